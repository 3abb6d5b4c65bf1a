"""What a residual branch has besides convolutions: its place in the network, scalars, scalar biases."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn import initializers


@dataclass(frozen=True)
class Branch:
    """A residual branch, for the initialisation of its convolutions.

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
    def fixup_shrink(self) -> float:
        """Fixup's factor L^(-1/(2m-2)) on the standard deviation of all kernels but the last."""
        return self.blocks ** (-1 / (2 * self.length - 2))


class ScalarBias(nn.Module):
    """Adds one learnable scalar to the whole tensor."""

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.param("bias", initializers.zeros, (), self.param_dtype).astype(x.dtype)


class ScaleAndShift(nn.Module):
    """Multiplies by one learnable scalar and adds another."""

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", initializers.ones, (), self.param_dtype)
        bias = self.param("bias", initializers.zeros, (), self.param_dtype)
        return x * scale.astype(x.dtype) + bias.astype(x.dtype)
