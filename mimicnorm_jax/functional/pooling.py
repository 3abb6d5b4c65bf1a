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

    The backward pass needs which place of the window won: 2 bits for a window of 2 x 2, 4 for one of 3 x 3, where
    autodiff of `nn.max_pool` keeps the whole input. Of equal values the first in row-major order takes the
    gradient, as there.

    Args:
      x: `(B, H, W, C)`, floating point.
      window: its height and width, at most 256 places.
      strides: steps down and right.
      padding: rows and columns of minus infinity on each side.

    Returns:
      `(B, H', W', C)` with `H' = (H + 2 padding - height) // stride + 1`; what does not fill a window
      at the lower and right edge is left out.

    Raises:
      ValueError: if `x` is not such an image batch, the window has more than 256 places or does not
        fit into the padded image.

    Example:
      >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1), (2, 2), (2, 2))[0, :, :, 0].tolist()
      [[5.0, 7.0], [13.0, 15.0]]
    """
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"max_pool takes floating-point images (B, H, W, C); got {x.dtype} of shape {x.shape}")
    height, width = window
    if math.prod(window) > 256:
        raise ValueError(f"max_pool keeps the winner's place in one byte: a window of {height} x {width} is too large")
    if height > x.shape[1] + 2 * padding or width > x.shape[2] + 2 * padding:
        raise ValueError(f"a window of {height} x {width} does not fit into images of {x.shape[1]} x {x.shape[2]}")
    return _max_pool(x, (height, width), (strides[0], strides[1]), padding)


def _places(x: jax.Array, window: tuple[int, int], strides: tuple[int, int], fill: float, padding: int) -> list:
    """For each place of the window what stands there, `(B, H', W', C)`."""
    edge = (padding, padding, 0)
    x = lax.pad(x, jnp.array(fill, x.dtype), [(0, 0, 0), edge, edge, (0, 0, 0)])
    batch, height, width, channels = x.shape
    down, right = (height - window[0]) // strides[0], (width - window[1]) // strides[1]
    return [
        lax.slice(
            x,
            (0, i, j, 0),
            (batch, i + down * strides[0] + 1, j + right * strides[1] + 1, channels),
            (1, *strides, 1),
        )
        for i in range(window[0])
        for j in range(window[1])
    ]


def _winner(x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: int) -> tuple:
    first, *rest = _places(x, window, strides, -math.inf, padding)
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
    width = next(width for width in (1, 2, 4, 8) if math.prod(window) <= 2**width)
    # Else XLA finds the winners in the backward pass, and keeps the input until then.
    packed = checkpoint_name(lax.optimization_barrier(bits.pack(lax.optimization_barrier(place), width)), SAVED)

    # The checkpoint makes autodiff keep the packed places, and not a mask for each.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(packed: jax.Array, dx: jax.Array) -> jax.Array:
        place = bits.unpack(packed, width, dx.shape[-1])
        parts = _places(dx, window, strides, 0.0, padding)
        chosen = [jnp.where(place == k, part, jnp.zeros_like(part)) for k, part in enumerate(parts)]
        return functools.reduce(jnp.add, chosen)

    return largest, tangent(packed, *tangents)
