"""What `diagnose depth` prints of infinitely wide MLPs."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics import condition_number
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.theory import PLAIN, WEIGHT_MEAN, batch_norm_chi, padded
from mimicnorm_jax.utils.console import log_line


def report(inputs: int, rho: float, depths: Sequence[int]) -> dict[str, Any]:
    """Prints correlations and condition numbers of tangent kernels by depth.

    Args:
      inputs: how many.
      rho: the correlation of any two.
      depths: of the MLPs.

    Returns:
      The same by MLP.

    Raises:
      UserError: if no inputs are correlated so.
    """
    if inputs < 2:
        raise UserError(f"--inputs is {inputs}: it must be at least 2, that there is a correlation")
    if not -1 / (inputs - 1) <= rho <= 1:
        raise UserError(f"--rho is {rho:g}: {inputs} inputs have correlations from -1/{inputs - 1} to 1")
    mlps = {
        "plain (He)": PLAIN,
        "weight mean": WEIGHT_MEAN,
        "weight mean, 6/9 of taps valid": padded(6 / 9),
        "weight mean, 4/9 of taps valid": padded(4 / 9),
    }
    with jax.enable_x64(True):
        gram = (1 - rho) * jnp.eye(inputs) + rho
        found: dict[str, Any] = {}
        for name, mlp in mlps.items():
            kernels = {depth: mlp.kernels(gram, depth) for depth in depths}
            found[name] = {
                "chi": mlp.chi(),
                "fixed_correlation": mlp.fixed_correlation(),
                "depth_scale": mlp.depth_scale(),
                "correlation": {d: float(k[0, 1] / k[0, 0]) for d, (k, _) in kernels.items()},
                "kappa": {d: condition_number(ntk) for d, (_, ntk) in kernels.items()},
            }
    head = f"{inputs} inputs of correlation {rho:g}; correlation | condition number by depth"
    log_line(f"{head}\n{'':32}{'chi':>7}{'rho*':>7}" + "".join(f"{d:>16}" for d in depths))
    for name, row in found.items():
        cells = "".join(f"{row['correlation'][d]:>8.4f}{row['kappa'][d]:>8.3f}" for d in depths)
        log_line(f"{name:32}{row['chi']:>7.3f}{row['fixed_correlation']:>7.3f}{cells}")
    batches = (8, 16, 32, 64)
    log_line("BatchNorm's chi at batch " + ", ".join(f"{b}: {batch_norm_chi(b):.3f}" for b in batches))
    return found
