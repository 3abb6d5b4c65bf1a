"""How well a kernel matrix is conditioned."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

FLOAT32_LIMIT = 1e6
"""A float32 Gram matrix tells its condition number to 10-30 % up to here; beyond it is rounding."""


def largest_condition(precision: Any) -> float:
    """The largest condition number that a Gram matrix of this precision tells: `FLOAT32_LIMIT`, by its rounding.

    Example:
      >>> largest_condition("float32"), f"{largest_condition('float64'):.1g}"
      (1000000.0, '5e+14')
    """
    return FLOAT32_LIMIT * float(jnp.finfo(jnp.float32).eps) / float(jnp.finfo(precision).eps)


def condition_number(kernel: Any) -> float:
    """Largest over smallest eigenvalue of a symmetric matrix `(N, N)`, in its own precision; infinite if that is not
    positive, or the matrix not finite."""
    kernel = np.asarray(kernel)
    if not np.isfinite(kernel).all():
        return math.inf
    values = np.linalg.eigvalsh(kernel)
    return float(values[-1] / values[0]) if values[0] > 0 else math.inf


def unit_diagonal(kernel: Any) -> np.ndarray:
    """`K_ij / sqrt(K_ii K_jj)` of kernels `(..., N, N)`."""
    kernel = np.asarray(kernel)
    scale = np.sqrt(np.diagonal(kernel, axis1=-2, axis2=-1))
    return kernel / (scale[..., :, None] * scale[..., None, :])
