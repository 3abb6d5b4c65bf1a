"""Augmentation on the device: pad and crop, flip, rotation, in one gather; and normalization."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image, in this order.

    Attributes:
      crop_padding: pad by this many black pixels on each side, then crop back at a random offset.
      flip: mirror left and right with probability 1/2.
      rotation: rotate about the center by an angle uniform in +- this many degrees; nearest pixel,
        black outside.
    """

    crop_padding: int = 0
    flip: bool = False
    rotation: float = 0.0


def augment(keys: jax.Array, images: jax.Array, augmentation: Augmentation) -> jax.Array:
    """Augments each image with a key of its own.

    Args:
      keys: `(B,)` typed PRNG keys.
      images: `(B, H, W, C)`, of any dtype.
      augmentation: what to do.

    Returns:
      Images of the same shape and dtype. The same key gives the same result at any place in a batch.
    """
    if augmentation == Augmentation():
        return images
    return jax.vmap(lambda key, image: _augment_one(key, image, augmentation))(keys, images)


def _augment_one(key: jax.Array, image: jax.Array, augmentation: Augmentation) -> jax.Array:
    height, width, _ = image.shape
    pad = augmentation.crop_padding
    crop_key, flip_key, rotation_key = jax.random.split(key, 3)
    offset = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1) - pad
    flipped = jax.random.bernoulli(flip_key) & augmentation.flip
    angle = jnp.deg2rad(jax.random.uniform(rotation_key, (), minval=-1.0) * augmentation.rotation)

    # Each output pixel asks where it comes from, so the last operation is undone first.
    row, column = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    y, x = row - (height - 1) / 2, column - (width - 1) / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    row = jnp.round(cos * y - sin * x + (height - 1) / 2).astype(jnp.int32)
    column = jnp.round(sin * y + cos * x + (width - 1) / 2).astype(jnp.int32)
    inside = _inside(row, column, height, width)
    column = jnp.where(flipped, width - 1 - column, column)
    row, column = row + offset[0], column + offset[1]
    inside &= _inside(row, column, height, width)
    pixels = image[row.clip(0, height - 1), column.clip(0, width - 1)]
    return jnp.where(inside[..., None], pixels, jnp.zeros_like(pixels))


def _inside(row: jax.Array, column: jax.Array, height: int, width: int) -> jax.Array:
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: Any = jnp.float32) -> jax.Array:
    """Maps uint8 images `(B, H, W, C)` to `(image / 255 - mean) / std`, computed in float32, in `dtype`.

    Args:
      images: uint8.
      mean: per channel, in [0, 1].
      std: per channel, in [0, 1].
      dtype: of the result.
    """
    center, scale = (jnp.asarray(value, jnp.float32).reshape(1, 1, 1, -1) for value in (mean, std))
    return ((images.astype(jnp.float32) / 255 - center) / scale).astype(dtype)
