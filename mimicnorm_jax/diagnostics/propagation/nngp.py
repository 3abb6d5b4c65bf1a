r"""Empirical NNGP kernels, pair correlations and second moments, layer by layer.

A layer is a product of activations with a kernel; of it one sees the `product` (the pre-activation, before a bias is
added) or its `input` (the activations). The NNGP kernel is their inner product over all d units of an example
(positions of a feature map included), $K_{ij} = \langle h_i, h_j \rangle / d$; a correlation is the cosine
$\rho_{ij} = K_{ij} / \sqrt{K_{ii} K_{jj}}$ of the theory, without subtraction of a mean.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.tracing.layers import (
    EVERYTHING,
    ByLayer,
    View,
    coupled_groups,
    example_axis,
    prepared,
    select,
    static,
    trace,
)
from mimicnorm_jax.diagnostics.tracing.network import LayerCall
from mimicnorm_jax.diagnostics.tracing.outputs import check_finite
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn
from mimicnorm_jax.errors import unknown

Part = Literal["product", "input"]
"""The pre-activations of a layer, or the activations that it is given."""


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer.

    Attributes:
      units: of one example, d.
      mean_square: $K_{ii}$, mean over the examples: the variance q of the theory.
      spread: standard deviation of $K_{ii}$ over the examples.
      correlation: mean of the correlations of pairs of examples.
      correlation_rms: their root mean square; about $1.8 / \\sqrt{d}$ where an MLP has decorrelated all pairs.
      pairs: how many pairs that is.
    """

    units: int
    mean_square: float
    spread: float
    correlation: float
    correlation_rms: float
    pairs: int


def names(apply_fn: ApplyFn, params: Any, x: jax.Array) -> tuple[str, ...]:
    """Names of a network's layers in the order of evaluation.

    Args:
      apply_fn: the network.
      params: its parameters.
      x: inputs, `(N, ...)`.

    Raises:
      ValueError: if the network has no layer that can be seen.

    Example:
      >>> names(lambda params, x: jax.nn.relu(x @ params["first"]) @ params["last"],
      ...       {"first": jnp.ones((2, 3)), "last": jnp.ones((3, 1))}, jnp.ones((4, 2)))
      ('first', 'last')
    """
    return tuple(layer.name for layer in select(trace(*prepared(apply_fn, params, x)), None))


def _units(value: jax.Array, layer: LayerCall, examples: int, view: View, part: Part) -> jax.Array:
    """A layer's value for groups of examples as `(N, d)`."""
    if view.batch_coupled:
        value = jnp.moveaxis(value[0], example_axis(layer, examples, of_product=part == "product"), 0)
    return value.reshape(examples, -1).astype(jnp.promote_types(value.dtype, jnp.float32))


