r"""Jacobians of a network, from its inputs or a layer to a later layer or its outputs, and their singular values.

A layer stands for its product of activations with a kernel (the pre-activation, before a bias is added). Examples are
taken one by one, so a network with BatchNorm has to be in its evaluation mode. `singular_values` forms the matrices;
`mean_square`, `largest` and `density` only multiply with them, for all examples at once. All are in the precision of
inputs and parameters.

There is no condition number here: the small singular values of a deep network's Jacobian are below rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.spectra import lanczos
from mimicnorm_jax.diagnostics.spectra.operators import WHOLE, Ends, LinearOperator, per_example
from mimicnorm_jax.diagnostics.tracing.jaxprs import coarsest
from mimicnorm_jax.diagnostics.tracing.layers import check_num_samples, prepared
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn

MAX_ENTRIES = 2**22
"""The largest Jacobian of one example that is formed: 2048 by 2048."""
_AT_A_TIME = 256  # Products with unit vectors that are evaluated together.


@dataclass(frozen=True)
class Estimate:
    """Means over random samples and their standard errors, both `(N,)`."""

    mean: jax.Array
    standard_error: jax.Array


@dataclass(frozen=True)
class Density:
    r"""Spectral density of log squared singular values, averaged over examples: $\sum_k w_k \delta(t - t_k)$.

    Of min(inputs, outputs) singular values for each example. A weighted histogram, or a sum of Gaussians, shows it.

    Attributes:
      log_squares: points $t_k$, ascending, natural logarithm of squared singular values.
      weights: of the points.
      vanishing: weight of singular values at or below rounding, which have no logarithm to speak of; 1 with `weights`.
    """

    log_squares: np.ndarray
    weights: np.ndarray
    vanishing: float


@dataclass(frozen=True)
class Quadrature:
    """How finely a spectrum is resolved by stochastic Lanczos quadrature.

    Attributes:
      num_samples: start vectors per example, at least 1.
      num_matvecs: products with the Jacobian and its transpose per sample, at least 1.

    Raises:
      ValueError: for fewer.
    """

    num_samples: int = 4
    num_matvecs: int = 40

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_matvecs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


QUADRATURE = Quadrature()


@dataclass(frozen=True)
class _Form:
    """Writes a Jacobian out, or only its singular values."""

    values_only: bool
    one_by_one: bool = True

    def __call__(self, jacobian: LinearOperator, _: jax.Array) -> jax.Array:
        rows, columns = jacobian.outputs, jacobian.inputs
        if rows * columns > MAX_ENTRIES:
            raise ValueError(
                f"the Jacobian of one example is {rows} by {columns}, more than the {MAX_ENTRIES} entries "
                "(jacobian.MAX_ENTRIES) that are formed: use mean_square, largest or density, which only multiply with "
                "it, or a source and target with fewer units"
            )
        wide = rows <= columns
        units = jnp.eye(jacobian.side, dtype=jacobian.dtype)
        matvec = jacobian.rmatvec if wide else jacobian.matvec
        matrix = jax.lax.map(matvec, units, batch_size=min(_AT_A_TIME, jacobian.side))
        matrix = matrix if wide else matrix.T
        return jnp.linalg.svd(matrix, compute_uv=False) if self.values_only else matrix


@dataclass(frozen=True)
class _MeanSquares:
    """The mean square of each random vector's image, `(S,)`."""

    num_samples: int
    one_by_one: bool = False

    def __call__(self, jacobian: LinearOperator, key: jax.Array) -> jax.Array:
        samples = jax.random.rademacher(key, (self.num_samples, jacobian.inputs), jacobian.dtype)
        return mean_squares(jacobian.matvec, samples)


@dataclass(frozen=True)
class _Largest:
    search: lanczos.Search
    one_by_one: bool = False

    def __call__(self, jacobian: LinearOperator, key: jax.Array) -> lanczos.Eigenvalues:
        start = jax.random.normal(key, (jacobian.side,), jacobian.dtype)
        return lanczos.largest(jacobian.gram_matvec, start, self.search)


