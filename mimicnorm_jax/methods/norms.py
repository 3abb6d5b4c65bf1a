"""What normalizes behind a convolution."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from mimicnorm_jax.linen.dynamic_tanh import DynamicTanh as DynamicTanhLayer


@dataclass(frozen=True)
class NormOptions:
    """What a network says of its norms.

    Attributes:
      dtype, param_dtype: of activations and of parameters.
      axis_name: mapped axis over which a batch's statistics are synchronized, or None.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None


class Norm(Protocol):
    """Makes the norm behind one convolution.

    Attributes:
      couples_batch: whether in training an image's output depends on the others in its batch.
      divides_scale: whether a factor on its input, the same everywhere, changes nothing of its output but by epsilon.
    """

    couples_batch: ClassVar[bool]
    divides_scale: ClassVar[bool]

    def __call__(self, train: bool, options: NormOptions) -> Callable[[jax.Array], jax.Array]:
        """A layer `(B, H, W, C)` to the same, to be called inside a compact method."""
        ...


@dataclass(frozen=True)
class BatchNorm:
    """Flax's BatchNorm with the momentum and epsilon of the paper's nets."""

    couples_batch: ClassVar[bool] = True
    divides_scale: ClassVar[bool] = True

    def __call__(self, train: bool, options: NormOptions) -> Callable[[jax.Array], jax.Array]:
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=options.dtype,
            param_dtype=options.param_dtype,
            axis_name=options.axis_name,
            name="bn",
        )


@dataclass(frozen=True)
class GroupNorm:
    """Flax's GroupNorm (Wu & He 2018).

    Attributes:
      groups: of channels; where they do not divide the channels, the greatest divisor of both. Of narrow layers half as
        many groups as channels: a channel by itself would be instance normalization.
    """

    groups: int = 32
    couples_batch: ClassVar[bool] = False
    divides_scale: ClassVar[bool] = True

    def __call__(self, train: bool, options: NormOptions) -> Callable[[jax.Array], jax.Array]:
        def norm(x: jax.Array) -> jax.Array:
            channels = x.shape[-1]
            groups = math.gcd(self.groups, channels)
            groups = max(1, channels // 2) if groups == channels else groups
            layer = nn.GroupNorm(groups, epsilon=1e-5, dtype=options.dtype, param_dtype=options.param_dtype, name="gn")
            return layer(x)

        return norm


@dataclass(frozen=True)
class DynamicTanh:
    """`linen.DynamicTanh`, elementwise and without statistics, where others normalize.

    Attributes:
      alpha: where its scalar starts.
    """

    alpha: float = 0.5
    couples_batch: ClassVar[bool] = False
    divides_scale: ClassVar[bool] = False

    def __call__(self, train: bool, options: NormOptions) -> Callable[[jax.Array], jax.Array]:
        return DynamicTanhLayer(self.alpha, dtype=options.dtype, param_dtype=options.param_dtype, name="dyt")
