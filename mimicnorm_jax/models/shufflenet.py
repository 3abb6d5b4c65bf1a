"""ShuffleNetV2 (Ma et al. 2018), in the paper's CIFAR form, stem of stride 1 and no max-pool, and its ImageNet form."""

from functools import partial

import jax
from flax import linen as nn
from jax import numpy as jnp

from mimicnorm_jax.methods.branch import Branch
from mimicnorm_jax.models.conv_norm import ConvNorm
from mimicnorm_jax.models.factory import LayerFactory, scale_width
from mimicnorm_jax.models.head import LastBatchNormHead

CHANNELS: dict[str, tuple[int, int, int, int]] = {
    "x0.5": (48, 96, 192, 1024),
    "x1": (116, 232, 464, 1024),
    "x1.5": (176, 352, 704, 1024),
    "x2": (244, 488, 976, 2048),
}
"""Channels of the three stages and of the last convolution, by published width."""
REPEATS = (4, 8, 4)


def shuffle(x: jax.Array, groups: int = 2) -> jax.Array:
    """Interleaves `groups` equal blocks of channels of `(..., C)`.

    Example:
      >>> shuffle(jnp.arange(6)).tolist()
      [0, 3, 1, 4, 2, 5]
    """
    return x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2).reshape(x.shape)


class Unit(nn.Module):
    """A residual branch beside a shortcut, concatenated and shuffled.

    Attributes:
      factory: says what the method has.
      features: output channels.
      strides: 1, where the shortcut is half of the input, or 2, where it has convolutions.
      imagenet: whether a branch of stride 2 goes to half of the features at once, and its end has neither scale
        nor bias behind its ReLU.
    """

    factory: LayerFactory
    features: int
    strides: int
    imagenet: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        factory, half = self.factory, self.features // 2
        if self.strides == 1:
            shortcut, y = jnp.split(x, 2, axis=-1)
        else:
            shortcut, y = self._shortcut(x, half, train), x
        channels, branch = half if self.imagenet else y.shape[-1], Branch()
        y = factory.relu(ConvNorm(factory, channels, 1, branch=branch, name="conv1")(y, train), cheap=True)
        y = factory.save(self._depthwise(channels, "conv2", branch)(y, train))
        conv3 = ConvNorm(factory, half, 1, branch=branch, compensates=True, name="conv3")
        if self.imagenet:
            y = factory.relu(conv3(y, train), output_saved_anyway=False, cheap=True)
        else:
            relu = factory.branch_relu("after")
            y = relu(conv3(y, train, relu.conv_scale()))
        return shuffle(jnp.concatenate([shortcut, y], axis=-1))

    def _depthwise(self, channels: int, name: str, branch: Branch | None = None) -> ConvNorm:
        strides = self.strides
        return ConvNorm(self.factory, channels, 3, strides=strides, groups=channels, branch=branch, name=name)

    def _shortcut(self, x: jax.Array, half: int, train: bool) -> jax.Array:
        factory = self.factory
        x = factory.save(self._depthwise(x.shape[-1], "shortcut1")(x, train))
        x = ConvNorm(factory, half, 1, compensates=True, name="shortcut2")(x, train)
        return factory.relu(x, output_saved_anyway=False, cheap=True)


class ShuffleNetV2(LastBatchNormHead, nn.Module):
    """A stem, three stages of units, the first of each with stride 2, a classifier.

    Attributes:
      factory: makes the layers.
      num_classes: number of logits.
      width: factor on all channels, on top of the published widths.
      channels: of the three stages and the last convolution.
      imagenet: whether the stem has stride 2, a ReLU and a max-pool, and the units are the ImageNet form's.
    """

    factory: LayerFactory
    num_classes: int
    width: float
    channels: tuple[int, int, int, int]
    imagenet: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `(B, H, W, C)`, H and W at least 8 or, in the ImageNet form, 32, to logits `(B, num_classes)`."""
        factory = self.factory
        *stages, last = (scale_width(c, self.width) for c in self.channels)
        strides = 2 if self.imagenet else 1
        x = ConvNorm(factory, scale_width(24, self.width), 3, strides=strides, untouched=True, name="stem")(x, train)
        if self.imagenet:
            # The same either way round; after the pool the ReLU has a quarter to keep.
            x = factory.relu(factory.max_pool(x, 3, padding=1))
        for stage, features in enumerate(stages, 1):
            x = factory.part(partial(ShuffleNetV2._stage, stage=stage, features=features, train=train))(self, x)
        x = ConvNorm(factory, last, 1, compensates=True, untouched=True, name="last_conv")(x, train)
        x = factory.relu(x, output_saved_anyway=False)
        return factory.logits(factory.classifier(self.num_classes)(x.mean((1, 2))), train)

    def _stage(self, x: jax.Array, stage: int, features: int, train: bool) -> jax.Array:
        for i in range(REPEATS[stage - 1]):
            name = f"stage{stage}_unit{i + 1}"
            x = Unit(self.factory, features, strides=1 if i else 2, imagenet=self.imagenet, name=name)(x, train)
        return x
