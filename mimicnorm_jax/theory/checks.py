"""What `verify` reports: numbers held to an interval, numbers that are only shown, and the table of either."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Check:
    """One checked number.

    Attributes:
      name: of the quantity.
      setting: where it is measured.
      expected: by theory; None where theory only bounds it.
      low: smallest value that passes; None for no bound.
      high: largest value that passes; None for no bound.
      measured: the mean over networks, where there are several.
      standard_error: of that mean; None for a number without chance in it.
      passed: whether `measured` lies between `low` and `high`.
    """

    name: str
    setting: str
    expected: float | None
    low: float | None
    high: float | None
    measured: float
    standard_error: float | None
    passed: bool
    header: ClassVar[tuple[str, ...]] = ("quantity", "setting", "expected", "measured", "")

    def cells(self) -> tuple[str, ...]:
        """The check as text, in the order of `header`."""
        measured = _number(self.measured, self.standard_error)
        if self.expected is not None and self.high is not None:
            tolerance = self.high - self.expected
            digits = max(0, 1 - math.floor(math.log10(1.001 * tolerance)))
            expected = f"{self.expected:.{digits}f} ± {tolerance:.2g}"
            if self.standard_error is None:
                measured = f"{self.measured:.{digits}f}"
        elif self.low is not None and self.high is not None:
            expected = f"{self.low:g} to {self.high:g}"
        else:
            expected = f"< {self.high:g}" if self.high is not None else f"> {self.low:g}"
        return self.name, self.setting, expected, measured, "ok" if self.passed else "FAILED"


@dataclass(frozen=True)
class Observation:
    """One number that is shown and not asserted; attributes as in `Check`, and a remark on what to make of it."""

    name: str
    setting: str
    measured: float
    standard_error: float | None
    remark: str
    header: ClassVar[tuple[str, ...]] = ("not asserted", "setting", "measured", "remark")

    def cells(self) -> tuple[str, ...]:
        """The observation as text, in the order of `header`."""
        return self.name, self.setting, _number(self.measured, self.standard_error), self.remark


def expect_between(
    name: str,
    setting: str,
    samples: float | np.ndarray,
    low: float | None = None,
    high: float | None = None,
    expected: float | None = None,
) -> Check:
    """The check of a number, or of the mean of independent samples `(draws,)`, that must lie in an interval.

    Args:
      name, setting: what is checked, and of what.
      samples: a number, or `(draws,)`.
      low, high: the interval; None for no bound.
      expected: what theory says, to be shown.
    """
    measured, error = _mean(samples)
    passed = (low is None or low <= measured) and (high is None or measured <= high)
    return Check(name, setting, expected, low, high, measured, error, passed and math.isfinite(measured))


def expect_close(name: str, setting: str, samples: float | np.ndarray, expected: float, tolerance: float) -> Check:
    """The check of what must be `expected` up to an absolute tolerance; see `expect_between`.

    Args:
      name, setting: what is checked, and of what.
      samples: a number, or `(draws,)`.
      expected: what theory says.
      tolerance: absolute.
    """
    return expect_between(name, setting, samples, expected - tolerance, expected + tolerance, expected)


def observed(name: str, setting: str, samples: float | np.ndarray, remark: str) -> Observation:
    """The observation of a number, or of the mean of independent samples `(draws,)`."""
    return Observation(name, setting, *_mean(samples), remark)


def as_table(checks: Sequence[Check] | Sequence[Observation]) -> str:
    """Checks, or observations, under their header in aligned columns.

    Example:
      >>> slope = expect_close("slope", "n = 8", 1.52, 1.5, 0.1)
      >>> print(as_table([slope, expect_between("kappa", "n = 8", 3.0, high=1.2)]))
      quantity  setting  expected    measured
      slope     n = 8    1.50 ± 0.1  1.52      ok
      kappa     n = 8    < 1.2       3         FAILED
    """
    cells = [checks[0].header, *(check.cells() for check in checks)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def _mean(samples: float | np.ndarray) -> tuple[float, float | None]:
    values = np.atleast_1d(samples)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error


def _number(value: float, error: float | None) -> str:
    if error is None or not 0 < error < math.inf:
        return f"{value:.4g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"
