"""Initial values for layers with centered kernels, wherever those stand: the exact gain, and residual scalars."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, constant, variance_scaling

from mimicnorm_jax.functional import kernels
from mimicnorm_jax.functional.rules import Rule, always


def centered_he(
    rule: Rule = always, groups: int = 1, *, out_axis: int | Sequence[int] = -1, batch_axis: int | Sequence[int] = ()
) -> Initializer:
    r"""Normal kernels of variance $2 g^2 / n$ where they are centered, $2 / n$ elsewhere (Theorem 3).

    n is the fan-in and g its `gain`: a centered kernel behind a ReLU then keeps the mean square, as He's variance does
    with a kernel that is not centered. What a layer that centers always takes is `centered_he()`.

    Args:
      rule: which kernels are centered, such as a transform's `centers`; asked with the shape `(..., n_out)`.
      groups: of the layer; asked of the rule.
      out_axis: axis or axes of the output channels, as in `jax.nn.initializers.variance_scaling`; -2 for the kernel of
        an `nn.ConvTranspose` with `transpose_kernel`.
      batch_axis: axes along which kernels of the same fan-in lie side by side, as there; `(0, 1)` for the places of a
        2-D `nn.ConvLocal`.

    Returns:
      An initializer `(key, shape, dtype) -> kernel`. It raises ValueError for a centered kernel of fan-in 1.

    Example:
      >>> kernel = centered_he()(jax.random.key(0), (3, 3, 64, 512), jnp.float32)
      >>> round(float(576 * kernel.var()), 1)
      2.9
    """

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        outputs, batch = ((axes,) if isinstance(axes, int) else tuple(axes) for axes in (out_axis, batch_axis))
        aside = {axis % len(shape) for axis in (*outputs, *batch)}
        flat = (*(size for axis, size in enumerate(shape) if axis not in aside), math.prod(shape[i] for i in outputs))
        inputs = [axis for axis in range(len(shape)) if axis not in aside]
        gain = kernels.gain(kernels.fan_in(flat)) if rule(flat, groups) else 1.0
        draw = variance_scaling(2 * gain**2, "fan_in", "normal", inputs, outputs, batch)
        return draw(key, tuple(shape), dtype, out_sharding)

    return init


def residual_scale(block: int, gains: Sequence[float] = ()) -> Initializer:
    """What the learnable scalar at the end of a residual branch starts at: the product of `gains`, over `block`.

    With 1/l on the l-th branch a sum of branches that keep the mean square stays below a bound at any depth: of the
    product of 1 + 1/l^2, which is 3.68. The published ResNets start all kernels with He's variance and their scalars at
    1.2^k/l: `residual_scale(l, [PUBLISHED_GAIN] * k)`. Where kernels start with `centered_he`, the default of centered
    layers, they have their gain already: `residual_scale(l)`.

    Args:
      block: l, the residual block's running index over the whole net, from 1.
      gains: of those centered kernels of the branch that start with He's variance, 2/n.

    Returns:
      An initializer, for `scale_init=` of our layers or a parameter of shape `()` of your own.

    Raises:
      ValueError: for a `block` below 1.

    Example:
      >>> from mimicnorm_jax.functional.kernels import PUBLISHED_GAIN
      >>> float(residual_scale(4, [PUBLISHED_GAIN] * 2)(jax.random.key(0), (), jnp.float32))
      0.36000001430511475
    """
    if block < 1:
        raise ValueError(f"residual_scale counts residual blocks from 1 over the whole net; got block={block}")
    return constant(math.prod(gains) / block)
