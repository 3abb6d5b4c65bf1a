"""What a residual branch has besides convolutions: its place in the network, scalars, scalar biases."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers

from mimicnorm_jax.functional.activations import relu_save_mask


@dataclass(frozen=True)
class Branch:
    """A residual branch, for the initialization of its convolutions.

    Attributes:
      block: the running index of its block over the whole net, from 1.
      blocks: how many blocks the net has.
      kernels: `(shape, groups)` of the branch's convolutions whose gain its scalar makes up for.
      length: how many convolutions it has.
    """

    block: int
    blocks: int
    kernels: tuple[tuple[tuple[int, ...], int], ...]
    length: int

    @property
    def fixup_scale(self) -> float:
        """Fixup's factor L^(-1/(2m-2)) on the standard deviation of all kernels but the last."""
        return self.blocks ** (-1 / (2 * self.length - 2))


class ScalarBias(nn.Module):
    """Adds one learnable scalar to the whole tensor."""

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.param("bias", initializers.zeros, (), self.param_dtype).astype(x.dtype)


class ScaledReLU(nn.Module):
    """s relu(z) + b with two learnable scalars, as sign(s) relu(|s| z) + b; or relu(z).

    So the gradient of s comes through the convolution before, and one bit an element is kept instead of the ReLU's
    output; a pointwise convolution before gives the output again. At s = 0, which no run meets but by being set there,
    that gradient is 0 instead of the true one.

    Attributes:
      scaled: whether the scalars are there.
      param_dtype: of the scalars.
    """

    scaled: bool
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        if self.scaled:
            self.scale = self.param("scale", initializers.ones, (), self.param_dtype)
            self.bias = self.param("bias", initializers.zeros, (), self.param_dtype)

    def factor(self) -> jax.Array | None:
        """|s|, by which the convolution before has to multiply its kernel and bias."""
        return jnp.abs(self.scale) if self.scaled else None

    def __call__(self, z: jax.Array) -> jax.Array:
        """Maps |s| z to s relu(z) + b."""
        y = relu_save_mask(z, saved=False)
        return y * jnp.sign(self.scale).astype(y.dtype) + self.bias.astype(y.dtype) if self.scaled else y
