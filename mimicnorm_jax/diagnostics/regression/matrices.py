"""Kernels and targets as float64 matrices, and how small an eigenvalue or a ridge their precision lets one see."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from mimicnorm_jax.diagnostics.spectra.conditioning import largest_condition


def class_targets(labels: Any, num_classes: int) -> np.ndarray:
    """Labels as regression targets: one-hot less its mean 1/C, `(N, C)` float64 (Lee et al. 2020).

    Args:
      labels: `(N,)`.
      num_classes: C.

    Raises:
      ValueError: for labels that are not whole numbers from 0 to C - 1.

    Example:
      >>> class_targets([1, 0], 2).tolist()
      [[-0.5, 0.5], [0.5, -0.5]]
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {labels.dtype} of shape {labels.shape}: they are N whole numbers, (N,)")
    if labels.size and not (labels.min() >= 0 and labels.max() < num_classes):
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}: they are from 0 to {num_classes - 1}")
    return np.eye(num_classes)[labels] - 1 / num_classes


def as_matrix(kernel: Any, name: str = "kernel") -> np.ndarray:
    """A kernel `(N, M)`, or `(N, M, O, P)` of all pairs of outputs as `(N O, M P)`, in float64.

    Raises:
      ValueError: for another number of axes, or numbers that are not finite.
    """
    kernel = np.asarray(kernel)
    if kernel.ndim == 4:
        n, m, o, p = kernel.shape
        kernel = kernel.transpose(0, 2, 1, 3).reshape(n * o, m * p)
    if kernel.ndim != 2:
        raise ValueError(
            f"{name} has shape {kernel.shape}: it is (N, M), or (N, M, O, P) of all pairs of outputs; of each output "
            "with itself, (N, M, O), take one kernel[..., o] at a time"
        )
    if not np.isfinite(kernel).all():
        raise ValueError(f"{name} has entries that are infinite or not a number")
    return kernel.astype(np.float64)


def as_targets(targets: Any, rows: int, outputs: int | None) -> np.ndarray:
    """Targets `(rows, C)` in float64; `(N, O)` of a kernel of all pairs of outputs as one column.

    Raises:
      ValueError: unless they are finite numbers, one row for each of the kernel's.
    """
    targets = np.asarray(targets, np.float64)
    found = targets[:, None] if targets.ndim == 1 else targets
    if outputs is not None and targets.shape == (rows // outputs, outputs):
        found = targets.reshape(-1, 1)
    if found.ndim != 2 or len(found) != rows or (outputs is not None and found.shape[1] != 1):
        wanted = f"({rows}, C) or ({rows},)" if outputs is None else f"({rows // outputs}, {outputs})"
        raise ValueError(f"targets have shape {targets.shape}; for this kernel they are {wanted}")
    if not np.isfinite(found).all():
        raise ValueError("targets hold numbers that are infinite or not a number")
    return found


def _rounding(limit: float) -> float:
    """Share of the largest number that sums of rounded numbers may be off by; 16 roundings of bfloat16 at most."""
    return min(100 / limit, 1 / 8)


@dataclass(frozen=True)
class TrainingKernel:
    """A symmetric kernel of training examples with itself.

    Attributes:
      matrix: float64, `(D, D)`.
      outputs: O of a kernel `(N, N, O, O)`, whose D is N O; else None.
      limit: the largest condition number that the precision it was computed in can tell.
    """

    matrix: np.ndarray
    outputs: int | None
    limit: float

    @staticmethod
    def of(kernel: Any, precision: Any = None) -> "TrainingKernel":
        """Checks a kernel.

        Args:
          kernel: `(N, N)` or `(N, N, O, O)`.
          precision: that it was computed in, if that is coarser than its type: bfloat16, say.

        Raises:
          ValueError: unless it is finite and symmetric to the rounding of that precision.
        """
        given = np.asarray(kernel)
        floating = jnp.issubdtype(given.dtype, jnp.floating)
        kind = precision or (given.dtype if floating else np.float64)
        matrix, limit = as_matrix(given), largest_condition(kind)
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"the kernel of the training examples has shape {given.shape}: it is (N, N), a square")
        apart, scale = np.abs(matrix - matrix.T).max(initial=0.0), np.abs(matrix).max(initial=0.0)
        if apart > _rounding(limit) * scale:
            raise ValueError(
                f"the kernel is not symmetric: entries that should be equal are {apart:.2g} apart, of {scale:.2g}"
            )
        return TrainingKernel((matrix + matrix.T) / 2, given.shape[2] if given.ndim == 4 else None, limit)

    def eigh(self) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues, ascending, and eigenvectors.

        Raises:
          ValueError: for an eigenvalue that is negative by more than rounding.
        """
        values, vectors = scipy.linalg.eigh(self.matrix)
        if values[0] < -_rounding(self.limit) * abs(values[-1]):
            raise ValueError(
                f"the kernel has the eigenvalue {values[0]:.3g} (the largest is {values[-1]:.3g}): it is not positive "
                "semidefinite, and its precision does not explain that"
            )
        return values, vectors

    def noise(self, largest: float) -> float:
        """Eigenvalues below this are rounding, if the largest one is so large."""
        return largest / self.limit
