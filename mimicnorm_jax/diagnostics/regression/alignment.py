"""How well a kernel's geometry agrees with the labels."""

from typing import Any

import numpy as np

from mimicnorm_jax.diagnostics.regression.matrices import TrainingKernel, as_targets

ROUNDING = 1e-12
"""What is left of targets without their means is nothing but that, in float64, at so small a share of the whole."""

_ROUNDED = 0.1
"""By the largest condition number that a type can tell, what rounding to it can make of a kernel's norm: 0.06, by half
an epsilon of each entry."""


def alignment(kernel: Any, targets: Any, *, centered: bool = False) -> float:
    r"""Alignment of a kernel with targets, $\langle K, Y Y^\top \rangle / (|K| |Y Y^\top|)$ in the Frobenius norm.

    Plain it is that of Cristianini et al. (2001). Centered, K and Y are first rid of their means over the examples
    (Cortes, Mohri & Rostamizadeh 2012; linear CKA): what all examples have in common then counts for nothing.

    Args:
      kernel: `(N, N)`.
      targets: `(N, C)` or `(N,)`; for labels see `class_targets`.
      centered: whether means are taken away.

    Returns:
      From 0 to 1; NaN where the kernel or the targets vanish, or nothing but rounding is left without their means.

    Raises:
      ValueError: for a kernel that is not finite and symmetric, or targets of another number of examples.

    Example:
      >>> y = np.array([1.0, -1.0])
      >>> alignment(np.outer(y, y), y), alignment(np.ones((2, 2)), y)
      (1.0, 0.0)
    """
    known = TrainingKernel.of(kernel)
    if known.outputs is not None:
        raise ValueError("the kernel is of all pairs of outputs, (N, N, O, O): take the trace or the pseudo-kernel")
    matrix, y = known.matrix, as_targets(targets, len(known.matrix), None)
    least = (_ROUNDED * np.linalg.norm(matrix) / known.limit, ROUNDING * np.linalg.norm(y))
    if centered:
        means = matrix.mean(0, keepdims=True)
        matrix, y = matrix - means - means.T + matrix.mean(), y - y.mean(0, keepdims=True)
    if not all(np.linalg.norm(left) > bound for left, bound in zip((matrix, y), least, strict=True)):
        return float("nan")
    return float((y * (matrix @ y)).sum() / (np.linalg.norm(matrix) * np.linalg.norm(y.T @ y)))
