r"""Kernel regression without the kernel: conjugate gradients on products with vectors, preconditioned."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.regression.matrices import as_targets
from mimicnorm_jax.diagnostics.regression.ridge import RidgeFit
from mimicnorm_jax.diagnostics.spectra.operators import LinearOperator

CHECKED = 25
"""After so many products the recursion's residual is compared with the true one."""


def _products(operator: LinearOperator, columns: np.ndarray) -> np.ndarray:
    """The kernel times `(D, C)`, all columns in one sweep, in float64."""
    found = jax.vmap(operator.matvec, 1, 1)(jnp.asarray(columns, operator.dtype))
    return np.asarray(found, np.float64)


@dataclass(frozen=True)
class Nystrom:
    r"""The randomized Nyström preconditioner (Frangella, Tropp & Udell 2023).

    $P^{-1} = (\hat\lambda_r + \mu) U (\hat\Lambda + \mu)^{-1} U^\top + (I - U U^\top)$: where the first r eigenvalues
    are found, those of the preconditioned matrix differ by about $(\hat\lambda_r + \mu) / \mu$.

    Attributes:
      vectors: $U$, `(D, r)`.
      values: $\hat\Lambda$, descending, `(r,)`.
    """

    vectors: np.ndarray
    values: np.ndarray

    @staticmethod
    def of(operator: LinearOperator, rank: int, key: jax.Array) -> "Nystrom":
        """From `rank` products of the kernel with random vectors, all in one sweep.

        Raises:
          ValueError: unless the kernel is square and has at least `rank` rows, or if it is not positive semidefinite.
        """
        size = _size(operator)
        if not 1 <= rank <= size:
            raise ValueError(f"rank is {rank}: it is from 1 to the kernel's {size} rows")
        start, _ = np.linalg.qr(np.asarray(jax.random.normal(key, (size, rank)), np.float64))
        image = _products(operator, start)
        values, vectors = np.linalg.eigh((core := start.T @ image) / 2 + core.T / 2)
        noise = 10 * float(jnp.finfo(operator.dtype).eps) * size**0.5 * abs(values).max()
        if values[0] < -noise:
            raise ValueError(f"the kernel is not positive semidefinite: it takes a vector to {values[0]:.3g} of itself")
        kept = values > noise
        half = image @ (vectors[:, kept] / np.sqrt(values[kept]))
        left, singular, _ = np.linalg.svd(half, full_matrices=False)
        return Nystrom(left, singular**2)

    def solve(self, residual: np.ndarray, ridge: float) -> np.ndarray:
        """$P^{-1}$ times `(D, C)`.

        Args:
          residual: `(D, C)`.
          ridge: that P holds beside the kernel.
        """
        if not self.values.size:
            return residual
        seen = self.vectors.T @ residual
        scale = (self.values[-1] + ridge) / (self.values + ridge)
        return residual + self.vectors @ ((scale - 1)[:, None] * seen)