def _run(apply_fn: ApplyFn, params: Any, x: jax.Array, view: View, part: Part) -> tuple[ByLayer, jax.Array]:
    """Units `(N, d)` by layer and the outputs `(N, O)`."""
    batch_coupled = view.batch_coupled
    network = trace(apply_fn, params, x, batch_coupled)
    chosen = select(network, view.layers)

    def one(group: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        outputs, evaluation = network.run(params, group)
        seen = evaluation.products if part == "product" else evaluation.operands
        return [seen[layer.index] for layer in chosen], outputs

    values, outputs = jax.vmap(one)(coupled_groups(x, batch_coupled))
    units = tuple(_units(value, layer, len(x), view, part) for value, layer in zip(values, chosen, strict=True))
    return ByLayer(tuple(layer.name for layer in chosen), units), outputs.reshape(len(x), -1)


def gram(left: jax.Array, right: jax.Array) -> jax.Array:
    r"""$\langle h_i, h_j \rangle / d$.

    Args:
      left: units, `(N, d)`.
      right: units, `(M, d)`.
    """
    return jnp.matmul(left, right.T, precision=jax.lax.Precision.HIGHEST) / left.shape[1]


def _cosines(left: jax.Array, right: jax.Array) -> jax.Array:
    # Of any scale: squares of small or large numbers leave the range of their type.
    left, right = (units / jnp.abs(units).max(1, keepdims=True) for units in (left, right))
    norms = [jnp.sqrt(jnp.mean(units**2, 1)) for units in (left, right)]
    return gram(left, right) / (norms[0][:, None] * norms[1][None, :])


@partial(jax.jit, static_argnames=("apply_fn", "view", "part", "cosine"))
def _pairs(
    apply_fn: ApplyFn, params: Any, sides: tuple[jax.Array, jax.Array | None], view: View, part: Part, cosine: bool
) -> tuple[ByLayer, list[jax.Array]]:
    left, outputs = _run(apply_fn, params, sides[0], view, part)
    right, others = (left, outputs) if sides[1] is None else _run(apply_fn, params, sides[1], view, part)
    compare = _cosines if cosine else gram
    return ByLayer(left.names, tuple(map(compare, left.values, right.values))), [outputs, others]


def _compared(
    apply_fn: ApplyFn, params: Any, sides: tuple[Any, Any], view: View, part: Part, cosine: bool
) -> dict[str, jax.Array]:
    x, x2 = sides
    if x2 is not None and np.shape(x2)[1:] != np.shape(x)[1:]:
        raise ValueError(
            f"x2 has shape {np.shape(x2)}, x {np.shape(x)}: they may differ in the number of examples only"
        )
    _check_part(part)
    x2 = None if x2 is None else prepared(apply_fn, params, x2, view.batch_coupled)[2]
    apply_fn, params, x = prepared(apply_fn, params, x, view.batch_coupled)
    found, outputs = _pairs(apply_fn, params, (x, x2), view, part, cosine)
    for values in outputs:
        check_finite(values)
    return dict(zip(found.names, found.values, strict=True))


def _check_part(part: str) -> None:
    if part not in ("product", "input"):
        raise ValueError(unknown("part", part, ("product", "input")))


def kernels(
    apply_fn: ApplyFn,
    params: Any,
    x: jax.Array,
    view: View = EVERYTHING,
    *,
    x2: jax.Array | None = None,
    part: Part = "product",
) -> dict[str, jax.Array]:
    r"""Empirical NNGP kernels $K_{ij} = \langle h_i, h_j \rangle / d$.

    All activations of the chosen layers are held at once.

    Args:
      apply_fn: the network.
      params: its parameters.
      x: inputs, `(N, ...)`.
      view: which layers. If it is `batch_coupled`, `x` is one batch and `x2` another.
      x2: other inputs, `(M, ...)`; None for `x` itself.
      part: of the layers.

    Returns:
      By layer, in the order of evaluation, `(N, M)` in the network's precision, at least float32.

    Raises:
      ValueError: for an unknown layer, inputs of different shapes, or outputs that are not finite.

    Example:
      >>> def apply_fn(params, x):
      ...     return x @ params["head"]
      >>> kernels(apply_fn, {"head": jnp.eye(2)}, jnp.array([[1.0, 0.0], [1.0, 1.0]]))["head"].tolist()
      [[0.5, 0.5], [0.5, 1.0]]
    """
    return _compared(apply_fn, params, (x, x2), static(view), part, cosine=False)


def correlations(
    apply_fn: ApplyFn,
    params: Any,
    x: jax.Array,
    view: View = EVERYTHING,
    *,
    x2: jax.Array | None = None,
    part: Part = "product",
) -> dict[str, jax.Array]:
    r"""Pair correlations $\rho_{ij} = K_{ij} / \sqrt{K_{ii} K_{jj}}$; arguments and errors as in `kernels`.

    Args:
      apply_fn, params, x, view, x2, part: as in `kernels`.

    Returns:
      By layer, in the order of evaluation, `(N, M)`; NaN for an example on which a layer vanishes.
    """
    return _compared(apply_fn, params, (x, x2), static(view), part, cosine=True)


@partial(jax.jit, static_argnames=("apply_fn", "view", "part"))
def _sums(apply_fn: ApplyFn, params: Any, x: jax.Array, view: View, part: Part) -> tuple[ByLayer, jax.Array]:
    """By layer, largest units `(N,)`, mean squares in their square, and sum and sum of squares of the correlations."""
    found, outputs = _run(apply_fn, params, x, view, part)
    above = jnp.triu(jnp.ones((len(x), len(x)), bool), 1)
    sums = []
    for units in found.values:
        rho = jnp.where(above, _cosines(units, units), 0)
        largest = jnp.abs(units).max(1)
        shares = jnp.mean((units / jnp.where(largest > 0, largest, 1)[:, None]) ** 2, 1)
        sums.append((jnp.stack([largest, shares]), rho.sum(), (rho**2).sum(), jnp.asarray(units.shape[1])))
    return ByLayer(found.names, tuple(sums)), outputs


def moments(
    apply_fn: ApplyFn,
    params: Any,
    x: jax.Array,
    view: View = EVERYTHING,
    *,
    part: Part = "product",
    batch: int = 256,
) -> dict[str, Moments]:
    """Second moments and pair correlations of all layers in one pass over the examples.

    Args:
      apply_fn: the network.
      params: its parameters.
      x: inputs, `(N, ...)`, at least two.
      view: which layers. If it is `batch_coupled`, `x` is one batch.
      part: of the layers.
      batch: examples that are evaluated, and compared with one another, at a time.

    Returns:
      By layer, in the order of evaluation; correlations are NaN where a layer vanishes on an example.

    Raises:
      ValueError: for an unknown layer, outputs that are not finite, or fewer than two examples.
    """
    _check_part(part)
    view = static(view)
    apply_fn, params, x = prepared(apply_fn, params, x)
    if not view.batch_coupled:
        prepared(apply_fn, params, x[:batch], batch_coupled=False)
    if min(len(x), batch) < 2:
        raise ValueError(f"{len(x)} examples, batch {batch}: spread and correlations need at least 2 of both")
    found: list[ByLayer] = []
    size = len(x) if view.batch_coupled else batch
    for start in range(0, len(x), size):
        sums, outputs = _sums(apply_fn, params, x[start : start + size], view, part)
        check_finite(outputs)
        found.append(jax.device_get(sums))
    return {name: _moments([sums.values[i] for sums in found]) for i, name in enumerate(found[0].names)}


def _moments(batches: Sequence[tuple[Any, Any, Any, Any]]) -> Moments:
    largest, shares = np.concatenate([np.asarray(squares, np.float64) for squares, *_ in batches], 1)
    squares = shares * largest**2
    pairs = sum(math.comb(squares.shape[1], 2) for squares, *_ in batches)
    first, second = (sum(float(sums[i]) for sums in batches) / pairs for i in (1, 2))
    return Moments(
        units=int(batches[0][3]),
        mean_square=float(squares.mean()),
        spread=float(squares.std(ddof=1)),
        correlation=first,
        correlation_rms=math.sqrt(second),
        pairs=pairs,
    )
