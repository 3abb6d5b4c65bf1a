"""MobileNetV2 (Sandler et al. 2018), in the CIFAR form of the paper's code."""

from functools import partial

import jax
from flax import linen as nn

from mimicnorm_jax.methods.branch import Branch
from mimicnorm_jax.models.conv_norm import ConvNorm
from mimicnorm_jax.models.factory import LayerFactory, scale_width
from mimicnorm_jax.models.head import LastBatchNormHead

# (expansion, channels, repeats, stride of the first)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1), (6, 320, 1, 1))
BLOCKS = sum(repeats for _, _, repeats, _ in STAGES)


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise, linear pointwise; and a sum, in the blocks that keep the shape.

    Attributes:
      factory: says what the method has.
      features: output channels.
      expansion: factor on the input channels.
      strides: of the depthwise convolution.
      number: the running index, from 1, among the blocks with a sum; None for a block without one.
      sums: see `Branch`.
      window: side of the depthwise convolution's window.
      blocks: how many blocks the net has.
    """

    factory: LayerFactory
    features: int
    expansion: int
    strides: int
    number: int | None
    sums: int
    window: int = 3
    blocks: int = BLOCKS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        factory, wide = self.factory, x.shape[-1] * self.expansion
        branch, bias = Branch(self.number, self.blocks, 3, self.sums), factory.rule
        y = ConvNorm(factory, wide, 1, bias=bias, branch=branch, name="conv1")(x, train)
        y = factory.relu6(y, cheap=True)
        depthwise = {"strides": self.strides, "groups": wide, "bias": bias, "branch": branch}
        y = ConvNorm(factory, wide, self.window, **depthwise, name="conv2")(y, train)
        role = "conv" if self.number is None else "residual_out"
        conv3 = ConvNorm(factory, self.features, 1, bias=bias, branch=branch, role=role, compensates=True, name="conv3")
        y = conv3(factory.relu6(y), train)
        return factory.save(y if self.number is None else x + y)


def classify(factory: LayerFactory, x: jax.Array, features: int, num_classes: int, train: bool) -> jax.Array:
    """The end of the network, inside its compact method: a last convolution, the mean, a convolutional classifier."""
    x = ConvNorm(factory, features, 1, name="last_conv")(x, train)
    x = factory.relu6(x, output_saved_anyway=False).mean((1, 2), keepdims=True)
    x = ConvNorm(factory, num_classes, 1, classifier=True, name="classifier")(x, train)
    return factory.logits(x.reshape(x.shape[0], -1), train)


class MobileNetV2(LastBatchNormHead, nn.Module):
    """A pointwise stem padded by 1, inverted residual blocks, a convolutional classifier.

    Convolutions that the centering rule leaves out have no bias, unless BatchNorm follows them.

    Attributes:
      factory: makes the layers.
      num_classes: number of logits.
      width: factor on all channels.
    """

    factory: LayerFactory
    num_classes: int
    width: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `(B, H, W, C)`, H and W at least 8, to logits `(B, num_classes)`."""
        factory = self.factory
        stem = ConvNorm(factory, scale_width(32, self.width), 1, padding=1, bias=factory.rule, name="stem")
        x = factory.relu6(stem(x, train))
        for stage, blocks in enumerate(self._blocks(x.shape[-1]), 1):
            x = factory.part(partial(MobileNetV2._stage, stage=stage, blocks=blocks, train=train))(self, x)
        return classify(factory, x, scale_width(1280, self.width), self.num_classes, train)

    def _blocks(self, channels: int) -> list[list[tuple[int | None, int]]]:
        """By stage and block, from what the stem gives: `number` and `sums` of `InvertedResidual`.

        The number is the l of the published scalar 1.2^2/l, in which only blocks that keep the shape count.
        """
        count = sums = 0
        stages = []
        for _, features, repeats, first_stride in STAGES:
            stages.append([])
            for strides in (first_stride, *(1,) * (repeats - 1)):
                keeps_shape = strides == 1 and scale_width(features, self.width) == channels
                channels = scale_width(features, self.width)
                count += keeps_shape
                stages[-1].append((count if keeps_shape else None, sums))
                sums = sums + 1 if keeps_shape else 0
        return stages

    def _stage(self, x: jax.Array, stage: int, blocks: list[tuple[int | None, int]], train: bool) -> jax.Array:
        expansion, features, _, strides = STAGES[stage - 1]
        for i, (number, sums) in enumerate(blocks):
            x = InvertedResidual(
                self.factory,
                scale_width(features, self.width),
                expansion,
                strides=1 if i else strides,
                number=number,
                sums=sums,
                name=f"stage{stage}_block{i + 1}",
            )(x, train)
        return x
