"""Activations whose backward pass needs only their output, or one byte for each element.

Where the next layer keeps that output anyway, they add nothing to what is stored for the backward
pass. Forward-mode, nested and batched derivatives work as for any JAX function.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

_Elementwise = Callable[[jax.Array], jax.Array]


def _lean(function: _Elementwise, is_linear: _Elementwise, *, keeps_output: bool = True) -> _Elementwise:
    @jax.custom_jvp
    def activation(x: jax.Array) -> jax.Array:
        return function(x)

    @activation.defjvp
    def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        y = activation(*primals)

        # The checkpoint makes autodiff keep its argument: y, which it has, or the mask, but not both
        # and not the zeros.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def tangent(kept: jax.Array, dx: jax.Array) -> jax.Array:
            return jnp.where(is_linear(kept) if keeps_output else kept, dx, jnp.zeros_like(dx))

        return y, tangent(y if keeps_output else is_linear(y), *tangents)

    return activation


_relu = _lean(lambda x: jnp.maximum(x, 0), lambda y: y > 0)
_relu_of_mask = _lean(lambda x: jnp.maximum(x, 0), lambda y: y > 0, keeps_output=False)
_relu6 = _lean(lambda x: jnp.clip(x, 0, 6), lambda y: (y > 0) & (y < 6))


def relu(x: jax.Array) -> jax.Array:
    """`max(x, 0)` elementwise, with derivative 0 at 0.

    Example:
      >>> relu(jnp.array([-1.0, 2.0])).tolist()
      [0.0, 2.0]
    """
    return _relu(x)


def relu_of_mask(x: jax.Array) -> jax.Array:
    """`relu` that keeps a mask of one byte an element: for outputs that no layer keeps, as of a sum.

    Example:
      >>> relu_of_mask(jnp.array([-1.0, 2.0])).tolist()
      [0.0, 2.0]
    """
    return _relu_of_mask(x)


def relu6(x: jax.Array) -> jax.Array:
    """`min(max(x, 0), 6)` elementwise, with derivative 0 at 0 and at 6.

    Example:
      >>> relu6(jnp.array([-1.0, 2.0, 7.0])).tolist()
      [0.0, 2.0, 6.0]
    """
    return _relu6(x)