def conjugate_gradients(
    operator: LinearOperator,
    targets: Any,
    ridge: float,
    *,
    preconditioner: Nystrom | None = None,
    tolerance: float = 1e-4,
    max_matvecs: int = 500,
) -> RidgeFit:
    r"""Solves $(K + \lambda I) \alpha = Y$ by preconditioned conjugate gradients, all columns beside one another.

    Vectors and their inner products are in float64 on the host; products are in the operator's precision. What counts
    is the true residual, computed anew: where float32 products cannot bring it below the tolerance, that is an error.

    Args:
      operator: the kernel, such as `ntk_operator(apply_fn, params, x, batch=...)`, of D rows.
      targets: `(D, C)`, or `(D,)`; `(N, O)` for a kernel of all pairs of outputs, of D = N O rows, as `ntk_operator`
        has them: predictions are `(M, O)` then.
      ridge: $\lambda$, at least 0. There is no GCV without eigenvalues: choose it on a subset, and scale it by the
        number of examples.
      preconditioner: see `Nystrom`.
      tolerance: of each column's residual, relative to its targets.
      max_matvecs: at most so many products, each of all columns.

    Raises:
      ValueError: if it does not converge, with the residual and why; or for what cannot be solved.

    Example:
      >>> operator = LinearOperator(lambda v: 3 * v, lambda v: 3 * v, 2, 2, jnp.float32)
      >>> conjugate_gradients(operator, np.array([2.0, 4.0]), 1.0).coefficients.tolist()
      [[0.5], [1.0]]
    """
    size, shape = _size(operator), np.shape(targets)
    outputs = shape[1] if len(shape) == 2 and shape[0] != size == shape[0] * shape[1] else None
    y = as_targets(targets, size, outputs)
    if not 0 <= ridge < np.inf or not 0 < tolerance < 1 or max_matvecs < 2:
        raise ValueError(
            f"ridge is {ridge}, tolerance {tolerance} and max_matvecs {max_matvecs}: they are at least 0, "
            "between 0 and 1, and at least 2"
        )
    scale = np.maximum(np.linalg.norm(y, axis=0), np.finfo(float).tiny)
    system = _System(operator, ridge, preconditioner, tolerance * scale, max_matvecs)
    solution, residual = np.zeros_like(y), y.copy()
    before = np.inf
    while not (np.linalg.norm(residual, axis=0) <= tolerance * scale).all():
        worst = float((np.linalg.norm(residual, axis=0) / scale).max())
        if system.num_matvecs >= max_matvecs:
            raise ValueError(
                f"conjugate gradients are at a relative residual of {worst:.2g} after {system.num_matvecs} products, "
                f"tolerance {tolerance:.2g}: raise max_matvecs, the ridge, the rank of a Nystrom preconditioner, or "
                f"the precision of the products, which is {np.dtype(operator.dtype)}"
            )
        if not worst < before / 2:
            raise ValueError(
                f"conjugate gradients stay at a relative residual of {worst:.2g}, above the tolerance {tolerance:.2g}: "
                f"that is what products in {np.dtype(operator.dtype)} tell of this kernel with ridge {ridge:.3g}. "
                "Raise the ridge or the tolerance, or compute in float64 (jax.enable_x64)"
            )
        before = worst
        solution = solution + system.improve(residual)
        residual = y - system.apply(solution)
    final = float((np.linalg.norm(residual, axis=0) / scale).max(initial=0.0))
    return RidgeFit(solution, ridge, final, outputs, num_matvecs=system.num_matvecs)


@dataclass
class _System:
    operator: LinearOperator
    ridge: float
    preconditioner: Nystrom | None
    enough: np.ndarray
    max_matvecs: int
    num_matvecs: int = 0

    def apply(self, columns: np.ndarray) -> np.ndarray:
        self.num_matvecs += 1
        found = _products(self.operator, columns) + self.ridge * columns
        if not np.isfinite(found).all():
            raise ValueError("a product with the kernel is not finite: look for NaN or overflow in params and inputs")
        return found

    def _solve(self, residual: np.ndarray) -> np.ndarray:
        return residual if self.preconditioner is None else self.preconditioner.solve(residual, self.ridge)

    def improve(self, residual: np.ndarray) -> np.ndarray:
        """One run of the recursion from zero, until its own residual is small; leaves a product for the true one."""
        target, solution = residual, np.zeros_like(residual)
        direction = z = self._solve(residual)
        power = (residual * z).sum(0)
        while self.num_matvecs < self.max_matvecs - 1:
            image = self.apply(direction)
            curvature = (direction * image).sum(0)
            active = (power > 0) & (curvature > 0) & (np.linalg.norm(residual, axis=0) > self.enough / 2)
            step = np.where(active, power / np.where(active, curvature, 1), 0)
            solution, residual = solution + step * direction, residual - step * image
            done = not active.any() or (np.linalg.norm(residual, axis=0) <= self.enough / 2).all()
            checked = self.num_matvecs % CHECKED == 0 and self.num_matvecs < self.max_matvecs - 1
            if done or (checked and self._drifted(target, solution, residual)):
                break
            z = self._solve(residual)
            now = (residual * z).sum(0)
            direction = z + np.where(active, now / np.where(active, power, 1), 0) * direction
            power = now
        return solution

    def _drifted(self, target: np.ndarray, solution: np.ndarray, residual: np.ndarray) -> bool:
        """Whether the recursion's residual is no longer the true one, because of the products' rounding."""
        true = np.linalg.norm(target - self.apply(solution), axis=0)
        return bool((abs(true - np.linalg.norm(residual, axis=0)) > np.maximum(true / 2, self.enough)).any())


def _size(operator: LinearOperator) -> int:
    if operator.inputs != operator.outputs:
        raise ValueError(f"the operator has shape {operator.shape}: a kernel of training examples is square")
    return operator.inputs
