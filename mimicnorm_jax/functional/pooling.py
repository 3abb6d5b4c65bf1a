"""Max-pooling that keeps a few bits an output for its backward pass, and not its input."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mimicnorm_jax.functional import bits
from mimicnorm_jax.functional.activations import SAVED


def max_pool(x: jax.Array, window: Sequence[int], strides: Sequence[int], padding: int = 0) -> jax.Array:
    """The largest value in each window; a NaN in a window makes its output NaN.

    The backward pass needs which place of the window won: 2 bits for a window of 2 x 2, 4 for one of 3 x 3, a byte
    where an explicit mesh spreads the channels; autodiff of `nn.max_pool` keeps the whole input. Of equal values
    the first in row-major order takes the gradient, as there.

    Args:
      x: `(B, H, W, C)`, floating point.
      window: its height and width, at most 256 places.
      strides: steps down and right.
      padding: rows and columns of minus infinity on each side.

    Returns:
      `(B, H', W', C)` with `H' = (H + 2 padding - height) // stride + 1`; what does not fill a window
      at the lower and right edge is left out.

    Raises:
      ValueError: if `x` is not such an image batch, window or strides are not two positive numbers each, or the window
        has more than 256 places or does not fit into the padded image.

    Example:
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2), (2, 2))[0, :, :, 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"max_pool takes floating-point images (B, H, W, C); got {x.dtype} of shape {x.shape}")
    if not all(len(pair) == 2 and min(pair) > 0 for pair in (window, strides)):
        raise ValueError(f"window and strides of max_pool are two positive numbers each; got {window} and {strides}")
    height, width = window
    if math.prod(window) > 256:
        raise ValueError(f"max_pool keeps the winner's place in one byte: a window of {height} x {width} is too large")
    if height > x.shape[1] + 2 * padding or width > x.shape[2] + 2 * padding:
        raise ValueError(f"a window of {height} x {width} does not fit into images of {x.shape[1]} x {x.shape[2]}")
    return _max_pool(x, (height, width), (strides[0], strides[1]), padding)


def _places(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: int, outside: float = -math.inf
) -> list:
    """For each place of the window what stands there, `(B, H', W', C)`; `outside` in the padding."""
    rows, columns = _outputs(x, window, strides, padding)
    edge = (padding, padding, 0)
    x = lax.pad(x, jnp.array(outside, x.dtype), [(0, 0, 0), edge, edge, (0, 0, 0)])
    batch, *_, channels = x.shape
    return [
        lax.slice(
            x,
            (0, i, j, 0),
            (batch, i + (rows - 1) * strides[0] + 1, j + (columns - 1) * strides[1] + 1, channels),
            (1, *strides, 1),
        )
        for i in range(window[0])
        for j in range(window[1])
    ]


def _phases(x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: int) -> list:
    """What `_places` returns with zeros for padding, by unit-stride slices of every `strides`-th row and column.

    Its transpose writes each row and column once; the transpose of a slice with strides spreads a whole map for each
    place of the window, which a TPU does not fuse (ResNet-50's stem on a v5e: 14.9 GB, so 7.8).
    """
    batch, height, width, channels = x.shape
    (down, right), (rows, columns) = strides, (_outputs(x, window, strides, padding))
    # Rows and columns of the padded images, in multiples of the strides.
    blocks = -(-(height + 2 * padding) // down), -(-(width + 2 * padding) // right)
    edges = [
        (padding, count * step - size - padding, 0)
        for count, step, size in zip(blocks, strides, x.shape[1:3], strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
    x = x.reshape(batch, blocks[0], down, blocks[1] * right, channels)
    # One reshape would do, but not of images whose sharding is in their type.
    by_row = [
        lax.squeeze(part, (2,)).reshape(batch, *blocks, right, channels).reshape(batch, *blocks, right * channels)
        for part in lax.split(x, (1,) * down, 2)
    ]
    by_place = [lax.split(part, (channels,) * right, 3) for part in by_row]
    return [
        lax.slice(
            by_place[i % down][j % right],
            (0, i // down, j // right, 0),
            (batch, i // down + rows, j // right + columns, channels),
        )
        for i in range(window[0])
        for j in range(window[1])
    ]


def _outputs(x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: int) -> tuple[int, int]:
    sizes = zip(x.shape[1:3], window, strides, strict=True)
    rows, columns = ((size + 2 * padding - places) // step + 1 for size, places, step in sizes)
    return rows, columns


def _winner(x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: int) -> tuple:
    first, *rest = _places(x, window, strides, padding)
    largest, place = first, jnp.zeros(first.shape, jnp.uint8)
    for k, value in enumerate(rest, 1):
        place = jnp.where(value > largest, jnp.uint8(k), place)
        largest = jnp.maximum(largest, value)
    return largest, place


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _max_pool(x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: int) -> jax.Array:
    return _winner(x, window, strides, padding)[0]


@_max_pool.defjvp
def _(window: tuple[int, int], strides: tuple[int, int], padding: int, primals: tuple, tangents: tuple) -> tuple:
    largest, place = _winner(primals[0], window, strides, padding)
    width = bits.width(math.prod(window), place)
    # Else XLA finds the winners in the backward pass, and keeps the input until then.
    packed = checkpoint_name(lax.optimization_barrier(bits.pack(lax.optimization_barrier(place), width)), SAVED)

    # The checkpoint makes autodiff keep the packed places, and not a mask for each.
    @jax.checkpoint
    def tangent(packed: jax.Array, dx: jax.Array) -> jax.Array:
        place = bits.unpack(packed, width, dx.shape[-1])
        # No reshape splits axes that an explicit mesh spreads, but the batch.
        spread = any(axis is not None for axis in jax.typeof(dx).sharding.spec[1:])
        parts = _places(dx, window, strides, padding, 0) if spread else _phases(dx, window, strides, padding)
        chosen = [jnp.where(place == k, part, jnp.zeros_like(part)) for k, part in enumerate(parts)]
        return functools.reduce(jnp.add, chosen)

    return largest, tangent(packed, *tangents)
