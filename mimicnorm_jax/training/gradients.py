"""Loss and gradient of one device's part of a batch, whole or one microbatch's activations at a time."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax

from mimicnorm_jax.models.head import SplitNetwork
from mimicnorm_jax.training.model import at_least_float32, head_of, train_option


class Gradient(NamedTuple):
    """What a batch gives.

    Attributes:
      grads: of the mean loss over this device's images, with respect to the parameters.
      logits: `(b, classes)`, in the order of the images.
      batch_stats: running averages after this batch; empty for a network without.
    """

    grads: Any
    logits: jax.Array
    batch_stats: Any


@dataclasses.dataclass(frozen=True)
class LossAndGrad:
    """The loss that is minimized, and how its gradient is computed.

    Attributes:
      model: maps images to logits; one that declares a head as in `models.head` takes microbatches exactly.
      label_smoothing: probability spread over all classes.
      microbatches: equal parts of a device's images, whose activations are in memory one part at a time.
    """

    model: nn.Module
    label_smoothing: float = 0.0
    microbatches: int = 1

    def gradient(
        self, params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array, dropout_key: jax.Array
    ) -> Gradient:
        """The gradient of the mean loss.

        Where examples meet in a declared head alone, or nowhere, microbatches change nothing but rounding and
        dropout's masks. Any other BatchNorm normalizes each microbatch by itself, so the gradient is the mean of the
        microbatches' and running averages advance once for each.

        The microbatches run in a loop, where XLA is slow at the gradients of convolutions on a CPU (jax issue 12868);
        unrolled they would be fast there and save no memory.

        Args:
          params: raw parameters.
          batch_stats: running averages.
          images: `(b, H, W, C)`, b a multiple of `microbatches`.
          labels: `(b,)`.
          dropout_key: of this device.

        Raises:
          ValueError: if b is no multiple of `microbatches`.
        """
        if len(images) % self.microbatches:
            raise ValueError(f"{len(images)} images do not split into {self.microbatches} equal microbatches")
        if self.microbatches == 1:
            return self._full_batch(params, batch_stats, images, labels, dropout_key)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(dropout_key, jnp.arange(self.microbatches))
        if (split := head_of(self.model)) is not None:
            return self._accumulate_exact(split, params, batch_stats, (self._split(images), keys), labels)
        return self._accumulate(params, batch_stats, (self._split(images), self._split(labels), keys))

    def _loss(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), self.label_smoothing
        )
        return optax.softmax_cross_entropy(logits, targets).mean()

    def _full_batch(
        self, params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array, dropout_key: jax.Array
    ) -> Gradient:
        def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, updated = self.model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
                **train_option(self.model, True),
            )
            logits = at_least_float32(logits)
            chex.assert_shape(logits, (len(labels), None))
            return self._loss(logits, labels), (logits, updated.get("batch_stats", {}))

        grads, (logits, updated) = jax.grad(loss_fn, has_aux=True)(params)
        return Gradient(grads, logits, updated)

    def _accumulate(self, params: Any, batch_stats: Any, parts: tuple[jax.Array, jax.Array, jax.Array]) -> Gradient:
        def add(carry: tuple[Any, Any], part: tuple[jax.Array, ...]) -> tuple[tuple[Any, Any], jax.Array]:
            total, batch_stats = carry
            found = self._full_batch(params, batch_stats, *part)
            return (jax.tree.map(jnp.add, total, found.grads), found.batch_stats), found.logits

        start = jax.tree.map(jnp.zeros_like, params), batch_stats
        (total, batch_stats), logits = lax.scan(add, start, parts)
        return Gradient(jax.tree.map(lambda g: g / self.microbatches, total), _join(logits), batch_stats)

    def _accumulate_exact(
        self, split: SplitNetwork, params: Any, batch_stats: Any, parts: tuple[jax.Array, jax.Array], labels: jax.Array
    ) -> Gradient:
        body, head, name = split
        before, last = tuple(a[:-1] for a in parts), tuple(a[-1] for a in parts)

        def raw_logits(params: Any, images: jax.Array, key: jax.Array) -> Any:
            return body.apply({"params": params}, images, rngs={"dropout": key}, **train_option(body, True))

        def head_loss(raw: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, updated = head.apply({"batch_stats": batch_stats[name]}, raw, mutable=["batch_stats"])
            logits = at_least_float32(logits)
            return self._loss(logits, labels), (logits, {name: updated["batch_stats"]})

        def add(total: Any, part: tuple[jax.Array, ...]) -> tuple[Any, None]:
            *inputs, cotangent = part
            _, pull_back = jax.vjp(lambda params: raw_logits(params, *inputs), params)
            return jax.tree.map(jnp.add, total, pull_back(cotangent)[0]), None

        raw_before = lax.map(lambda part: raw_logits(params, *part), before)
        # The loss needs all logits, and the gradient all activations: those of the last part are still there.
        raw_last, pull_back = jax.vjp(lambda params: raw_logits(params, *last), params)
        raw = _join(jnp.concatenate([raw_before, raw_last[None]]))
        cotangent, (logits, updated) = jax.grad(head_loss, has_aux=True)(raw)
        cotangents = self._split(cotangent)
        # Else XLA, which unrolls short loops, keeps both passes' activations, or those of two parts, at a time.
        rest = lax.optimization_barrier((pull_back(cotangents[-1])[0], *before, cotangents[:-1]))
        grads, _ = lax.scan(add, rest[0], rest[1:])
        return Gradient(grads, logits, updated)

    def _split(self, array: jax.Array) -> jax.Array:
        return array.reshape(self.microbatches, -1, *array.shape[1:])


def _join(array: jax.Array) -> jax.Array:
    return array.reshape(-1, *array.shape[2:])
