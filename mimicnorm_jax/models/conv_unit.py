"""The unit that networks are made of: a convolution and what its method puts behind it."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers

from mimicnorm_jax.functional import activations, kernels
from mimicnorm_jax.linen.layers import CenteredConv
from mimicnorm_jax.models.branch import ScalarBias


class ConvNorm(nn.Module):
    """A convolution and what its method puts behind it: BatchNorm, a scalar bias, or nothing.

    Pads explicitly by half the window, as the published code does; at stride 2 this is not 'SAME'.
    """

    factory: Any  # the `LayerFactory` that made it
    features: int
    window: int
    strides: int
    padding: int
    groups: int
    use_bias: bool
    scalar_bias: bool
    batch_norm: bool
    scale: float | None
    kernel_init: Callable[..., jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, factor: jax.Array | None = None) -> jax.Array:
        make = self.factory
        is_cheap = self.window == 1 and self.features >= x.shape[-1]
        x = CenteredConv(
            self.features,
            (self.window, self.window),
            strides=self.strides,
            padding=self.padding,
            feature_group_count=self.groups,
            use_bias=self.use_bias,
            dtype=make.dtype,
            param_dtype=make.param_dtype,
            kernel_init=self.kernel_init,
            rule=make.rule if make.method.centers and make.center_in_call else kernels.never,
            scale_init=None if self.scale is None else initializers.constant(self.scale),
            name="conv",
        )(x, factor)
        if self.scalar_bias:
            x = ScalarBias(make.param_dtype, name="shift")(x)
        if self.batch_norm:
            # Normalization needs the convolution's output, which its ReLU's output does not give back.
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=make.dtype,
                param_dtype=make.param_dtype,
                axis_name=make.axis_name,
                name="bn",
            )(x if is_cheap else checkpoint_name(x, activations.SAVED))
        return x
