"""Sums and counts, so that batches, devices and masks add up exactly."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax


class Metrics(struct.PyTreeNode):
    """Sums over images of the loss and of correct answers, and the number of images."""

    loss_sum: Any
    correct: Any
    count: Any

    @classmethod
    def empty(cls) -> "Metrics":
        """Of no images."""
        return cls(0.0, 0.0, 0.0)

    @classmethod
    def from_logits(cls, logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> "Metrics":
        """Metrics of logits `(B, C)` and labels `(B,)`; images with mask `(B,)` 0 do not count."""
        mask = jnp.ones(labels.shape, logits.dtype) if mask is None else mask
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = (logits.argmax(-1) == labels).astype(logits.dtype)
        return cls((losses * mask).sum(), (correct * mask).sum(), mask.sum())

    def psum(self, axis_name: str) -> "Metrics":
        """The sum over a mapped axis."""
        return lax.psum(self, axis_name)

    def __add__(self, other: "Metrics") -> "Metrics":
        return jax.tree.map(lambda a, b: a + b, self, other)

    @property
    def loss(self) -> float:
        """Mean cross entropy in nats; not a number without images."""
        return float(self.loss_sum) / float(self.count) if self.count else math.nan

    @property
    def accuracy(self) -> float:
        """Share of correct answers, in [0, 1]; not a number without images."""
        return float(self.correct) / float(self.count) if self.count else math.nan
