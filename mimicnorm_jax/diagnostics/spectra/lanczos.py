r"""Eigenvalues and spectral densities of positive semidefinite matrices that are known by their products only.

Lanczos' method with full reorthogonalization: after m products, $A \approx Q T Q^\top$ with a tridiagonal $T$ on an
orthonormal basis of the Krylov space of the start vector (Golub & Van Loan, Matrix Computations, ch. 10).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Product = Callable[[jax.Array], jax.Array]
"""The product of a symmetric matrix with a vector `(d,)`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues of a matrix, or of several along leading axes.

    A matrix with equal eigenvalues shows one of them only, unless its other eigenvalues are exhausted.

    Attributes:
      values: descending, `(..., count)`.
      residuals: of the eigenpairs, `(..., count)`; an eigenvalue lies this close to the value, as a rule much closer
        (residual squared over the gap).
      products: with the matrix that it took, `(...)`.
      tolerance: asked for, relative to the largest.
    """

    values: jax.Array
    residuals: jax.Array
    products: jax.Array
    tolerance: float = field(metadata={"static": True})

    @property
    def converged(self) -> jax.Array:
        """Whether all residuals are within the tolerance, `(...)`."""
        return (self.residuals <= self.tolerance * self.values[..., :1]).all(-1)


class _Krylov(NamedTuple):
    """Row j of `basis` was multiplied for all j below `products`; rows above that one are zero."""

    products: jax.Array
    basis: jax.Array
    diagonal: jax.Array
    beside: jax.Array

    def eigh(self) -> tuple[jax.Array, jax.Array]:
        beside = jnp.where(jnp.arange(self.beside.size) < self.products - 1, self.beside, 0)[:-1]
        return jnp.linalg.eigh(jnp.diag(self.diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _orthogonal(basis: jax.Array, vector: jax.Array) -> jax.Array:
    return vector - _dot(_dot(basis, vector), basis)


def _begin(start: jax.Array, steps: int) -> _Krylov:
    basis = jnp.zeros((steps, start.size), start.dtype).at[0].set(start / jnp.linalg.norm(start))
    return _Krylov(jnp.zeros((), int), basis, jnp.zeros(steps, start.dtype), jnp.zeros(steps, start.dtype))


def _advance(product: Product, krylov: _Krylov) -> _Krylov:
    """One more product. An exhausted space is left by the unit vector farthest from it, decoupled in T."""
    j, basis, diagonal, beside = krylov
    image = product(basis[j])
    diagonal = diagonal.at[j].set(_dot(basis[j], image))
    rest = _orthogonal(basis, image)
    length = jnp.linalg.norm(rest)
    exhausted = length <= 10 * jnp.finfo(rest.dtype).eps * (abs(diagonal).max() + beside.max())
    beside = beside.at[j].set(jnp.where(exhausted, 0, length))
    farthest = jax.nn.one_hot(jnp.argmin((basis**2).sum(0)), rest.size, dtype=rest.dtype)
    rest = jnp.where(exhausted, farthest, rest)
    # Each pass leaves a rounding error relative to what it was given; after two more there is none to speak of.
    rest = jax.lax.fori_loop(0, 2, lambda _, rest: _orthogonal(basis, rest), rest)
    basis = basis.at[j + 1].set(rest / jnp.linalg.norm(rest), mode="drop")
    return _Krylov(j + 1, basis, diagonal, beside)


def check(size: int, count: int, steps: int) -> None:
    """Raises ValueError unless `count` eigenvalues of a matrix of that size can be found in that many products."""
    if not 1 <= count <= size:
        raise ValueError(f"count is {count}: the matrix has {size} eigenvalues")
    if steps < count:
        raise ValueError(f"steps is {steps}: {count} eigenvalues take at least {count} products, and mostly more")


def largest(
    product: Product, size: int, dtype: Any, key: jax.Array, *, count: int, steps: int, tolerance: float
) -> Eigenvalues:
    """The largest eigenvalues of a positive semidefinite matrix.

    Args:
      product: with the matrix.
      size: of the matrix.
      dtype: of the vectors.
      key: for the start vector.
      count: number of eigenvalues.
      steps: at most this many products.
      tolerance: of the residuals, relative to the largest eigenvalue; stops when all are within it.

    Raises:
      ValueError: unless `1 <= count <= size` and `steps >= count`.
    """
    check(size, count, steps)

    def ritz(krylov: _Krylov) -> tuple[jax.Array, jax.Array]:
        values, vectors = krylov.eigh()
        last = krylov.products - 1
        residuals = krylov.beside[last] * abs(vectors[last])
        return values[::-1][:count], residuals[::-1][:count]

    def unsettled(krylov: _Krylov) -> jax.Array:
        values, residuals = ritz(krylov)
        few = krylov.products < count
        return (krylov.products < krylov.diagonal.size) & (few | ~(residuals <= tolerance * values[0]).all())

    krylov = _begin(jax.random.normal(key, (size,), dtype), min(steps, size))
    krylov = jax.lax.while_loop(unsettled, lambda krylov: _advance(product, krylov), krylov)
    return Eigenvalues(*ritz(krylov), krylov.products, tolerance)


def quadrature(product: Product, start: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    r"""Gauss quadrature of the spectrum as a start vector $v$ sees it.

    $\sum_k w_k f(\theta_k) = v^\top f(A) v / v^\top v$, exactly for polynomials $f$ of degree below `2 steps`. With
    random signs for $v$ the expectation is the trace of $f(A)$ over the size (Ubaru, Chen & Saad 2017).

    Args:
      product: with the matrix A.
      start: the vector, `(d,)`.
      steps: number of products; more than `d` make no difference.

    Returns:
      Nodes and weights, both `(min(steps, d),)`; the weights sum to 1.

    Example:
      >>> matrix = jnp.diag(jnp.array([1.0, 2.0, 4.0]))
      >>> nodes, weights = quadrature(lambda v: matrix @ v, jnp.ones(3), 2)
      >>> round(float((weights * nodes**3).sum()), 4)  # (1 + 8 + 64) / 3
      24.3333
    """
    krylov = _begin(start, min(steps, start.size))
    krylov = jax.lax.fori_loop(0, krylov.diagonal.size, lambda _, krylov: _advance(product, krylov), krylov)
    nodes, vectors = krylov.eigh()
    return nodes, vectors[0] ** 2
