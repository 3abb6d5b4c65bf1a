"""ResNets (He et al. 2016), in the paper's CIFAR form, 3x3 stem and no max-pool, and in its ImageNet form."""

from functools import partial

import jax
from flax import linen as nn

from mimicnorm_jax.models.branch import Branch
from mimicnorm_jax.models.factory import LayerFactory, scale_width
from mimicnorm_jax.models.head import LastBatchNormHead


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the ReLU comes after the sum."""

    factory: LayerFactory
    channels: int
    strides: int
    block: int
    blocks: int
    scale_shortcut: bool
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        make, c = self.factory, self.channels
        kernels = [((3, 3, x.shape[-1], c), 1), ((3, 3, c, c), 1)]
        branch = Branch(self.block, self.blocks, tuple(k for k in kernels if make.centers(*k)), 2)
        entry = make.shift("shift1")(x)
        y = make.relu(make.conv(c, 3, strides=self.strides, branch=branch, name="conv1")(entry, train))
        y = make.shift("shift2")(y)
        y = make.branch_end(c, 3, branch=branch, name="conv2")(y, train)
        if x.shape != y.shape:
            covers = [((1, 1, x.shape[-1], c), 1)] if self.scale_shortcut else None
            x = make.shortcut(c, strides=self.strides, covers=covers, name="shortcut")(entry, train)
        return make.relu(x + y)


class Bottleneck(nn.Module):
    """Pointwise, 3x3 with the stride, pointwise to four times the channels; ReLU after the sum."""

    factory: LayerFactory
    channels: int
    strides: int
    block: int
    blocks: int
    scale_shortcut: bool
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        make, c, wide = self.factory, self.channels, self.channels * self.expansion
        kernels = [((1, 1, x.shape[-1], c), 1), ((3, 3, c, c), 1), ((1, 1, c, wide), 1)]
        branch = Branch(self.block, self.blocks, tuple(k for k in kernels if make.centers(*k)), 3)
        entry = make.shift("shift1")(x)
        y = make.relu(make.conv(c, 1, branch=branch, name="conv1")(entry, train))
        y = make.shift("shift2")(y)
        y = make.relu(make.conv(c, 3, strides=self.strides, branch=branch, name="conv2")(y, train))
        y = make.shift("shift3")(y)
        y = make.branch_end(wide, 1, branch=branch, name="conv3")(y, train)
        if x.shape != y.shape:
            covers = [((1, 1, x.shape[-1], wide), 1)] if self.scale_shortcut else None
            x = make.shortcut(wide, strides=self.strides, bias=False, covers=covers, name="shortcut")(entry, train)
        return make.relu(x + y, cheap=True)


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
        has a scalar of its own, in methods with such scalars.
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
        make = self.factory
        stem = scale_width(self.channels, self.width)
        if self.imagenet:
            x = make.max_pool(make.conv(stem, 7, strides=2, name="stem")(x, train), 3, padding=1)
        else:
            x = make.conv(stem, 3, name="stem", untouched=True)(x, train)
        x = make.relu(x)
        for stage in range(len(self.stages)):
            x = make.part(partial(ResNet._stage, stage=stage, train=train))(self, x)
        x = make.shift("classifier_shift")(x.mean((1, 2)))
        return make.logits(make.classifier(self.num_classes)(x), train)

    def _stage(self, x: jax.Array, stage: int, train: bool) -> jax.Array:
        for i in range(self.stages[stage]):
            x = self.block(
                self.factory,
                scale_width(self.channels * 2**stage, self.width),
                strides=2 if stage > 0 and i == 0 else 1,
                block=sum(self.stages[:stage]) + i + 1,
                blocks=sum(self.stages),
                scale_shortcut=self.imagenet,
                name=f"stage{stage + 1}_block{i + 1}",
            )(x, train)
        return x
