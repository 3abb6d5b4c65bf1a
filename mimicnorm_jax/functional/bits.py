"""Small whole numbers packed into bytes, for what a backward pass keeps beside feature maps."""

import functools
import math

import jax
import jax.numpy as jnp


def _share(channels: int, bits: int) -> tuple[int, int]:
    """Numbers in a byte, and bytes for `channels` of them."""
    per_byte = 8 // bits
    return per_byte, math.ceil(channels / per_byte)


def width(places: int, x: jax.Array) -> int:
    """Bits in which numbers below `places` are kept, one for each element of `(..., C)`; as many as `pack` takes.

    A whole byte where the channels are spread over an explicit mesh: else it would hold numbers of several devices.

    Args:
      places: at most 256.
      x: the array.

    Example:
      >>> width(2, jnp.ones(3)), width(9, jnp.ones(3))
      (1, 4)
    """
    if jax.typeof(x).sharding.spec[-1] is not None:
        return 8
    return next(bits for bits in (1, 2, 4, 8) if places <= 2**bits)


def pack(values: jax.Array, bits: int) -> jax.Array:
    """Packs numbers of `bits` bits along the last axis, without a loop or a gather.

    A byte holds numbers that are far from each other, not neighbors, so that packing is a sum of shifted slices.

    Args:
      values: `(..., C)`, boolean or uint8, each below `2**bits`.
      bits: 1, 2, 4 or 8.

    Returns:
      `(..., ceil(C bits / 8))`, uint8.

    Example:
      >>> pack(jnp.array([True, False, True]), 1).tolist()
      [5]
    """
    if bits == 8:
        return values.astype(jnp.uint8)
    per_byte, packed = _share(values.shape[-1], bits)
    padding = per_byte * packed - values.shape[-1]
    values = jnp.pad(values.astype(jnp.uint8), [(0, 0)] * (values.ndim - 1) + [(0, padding)])

    def of_slices(values: jax.Array) -> jax.Array:
        parts = [values[..., k * packed : (k + 1) * packed] << jnp.uint8(bits * k) for k in range(per_byte)]
        return functools.reduce(jnp.bitwise_or, parts)

    def of_reduction(values: jax.Array) -> jax.Array:
        parts = values.reshape(*values.shape[:-1], per_byte, packed)
        shifts = bits * jax.lax.broadcasted_iota(jnp.uint8, parts.shape, parts.ndim - 2)
        return jnp.bitwise_or.reduce(parts << shifts, axis=-2)

    # XLA drops optimization barriers on a CPU before it fuses, and would pack anew for each number unpacked: it never
    # does so with a reduction. On a TPU the slices need fewer copies.
    return jax.lax.platform_dependent(values, cpu=of_reduction, default=of_slices)


def unpack(packed: jax.Array, bits: int, channels: int) -> jax.Array:
    """The numbers that `pack` packed, `(..., channels)` uint8.

    Example:
      >>> unpack(jnp.array([5], jnp.uint8), 1, 3).tolist()
      [1, 0, 1]
    """
    if bits == 8:
        return packed
    per_byte, count = _share(channels, bits)
    spread = jnp.broadcast_to(packed[..., None, :], (*packed.shape[:-1], per_byte, count))
    shifts = bits * jax.lax.broadcasted_iota(jnp.uint8, spread.shape, spread.ndim - 2)
    values = (spread >> shifts) & jnp.uint8(2**bits - 1)
    return values.reshape(*packed.shape[:-1], per_byte * count)[..., :channels]
