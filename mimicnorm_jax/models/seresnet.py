"""Squeeze-and-excitation ResNets (Hu et al. 2018), in the CIFAR form of the paper's code.

They are not the ResNets of `resnet` with a gate: a branch ends in a ReLU before it is gated and summed, the last stage
has 516 channels, every convolution a bias, and the shortcut's convolution a scalar of its own.
"""

from typing import Any

import jax
from flax import linen as nn

from mimicnorm_jax.methods.branch import Branch
from mimicnorm_jax.models.conv_norm import ConvNorm
from mimicnorm_jax.models.factory import LayerFactory, scale_width
from mimicnorm_jax.models.head import LastBatchNormHead
from mimicnorm_jax.models.resnet import ResidualBlock, apply_stages, make_shortcut

CHANNELS = (64, 128, 256, 516)
"""Of the stages; 516 is the published code's."""
REDUCTION = 16
"""By which the excitation narrows, rounded down."""


@jax.checkpoint
def _gate(u: jax.Array, scale: jax.Array) -> jax.Array:
    # The checkpoint keeps the two factors, and not the second spread over all pixels.
    return u * scale[:, None, None]


class Excitation(nn.Module):
    """A factor for each channel of an image: sigmoid(W2 relu(W1 mean(u) + b1) + b2); nothing here is centered."""

    factory: LayerFactory

    @nn.compact
    def __call__(self, u: jax.Array) -> jax.Array:
        """Maps `(B, H, W, C)` to factors `(B, C)`."""
        factory, channels = self.factory, u.shape[-1]
        hidden = factory.dense(max(1, channels // REDUCTION), name="dense1")(u.mean((1, 2)))
        return nn.sigmoid(factory.dense(channels, name="dense2")(factory.relu(hidden)))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions, the second's ReLU gated; the last ReLU comes after the sum."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        factory, c = self.factory, self.channels
        branch = Branch(self.block, self.blocks, 2, self.sums)
        y = factory.relu(ConvNorm(factory, c, 3, strides=self.strides, branch=branch, name="conv1")(x, train))
        y = ConvNorm(factory, c, 3, branch=branch, role="residual_out", name="conv2")(y, train)
        return _gated_sum(self, x, factory.relu(y), branch, train)


class Bottleneck(ResidualBlock):
    """Pointwise, 3x3 with the stride, pointwise to four times the channels and gated; ReLU after the sum."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        factory, c = self.factory, self.channels
        branch = Branch(self.block, self.blocks, 3, self.sums)
        y = factory.relu(ConvNorm(factory, c, 1, branch=branch, name="conv1")(x, train))
        y = factory.relu(ConvNorm(factory, c, 3, strides=self.strides, branch=branch, name="conv2")(y, train))
        y = ConvNorm(factory, 4 * c, 1, branch=branch, role="residual_out", name="conv3")(y, train)
        return _gated_sum(self, x, factory.relu(y, cheap=True), branch, train)


def _gated_sum(block: Any, x: jax.Array, u: jax.Array, branch: Branch, train: bool) -> jax.Array:
    """relu(s u + shortcut of x), inside a block's compact method."""
    factory, cheap = block.factory, isinstance(block, Bottleneck)
    y = _gate(u, Excitation(factory, name="excitation")(u))
    if x.shape == u.shape:
        return factory.relu(x + y, cheap=cheap, rectified=True)
    shortcut = make_shortcut(block, u.shape[-1], branch, scaled=True)
    return factory.relu(shortcut(x, train) + y, cheap=cheap)


class SEResNet(LastBatchNormHead, nn.Module):
    """A stem, stages of gated residual blocks, the first of each but the first with stride 2, a classifier.

    Attributes:
      factory: makes the layers.
      num_classes: number of logits.
      width: factor on all channels.
      block: `BasicBlock` or `Bottleneck`.
      stages: blocks in each stage.
    """

    factory: LayerFactory
    num_classes: int
    width: float
    block: type[BasicBlock] | type[Bottleneck]
    stages: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `(B, H, W, C)` to logits `(B, num_classes)`."""
        factory = self.factory
        x = factory.relu(ConvNorm(factory, scale_width(CHANNELS[0], self.width), 3, name="stem")(x, train))
        x = apply_stages(self, x, train, channels=CHANNELS)
        return factory.logits(factory.classifier(self.num_classes)(x.mean((1, 2))), train)
