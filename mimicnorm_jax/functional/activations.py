"""Activations whose backward pass needs only their output, or one bit for each element.

Where the next layer keeps that output anyway, they add nothing to what is stored for the backward
pass. Forward-mode, nested and batched derivatives work as for any JAX function.

What the derivative reads stands behind an `optimization_barrier`. Without it XLA fuses the activation into its own
derivative and keeps the input beside the output: two maps for each convolution, on a GPU and on a TPU. With it the
input has a single reader, and cuDNN makes one kernel of convolution, bias, residual and ReLU.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.lax import optimization_barrier

from mimicnorm_jax.functional import bits

_Elementwise = Callable[[jax.Array], jax.Array]

SAVED = "saved"
"""Name of the values that rematerialization by `jax.checkpoint_policies.save_only_these_names` is to keep."""


def _save_output_only(function: _Elementwise, is_linear: _Elementwise, *, as_mask: bool, named: bool) -> _Elementwise:
    @jax.custom_jvp
    def activation(x: jax.Array) -> jax.Array:
        return optimization_barrier(function(x))

    def packed(y: jax.Array) -> jax.Array:
        # Else XLA packs in the backward pass, and keeps the output until then.
        mask = jnp.atleast_1d(is_linear(y))
        return optimization_barrier(bits.pack(mask, bits.width(2, mask)))

    def unpacked(mask: jax.Array, like: jax.Array) -> jax.Array:
        wide = jnp.atleast_1d(like)
        return bits.unpack(mask, bits.width(2, wide), wide.shape[-1]).reshape(like.shape) != 0

    @activation.defjvp
    def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        y = activation(*primals)
        # Named here, where the derivative reads the named value too: a name behind the activation would not be enough.
        y = checkpoint_name(y, SAVED) if named else y

        # The checkpoint makes autodiff keep its argument, and neither the mask that it makes of it nor the zeros.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def tangent(kept: jax.Array, dx: jax.Array) -> jax.Array:
            return jnp.where(unpacked(kept, dx) if as_mask else is_linear(kept), dx, jnp.zeros_like(dx))

        return y, tangent(packed(y) if as_mask else y, *tangents)

    return activation


def _max0(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0)


def _above0(y: jax.Array) -> jax.Array:
    return y > 0


def _both(function: _Elementwise, is_linear: _Elementwise, *, as_mask: bool = False) -> dict[bool, _Elementwise]:
    return {named: _save_output_only(function, is_linear, as_mask=as_mask, named=named) for named in (True, False)}


_RELU = _both(_max0, _above0)
_RELU_SAVE_MASK = _both(_max0, _above0, as_mask=True)
_RELU6 = _both(lambda x: jnp.clip(x, 0, 6), lambda y: (y > 0) & (y < 6))


def relu(x: jax.Array, *, saved: bool = True) -> jax.Array:
    """`max(x, 0)` elementwise, with derivative 0 at 0.

    Args:
      x: of any shape.
      saved: whether a rematerialization policy that goes by the name `SAVED` keeps the output.

    Example:
      >>> relu(jnp.array([-1.0, 2.0])).tolist()
      [0.0, 2.0]
    """
    return _RELU[saved](x)


def relu_save_mask(x: jax.Array, *, saved: bool = True) -> jax.Array:
    """`relu` of `(..., C)` that keeps a mask of one bit an element: for outputs that no layer keeps, as of a sum.

    A byte an element where an explicit mesh spreads the channels.

    Args:
      x: of any shape.
      saved: as in `relu`.

    Example:
      >>> relu_save_mask(jnp.array([-1.0, 2.0])).tolist()
      [0.0, 2.0]
    """
    return _RELU_SAVE_MASK[saved](x)


def relu6(x: jax.Array, *, saved: bool = True) -> jax.Array:
    """`min(max(x, 0), 6)` elementwise, with derivative 0 at 0 and at 6.

    Args:
      x: of any shape.
      saved: as in `relu`.

    Example:
      >>> relu6(jnp.array([-1.0, 2.0, 7.0])).tolist()
      [0.0, 2.0, 6.0]
    """
    return _RELU6[saved](x)
