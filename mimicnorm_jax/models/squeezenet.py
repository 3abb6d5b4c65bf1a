"""SqueezeNet with simple bypass (Iandola et al. 2016), in the CIFAR form of the paper."""

from functools import partial

import jax
from flax import linen as nn
from jax import numpy as jnp

from mimicnorm_jax.models.conv_norm import ConvNorm
from mimicnorm_jax.models.factory import LayerFactory, scale_width
from mimicnorm_jax.models.head import LastBatchNormHead

# (out, squeeze, bypass sum, max-pool after). Unlike the original paper, the published code has no sum around the last.
FIRES = (
    (128, 16, False, False),
    (128, 16, True, False),
    (256, 32, False, True),
    (256, 32, True, False),
    (384, 48, False, False),
    (384, 48, True, False),
    (512, 64, False, True),
    (512, 64, False, False),
)


class Fire(nn.Module):
    """A pointwise squeeze, then pointwise and 3x3 expansions side by side; `bypass` adds the input, `pool` halves."""

    factory: LayerFactory
    features: int
    squeeze: int
    bypass: bool
    pool: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        factory = self.factory
        squeezed = factory.relu(ConvNorm(factory, self.squeeze, 1, name="squeeze")(x, train))
        y = jnp.concatenate([self._expand(squeezed, window, train) for window in (1, 3)], axis=-1)
        return x + y if self.bypass else y

    def _expand(self, x: jax.Array, window: int, train: bool) -> jax.Array:
        factory = self.factory
        x = ConvNorm(factory, self.features // 2, window, name=f"expand{window}")(x, train)
        # The same either way round; after the pool the ReLU has a quarter to keep.
        return factory.relu(factory.max_pool(x) if self.pool else x, output_saved_anyway=False, cheap=window == 1)


class SqueezeNet(LastBatchNormHead, nn.Module):
    """Eight fire modules, identity sums around the second, fourth and sixth, a convolutional classifier.

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
        # The same either way round; after the pool the ReLU has a quarter to keep.
        x = factory.relu(factory.max_pool(ConvNorm(factory, scale_width(96, self.width), 3, name="stem")(x, train)))
        for fires in ((2, 3, 4), (5, 6, 7, 8), (9,)):
            x = factory.part(partial(SqueezeNet._fires, numbers=fires, train=train))(self, x)
        x = ConvNorm(factory, self.num_classes, 1, classifier=True, name="classifier")(x, train)
        return factory.logits(x.mean((1, 2)), train)

    def _fires(self, x: jax.Array, numbers: tuple[int, ...], train: bool) -> jax.Array:
        for number in numbers:
            features, squeeze, bypass, pool = FIRES[number - 2]
            half = scale_width(features // 2, self.width)
            fire = Fire(self.factory, 2 * half, scale_width(squeeze, self.width), bypass, pool, name=f"fire{number}")
            x = fire(x, train)
        return x
