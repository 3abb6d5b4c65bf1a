"""In which regime a network is: the condition of its tangent kernel, and how perturbations grow."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.ntk.empirical import EmpiricalNTK
from mimicnorm_jax.diagnostics.propagation.growth import Growth, perturbation_growth
from mimicnorm_jax.diagnostics.spectra.conditioning import FLOAT32_LIMIT, condition_number, unit_diagonal
from mimicnorm_jax.diagnostics.tracing.layers import View
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn


@dataclass(frozen=True)
class Regime:
    """What tells the chaotic from the ordered regime.

    Attributes:
      kappa: condition number of the tangent kernel; infinite if it is singular to rounding.
      kappa_unit_diagonal: that of the kernel scaled to a unit diagonal.
      growth: of a perturbation's mean square against the signal's, from the first layer to the last on which neither
        vanishes; from the second where examples influence one another, since BatchNorm takes the perturbation's mean
        away at the first.
      chi: the same per layer, a geometric mean; above 1 is chaotic.
      chi_error: its standard error over the examples and tangents.
      layers: how many there are.
      precision: of the kernel.
    """

    kappa: float
    kappa_unit_diagonal: float
    growth: float
    chi: float
    chi_error: float
    layers: int
    precision: str


def describe_condition(kappa: float, precision: Any) -> str:
    """A condition number as far as its precision tells it.

    Args:
      kappa: the condition number.
      precision: in which it was computed.

    Example:
      >>> describe_condition(12.34, "float32"), describe_condition(3e7, "float32")
      ('12.34', '>= 1e6 (float32 tells no more; use float64)')
    """
    if jnp.finfo(precision).bits <= 32 and not kappa < FLOAT32_LIMIT:
        return f">= 1e6 ({precision} tells no more; use float64)"
    return "singular" if not np.isfinite(kappa) else f"{kappa:.4g}"


def measured_layers(grown: Growth, batch_coupled: bool) -> np.ndarray:
    """Indices of the layers between which growth is counted; see `Regime.growth`.

    Args:
      grown: what was measured, by layer `(L,)`.
      batch_coupled: whether the network couples its batch.

    Raises:
      ValueError: if there are fewer than two.
    """
    # A layer on which signal or tangent vanish, such as a classifier that starts at zero, has no ratio.
    seen = np.flatnonzero(np.isfinite(grown.log_ratios).all(0))[1 if batch_coupled else 0 :]
    if len(seen) < 2:
        raise ValueError("growth needs two layers on which neither the signal nor the perturbation vanishes")
    return seen


class RegimeMeter:
    """Measures `Regime`; compiles once for a network and a number of examples.

    Args:
      apply_fn: the network.
      batch_coupled: see `diagnostics`.
      output: the one whose kernel is taken; in wide networks at initialization all outputs' are alike.
      memory: for the kernel.
    """

    def __init__(self, apply_fn: ApplyFn, *, batch_coupled: bool = False, output: int = 0, memory: int = 2**32) -> None:
        self.apply_fn, self.batch_coupled = apply_fn, batch_coupled
        self.kernel = EmpiricalNTK(apply_fn, output=output, batch_coupled=batch_coupled, memory=memory)

    def __call__(self, params: Any, x: jax.Array, key: jax.Array) -> Regime:
        """Measures the network at these parameters on inputs `(N, ...)`; `key` draws the tangents."""
        kernel = np.asarray(self.kernel(params, x))
        grown = perturbation_growth(self.apply_fn, params, x, View(batch_coupled=self.batch_coupled), key=key)
        seen = measured_layers(grown, self.batch_coupled)
        chi, error = grown.rate(grown.names[seen[0]], grown.names[seen[-1]])
        return Regime(
            kappa=condition_number(kernel),
            kappa_unit_diagonal=condition_number(unit_diagonal(kernel)),
            growth=float(np.exp((grown.log_ratios[:, seen[-1]] - grown.log_ratios[:, seen[0]]).mean())),
            chi=chi,
            chi_error=error,
            layers=len(grown.names),
            precision=str(kernel.dtype),
        )
