"""The same networks as a user would otherwise run them: Flax's own layers around the same topology.

`network(name, "batchnorm")` has Flax's BatchNorm, ReLU and
max-pooling; "batchnorm_remat" the same with only what products return kept for the backward pass,
which then recomputes normalization and ReLU but no convolution; "groupnorm_ws" has GroupNorm and
weight standardization (Qiao et al. 2019). "ours:METHOD" is the library's network under a method.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mimicnorm_jax import models
from mimicnorm_jax.diagnostics import nbytes, saved_for_backward
from mimicnorm_jax.methods import METHODS, FlaxActivation

VARIANTS = ("batchnorm", "batchnorm_remat", "groupnorm_ws", "ours:batchnorm", "ours:none", "ours:mimicnorm")
Apply = Callable[..., Any]


def has_variant(name: str, variant: str) -> bool:
    """Whether the network has the variant: `cheap` is nothing for networks without wide pointwise convolutions."""
    return not variant.endswith("+cheap") or models.ARCHITECTURES[name].cheap_remat


def network(name: str, variant: str, num_classes: int, dtype: Any, width: float = 1.0) -> nn.Module:
    """A network of `models.ARCHITECTURES` in one of `VARIANTS`; `ours:METHOD` or `ours:METHOD+REMAT` is any of ours."""
    if variant.startswith("ours:"):
        method, _, remat = variant.removeprefix("ours:").partition("+")
        return models.create(
            name, method=method, num_classes=num_classes, dtype=dtype, remat=remat or "none", width=width
        )
    method = METHODS["ws_gn" if variant == "groupnorm_ws" else "batchnorm"]
    method = dataclasses.replace(method, activation=FlaxActivation())
    model: Any = models.create(name, method=method, num_classes=num_classes, dtype=dtype, width=width)
    return model.clone(factory=dataclasses.replace(model.factory, recompute_kernel=False))


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """One training step of one network in one variant.

    Attributes:
      model: the network.
      loss: `(params, batch_stats, images, labels, key)` to the loss and the updated batch_stats.
      step: `(state, images, labels)` to the next state, by SGD with momentum; to be jitted, state donated.
      state: shapes of parameters, batch_stats and momentum.
      images, labels: shapes of a batch.
    """

    model: nn.Module
    loss: Apply
    step: Apply
    state: Any
    images: jax.ShapeDtypeStruct
    labels: jax.ShapeDtypeStruct

    def saved_bytes(self) -> int:
        """Bytes that autodiff keeps for the backward pass."""
        params, stats, _ = self.state
        key = jax.eval_shape(lambda: jax.random.key(0))
        kept = saved_for_backward(lambda p, *a: self.loss(p, *a)[0], params, stats, self.images, self.labels, key)
        return nbytes(kept)

    def compile(self) -> Any:
        """The compiled step."""
        return jax.jit(self.step, donate_argnums=0).lower(self.state, self.images, self.labels).compile()

    def init(self) -> tuple[Any, jax.Array, jax.Array]:
        """Values for `state`, random images and labels."""
        images = jax.random.normal(jax.random.key(1), self.images.shape, self.images.dtype)
        variables = jax.jit(self.model.init)(jax.random.key(0), images[:2])
        params, stats = variables["params"], variables.get("batch_stats", {})
        labels = jnp.arange(self.labels.shape[0]) % 10
        return (params, stats, jax.tree.map(jnp.zeros_like, params)), images, labels


def training_step(name: str, variant: str, batch: int, dtype: Any, width: float = 1.0) -> TrainingStep:
    """The step of a network of `models.ARCHITECTURES`, on 32 x 32 images, or 224 x 224 for an ImageNet form."""
    size, classes = (224, 1000) if name.endswith("_imagenet") else (32, 100)
    model = network(name, variant, classes, dtype, width)
    loss_fn = _loss(model, variant)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    params = variables["params"]

    def step(state: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, stats, momentum = state
        grads, stats = jax.grad(loss_fn, has_aux=True)(params, stats, images, labels, jax.random.key(0))
        momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
        return jax.tree.map(lambda p, m: p - 0.01 * m, params, momentum), stats, momentum

    return TrainingStep(
        model,
        loss_fn,
        step,
        (params, variables.get("batch_stats", {}), params),
        images,
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )


def _loss(model: nn.Module, variant: str) -> Apply:
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

    return loss_fn
