"""Loss and gradient of one device's part of a batch, whole or one microbatch's activations at a time."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax


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
      model: from `models.create`.
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

        Where no BatchNorm stands before the last one, microbatches change nothing but rounding and dropout's masks.
        A BatchNorm behind every convolution normalizes each microbatch by itself, so the gradient is the mean of
        the microbatches' and running averages advance once for each.

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
            return self._at_once(params, batch_stats, images, labels, dropout_key)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(dropout_key, jnp.arange(self.microbatches))
        method = _factory(self.model).method
        if method.last_batch_norm and not method.batch_norm:
            return self._in_two_passes(params, batch_stats, images, labels, keys)
        return self._in_one_pass(params, batch_stats, images, labels, keys)

    def _loss(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        targets = optax.smooth_labels(
            jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), self.label_smoothing
        )
        return optax.softmax_cross_entropy(logits, targets).mean()

    def _at_once(
        self, params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array, dropout_key: jax.Array
    ) -> Gradient:
        def loss_fn(params: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, updated = self.model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": dropout_key},
            )
            return self._loss(logits, labels), (logits, updated.get("batch_stats", {}))

        grads, (logits, updated) = jax.grad(loss_fn, has_aux=True)(params)
        return Gradient(grads, logits, updated)

    def _in_one_pass(
        self, params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array, keys: jax.Array
    ) -> Gradient:
        def add(carry: tuple[Any, Any], part: tuple[jax.Array, ...]) -> tuple[tuple[Any, Any], jax.Array]:
            total, batch_stats = carry
            found = self._at_once(params, batch_stats, *part)
            return (jax.tree.map(jnp.add, total, found.grads), found.batch_stats), found.logits

        start = jax.tree.map(jnp.zeros_like, params), batch_stats
        (total, batch_stats), logits = lax.scan(add, start, (self._split(images), self._split(labels), keys))
        return Gradient(jax.tree.map(lambda g: g / self.microbatches, total), _join(logits), batch_stats)

    def _in_two_passes(
        self, params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array, keys: jax.Array
    ) -> Gradient:
        factory = _factory(self.model)
        headless = dataclasses.replace(factory, method=dataclasses.replace(factory.method, last_norm=None))
        body, head = self.model.clone(factory=headless), factory.last_batch_norm(train=True)
        parts = self._split(images), keys
        before, last = tuple(a[:-1] for a in parts), tuple(a[-1] for a in parts)

        def raw_logits(params: Any, images: jax.Array, key: jax.Array) -> Any:
            return body.apply({"params": params}, images, train=True, rngs={"dropout": key})

        def head_loss(raw: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            logits, updated = head.apply({"batch_stats": batch_stats["last_bn"]}, raw, mutable=["batch_stats"])
            return self._loss(logits, labels), (logits, {"last_bn": updated["batch_stats"]})

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


def _factory(model: Any) -> Any:
    return model.factory


def _join(array: jax.Array) -> jax.Array:
    return array.reshape(-1, *array.shape[2:])
