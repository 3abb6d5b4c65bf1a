"""Learnable scalars that stand between layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from mimicnorm_jax.functional.activations import relu_save_mask


class ScalarBias(nn.Module):
    """Adds one learnable scalar to the whole tensor."""

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.param("bias", initializers.zeros, (), self.param_dtype).astype(x.dtype)


class ChannelBias(nn.Module):
    """Adds a learnable bias to each channel of `(..., C)`."""

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        bias = self.param("bias", initializers.zeros, (x.shape[-1],), self.param_dtype).astype(x.dtype)
        return x + _wide(bias, x)


class RPReLU(nn.Module):
    """PReLU of `(..., C)` between two biases, all learnable by channel (ReActNet); its slope starts at 1/4."""

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = ChannelBias(self.param_dtype, name="before")(x)
        slope = self.param("slope", initializers.constant(0.25), (x.shape[-1],), self.param_dtype).astype(x.dtype)
        return ChannelBias(self.param_dtype, name="after")(jnp.where(x > 0, x, _wide(slope, x) * x))


def _wide(values: jax.Array, x: jax.Array) -> jax.Array:
    return values.reshape((1,) * (x.ndim - 1) + values.shape)


class ScaledReLU(nn.Module):
    """s relu(z) + b with two learnable scalars, as sign(s) relu(|s| z) + b; or relu(z).

    So the gradient of s comes through the convolution before, and one bit an element is kept instead of the ReLU's
    output; a pointwise convolution before gives the output again. At s = 0, which no run meets but by being set there,
    that gradient is 0 instead of the true one.

    Attributes:
      scaled: whether the scalars are there.
      param_dtype: of the scalars.
      relu: the ReLU.
      sign_only: whether s is 1 or -1, so that the convolution before is left alone.
    """

    scaled: bool
    param_dtype: Any = jnp.float32
    relu: Callable[[jax.Array], jax.Array] = partial(relu_save_mask, saved=False)
    sign_only: bool = False

    def setup(self) -> None:
        if self.scaled:
            self.scale = self.param("scale", initializers.ones, (), self.param_dtype)
            self.bias = self.param("bias", initializers.zeros, (), self.param_dtype)

    def conv_scale(self) -> jax.Array | None:
        """|s|, a scalar array, by which the convolution before has to multiply its kernel and bias."""
        return jnp.abs(self.scale) if self.scaled and not self.sign_only else None

    def __call__(self, z: jax.Array) -> jax.Array:
        """Maps |s| z to s relu(z) + b."""
        y = self.relu(z)
        return y * jnp.sign(self.scale).astype(y.dtype) + self.bias.astype(y.dtype) if self.scaled else y
