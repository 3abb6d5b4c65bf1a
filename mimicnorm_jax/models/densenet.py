"""DenseNets (Huang et al. 2017), in the CIFAR form of the paper's code: a 3x3 stem and nothing behind it."""

from functools import partial

import jax
from flax import linen as nn
from jax import numpy as jnp

from mimicnorm_jax.models.conv_norm import ConvNorm
from mimicnorm_jax.models.factory import LayerFactory, scale_width
from mimicnorm_jax.models.head import LastBatchNormHead

Maps = tuple[jax.Array, ...]
"""What a block has made so far, `(B, H, W, C)` each: what enters it, and one map of every layer."""

BLOCKS: dict[int, tuple[int, tuple[int, ...]]] = {
    121: (32, (6, 12, 24, 16)),
    161: (48, (6, 12, 36, 24)),
    169: (32, (6, 12, 32, 32)),
    201: (32, (6, 12, 48, 32)),
}
"""Growth, the channels that a layer adds, and layers in each block, by depth."""


class NormInFront(nn.Module):
    """The norm of methods that have one, where no convolution stands right before it; the identity elsewhere."""

    factory: LayerFactory

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return x if self.factory.method.norm is None else self.factory.norm(train)(x)


def _rectify(factory: LayerFactory, maps: Maps, *, output_saved_anyway: bool = True) -> Maps:
    """ReLU of the concatenated maps, of which all but the last are rectified already; unless a norm comes first.

    The published code rectifies in place. Without a norm in between that changes the very maps which later layers
    concatenate; with one it changes the norm's output only, and the maps stay raw.
    """
    if factory.method.norm is not None:
        return maps
    return (*maps[:-1], factory.relu(maps[-1], output_saved_anyway=output_saved_anyway))


def _norm_relu(factory: LayerFactory, x: jax.Array, train: bool, *, output_saved_anyway: bool = True) -> jax.Array:
    """A ReLU behind a norm, of maps from `_rectify`; where there is no norm they are rectified already."""
    if factory.method.norm is None:
        return x
    x = NormInFront(factory, name="norm")(x, train)
    return factory.relu(x, output_saved_anyway=output_saved_anyway)


class DenseLayer(nn.Module):
    """ReLU, pointwise convolution to four times the growth, ReLU, 3x3 convolution to the growth; no biases.

    A norm, in methods that have one, stands before each ReLU.
    """

    factory: LayerFactory
    growth: int

    @nn.compact
    def __call__(self, maps: Maps, train: bool) -> Maps:
        """The maps, rectified where no norm is, and one more of `growth` channels."""
        factory = self.factory
        maps = _rectify(factory, maps)
        y = factory.relu(factory.joined(partial(DenseLayer._squeeze, train=train))(self, maps))
        return (*maps, ConvNorm(factory, self.growth, 3, bias=False, norm=False, name="conv2")(y, train))

    def _squeeze(self, maps: Maps, train: bool) -> jax.Array:
        x = _norm_relu(self.factory, jnp.concatenate(maps, axis=-1), train)
        return ConvNorm(self.factory, 4 * self.growth, 1, bias=False, name="conv1")(x, train)


class Transition(nn.Module):
    """A pointwise convolution to half of the channels, and the mean of 2x2 pixels; no ReLU, no bias."""

    factory: LayerFactory

    @nn.compact
    def __call__(self, maps: Maps, train: bool) -> jax.Array:
        """Maps `(B, H, W, C)` in all to `(B, H / 2, W / 2, C / 2)`; the last map is not rectified."""
        x = NormInFront(self.factory, name="norm")(jnp.concatenate(maps, axis=-1), train)
        # The same either way round; after the mean the convolution has a quarter to keep and to compute.
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return ConvNorm(self.factory, x.shape[-1] // 2, 1, bias=False, norm=False, name="conv")(x, train)


class DenseNet(LastBatchNormHead, nn.Module):
    """A stem, blocks of layers that read everything made before them in the block, transitions between, a classifier.

    Without norms the backward pass keeps two maps a layer, of four and of one times the growth, and concatenates
    again: memory grows with the depth of a block, not with its square.

    Attributes:
      factory: makes the layers.
      num_classes: number of logits.
      width: factor on all channels.
      growth: channels that a layer adds.
      blocks: layers in each block.
    """

    factory: LayerFactory
    num_classes: int
    width: float
    growth: int
    blocks: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `(B, H, W, C)`, H and W at least 8, to logits `(B, num_classes)`."""
        factory = self.factory
        growth = scale_width(self.growth, self.width)
        x = ConvNorm(factory, 2 * growth, 3, bias=False, norm=False, name="stem")(x, train)
        for block in range(1, len(self.blocks) + 1):
            x = factory.part(partial(DenseNet._block, block=block, growth=growth, train=train))(self, x)
        return factory.logits(factory.classifier(self.num_classes)(x), train)

    def _block(self, x: jax.Array, block: int, growth: int, train: bool) -> jax.Array:
        factory, maps = self.factory, (x,)
        for layer in range(1, self.blocks[block - 1] + 1):
            maps = DenseLayer(factory, growth, name=f"block{block}_layer{layer}")(maps, train)
        if block < len(self.blocks):
            return Transition(factory, name=f"transition{block}")(maps, train)
        maps = _rectify(factory, maps, output_saved_anyway=False)
        x = _norm_relu(factory, jnp.concatenate(maps, axis=-1), train, output_saved_anyway=False)
        return x.mean((1, 2))
