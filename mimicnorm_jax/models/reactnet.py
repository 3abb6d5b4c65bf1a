"""Binary ReActNets (Liu et al. 2020): convolutions of signs by binary kernels, and skips of real numbers.

The CIFAR form is a Bi-Real ResNet of one convolution a block, 3x3 stem and no max-pool; ReActNet-A, for ImageNet, has
blocks of a 3x3 and a pointwise stage. What is not known of the published nets from their text and was decided here: no
activation stands behind a stem, and the pointwise convolution on a CIFAR shortcut reads the pooled map itself, not its
sign.
"""

from functools import partial
from typing import Any

import jax
from flax import linen as nn
from jax import numpy as jnp

from mimicnorm_jax.functional.binary import binary_sign
from mimicnorm_jax.linen.scalars import ChannelBias, RPReLU
from mimicnorm_jax.methods.branch import Branch
from mimicnorm_jax.models.conv_norm import ConvNorm
from mimicnorm_jax.models.factory import LayerFactory, scale_width
from mimicnorm_jax.models.head import LastBatchNormHead
from mimicnorm_jax.models.resnet import ResidualBlock, apply_stages

BLOCKS = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2), *5 * ((16, 1),), (32, 2), (32, 1))
"""Channels, in multiples of the stem's, and stride of ReActNet-A's blocks."""


def _halved(x: jax.Array) -> jax.Array:
    """Means of 2x2 pixels, of what there is of them at an odd border, so that the shape is that of a convolution."""
    return nn.avg_pool(x, (2, 2), (2, 2), "SAME", count_include_pad=False)


class SignConv(nn.Module):
    """A convolution of the signs of a map shifted by a bias a channel, which ends a branch.

    Attributes:
      factory: says what the method has.
      features, window, strides: of the convolution.
      branch: of this one convolution.
      binary_kernel: whether its kernel is binary too.
    """

    factory: LayerFactory
    features: int
    window: int
    strides: int
    branch: Branch
    binary_kernel: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `(B, H, W, C)` to `(B, H', W', features)`."""
        signs = binary_sign(ChannelBias(self.factory.param_dtype, name="shift")(x))
        return ConvNorm(
            self.factory,
            self.features,
            self.window,
            strides=self.strides,
            bias=False,
            branch=self.branch,
            role="residual_out",
            binary=self.binary_kernel,
            name="conv",
        )(signs, train)


class BiRealBlock(ResidualBlock):
    """One 3x3 convolution of signs beside a skip, and RPReLU behind the sum.

    Where the shape changes, the skip is a mean of 2x2 pixels and a pointwise convolution.

    Attributes:
      binary_kernels: whether kernels are binary, and not only what they read.
      sign_shortcut: whether the pointwise convolution on the skip reads signs.
    """

    binary_kernels: bool
    sign_shortcut: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        factory, c = self.factory, self.channels
        # The scale of the input is not the convolution's to fold: the branch counts no sums.
        scaled = _scaled(factory, x, self.sums)
        branch = Branch(self.block, self.blocks)
        y = SignConv(factory, c, 3, self.strides, branch, self.binary_kernels, name="conv1")(scaled, train)
        return RPReLU(factory.param_dtype, name="act")(self._skip(x, scaled, branch, train) + y)

    def _skip(self, x: jax.Array, scaled: jax.Array, branch: Branch, train: bool) -> jax.Array:
        if (self.strides, x.shape[-1]) == (1, self.channels):
            return x
        pooled = _halved(scaled) if self.strides == 2 else scaled
        shortcut = ConvNorm(
            self.factory,
            self.channels,
            1,
            bias=False,
            branch=branch,
            role="shortcut",
            binary=self.binary_kernels,
            name="shortcut",
        )
        return shortcut(binary_sign(pooled) if self.sign_shortcut else pooled, train)


def _scaled(factory: LayerFactory, x: jax.Array, sums: int) -> jax.Array:
    """The input of a block, times what the method asks for where this many branches were summed onto it."""
    scale = factory.method.residual.block_scale(sums)
    return x if scale == 1.0 else x * scale


class ReActNet(LastBatchNormHead, nn.Module):
    """A stem, stages of blocks of one binary convolution, the first of each but the first with stride 2, a classifier.

    Stem and classifier are not binary.

    Attributes:
      factory: makes the layers.
      num_classes: number of logits.
      width: factor on all channels.
      stages: blocks in each stage.
      channels: of the stem and the first stage; doubled at each further stage.
      binary_kernels, sign_shortcut: as in `BiRealBlock`.
    """

    factory: LayerFactory
    num_classes: int
    width: float
    stages: tuple[int, ...]
    channels: int = 64
    binary_kernels: bool = True
    sign_shortcut: bool = False
    block: type[BiRealBlock] = BiRealBlock

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `(B, H, W, C)` to logits `(B, num_classes)`."""
        factory = self.factory
        x = ConvNorm(factory, scale_width(self.channels, self.width), 3, name="stem")(x, train)
        channels = [self.channels * 2**stage for stage in range(len(self.stages))]
        options = {"binary_kernels": self.binary_kernels, "sign_shortcut": self.sign_shortcut}
        x = apply_stages(self, x, train, channels=channels, **options)
        return factory.logits(factory.classifier(self.num_classes)(x.mean((1, 2))), train)


