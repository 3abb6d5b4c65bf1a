r"""Eigenvalues and spectral densities of positive semidefinite matrices, from products with vectors alone.

Lanczos' method with full reorthogonalization: after m products, $A \approx Q T Q^\top$ with a tridiagonal $T$ on an
orthonormal basis of the Krylov space of the start vector (Golub & Van Loan, Matrix Computations, ch. 10).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

MatVec = Callable[[jax.Array], jax.Array]
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
      num_matvecs: products with the matrix that it took, `(...)`.
      tolerance: asked for, relative to the largest.
    """

    values: jax.Array
    residuals: jax.Array
    num_matvecs: jax.Array
    tolerance: float = field(metadata={"static": True})

    @property
    def converged(self) -> jax.Array:
        """Whether all residuals are within the tolerance, `(...)`."""
        return (self.residuals <= self.tolerance * self.values[..., :1]).all(-1)


class _Krylov(NamedTuple):
    """Row j of `basis` was multiplied for all j below `num_matvecs`; rows above that one are zero."""

    num_matvecs: jax.Array
    basis: jax.Array
    diagonal: jax.Array
    off_diagonal: jax.Array

    def eigh(self) -> tuple[jax.Array, jax.Array]:
        off_diagonal = jnp.where(jnp.arange(self.off_diagonal.size) < self.num_matvecs - 1, self.off_diagonal, 0)[:-1]
        return jnp.linalg.eigh(jnp.diag(self.diagonal) + jnp.diag(off_diagonal, 1) + jnp.diag(off_diagonal, -1))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _orthogonal(basis: jax.Array, vector: jax.Array) -> jax.Array:
    return vector - _dot(_dot(basis, vector), basis)


def _begin(start: jax.Array, num_matvecs: int) -> _Krylov:
    basis = jnp.zeros((num_matvecs, start.size), start.dtype).at[0].set(start / jnp.linalg.norm(start))
    return _Krylov(jnp.zeros((), int), basis, jnp.zeros(num_matvecs, start.dtype), jnp.zeros(num_matvecs, start.dtype))


def _advance(matvec: MatVec, krylov: _Krylov) -> _Krylov:
    """One more product. An exhausted space is left by the unit vector farthest from it, decoupled in T."""
    j, basis, diagonal, off_diagonal = krylov
    image = matvec(basis[j])
    diagonal = diagonal.at[j].set(_dot(basis[j], image))
    rest = _orthogonal(basis, image)
    length = jnp.linalg.norm(rest)
    exhausted = length <= 10 * jnp.finfo(rest.dtype).eps * (abs(diagonal).max() + off_diagonal.max())
    off_diagonal = off_diagonal.at[j].set(jnp.where(exhausted, 0, length))
    farthest = jax.nn.one_hot(jnp.argmin((basis**2).sum(0)), rest.size, dtype=rest.dtype)
    rest = jnp.where(exhausted, farthest, rest)
    # Each pass leaves a rounding error relative to what it was given; after two more there is none to speak of.
    rest = jax.lax.fori_loop(0, 2, lambda _, rest: _orthogonal(basis, rest), rest)
    basis = basis.at[j + 1].set(rest / jnp.linalg.norm(rest), mode="drop")
    return _Krylov(j + 1, basis, diagonal, off_diagonal)


@dataclass(frozen=True)
class Search:
    """Which eigenvalues are looked for, and how far.

    Attributes:
      count: number of eigenvalues, the largest.
      num_matvecs: at most this many products with the matrix.
      tolerance: of the residuals, relative to the largest eigenvalue; it stops when all are within it.
    """

    count: int = 1
    num_matvecs: int = 100
    tolerance: float = 1e-3

    def check(self, size: int) -> None:
        """Raises ValueError unless that can be found of a matrix of that size."""
        if not 1 <= self.count <= size:
            raise ValueError(f"count is {self.count}: the matrix has {size} eigenvalues")
        if self.num_matvecs < self.count:
            raise ValueError(
                f"num_matvecs is {self.num_matvecs}: {self.count} eigenvalues take at least {self.count} products, "
                "and mostly more"
            )


LARGEST = Search()
"""One eigenvalue, the largest, to a thousandth."""


def largest(matvec: MatVec, start: jax.Array, search: Search) -> Eigenvalues:
    """The largest eigenvalues of a positive semidefinite matrix.

    Args:
      matvec: the product with the matrix.
      start: the vector to start from, `(d,)`; standard normal, say.
      search: how many, and when to stop.

    Raises:
      ValueError: unless `1 <= count <= d` and `num_matvecs >= count`.
    """
    search.check(start.size)
    count, tolerance = search.count, search.tolerance

    def ritz(krylov: _Krylov) -> tuple[jax.Array, jax.Array]:
        values, vectors = krylov.eigh()
        last = krylov.num_matvecs - 1
        residuals = krylov.off_diagonal[last] * abs(vectors[last])
        return values[::-1][:count], residuals[::-1][:count]

    def unsettled(krylov: _Krylov) -> jax.Array:
        values, residuals = ritz(krylov)
        few = krylov.num_matvecs < count
        return (krylov.num_matvecs < krylov.diagonal.size) & (few | ~(residuals <= tolerance * values[0]).all())

    krylov = _begin(start, min(search.num_matvecs, start.size))
    krylov = jax.lax.while_loop(unsettled, lambda krylov: _advance(matvec, krylov), krylov)
    return Eigenvalues(*ritz(krylov), krylov.num_matvecs, tolerance)


def quadrature(matvec: MatVec, start: jax.Array, num_matvecs: int) -> tuple[jax.Array, jax.Array]:
    r"""Gauss quadrature of the spectrum as a start vector $v$ sees it.

    $\sum_k w_k f(\theta_k) = v^\top f(A) v / v^\top v$, exactly for polynomials $f$ of degree below
    `2 num_matvecs`. With random signs for $v$ the expectation is the trace of $f(A)$ over the size (Ubaru, Chen & Saad
    2017).

    Args:
      matvec: the product with the matrix A.
      start: the vector, `(d,)`.
      num_matvecs: number of products; more than `d` make no difference.

    Returns:
      Nodes and weights, both `(min(num_matvecs, d),)`; the weights sum to 1.

    Example:
      >>> matrix = jnp.diag(jnp.array([1.0, 2.0, 4.0]))
      >>> nodes, weights = quadrature(lambda v: matrix @ v, jnp.ones(3), 2)
      >>> round(float((weights * nodes**3).sum()), 4)  # (1 + 8 + 64) / 3
      24.3333
    """
    krylov = _begin(start, min(num_matvecs, start.size))
    krylov = jax.lax.fori_loop(0, krylov.diagonal.size, lambda _, krylov: _advance(matvec, krylov), krylov)
    nodes, vectors = krylov.eigh()
    return nodes, vectors[0] ** 2
