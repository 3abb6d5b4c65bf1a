"""VGG (Simonyan & Zisserman 2015), in the paper's CIFAR form and its ImageNet form, which differ in the image alone.

The head flattens what is left of the image: 1 x 1 x 512 of 32 x 32 pixels, 7 x 7 x 512 of 224 x 224, here in the order
height, width, channel. PyTorch flattens channel, height, width, so the first dense kernel of its checkpoints has to be
permuted.
"""

from functools import partial

import jax
from flax import linen as nn

from mimicnorm_jax.models.conv_norm import ConvNorm
from mimicnorm_jax.models.factory import LayerFactory, scale_width
from mimicnorm_jax.models.head import LastBatchNormHead

STAGES: dict[int, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Convolutions between max-pools, by depth."""
CHANNELS = (64, 128, 256, 512, 512)


class VGG(LastBatchNormHead, nn.Module):
    """3x3 convolutions, five max-pools, and a head of three dense layers with dropout 0.5.

    Attributes:
      factory: makes the layers.
      num_classes: number of logits.
      width: factor on all channels and hidden units.
      stages: convolutions before each max-pool.
    """

    factory: LayerFactory
    num_classes: int
    width: float
    stages: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `(B, H, W, C)`, H and W at least 32, to logits `(B, num_classes)`."""
        factory = self.factory
        for stage in range(1, len(self.stages) + 1):
            x = factory.part(partial(VGG._stage, stage=stage, train=train))(self, x)
        x = x.reshape(x.shape[0], -1)
        for i in (1, 2):
            x = factory.dense(scale_width(4096, self.width), name=f"dense{i}")(x)
            # Before the ReLU, which then keeps what the next layer keeps.
            x = factory.relu(factory.dropout(0.5, train, name=f"dropout{i}")(x))
        return factory.logits(factory.classifier(self.num_classes)(x), train)

    def _stage(self, x: jax.Array, stage: int, train: bool) -> jax.Array:
        factory, repeats, channels = self.factory, self.stages[stage - 1], CHANNELS[stage - 1]
        for i in range(1, repeats + 1):
            x = ConvNorm(factory, scale_width(channels, self.width), 3, name=f"stage{stage}_conv{i}")(x, train)
            # The same either way round; after the pool the ReLU has a quarter to keep.
            x = factory.relu(factory.max_pool(x) if i == repeats else x)
        return x