class TwoStageBlock(ResidualBlock):
    """A 3x3 stage on the channels there are, then a pointwise stage, each beside a skip and before an RPReLU.

    Where the block doubles the channels, its pointwise stage is two of them, each beside the skip, concatenated.

    Attributes:
      binary_kernels: as in `BiRealBlock`.
    """

    binary_kernels: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        factory, c = self.factory, x.shape[-1]
        scaled = _scaled(factory, x, self.sums)
        y = self._conv(3, self.strides, self.block, c, "conv1")(scaled, train)
        x = RPReLU(factory.param_dtype, name="act1")((x if self.strides == 1 else _halved(scaled)) + y)
        scaled = _scaled(factory, x, sums_after(self.sums, self.strides))
        names = ["conv2"] if self.channels == c else ["conv2a", "conv2b"]
        parts = [x + self._conv(1, 1, self.block + 1, c, name)(scaled, train) for name in names]
        return RPReLU(factory.param_dtype, name="act2")(jnp.concatenate(parts, axis=-1))

    def _conv(self, window: int, strides: int, block: int, features: int, name: str) -> SignConv:
        branch = Branch(block, self.blocks)
        return SignConv(self.factory, features, window, strides, branch, self.binary_kernels, name=name)


def sums_after(sums: int, strides: int) -> int:
    """Branches on the output of a stage whose input has `sums`: a stride scales the skip back to variance 1.

    Example:
      >>> sums_after(3, strides=1), sums_after(3, strides=2)
      (4, 1)
    """
    return sums + 1 if strides == 1 else 1


class ReActNetA(LastBatchNormHead, nn.Module):
    """A stem of stride 2, blocks of two binary stages, a classifier; stem and classifier are not binary.

    Attributes:
      factory, num_classes, width, binary_kernels: as in `ReActNet`.
    """

    factory: LayerFactory
    num_classes: int
    width: float
    binary_kernels: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `(B, H, W, C)`, H and W at least 32, to logits `(B, num_classes)`."""
        factory = self.factory
        x = ConvNorm(factory, scale_width(32, self.width), 3, strides=2, name="stem")(x, train)
        sums, stem = 0, x.shape[-1]
        for number, (multiple, strides) in enumerate(BLOCKS):
            part = partial(ReActNetA._block, number=number, channels=multiple * stem, sums=sums, train=train)
            x = factory.part(part)(self, x)
            sums = sums_after(sums, strides) + 1
        return factory.logits(factory.classifier(self.num_classes)(x.mean((1, 2))), train)

    def _block(self, x: jax.Array, number: int, channels: int, sums: int, train: bool) -> jax.Array:
        about: dict[str, Any] = {"block": 2 * number + 1, "blocks": 2 * len(BLOCKS), "sums": sums}
        block = TwoStageBlock(
            self.factory,
            channels,
            BLOCKS[number][1],
            **about,
            binary_kernels=self.binary_kernels,
            name=f"block{number + 1}",
        )
        return block(x, train)
