"""What the tangent kernel needs of each example: per-example derivatives, factored where a layer allows it.

Letters: n, m groups of examples that influence one another (single ones, unless a network normalizes by its batch),
q, r examples of a group, o, p outputs, s, t positions, g groups of channels, f fan-in, c output channels, k parameters.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
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
        n, q, o, s, g, c = self.cotangents.shape
        # One large product an example, of shapes (q o c, s) and (s, f), writes its rows where they stay.
        cotangents = self.cotangents.transpose(0, 4, 3, 1, 2, 5).reshape(n, g, s, q * o * c)
        rows = jnp.einsum("nsgf,ngsk->ngkf", self.patches, cotangents)
        return Jacobian(rows.reshape(n, g, q, o, -1).transpose(0, 2, 3, 1, 4).reshape(n, q, o, -1))


Feature = Jacobian | FactoredJacobian
Features = dict[tuple[int, int, int], Feature]
"""By a parameter's leaf, a number and a sign; contributions to the kernel add up with their sign."""

TURN = 40_000
"""MACs of a large product in the time of one turn of the loops over pairs and outputs, by their time on a CPU."""


def contract_by_parameter(
    left: Features, right: Features, titles: Sequence[str], output: Output, symmetric: bool
) -> dict[str, jax.Array]:
    """Every parameter's contribution, by its title.

    Args:
      left, right: features of two sets of examples, see `contract`.
      titles: of the parameters, by leaf.
      output: which pairs of outputs.
      symmetric: whether `right` is `left`.
    """
    found: dict[str, jax.Array] = {}
    for key in sorted(left):
        title = titles[key[0]]
        block = key[2] * contract(left[key], right[key], output, symmetric)
        found[title] = found[title] + block if title in found else block
    return found


def contract(left: Feature, right: Feature, output: Output, symmetric: bool = False) -> jax.Array:
    """Inner products of the derivatives of two sets of examples (Jacobian contraction, in the order that is cheapest).

    Args:
      left: features of `a = n q` examples.
      right: features of `b = m r` examples, of the same kind.
      output: which pairs of outputs.
      symmetric: whether `right` is `left`, which saves work.

    Returns:
      A block as in `Output`.
    """
    if isinstance(left, Jacobian) and isinstance(right, Jacobian):
        return _dense(left.rows, right.rows, output, symmetric)
    assert isinstance(left, FactoredJacobian)
    assert isinstance(right, FactoredJacobian)
    if not left.factored:
        return _written(left, right, output, symmetric)
    if left.patches.shape[1] == 1:
        return _outer(left, right, output, symmetric)
    return _chain(left, right, output, symmetric)


def _rows(rows: jax.Array) -> jax.Array:
    return rows.reshape(-1, *rows.shape[2:])


def _dense(left: jax.Array, right: jax.Array, output: Output, symmetric: bool) -> jax.Array:
    left, right = _rows(left), _rows(right)
    (a, o, k), (b, p, _) = left.shape, right.shape
    if output == "full":
        return gram(left.reshape(a * o, k), right.reshape(b * p, k), symmetric).reshape(a, o, b, p)
    if output == "trace":
        return gram(left.reshape(a, o * k), right.reshape(b, p * k), symmetric)
    return jnp.einsum("aok,bok->abo", left, right)


