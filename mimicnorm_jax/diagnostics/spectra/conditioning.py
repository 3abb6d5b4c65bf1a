"""How well a kernel matrix is conditioned."""

import math
from typing import Any

import numpy as np


def condition_number(kernel: Any) -> float:
    """Largest over smallest eigenvalue of a symmetric matrix `(N, N)`, in its own precision; infinite if that is not
    positive."""
    values = np.linalg.eigvalsh(np.asarray(kernel))
    return float(values[-1] / values[0]) if values[0] > 0 else math.inf


def unit_diagonal(kernel: Any) -> np.ndarray:
    """`K_ij / sqrt(K_ii K_jj)` of kernels `(..., N, N)`."""
    kernel = np.asarray(kernel)
    scale = np.sqrt(np.diagonal(kernel, axis1=-2, axis2=-1))
    return kernel / (scale[..., :, None] * scale[..., None, :])
