"""Activations whose backward pass needs only their output.

The next layer keeps that output anyway, so they add nothing to what is stored for the backward
pass. Forward-mode, nested and batched derivatives work as for any JAX function.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

_Elementwise = Callable[[jax.Array], jax.Array]


def _from_output(function: _Elementwise, is_linear: _Elementwise) -> _Elementwise:
    @jax.custom_jvp
    def activation(x: jax.Array) -> jax.Array:
        return function(x)

    @activation.defjvp
    def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        y = activation(*primals)

        # The checkpoint makes autodiff keep y, which it has, and not the mask, which it would store.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def tangent(y: jax.Array, dx: jax.Array) -> jax.Array:
            return jnp.where(is_linear(y), dx, jnp.zeros_like(dx))

        return y, tangent(y, *tangents)

    return activation


_relu = _from_output(lambda x: jnp.maximum(x, 0), lambda y: y > 0)
_relu6 = _from_output(lambda x: jnp.clip(x, 0, 6), lambda y: (y > 0) & (y < 6))


def relu(x: jax.Array) -> jax.Array:
    """`max(x, 0)` elementwise, with derivative 0 at 0.

    Example:
      >>> relu(jnp.array([-1.0, 2.0])).tolist()
      [0.0, 2.0]
    """
    return _relu(x)


def relu6(x: jax.Array) -> jax.Array:
    """`min(max(x, 0), 6)` elementwise, with derivative 0 at 0 and at 6.

    Example:
      >>> relu6(jnp.array([-1.0, 2.0, 7.0])).tolist()
      [0.0, 2.0, 6.0]
    """
    return _relu6(x)
