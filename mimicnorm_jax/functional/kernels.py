"""Pure functions of kernels: weight centering (MimicNorm's "weight mean"), its gain, and weight standardization.

A kernel follows Flax's layout: the last axis is the output channel, every other axis is fan-in,
`(n_in, n_out)` for dense layers and `(*window, n_in / groups, n_out)` for convolutions.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Shape = Sequence[int]

PUBLISHED_GAIN = 1.2
"""The published code's rounding of `gain`, used as a learnable scalar."""
PUBLISHED_VARIANCE = 2.8
"""The published code's rounding of `2 gain**2`, used as the numerator of a kernel's variance."""


def fan_in(shape: Shape) -> int:
    """Number of inputs to one output of a kernel of this shape: the product of all axes but the last.

    Raises:
      ValueError: for a shape of less than two axes.

    Example:
      >>> fan_in((3, 3, 64, 128))
      576
    """
    if len(shape) < 2:
        raise ValueError(f"a kernel has a fan-in and an output axis; got shape {tuple(shape)}")
    return math.prod(shape[:-1])


def center(kernel: jax.Array) -> jax.Array:
    r"""Subtracts from each output channel its mean over the fan-in (section 3.1, "weight mean").

    $\bar W_{ij} = W_{ij} - \frac1n \sum_k W_{kj}$, computed in at least float32.

    Args:
      kernel: `(..., n_out)`, of any rank from 2 on; grouped kernels hold `n_in / groups` inputs.

    Returns:
      The centered kernel, in the shape and dtype of `kernel`. Its sum over the fan-in is zero for
      every output channel, and so is that of its gradient: centering is an orthogonal projection.

    Raises:
      ValueError: if the fan-in is below 2, where centering would leave nothing.

    Example:
      >>> center(jnp.array([[1.0, 5.0], [3.0, 5.0]])).tolist()
      [[-1.0, 0.0], [1.0, 0.0]]
    """
    return _centered(kernel).astype(kernel.dtype).reshape(kernel.shape)


def standardize(kernel: jax.Array, *, epsilon: float = 1e-5) -> jax.Array:
    r"""Gives each output channel mean 0 and variance 1/n over its fan-in n (weight standardization, Qiao et al. 2019).

    $\hat W = (W - \mu) / \sqrt{n \sigma^2 + \epsilon}$, computed in at least float32. For a layer that a normalization
    follows, which makes the scale free.

    Args:
      kernel: as in `center`.
      epsilon: added to n times the variance.

    Returns:
      The standardized kernel, in the shape and dtype of `kernel`; it ignores constants added to an output channel and,
      up to `epsilon`, positive factors on it.

    Raises:
      ValueError: as `center`.

    Example:
      >>> standardize(jnp.array([[1.0], [3.0], [1.0], [3.0]])).round(4).tolist()
      [[-0.5], [0.5], [-0.5], [0.5]]
    """
    centered = _centered(kernel)
    return (centered * lax.rsqrt(_energy(centered) + epsilon)).astype(kernel.dtype).reshape(kernel.shape)


def scaled_standardize(kernel: jax.Array, *, gain: float = 1.0, epsilon: float = 1e-4) -> jax.Array:
    r"""Weight standardization with a gain, for networks that no normalization follows (Brock, De, Smith 2021).

    $\hat W = g (W - \mu) / \sqrt{\max(n \sigma^2, \epsilon)}$, computed in at least float32.

    Args:
      kernel: as in `center`.
      gain: g; `sqrt(2) gain(n)` for an input that comes out of a ReLU, unless the activation has that factor.
      epsilon: the least n times variance, below which a channel is not blown up to variance g^2/n.

    Returns:
      As `standardize`, of variance `gain**2 / n`.

    Raises:
      ValueError: as `center`.

    Example:
      >>> scaled_standardize(jnp.array([[1.0], [3.0], [1.0], [3.0]]), gain=2.0).round(4).tolist()
      [[-1.0], [1.0], [-1.0], [1.0]]
    """
    centered = _centered(kernel)
    factor = gain * lax.rsqrt(jnp.maximum(_energy(centered), epsilon))
    return (centered * factor).astype(kernel.dtype).reshape(kernel.shape)


def gain(n: int) -> float:
    r"""The factor on He's standard deviation that keeps the energy of a centered ReLU layer (Theorem 3).

    $\sqrt{n / ((n-1)(1-1/\pi))}$; it tends to 1.2112 for large fan-in `n`.

    Raises:
      ValueError: if `n < 2`.

    Example:
      >>> round(gain(10**9), 4)
      1.2112
    """
    if n < 2:
        raise ValueError(f"the gain of a centered kernel needs a fan-in of at least 2; got {n}")
    return math.sqrt(n / ((n - 1) * (1 - 1 / math.pi)))


def _centered(kernel: jax.Array) -> jax.Array:
    """In at least float32; as a matrix unless its fan-in is spread over devices."""
    if fan_in(kernel.shape) < 2:
        raise ValueError(
            f"centering a kernel of fan-in 1 leaves only zeros; got shape {kernel.shape}: leave such kernels out by a "
            "rule, as kernel_transform=KernelTransform(center, fan_in_above(1)) does in a layer"
        )
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    spread = any(axis is not None for axis in jax.typeof(wide).sharding.spec[:-1])
    if not spread:  # As a matrix: on a CPU the sum over one axis takes half the time of that over three.
        wide = wide.reshape(-1, kernel.shape[-1])
    return wide - wide.mean(axis=tuple(range(wide.ndim - 1)), keepdims=True)


def _energy(centered: jax.Array) -> jax.Array:
    """n times the variance of each output channel."""
    square = abs(centered) ** 2 if jnp.iscomplexobj(centered) else centered**2
    return square.sum(axis=tuple(range(centered.ndim - 1)), keepdims=True)
