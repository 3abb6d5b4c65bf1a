r"""Kernel ridge regression and classification, exact: $\alpha = (K + \lambda I)^{-1} Y$, $f(x) = K(x, X) \alpha$."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from mimicnorm_jax.diagnostics.regression.matrices import TrainingKernel, as_matrix, as_targets
from mimicnorm_jax.diagnostics.spectra.operators import LinearOperator

CANDIDATES = 97
"""Ridges that cross-validation compares by default, evenly spaced in their logarithm."""


@dataclass(frozen=True)
class GCV:
    """Generalized cross-validation (Golub, Heath & Wahba 1979).

    Attributes:
      ridges: compared, ascending, `(R,)`.
      scores: mean squared error that it estimates for each, `(R,)`.
      ridge: the one of the lowest score.
    """

    ridges: np.ndarray
    scores: np.ndarray
    ridge: float

    @property
    def at_end(self) -> bool:
        """Whether the best is the first or the last compared: there may be a better one beyond."""
        return self.ridge in (self.ridges[0], self.ridges[-1])


@dataclass(frozen=True)
class RidgeFit:
    r"""A kernel regression.

    Attributes:
      coefficients: `(N, C)` in float64; `(N O, 1)` for a kernel of all pairs of outputs.
      ridge: the one used.
      residual: of the equations, relative to the targets.
      outputs: O of a kernel of all pairs of outputs, else None.
      gcv: how the ridge was chosen, if it was.
      num_matvecs: products with the kernel, by conjugate gradients; 0 if solved by Cholesky.
      factor: the upper triangular Cholesky factor R of $K + \lambda I = R^\top R$, zero below the diagonal, in float64;
        None if solved by conjugate gradients.
    """

    coefficients: np.ndarray
    ridge: float
    residual: float
    outputs: int | None = None
    gcv: GCV | None = None
    num_matvecs: int = 0
    factor: np.ndarray | None = None

    def predict(self, cross: Any) -> np.ndarray:
        """Predictions for other inputs.

        Args:
          cross: the kernel of M inputs with the training examples: `(M, N)`, `(M, N, O, O)`, or a `LinearOperator`.

        Returns:
          `(M, C)` in float64, or `(M, O)` for a kernel of all pairs of outputs.

        Raises:
          ValueError: for a kernel with another number of training examples.
        """
        rows = len(self.coefficients)
        if isinstance(cross, LinearOperator):
            if cross.inputs != rows:
                raise ValueError(f"the operator has {cross.inputs} columns; the training kernel has {rows} rows")
            columns = [np.asarray(cross.matvec(column.astype(cross.dtype))) for column in self.coefficients.T]
            found = np.stack(columns, 1).astype(np.float64)
        else:
            matrix = as_matrix(cross, "cross")
            if matrix.shape[1] != rows:
                raise ValueError(
                    f"cross has shape {np.shape(cross)}; it is (M, N), new inputs by the {rows} training examples"
                )
            found = matrix @ self.coefficients
        return found if self.outputs is None else found.reshape(-1, self.outputs)

    def classify(self, cross: Any) -> np.ndarray:
        """The class of the largest prediction, `(M,)`.

        Args:
          cross: as in `predict`.

        Raises:
          ValueError: as `predict`, and where there is one prediction for each input.
        """
        predictions = self.predict(cross)
        if predictions.shape[1] == 1:
            raise ValueError(
                "one prediction for each input has no largest class: give targets of a column a class "
                "(`class_targets`), or look at the sign of predict()"
            )
        return predictions.argmax(1)


def ridge_regression(kernel: Any, targets: Any, ridge: float | None = None, *, precision: Any = None) -> RidgeFit:
    r"""Solves $(K + \lambda I) \alpha = Y$ by Cholesky in float64.

    Of a network that does not start at 0, subtract its first outputs from the targets, and add them to predictions.

    Args:
      kernel: of the N training examples, `(N, N)`, or `(N, N, O, O)` of all pairs of outputs.
      targets: `(N, C)` or `(N,)`; `(N, O)` for a kernel of all pairs of outputs. For labels see `class_targets`.
      ridge: $\lambda$, at least 0; None: chosen by `generalized_cross_validation`.
      precision: that the kernel was computed in, if that is coarser than its type.

    Raises:
      ValueError: for a kernel that is not symmetric or finite, for targets of another shape, or if the kernel's own
        precision does not tell the solution: K + ridge is conditioned worse than what it was computed in allows.

    Example:
      >>> fit = ridge_regression(np.eye(2), np.array([2.0, 4.0]), ridge=1.0)
      >>> fit.predict(np.ones((1, 2))).round(6).tolist()
      [[3.0]]
    """
    known = TrainingKernel.of(kernel, precision)
    y = as_targets(targets, len(known.matrix), known.outputs)
    gcv = None if ridge is not None else _search(known, y, None)
    chosen = gcv.ridge if gcv is not None else float(ridge or 0.0)
    _require_conditioned(known, chosen)
    shifted = known.matrix + chosen * np.eye(len(y))
    try:
        factor = scipy.linalg.cholesky(shifted)
    except scipy.linalg.LinAlgError as error:
        raise ValueError(
            f"K + ridge is not positive definite with ridge {chosen:.3g}: the kernel is not positive semidefinite"
        ) from error
    coefficients = scipy.linalg.cho_solve((factor, False), y)
    residual = float(np.linalg.norm(shifted @ coefficients - y) / max(np.linalg.norm(y), np.finfo(float).tiny))
    return RidgeFit(coefficients, chosen, residual, known.outputs, gcv, factor=factor)


def generalized_cross_validation(kernel: Any, targets: Any, ridges: Any = None, *, precision: Any = None) -> GCV:
    r"""Compares ridges by $N^{-1} |(I - A) Y|^2 / (N^{-1} tr(I - A))^2$ with $A = K (K + \lambda I)^{-1}$.

    One eigendecomposition serves all ridges. Several columns of targets share one: their errors are added up.

    Args:
      kernel, targets, precision: of `ridge_regression`.
      ridges: to compare, above 0; by default from the smallest that the kernel's precision allows to its largest
        eigenvalue.

    Raises:
      ValueError: as `ridge_regression`, or for ridges that are not above 0.
    """
    known = TrainingKernel.of(kernel, precision)
    return _search(known, as_targets(targets, len(known.matrix), known.outputs), ridges)


def _search(known: TrainingKernel, y: np.ndarray, ridges: Any) -> GCV:
    values, vectors = known.eigh()
    if not values[-1] > 0:
        raise ValueError("the kernel is zero: no ridge makes a difference")
    low = known.noise(values[-1]) - min(float(values[0]), 0.0)
    given = (
        np.geomspace(low, max(low, values[-1]), CANDIDATES)
        if ridges is None
        else np.sort(np.asarray(ridges, np.float64))
    )
    if given.ndim != 1 or not given.size or not (given > 0).all():
        raise ValueError(f"ridges are {ridges}: they are numbers above 0, (R,)")
    _require_ridge(known, float(given[0]), values)
    power = ((vectors.T @ y) ** 2).sum(1)
    left = given[:, None] / (given[:, None] + np.maximum(values, 0.0)[None, :])  # eigenvalues of I - A
    scores = len(y) * (left**2 @ power) / (left.sum(1) ** 2 * y.shape[1])
    return GCV(given, scores, float(given[np.argmin(scores)]))


def _require_conditioned(known: TrainingKernel, ridge: float) -> None:
    if not 0 <= ridge < np.inf:
        raise ValueError(f"ridge is {ridge}: it is a finite number of at least 0")
    # The largest eigenvalue is at most the largest row sum, so that most ridges cost no eigenvalue to be allowed.
    # Twice that, for the smallest is below 0 by rounding.
    if ridge < 2 * known.noise(np.abs(known.matrix).sum(1).max()):
        _require_ridge(known, ridge, scipy.linalg.eigvalsh(known.matrix))


def _require_ridge(known: TrainingKernel, ridge: float, values: np.ndarray) -> None:
    """Raises ValueError for a ridge that leaves some of the kernel's eigenvalues, ascending, below rounding."""
    noise = known.noise(values[-1])
    # Half of it, for routines find eigenvalues that differ by float64's rounding, and a ridge said here is to be taken.
    if ridge + values[0] < noise / 2:
        raise ValueError(
            f"with ridge {ridge:.3g} the solution is made of this kernel's rounding, which tells condition numbers up "
            f"to {known.limit:.1g}: take a ridge of at least {1.005 * (noise - values[0]):.3g}, or compute the kernel "
            "in float64 (jax.enable_x64, and parameters and inputs in float64)"
        )
