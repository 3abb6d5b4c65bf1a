"""MobileNetV2 (Sandler et al. 2018), in the CIFAR form of the paper's code."""

from functools import partial

import jax
from flax import linen as nn

from mimicnorm_jax.models.branch import Branch
from mimicnorm_jax.models.factory import LayerFactory, scale_width
from mimicnorm_jax.models.head import LastBatchNormHead

# (expansion, channels, repeats, stride of the first)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1), (6, 320, 1, 1))
BLOCKS = sum(repeats for _, _, repeats, _ in STAGES)


class InvertedResidual(nn.Module):
    """Pointwise expansion, depthwise 3x3, linear pointwise; and a sum, in the blocks that keep the shape.

    Attributes:
      number: the running index, from 1, among the blocks with a sum; None for a block without one.
    """

    factory: LayerFactory
    features: int
    expansion: int
    strides: int
    number: int | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        make, channels = self.factory, x.shape[-1]
        wide = channels * self.expansion
        expand, project = ((1, 1, channels, wide), 1), ((1, 1, wide, self.features), 1)
        relu, bias = make.relu6, make.centers
        y = relu(make.conv(wide, 1, bias=bias(*expand), name="conv1")(x, train), cheap=True)
        y = make.conv(wide, 3, strides=self.strides, groups=wide, bias=bias((3, 3, 1, wide)), name="conv2")(y, train)
        y = relu(y)
        if self.number is None:
            conv3 = make.conv(self.features, 1, bias=bias(*project), covers=[expand, project], name="conv3")
            return make.save(conv3(y, train))
        branch = Branch(self.number, BLOCKS, (expand, project), 3)
        return make.save(
            x + make.branch_end(self.features, 1, branch=branch, bias=bias(*project), name="conv3")(y, train)
        )


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
        make = self.factory
        relu = make.relu6
        stem = scale_width(32, self.width)
        x = relu(make.conv(stem, 1, padding=1, bias=make.centers((1, 1, x.shape[-1], stem)), name="stem")(x, train))
        number = 0
        for stage, (_, features, repeats, strides) in enumerate(STAGES, 1):
            # The number is the l of the published scalar 1.2^2/l, in which only blocks that keep the shape count.
            first_keeps = strides == 1 and scale_width(features, self.width) == x.shape[-1]
            x = make.part(partial(MobileNetV2._stage, stage=stage, number=number, train=train))(self, x)
            number += repeats - 1 + first_keeps
        x = relu(make.conv(scale_width(1280, self.width), 1, name="last_conv")(x, train), reused=False)
        x = x.mean((1, 2), keepdims=True)
        x = make.conv(self.num_classes, 1, norm=False, name="classifier")(x, train)
        return make.logits(x.reshape(x.shape[0], -1), train)

    def _stage(self, x: jax.Array, stage: int, number: int, train: bool) -> jax.Array:
        expansion, features, repeats, strides = STAGES[stage - 1]
        for i in range(repeats):
            stride, channels = 1 if i else strides, scale_width(features, self.width)
            keeps_shape = stride == 1 and channels == x.shape[-1]
            number += keeps_shape
            x = InvertedResidual(
                self.factory,
                channels,
                expansion,
                strides=stride,
                number=number if keeps_shape else None,
                name=f"stage{stage}_block{i + 1}",
            )(x, train)
        return x
