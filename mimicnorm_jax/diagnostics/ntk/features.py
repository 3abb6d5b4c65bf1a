"""What the tangent kernel needs of each example: per-example derivatives, factored where a layer allows it.

Letters: n, m groups of examples that influence one another (single ones, unless a network normalizes by its batch),
q, r examples of a group, o, p outputs, s, t positions, g groups of channels, f fan-in, c output channels, k parameters.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mimicnorm_jax.diagnostics.ntk.jacobians import FactoredJacobian, Jacobian, Output, PooledJacobian

Feature = Jacobian | FactoredJacobian | PooledJacobian
Features = dict[tuple[int, int, int], Feature]
"""By a parameter's leaf, a number and a sign; contributions to the kernel add up with their sign."""

PIECE, COLUMNS = 2**20 + 2**19, 64
"""Derivatives written out at a time, so that they stay in a CPU's cache; and the least columns of such a product."""


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
    if isinstance(left, PooledJacobian) and isinstance(right, PooledJacobian):
        return _pooled(left, right, output)
    assert isinstance(left, FactoredJacobian)
    assert isinstance(right, FactoredJacobian)
    if not left.factored:
        return _written(left, right, output, symmetric)
    if left.patches.shape[1] == 1:
        return _outer(left, right, output, symmetric)
    if in_grams(left.cotangents.shape[1], output):
        return _grams(left, right, symmetric)
    return _chain(left, right, output, symmetric)


def _rows(rows: jax.Array) -> jax.Array:
    return rows.reshape(-1, *rows.shape[2:])


def _dense(left: jax.Array, right: jax.Array, output: Output, symmetric: bool) -> jax.Array:
    left, right = _rows(left), _rows(right)
    if output == "diagonal":
        return jnp.einsum("aok,bok->abo", left, right)
    first, second = _flat(left, output), _flat(right, output)
    # Cutting long rows costs more in copies than the lower half is worth.
    product = gram(first, second, symmetric and first.shape[1] <= 4096)
    return product.reshape(*left.shape[:2], *right.shape[:2]) if output == "full" else product


def _flat(rows: jax.Array, output: Output) -> jax.Array:
    """Rows `(a, o, k)` as the factor of a matrix product."""
    return rows.reshape(-1, rows.shape[-1]) if output == "full" else rows.reshape(len(rows), -1)


def _written(left: FactoredJacobian, right: FactoredJacobian, output: Output, symmetric: bool) -> jax.Array:
    """Derivatives written out for some channels at a time, which stay in the cache until they are multiplied."""
    sides = (left,) if symmetric else (left, right)
    count = num_pieces(left.cotangents.shape, left.patches.shape[-1])
    halved = symmetric and output != "diagonal"

    def product(i: Any) -> Any:
        rows = [side.written(side.piece(i, count)).rows for side in sides]
        return upper(_flat(_rows(rows[0]), output)) if halved else _dense(rows[0], rows[-1], output, False)

    total = product(0)
    if count > 1:
        indices = jnp.arange(1, count)
        total = lax.scan(lambda t, i: (jax.tree.map(jnp.add, t, product(i)), None), total, indices)[0]
    if not halved:
        return total
    (n, q, o), whole = left.cotangents.shape[:3], assembled(total)
    return whole.reshape(n * q, o, n * q, o) if output == "full" else whole


def num_pieces(shape: Sequence[int], fan_in: int) -> int:
    """How many pieces a layer's channels are cut into where its derivatives are written out.

    Args:
      shape: of the cotangents, `(n, q, o, s, g, c)`.
      fan_in: F.
    """
    n, q, o, _, g, c = shape
    possible = [k for k in range(1, c + 1) if c % k == 0 and (k == 1 or q * o * c // k >= COLUMNS)]
    return next((k for k in possible if n * q * o * g * fan_in * c // k <= PIECE), possible[-1])


def gram(left: jax.Array, right: jax.Array, symmetric: bool) -> jax.Array:
    """`left right^T`; of a symmetric one only the blocks on and above the diagonal are multiplied."""
    return assembled(upper(left)) if symmetric else left @ right.T


def upper(rows: jax.Array) -> list[list[jax.Array]]:
    """The blocks of `rows rows^T` on and above the diagonal, by rows of blocks."""
    pieces = [rows[part] for part in _cut(len(rows))]
    return [[piece @ other.T for other in pieces[i:]] for i, piece in enumerate(pieces)]


def _cut(count: int) -> list[slice]:
    """The rows of blocks of a symmetric matrix of so many rows."""
    parts = max(1, min(4, count // 64))
    ends = [count * i // parts for i in range(parts + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def assembled(blocks: Sequence[Sequence[jax.Array]]) -> jax.Array:
    """A symmetric matrix from what `upper` gives."""
    count = len(blocks)
    whole = [[blocks[i][j - i] if i <= j else blocks[j][i - j].T for j in range(count)] for i in range(count)]
    return whole[0][0] if count == 1 else jnp.block(whole)


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


def in_grams(examples: int, output: Output) -> bool:
    """Whether factors of many positions are contracted by `_grams`: one number a pair of groups, in large products."""
    return examples == 1 and output == "trace"


def _grams(left: FactoredJacobian, right: FactoredJacobian, symmetric: bool) -> jax.Array:
    """Many positions, summed over outputs: the Gram matrices of patches and of cotangents, entry by entry."""

    def by_group(feature: FactoredJacobian) -> tuple[jax.Array, jax.Array]:
        """Patches `(n, g, s, f)`, and the cotangents of all outputs, `(n, g, s, o c)`."""
        n, _, o, s, g, c = feature.cotangents.shape
        cotangents = feature.cotangents[:, 0].transpose(0, 3, 2, 1, 4)
        return feature.patches.swapaxes(1, 2), cotangents.reshape(n, g, s, o * c)

    def block(first: Sequence[jax.Array], second: Sequence[jax.Array]) -> jax.Array:
        _, g, s, _ = first[0].shape
        patches, cotangents = (side.swapaxes(0, 1).reshape(g, -1, side.shape[-1]) for side in second)

        def row(one: tuple[jax.Array, jax.Array]) -> jax.Array:
            inputs = jnp.einsum("gsf,gmf->gsm", one[0], patches) + left.bias
            moved = jnp.einsum("gsk,gmk->gsm", one[1], cotangents)
            return (inputs * moved).sum((0, 1)).reshape(-1, s).sum(1)

        return lax.map(row, tuple(first), batch_size=max(1, PIECE // (g * s * patches.shape[1])))

    firsts = by_group(left)
    if not symmetric:
        return block(firsts, by_group(right))
    pieces = [[side[part] for side in firsts] for part in _cut(len(left.patches))]
    return assembled([[block(piece, other) for other in pieces[i:]] for i, piece in enumerate(pieces)])


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


def _pooled(left: PooledJacobian, right: PooledJacobian, output: Output) -> jax.Array:
    """Inner products of the maps, channel by channel, times the columns'."""
    (_, o, c), m = left.columns.shape, len(right.columns)
    columns = {"full": "mc,oc,mpc->omp", "trace": "mc,oc,moc->m", "diagonal": "mc,oc,moc->mo"}[output]
    products = jnp.einsum("nfc,mfc->nmc", left.maps, right.maps)

    def row(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.einsum(columns, *one, right.columns)

    return lax.map(row, (products, left.columns), batch_size=max(1, PIECE // (m * o * c)))


def transposed(block: Any, output: Output) -> Any:
    """The block of swapped sides."""
    return block.transpose((2, 3, 0, 1) if output == "full" else (1, 0, 2) if output == "diagonal" else (1, 0))
