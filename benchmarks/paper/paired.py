"""Differences of two methods in pairs of runs with one seed, and what they leave open."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import stats

from benchmarks._results import Record

LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class Paired:
    """Differences by seed.

    Attributes:
      by_seed: the difference of the two runs with a seed; not empty.
      survived: whether all of them came to their end; what a stopped run counts as is no draw from a normal law.
    """

    by_seed: dict[int, float]
    survived: bool = True

    @property
    def mean(self) -> float:
        return statistics.mean(self.by_seed.values())

    @property
    def half_width(self) -> float | None:
        """Of the interval about the mean, by Student's t for normal differences; None where there is no interval."""
        pairs = len(self.by_seed)
        if self.no_interval:
            return None
        quantile = float(stats.t.ppf((1 + LEVEL) / 2, pairs - 1))
        return quantile * statistics.stdev(self.by_seed.values()) / math.sqrt(pairs)

    @property
    def no_interval(self) -> str:
        """Why there is none; empty where there is one."""
        if not self.survived:
            return "a run ended early"
        return "" if len(self.by_seed) > 1 else f"{self.seeds} only"

    @property
    def interval(self) -> tuple[float, float] | None:
        """Its ends."""
        half = self.half_width
        return None if half is None else (self.mean - half, self.mean + half)

    def __str__(self) -> str:
        return self.shown("+.2f")

    def shown(self, digits: str) -> str:
        """Mean and interval, or why there is none, in this format."""
        if self.interval is None:
            return f"{self.mean:{digits}} ({self.no_interval}: no interval)"
        low, high = self.interval
        return f"{self.mean:{digits}} [{low:{digits}}, {high:{digits}}]"

    @property
    def seeds(self) -> str:
        """Those of the pairs, for a reader."""
        return f"seed{'s' * (len(self.by_seed) > 1)} {', '.join(map(str, self.by_seed))}"


def paired(ours: Sequence[Record], theirs: Sequence[Record], value: Callable[[Record], float]) -> Paired | None:
    """`value` of our runs minus that of theirs, where both have a run with the same seed; None where none has.

    Args:
      ours, theirs: finished runs, at most one a seed.
      value: of a run.
    """
    other = {record["seed"]: record for record in theirs}
    pairs = {record["seed"]: (record, other[record["seed"]]) for record in ours if record["seed"] in other}
    if not pairs:
        return None
    by_seed = {seed: value(a) - value(b) for seed, (a, b) in sorted(pairs.items())}
    return Paired(by_seed, not any(record["ended"] for pair in pairs.values() for record in pair))
