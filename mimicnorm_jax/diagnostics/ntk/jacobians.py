"""Derivatives of a network's outputs by a layer's kernel, example by example: written out, or as factors.

Letters as in `features`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Output = Literal["full", "diagonal", "trace"]
"""Kernel blocks `(a, o, b, p)` over all pairs of outputs, `(a, b, o)` of each with itself, or their sum `(a, b)`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Jacobian:
    """Derivatives themselves: rows `(n, q, o, k)`."""

    rows: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FactoredJacobian:
    """Derivatives as sums over positions of outer products, `(n, s, g, f)` with `(n, q, o, s, g, c)`.

    `bias` is the weight of one more input, the constant 1; `rows` leaves it out. `factored` says that inner products
    are cheaper without writing out the derivatives.
    """

    patches: jax.Array
    cotangents: jax.Array
    bias: jax.Array
    factored: bool = field(metadata={"static": True})

    def rows(self) -> Jacobian:
        """The derivatives by the kernel, written out."""
        return self.written(self.piece(0, 1))

    def piece(self, i: Any, count: int) -> jax.Array:
        """Cotangents of the i-th of so many equal parts of the channels, `(n, g, s, q o c)`."""
        n, q, o, s, g, c = self.cotangents.shape
        part = lax.dynamic_slice_in_dim(self.cotangents, i * (c // count), c // count, 5)
        return part.transpose(0, 4, 3, 1, 2, 5).reshape(n, g, s, q * o * (c // count))

    def written(self, piece: jax.Array) -> Jacobian:
        """The derivatives by a piece's channels, written out."""
        n, q, o, s, g, _ = self.cotangents.shape
        # One large product an example, of shapes (q o c, s) and (s, f), writes its rows where they stay. With one axis
        # for the batch, even where G is 1: XLA's CPU products of two are slower by half.
        patches = self.patches.swapaxes(1, 2).reshape(n * g, s, -1)
        rows = jnp.einsum("bsf,bsk->bkf", patches, piece.reshape(n * g, s, -1))
        return Jacobian(rows.reshape(n, g, q, o, -1).transpose(0, 2, 3, 1, 4).reshape(n, q, o, -1))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PooledJacobian:
    """Derivatives as maps `(n, f, c)` for all outputs times their columns `(n, o, c)`; of groups of one example."""

    maps: jax.Array
    columns: jax.Array
