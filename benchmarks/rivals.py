"""The same networks as a user would otherwise run them: Flax's own layers around the same topology.

Used by memory.py and step_time.py. `network(name, "batchnorm")` has Flax's BatchNorm, ReLU and
max-pooling; "batchnorm_remat" the same with only what products return kept for the backward pass,
which then recomputes normalisation and ReLU but no convolution; "groupnorm_ws" has GroupNorm and
weight standardisation (Qiao et al. 2019). Every name of `mimicnorm_jax.methods` is ours.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from mimicnorm_jax import models
from mimicnorm_jax.models.factory import ConvUnit, LayerFactory

RIVALS = ("batchnorm", "batchnorm_remat", "groupnorm_ws")
Apply = Callable[..., Any]


class StandardisedConv(nn.Conv):
    """A convolution whose kernel has mean 0 and variance 1 / fan-in for every output channel."""

    def param(self, name: str, init_fn: Any, *init_args: Any, **init_kwargs: Any) -> Any:
        value = super().param(name, init_fn, *init_args, **init_kwargs)
        if name != "kernel":
            return value
        axes = tuple(range(value.ndim - 1))
        mean, variance = value.mean(axes, keepdims=True), value.var(axes, keepdims=True)
        return (value - mean) / jnp.sqrt(variance * math.prod(value.shape[:-1]) + 1e-5)


class PlainUnit(ConvUnit):
    """A convolution with Flax's BatchNorm, or GroupNorm, behind it."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        make: Any = self.factory
        conv = StandardisedConv if make.group_norm and self.batch_norm else nn.Conv
        x = conv(
            self.features,
            (self.window, self.window),
            strides=self.strides,
            padding=self.padding,
            feature_group_count=self.groups,
            use_bias=self.use_bias,
            dtype=make.dtype,
            param_dtype=make.param_dtype,
            kernel_init=self.kernel_init,
            name="conv",
        )(x)
        if not self.batch_norm:
            return x
        if make.group_norm:
            return nn.GroupNorm(math.gcd(32, self.features), epsilon=1e-5, dtype=make.dtype, name="gn")(x)
        return nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, dtype=make.dtype, name="bn")(x)


@dataclasses.dataclass(frozen=True)
class PlainFactory(LayerFactory):
    """Flax's own layers in every role."""

    unit: ClassVar[type[ConvUnit]] = PlainUnit
    group_norm: bool = False

    def relu(self, x: jax.Array, *, reused: bool = True) -> jax.Array:
        return nn.relu(x)

    def relu6(self, x: jax.Array) -> jax.Array:
        return nn.relu6(x)

    def max_pool(self, x: jax.Array, window: int = 2, padding: int = 0) -> jax.Array:
        return nn.max_pool(x, (window, window), (2, 2), [(padding, padding)] * 2)

    def dropout(self, rate: float, train: bool, *, name: str) -> nn.Module:
        return nn.Dropout(rate, deterministic=not train, name=name)

    def _dense(self, features: int, name: str, kernel_init: Any) -> nn.Dense:
        return nn.Dense(features, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=kernel_init, name=name)


def network(name: str, variant: str, num_classes: int, dtype: Any) -> nn.Module:
    """A network of `models.ARCHITECTURES` in one of `RIVALS`, or under one of our methods as `ours:METHOD`."""
    if variant.startswith("ours:"):
        return models.create(name, method=variant.removeprefix("ours:"), num_classes=num_classes, dtype=dtype)
    model: Any = models.create(name, method="batchnorm", num_classes=num_classes, dtype=dtype)
    fields = {f.name: getattr(model.factory, f.name) for f in dataclasses.fields(LayerFactory)}
    return model.clone(factory=PlainFactory(**fields, group_norm=variant == "groupnorm_ws"))


def loss(name: str, variant: str, num_classes: int, dtype: Any) -> tuple[nn.Module, Apply]:
    """A network and its training loss `(params, batch_stats, images, labels, key) -> (loss, batch_stats)`."""
    model = network(name, variant, num_classes, dtype)

    def logits(params: Any, stats: Any, images: jax.Array, key: jax.Array) -> Any:
        return model.apply(
            {"params": params, "batch_stats": stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )

    if variant == "batchnorm_remat":
        logits = jax.checkpoint(logits, policy=jax.checkpoint_policies.dots_saveable)

    def loss_fn(params: Any, stats: Any, images: jax.Array, labels: jax.Array, key: jax.Array) -> Any:
        z, updated = logits(params, stats, images, key)
        z = z.astype(jnp.float32)
        nll = jax.nn.logsumexp(z, axis=-1) - jnp.take_along_axis(z, labels[:, None], axis=-1)[:, 0]
        return nll.mean(), updated.get("batch_stats", {})

    return model, loss_fn
