"""ResNets (He et al. 2016), in the paper's CIFAR form, 3x3 stem and no max-pool, and in its ImageNet form."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from flax import linen as nn

from mimicnorm_jax.methods.branch import Branch
from mimicnorm_jax.models.conv_norm import ConvNorm
from mimicnorm_jax.models.factory import LayerFactory, scale_width
from mimicnorm_jax.models.head import LastBatchNormHead


class ResidualBlock(nn.Module):
    """What a residual block is told.

    Attributes:
      factory: says what the method has.
      channels: of its 3x3 convolutions.
      strides: of the first of these.
      block, blocks, sums: its place in the network, see `Branch`.
    """

    factory: LayerFactory
    channels: int
    strides: int
    block: int
    blocks: int
    sums: int


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions; the ReLU comes after the sum.

    Attributes:
      scale_shortcut: whether a convolution on the shortcut has a scalar of its own, in methods with such scalars.
    """

    scale_shortcut: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        factory, c = self.factory, self.channels
        branch = Branch(self.block, self.blocks, 2, self.sums)
        entry = factory.residual_in("shift1")(x)
        y = ConvNorm(factory, c, 3, strides=self.strides, branch=branch, name="conv1")(entry, train)
        y = factory.residual_in("shift2")(factory.relu(y))
        y = ConvNorm(factory, c, 3, branch=branch, role="residual_out", name="conv2")(y, train)
        if x.shape == y.shape:
            return factory.relu(x + y, rectified=True)
        return factory.relu(make_shortcut(self, c, branch, scaled=self.scale_shortcut)(entry, train) + y)


class Bottleneck(ResidualBlock):
    """Pointwise, 3x3 with the stride, pointwise to four times the channels; ReLU after the sum.

    Attributes:
      scale_shortcut: as in `BasicBlock`, and whether that convolution has a bias, in methods with biases.
    """

    scale_shortcut: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        factory, c = self.factory, self.channels
        branch = Branch(self.block, self.blocks, 3, self.sums)
        entry = factory.residual_in("shift1")(x)
        y = factory.relu(ConvNorm(factory, c, 1, branch=branch, name="conv1")(entry, train))
        y = factory.residual_in("shift2")(y)
        y = ConvNorm(factory, c, 3, strides=self.strides, branch=branch, name="conv2")(y, train)
        y = factory.residual_in("shift3")(factory.relu(y))
        y = ConvNorm(factory, 4 * c, 1, branch=branch, role="residual_out", name="conv3")(y, train)
        if x.shape == y.shape:
            return factory.relu(x + y, cheap=True, rectified=True)
        shortcut = make_shortcut(self, 4 * c, branch, bias=self.scale_shortcut, scaled=self.scale_shortcut)
        return factory.relu(shortcut(entry, train) + y, cheap=True)


def make_shortcut(block: Any, features: int, branch: Branch, *, scaled: bool, bias: bool = True) -> ConvNorm:
    """The pointwise convolution on the shortcut of a block with `factory` and `strides`, in its compact method."""
    return ConvNorm(
        block.factory,
        features,
        1,
        strides=block.strides,
        bias=bias,
        branch=branch,
        role="shortcut",
        compensates=scaled,
        name="shortcut",
    )


def apply_stages(net: Any, x: jax.Array, train: bool, *, channels: Sequence[int], **options: Any) -> jax.Array:
    """The stages of residual blocks of a network, inside its compact method.

    Args:
      net: a module with `factory`, `width`, `block` and `stages`.
      x: the stem's output, `(B, H, W, C)`.
      train: whether BatchNorms see the batch.
      channels: of each stage, before the width's factor.
      **options: of the blocks.
    """
    for stage in range(len(net.stages)):
        blocks = partial(_stage, stage=stage, train=train, channels=channels[stage], options=options)
        x = net.factory.part(blocks)(net, x)
    return x


def _stage(net: Any, x: jax.Array, stage: int, train: bool, channels: int, options: dict[str, Any]) -> jax.Array:
    for i in range(net.stages[stage]):
        x = net.block(
            net.factory,
            scale_width(channels, net.width),
            strides=2 if stage > 0 and i == 0 else 1,
            block=sum(net.stages[:stage]) + i + 1,
            blocks=sum(net.stages),
            # A stage's first block reads what the stage before has summed up, but for the stem's output.
            sums=i if i or not stage else net.stages[stage - 1],
            name=f"stage{stage + 1}_block{i + 1}",
            **options,
        )(x, train)
    return x


class ResNet(LastBatchNormHead, nn.Module):
    """A stem, stages of residual blocks, the first of each but the first with stride 2, a classifier.

    Attributes:
      factory: makes the layers.
      num_classes: number of logits.
      width: factor on all channels.
      block: `BasicBlock` or `Bottleneck`.
      stages: blocks in each stage.
      channels: of the stem and the first stage; doubled at each further stage.
      imagenet: whether the stem is 7x7 with stride 2 and a max-pool, and the shortcut's convolution
        has a scalar of its own, in methods with such scalars, and in bottlenecks a bias.
    """

    factory: LayerFactory
    num_classes: int
    width: float
    block: type[BasicBlock] | type[Bottleneck]
    stages: tuple[int, ...]
    channels: int = 64
    imagenet: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `(B, H, W, C)` to logits `(B, num_classes)`."""
        factory = self.factory
        stem = scale_width(self.channels, self.width)
        if self.imagenet:
            x = factory.max_pool(ConvNorm(factory, stem, 7, strides=2, name="stem")(x, train), 3, padding=1)
        else:
            x = ConvNorm(factory, stem, 3, untouched=True, name="stem")(x, train)
        x = factory.relu(x)
        channels = [self.channels * 2**stage for stage in range(len(self.stages))]
        x = apply_stages(self, x, train, channels=channels, scale_shortcut=self.imagenet)
        x = factory.residual_in("classifier_shift")(x.mean((1, 2)))
        return factory.logits(factory.classifier(self.num_classes)(x), train)
