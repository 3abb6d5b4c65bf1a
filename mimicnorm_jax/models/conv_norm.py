"""The unit that networks are made of: a convolution and what its method puts behind it."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers

from mimicnorm_jax.functional import activations
from mimicnorm_jax.functional.binary import binarize
from mimicnorm_jax.functional.rules import Rule
from mimicnorm_jax.functional.transform import IDENTITY, KernelTransform, compose
from mimicnorm_jax.init_schemes import KernelSpec
from mimicnorm_jax.linen.conv import TransformedConv
from mimicnorm_jax.linen.scalars import ScalarBias
from mimicnorm_jax.methods.branch import Branch, Role, Site
from mimicnorm_jax.models.factory import LayerFactory


class ConvNorm(nn.Module):
    """A convolution with a square window and what its method puts behind it: a norm, a scalar bias, or nothing.

    Pads explicitly, by default half the window on each side, as the published code does; at stride 2 this is not
    'SAME'.

    Attributes:
      factory: says what the method has here.
      features: output channels.
      window: side of the window.
      strides: in both directions.
      padding: on each side; None for half the window.
      groups: of the convolution.
      bias: whether it has a bias, where the method has biases, or by which rule of its kernel.
      norm: False where no norm stands behind it, even in methods that have norms.
      classifier: whether it gives the logits; it then has no norm.
      branch: the branch that it belongs to, or stands beside as the shortcut.
      role: in its block.
      compensates: whether the published nets have a learnable scalar here that makes up for the gain of the branch's
        kernels so far, or outside of a branch of this kernel.
      untouched: whether the published baselines (Fixup, BatchNorm) never initialize it.
      binary: whether its kernel, as the method transforms it, is binarized; the method's constant on a block's input
        does not reach it.
    """

    factory: LayerFactory
    features: int
    window: int
    strides: int = 1
    padding: int | None = None
    groups: int = 1
    bias: bool | Rule = True
    norm: bool = True
    classifier: bool = False
    branch: Branch | None = None
    role: Role = "conv"
    compensates: bool = False
    untouched: bool = False
    binary: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, scale: jax.Array | None = None) -> jax.Array:
        """Maps `(B, H, W, C)` to `(B, H', W', features)`; `scale`, a scalar `()`, multiplies kernel and bias."""
        factory, residual = self.factory, self.factory.method.residual
        shape = (self.window, self.window, x.shape[-1] // self.groups, self.features)
        transform = factory.method.kernel_transform.of(factory.rule, classifier=self.classifier)
        # Centered also where the optimizer does it instead.
        kernel = KernelSpec(shape, transform.takes(shape, self.groups), self.groups, self.untouched)
        counts = (factory.published.scalar_rule or factory.rule)(shape, self.groups)
        site = Site.of(kernel, counts, self.role, self.branch)
        has_norms = factory.method.norm is not None and not self.classifier
        normalized = self.norm and has_norms
        bias = self.bias if isinstance(self.bias, bool) else self.bias(shape, self.groups)
        bias = factory.published.keep_conv_bias if normalized else bias
        scalar = residual.scalar(factory.scheme, site, self.compensates)
        is_cheap = self.window == 1 and self.features >= x.shape[-1]
        y = TransformedConv(
            self.features,
            (self.window, self.window),
            strides=self.strides,
            padding=self.window // 2 if self.padding is None else self.padding,
            feature_group_count=self.groups,
            use_bias=factory.method.conv_biases or (bias and not residual.scalar_biases),
            dtype=factory.dtype,
            param_dtype=factory.param_dtype,
            kernel_init=self._kernel_init(site),
            kernel_transform=self._in_call(transform, residual.input_scale(site)),
            scale_init=None if scalar is None else initializers.constant(scalar),
            recompute_kernel=factory.recompute_kernel,
            name="conv",
        )(x, self._times_constant(self._gains(scale), residual.output_scale(site)))
        if residual.scalar_biases and self.role != "shortcut":
            y = ScalarBias(factory.param_dtype, name="shift")(y)
        if has_norms and not is_cheap:
            # Normalization needs the convolution's output, which its ReLU's output does not give back.
            y = checkpoint_name(y, activations.SAVED)
        return factory.norm(train)(y) if normalized else y

    def _in_call(self, transform: KernelTransform, input_scale: float) -> KernelTransform:
        if self.factory.method.centers and not self.factory.center_in_call:
            transform = IDENTITY
        if self.binary:
            return compose(transform, KernelTransform(binarize))
        return transform if input_scale == 1.0 else compose(transform, KernelTransform(lambda w: w * input_scale))

    def _gains(self, scale: jax.Array | None) -> jax.Array | None:
        """The given scale, times the method's learnable gains by channel."""
        if not self.factory.method.residual.channel_gains:
            return scale
        gains = self.param("gain", initializers.ones, (self.features,), self.factory.param_dtype)
        return gains if scale is None else gains * scale

    def _times_constant(self, scale: jax.Array | None, factor: float) -> jax.Array | None:
        if factor == 1.0:
            return scale
        constant = jnp.asarray(factor, self.factory.param_dtype)
        return constant if scale is None else scale * constant

    def _kernel_init(self, site: Site) -> Callable[..., jax.Array]:
        def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32, **_: Any) -> jax.Array:
            factory = self.factory
            return factory.method.residual.kernel_init(factory.scheme, factory.published, site)(key, shape, dtype)

        return init
