"""What wide networks predict, from any kernel: as Gaussian processes, and along gradient flow."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg

from mimicnorm_jax.diagnostics.regression.matrices import TrainingKernel, as_matrix, as_targets
from mimicnorm_jax.diagnostics.regression.ridge import ridge_regression


@dataclass(frozen=True)
class GaussianProcess:
    """A posterior at M inputs.

    Attributes:
      mean: `(M, C)`; `(M, O)` for a kernel of all pairs of outputs.
      covariance: of the function, without noise, `(M, M)`, or `(M O, M O)`; one for all columns of targets.
    """

    mean: np.ndarray
    covariance: np.ndarray


def gaussian_process(train: Any, cross: Any, test: Any, targets: Any, noise: float) -> GaussianProcess:
    r"""The posterior of a Gaussian process with prior covariance K: $K_{*X} (K_{XX} + \sigma^2)^{-1} Y$.

    With the NNGP kernel it is Bayesian inference with an infinitely wide network (Lee et al. 2018).

    Args:
      train: the kernel of the N training examples, `(N, N)` or `(N, N, O, O)`.
      cross: of M inputs with them, `(M, N)` or `(M, N, O, O)`.
      test: of these inputs, `(M, M)` or `(M, M, O, O)`.
      targets: `(N, C)`, `(N,)` or `(N, O)`.
      noise: the targets' variance $\sigma^2$, at least 0.

    Raises:
      ValueError: as `ridge_regression`.

    Example:
      >>> found = gaussian_process([[1.0]], [[0.5]], [[1.0]], [2.0], 0.0)
      >>> found.mean.tolist(), found.covariance.tolist()
      ([[1.0]], [[0.75]])
    """
    fit = ridge_regression(train, targets, noise)
    mean, between, prior = fit.predict(cross), as_matrix(cross, "cross"), as_matrix(test, "test")
    if prior.shape != (len(between), len(between)):
        raise ValueError(f"test has shape {np.shape(test)}, cross {np.shape(cross)}: test is of cross's first inputs")
    assert fit.factor is not None
    half = scipy.linalg.solve_triangular(fit.factor, between.T, trans=1)
    return GaussianProcess(mean, prior - half.T @ half)


def gradient_flow(
    train: Any, cross: Any, targets: Any, times: Any, *, start: tuple[Any, Any] | None = None
) -> np.ndarray:
    r"""Predictions of a network of constant tangent kernel along gradient flow on $\frac12 \sum_n |f(x_n) - y_n|^2$.

    $f_t(x) = f_0(x) + \Theta(x, X) \Theta^{-1} (1 - e^{-\Theta t}) (Y - f_0(X))$ (Jacot et al. 2018; Lee et al. 2019),
    with $\Theta^{-1} (1 - e^{-\Theta t})$ evaluated as a whole, which small eigenvalues do not spoil.

    Args:
      train: $\Theta(X, X)$, `(N, N)` or `(N, N, O, O)`.
      cross: $\Theta(x, X)$, `(M, N)` or `(M, N, O, O)`; `train` for the training examples themselves.
      targets: `(N, C)`, `(N,)` or `(N, O)`.
      times: of the flow, `(T,)`, at least 0: learning rate times steps; for a loss that is a mean over the N examples
        that over N. Infinity is the end of training.
      start: the network's first outputs, at the M inputs and at the training examples; by default 0.

    Returns:
      `(T, M, C)`, or `(T, M, O)`, in float64.

    Raises:
      ValueError: for times below 0, or so large that they count on eigenvalues that are the kernel's rounding.

    Example:
      >>> gradient_flow([[2.0]], [[1.0]], [4.0], [0.0, np.inf]).ravel().tolist()
      [0.0, 2.0]
    """
    known, between = TrainingKernel.of(train), as_matrix(cross, "cross")
    y = as_targets(targets, len(known.matrix), known.outputs)
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or not (times >= 0).all():
        raise ValueError(f"times are {times}: numbers of at least 0, (T,)")
    first = np.zeros((len(between), y.shape[1]))
    if start is not None:
        first = as_targets(start[0], len(between), known.outputs)
        y = y - as_targets(start[1], len(y), known.outputs)
    if between.shape[1] != len(y) or first.shape[1] != y.shape[1]:
        raise ValueError(f"cross has shape {np.shape(cross)} and targets {np.shape(targets)}: they are (M, N), (N, C)")
    values, vectors = known.eigh()
    noise = known.noise(values[-1])
    if values[0] <= noise and not times.max(initial=0.0) * noise <= 1:
        raise ValueError(
            f"until time {times.max():.3g} eigenvalues below {noise:.2g} count, which are this kernel's rounding (the "
            f"largest is {values[-1]:.2g}): stop by {1 / noise:.2g}, or compute the kernel in float64"
        )
    seen, onto = vectors.T @ y, between @ vectors
    rates = [_rate(np.maximum(values, 0.0), time) for time in times]
    found = (
        np.stack([first + onto @ (rate[:, None] * seen) for rate in rates]) if rates else np.zeros((0, *first.shape))
    )
    return found if known.outputs is None else found.reshape(len(times), -1, known.outputs)


def _rate(values: np.ndarray, time: float) -> np.ndarray:
    r"""$(1 - e^{-\lambda t}) / \lambda$, which is t where $\lambda$ is 0."""
    if np.isinf(time):
        return 1 / values
    safe = np.where(values > 0, values, 1.0)
    return np.where(values > 0, -np.expm1(-safe * time) / safe, time)
