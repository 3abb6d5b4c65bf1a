"""SqueezeNet with simple bypass (Iandola et al. 2016), in the CIFAR form of the paper."""

import jax
from flax import linen as nn
from jax import numpy as jnp

from mimicnorm_jax.models.factory import LayerFactory, scale_width

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
    """A pointwise squeeze, then pointwise and 3x3 expansions side by side; `bypass` adds the input."""

    factory: LayerFactory
    features: int
    squeeze: int
    bypass: bool

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        make, half = self.factory, self.features // 2
        entry = x
        x = make.relu(make.conv(self.squeeze, 1, name="squeeze")(x, train))
        expanded = [make.conv(half, window, name=f"expand{window}")(x, train) for window in (1, 3)]
        y = make.relu(jnp.concatenate(expanded, axis=-1), reused=not self.bypass)
        return entry + y if self.bypass else y


class SqueezeNet(nn.Module):
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
        make = self.factory
        # The same either way round; after the pool the ReLU has a quarter to keep.
        x = make.relu(make.max_pool(make.conv(scale_width(96, self.width), 3, name="stem")(x, train)))
        for number, (features, squeeze, bypass, pool) in enumerate(FIRES, 2):
            half = scale_width(features // 2, self.width)
            x = Fire(make, 2 * half, scale_width(squeeze, self.width), bypass, name=f"fire{number}")(x, train)
            if pool:
                x = make.max_pool(x)
        x = make.conv(self.num_classes, 1, norm=False, name="classifier")(x, train)
        return make.logits(x.mean((1, 2)), train)