@dataclass(frozen=True)
class _Density:
    quadrature: Quadrature
    one_by_one: bool = False

    def __call__(self, jacobian: LinearOperator, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        starts = jax.random.rademacher(key, (self.quadrature.num_samples, jacobian.side), jacobian.dtype)
        num_matvecs = self.quadrature.num_matvecs
        return jax.lax.map(lambda v: lanczos.quadrature(jacobian.gram_matvec, v, num_matvecs), starts)


def mean_squares(matvec: Callable[[jax.Array], jax.Array], samples: jax.Array) -> jax.Array:
    """Mean square of the image of each vector `(S, inputs)` under a linear operator, `(S,)`.

    Args:
      matvec: the operator.
      samples: the vectors, `(S, inputs)`.
    """
    return jax.lax.map(lambda v: jnp.mean(matvec(v) ** 2), samples)


def _formed(values_only: bool, apply_fn: ApplyFn, params: Any, x: jax.Array, ends: Ends) -> jax.Array:
    key = jax.random.key(0)  # No use is made of it.
    return per_example(_Form(values_only), apply_fn, params, x, key, ends)


def jacobians(apply_fn: ApplyFn, params: Any, x: jax.Array, ends: Ends = WHOLE) -> jax.Array:
    """The Jacobian of each example, written out.

    Args:
      apply_fn: the network; its examples are independent.
      params: its parameters.
      x: inputs, `(N, ...)`.
      ends: what is differentiated, and by what.

    Returns:
      `(N, outputs, inputs)`, over flattened units.

    Raises:
      ValueError: for an unknown layer, a source that is not before the target, a matrix above `MAX_ENTRIES`, or
        outputs that are not finite.

    Example:
      >>> def apply_fn(params, x):
      ...     return jax.nn.relu(x @ params["first"]) @ params["last"]
      >>> params = {"first": jnp.eye(2), "last": jnp.array([[2.0], [3.0]])}
      >>> jacobians(apply_fn, params, jnp.array([[1.0, -1.0]])).tolist()
      [[[2.0, 0.0]]]
    """
    return _formed(False, apply_fn, params, x, ends)


def singular_values(apply_fn: ApplyFn, params: Any, x: jax.Array, ends: Ends = WHOLE) -> jax.Array:
    """All singular values of each example's Jacobian; arguments and errors as in `jacobians`.

    Args:
      apply_fn, params, x, ends: as in `jacobians`.

    Returns:
      `(N, min(outputs, inputs))`, descending.
    """
    return _formed(True, apply_fn, params, x, ends)


def mean_square(
    apply_fn: ApplyFn,
    params: Any,
    x: jax.Array,
    ends: Ends = WHOLE,
    *,
    key: jax.Array,
    num_samples: int = 64,
) -> Estimate:
    r"""Sum of squared singular values **over the number of outputs**, $|J|_F^2 / n_{out}$, by Hutchinson's estimator.

    This is the growth of the mean square of a random tangent. It is the mean of the squared singular values where
    there are as many inputs as outputs; multiply by outputs / inputs for the mean over the inputs.

    Args:
      apply_fn: the network; its examples are independent.
      params: its parameters.
      x: inputs, `(N, ...)`.
      ends: what is differentiated, and by what.
      key: for the samples, vectors of random signs.
      num_samples: at least 2; one product with the Jacobian each.

    Returns:
      Per example.

    Raises:
      ValueError: as `jacobians`, whatever the size of the matrix, and if `num_samples < 2`.
    """
    check_num_samples(num_samples)
    squares = per_example(_MeanSquares(num_samples), apply_fn, params, x, key, ends)
    return Estimate(squares.mean(1), squares.std(1, ddof=1) / np.sqrt(num_samples))


def largest(
    apply_fn: ApplyFn,
    params: Any,
    x: jax.Array,
    ends: Ends = WHOLE,
    *,
    key: jax.Array,
    search: lanczos.Search = lanczos.LARGEST,
) -> lanczos.Eigenvalues:
    """The largest **squared** singular values of each example's Jacobian, by Lanczos' method.

    Args:
      apply_fn: the network; its examples are independent.
      params: its parameters.
      x: inputs, `(N, ...)`.
      ends: what is differentiated, and by what.
      key: for the start vector.
      search: how many, and when to stop; each product is one with the Jacobian and one with its transpose.

    Returns:
      `(N, count)` values and residuals; see `converged`.

    Raises:
      ValueError: as `jacobians`, whatever the size of the matrix, and for a search that is none.
    """
    return per_example(_Largest(search), apply_fn, params, x, key, ends)


def density(
    apply_fn: ApplyFn,
    params: Any,
    x: jax.Array,
    ends: Ends = WHOLE,
    *,
    key: jax.Array,
    quadrature: Quadrature = QUADRATURE,
) -> Density:
    """Spectral density of the log squared singular values by stochastic Lanczos quadrature.

    Ubaru, Chen & Saad (2017). Resolves about `quadrature.num_matvecs` points of the spectrum per example and
    sample.

    Args:
      apply_fn: the network; its examples are independent.
      params: its parameters.
      x: inputs, `(N, ...)`.
      ends: as in `jacobians`.
      key: for the samples, vectors of random signs.
      quadrature: how finely.

    Raises:
      ValueError: as `jacobians`, whatever the size of the matrix.
    """
    apply_fn, params, x = prepared(apply_fn, params, x)
    nodes, weights = per_example(_Density(quadrature), apply_fn, params, x, key, ends)
    weights = weights / (len(x) * quadrature.num_samples)
    # Products within the network are rounded by its own types, the sums of the method by that of the vectors.
    network = coarsest(jax.make_jaxpr(apply_fn)(params, x))
    rounding = max(nodes.shape[-1] * float(jnp.finfo(nodes.dtype).eps), network)
    floor = rounding * nodes.max((1, 2), keepdims=True)
    above = np.asarray(nodes > floor)
    squares, shares = np.asarray(nodes)[above], np.asarray(weights)
    order = np.argsort(squares)
    return Density(np.log(squares[order]), shares[above][order], float(shares[~above].sum()))
