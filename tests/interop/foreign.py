"""Networks as other code writes them, after public structures, and one of every way that Flax has to hold layers."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
NORMAL = nn.initializers.normal(0.1)


class Bottleneck(nn.Module):
    """Its last norm starts at 0, as is usual. Layers have the names that Flax makes up."""

    features: int
    strides: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(self.features, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.features, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(4 * self.features, (1, 1))(y))
        if y.shape != x.shape:
            x = self.conv(4 * self.features, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet v1.5 of 50 layers by default."""

    stages: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    num_classes: int = 1000
    dtype: Any = jnp.float32
    conv: Any = nn.Conv
    norm: Any = nn.BatchNorm
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        conv = partial(self.conv, use_bias=False, dtype=self.dtype)
        norm = partial(self.norm, use_running_average=not train, dtype=self.dtype, axis_name=self.axis_name)
        x = conv(self.width, (7, 7), 2, padding=((3, 3), (3, 3)), name="conv_init")(x)
        x = nn.max_pool(nn.relu(norm(name="bn_init")(x)), (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                x = Bottleneck(self.width * 2**stage, 2 if stage and not block else 1, conv, norm)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    """ConvNeXt-T by default: depthwise convolutions, layer norms, dense layers, no BatchNorm."""

    depths: Sequence[int] = (3, 3, 9, 3)
    widths: Sequence[int] = (96, 192, 384, 768)
    num_classes: int = 1000
    conv: Any = nn.Conv

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool = True) -> jax.Array:
        del deterministic  # no stochastic depth here
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            if stage == 0:
                x = nn.LayerNorm()(self.conv(width, (4, 4), 4)(x))
            else:
                x = self.conv(width, (2, 2), 2)(nn.LayerNorm()(x))
            for block in range(depth):
                y = nn.LayerNorm()(self.conv(width, (7, 7), feature_group_count=width)(x))
                y = nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(y)))
                scale = self.param(f"scale_{stage}_{block}", nn.initializers.constant(1e-6), (width,))
                x = x + y * scale.reshape(1, 1, 1, -1)
        return nn.Dense(self.num_classes)(nn.LayerNorm()(x.mean((1, 2))))


class UNet(nn.Module):
    """Four levels and 64 to 1024 channels by default; an output for each pixel."""

    widths: Sequence[int] = (64, 128, 256, 512, 1024)
    num_classes: int = 2
    conv: Any = nn.Conv
    norm: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def double(x: jax.Array, width: int) -> jax.Array:
            for _ in range(2):
                x = nn.relu(self.norm(use_running_average=not train)(self.conv(width, (3, 3))(x)))
            return x

        skipped = []
        for width in self.widths[:-1]:
            skipped.append(double(x, width))
            x = nn.max_pool(skipped[-1], (2, 2), (2, 2))
        x = double(x, self.widths[-1])
        for width, skip in zip(self.widths[-2::-1], skipped[::-1], strict=True):
            x = double(jnp.concatenate([skip, nn.ConvTranspose(width, (2, 2), (2, 2))(x)], -1), width)
        return self.conv(self.num_classes, (1, 1))(x)


class CNN(nnx.Module):
    """Two convolutions with BatchNorms, two linear layers, for images of 28 x 28."""

    def __init__(self, *, rngs: nnx.Rngs, conv: Any = nnx.Conv, norm: Any = nnx.BatchNorm, width: int = 32) -> None:
        self.conv1 = conv(1, width, (3, 3), rngs=rngs)
        self.norm1 = norm(width, rngs=rngs)
        self.conv2 = conv(width, 2 * width, (3, 3), rngs=rngs)
        self.norm2 = norm(2 * width, rngs=rngs)
        self.linear1 = nnx.Linear(49 * 2 * width, 8 * width, rngs=rngs)
        self.linear2 = nnx.Linear(8 * width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = nnx.avg_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
        return self.linear2(nnx.relu(self.linear1(x.reshape(len(x), -1))))


class Block(nn.Module):
    """What is scanned, with rematerialization inside."""

    conv: type[nn.Module]
    norm: type[nn.Module]
    train: bool
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.remat(self.conv)(8, (3, 3), kernel_init=self.init, name="conv1")(x)
        y = nn.relu(self.norm(use_running_average=not self.train, name="norm1")(y))
        y = self.conv(8, (3, 3), feature_group_count=2, kernel_init=self.init, name="conv2")(y)
        return nn.relu(x + self.norm(use_running_average=not self.train, name="norm2")(y)), None


class Net(nn.Module):
    """A network of other code; by default with Flax's layers."""

    kind: str = "plain"
    conv: type[nn.Module] = nn.Conv
    norm: type[nn.Module] = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        init = NORMAL
        if self.kind == "partitioned":
            init = nn.with_partitioning(NORMAL, (None, None, None, "model"))
        x = self.conv(8, (3, 3), kernel_init=init, name="stem")(x)
        x = self.norm(use_running_average=not train, name="norm")(x)
        block = partial(Block, self.conv, self.norm, train, init)
        if self.kind == "scanned":
            axes = {"params": 0, "batch_stats": 0}
            scanned = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=3)
            x, _ = scanned(self.conv, self.norm, train, init, name="blocks")(x, None)
        else:
            for i in range(2):
                x, _ = block(name=f"block{i}")(x)
        return nn.Dense(5, name="classifier")(x.mean((1, 2)))


def applied(model, variables, x, **options):
    """What a model gives, compiled."""
    return jax.jit(partial(model.apply, **options))(variables, x)


def assert_equal(found, expected):
    """To the bit, leaf by leaf."""
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def pooled(x):
    return x.mean((1, 2))