def _written(left: FactoredJacobian, right: FactoredJacobian, output: Output, symmetric: bool) -> jax.Array:
    """Derivatives written out for some examples at a time, so that a symmetric kernel's lower half costs nothing."""
    n, q, o = left.cotangents.shape[:3]
    rows_each = q * (o if output == "full" else 1)
    parts = next(parts for parts in (4, 3, 2, 1) if n % parts == 0 and (parts == 1 or n // parts * rows_each >= 64))
    if not symmetric or output == "diagonal" or parts == 1:
        return _dense(left.rows().rows, right.rows().rows, output, symmetric)
    size = n // parts
    rows = [
        FactoredJacobian(left.patches[i : i + size], left.cotangents[i : i + size], left.bias, False).rows().rows
        for i in range(0, n, size)
    ]
    upper = {(i, j): _dense(a, b, output, False) for i, a in enumerate(rows) for j, b in enumerate(rows) if i <= j}
    whole = [[upper[i, j] if i <= j else transposed(upper[j, i], output) for j in range(parts)] for i in range(parts)]
    axis = 2 if output == "full" else 1
    return jnp.concatenate([jnp.concatenate(row, axis) for row in whole])


def gram(left: jax.Array, right: jax.Array, symmetric: bool, least: int = 64) -> jax.Array:
    """`left right^T`; of a symmetric one only the blocks on and above the diagonal are multiplied."""
    rows, terms = left.shape
    # Cutting long rows costs more in copies than the lower half is worth.
    if not symmetric or rows < 2 * least or terms > 4096:
        return left @ right.T
    half = rows // 2
    top, bottom = left[:half], left[half:]
    corner = top @ bottom.T
    first, second = gram(top, top, True, least), gram(bottom, bottom, True, least)
    return jnp.block([[first, corner], [corner.T, second]])


def _outer(left: FactoredJacobian, right: FactoredJacobian, output: Output, symmetric: bool) -> jax.Array:
    """One position: the product of two Gram matrices, of layer inputs and of cotangents."""
    (n, q, o, _, groups, _), (m, r, p, _, _, _) = left.cotangents.shape, right.cotangents.shape
    inputs = jnp.einsum("nsgf,msgf->gnm", left.patches, right.patches) + left.bias
    if output == "diagonal":
        cotangents = jnp.einsum("nqosgc,mrosgc->gnqmro", left.cotangents, right.cotangents)
        return (inputs[:, :, None, :, None, None] * cotangents).sum(0).reshape(n * q, m * r, o)
    summed = output == "trace"
    total = jnp.zeros((), left.cotangents.dtype)
    for group in range(groups):
        grams = [
            feature.cotangents[:, :, :, 0, group].reshape(count, -1)
            for feature, count in ((left, n * q * (1 if summed else o)), (right, m * r * (1 if summed else p)))
        ]
        product = gram(grams[0], grams[1], symmetric).reshape(n, -1, m, grams[1].shape[0] // m)
        total = total + inputs[group][:, None, :, None] * product
    return total.reshape((n * q, m * r) if summed else (n * q, o, m * r, p))


def _chain(left: FactoredJacobian, right: FactoredJacobian, output: Output, symmetric: bool) -> jax.Array:
    """Many positions: the Gram matrix of patches applied to the cotangents, one pair of groups at a time."""
    (n, q, o, _, _, _), (m, r, p, _, _, _) = left.cotangents.shape, right.cotangents.shape

    def pair(patches: jax.Array, cotangents: jax.Array, others: tuple[jax.Array, jax.Array]) -> jax.Array:
        grams = jnp.einsum("sgf,tgf->gst", patches, others[0]) + left.bias
        # A loop: as one batched product, copies to another order of axes would cost more than the product.
        moved = lax.map(lambda d: jnp.einsum("gst,tgc->sgc", grams, d), others[1].reshape(r * p, *others[1].shape[2:]))
        first, second = cotangents.reshape(q, o, -1), moved.reshape(r, p, -1)
        if output == "full":
            return (first.reshape(q * o, -1) @ second.reshape(r * p, -1).T).reshape(q, o, r, p)
        if output == "trace":
            return first.reshape(q, -1) @ second.reshape(r, -1).T
        return jnp.einsum("qok,rok->qro", first, second)

    firsts, seconds = (jnp.asarray(side.ravel()) for side in np.indices((n, m)))
    if symmetric:
        firsts, seconds = map(jnp.asarray, np.triu_indices(n))

    def block(index: tuple[jax.Array, jax.Array]) -> jax.Array:
        i, j = index
        return pair(left.patches[i], left.cotangents[i], (right.patches[j], right.cotangents[j]))

    found = lax.map(block, (firsts, seconds))
    blocks = jnp.zeros((n, m, *found.shape[1:]), found.dtype).at[firsts, seconds].set(found)
    if symmetric:
        mirrored = jax.vmap(lambda b: transposed(b, output))(found)
        blocks = blocks.at[seconds, firsts].set(mirrored)
    if output == "full":
        return blocks.transpose(0, 2, 3, 1, 4, 5).reshape(n * q, o, m * r, p)
    blocks = blocks.swapaxes(1, 2)
    return blocks.reshape(n * q, m * r, *((o,) if output == "diagonal" else ()))


def costs(
    sizes: Sequence[int], groups: tuple[int, int], examples: int, outputs: int, output: Output, symmetric: bool
) -> dict[str, float]:
    """Multiply-accumulates that a layer's contribution takes with its derivatives written out, or left as factors.

    Of many positions, factors are multiplied pair by pair in a loop (`_chain`), whose turns count as well.

    Args:
      sizes: positions S, groups of channels G, fan-in F, output channels C.
      groups: of examples, on each side.
      examples: in a group.
      outputs: of the network that are differentiated.
      output: which pairs of outputs.
      symmetric: whether both sides are the same examples.

    Returns:
      MACs with the derivatives `written` out and `factored`.
    """
    s, g, f, c = sizes
    n, m = groups
    rows = examples * outputs
    pairs = examples**2 * outputs * (outputs if output == "full" else 1)
    half = 0.5 if symmetric else 1.0
    written = (n if symmetric else n + m) * rows * s * g * f * c
    dense = written + half * n * m * pairs * g * f * c
    if s == 1:
        return {"written": dense, "factored": n * m * g * (f + half * pairs * c)}
    products = g * (s * s * f + s * s * rows * c + pairs * s * c)
    return {"written": dense, "factored": half * n * m * (products + TURN * (1 + rows))}


def transposed(block: Any, output: Output) -> Any:
    """The block of swapped sides."""
    return block.transpose((2, 3, 0, 1) if output == "full" else (1, 0, 2) if output == "diagonal" else (1, 0))
