"""What stands between layers and has no parameters: ReLU, max-pooling, dropout."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from flax import linen as nn

from mimicnorm_jax.functional import activations
from mimicnorm_jax.functional.pooling import max_pool
from mimicnorm_jax.linen.dropout import Dropout


class Activation(Protocol):
    """What a method's networks use between layers."""

    def relu(self, x: jax.Array, *, output_saved_anyway: bool, saved: bool, rectified: bool) -> jax.Array:
        """ReLU.

        Args:
          x: what comes out of a convolution, its norm or a sum.
          output_saved_anyway: whether a convolution reads the output, which is then kept anyway.
          saved: whether a rematerialization keeps the output, see `functional.activations.SAVED`.
          rectified: whether x is a rectified map but for a residual branch, so that its energy needs no gain.
        """
        ...

    def relu6(self, x: jax.Array) -> jax.Array:
        """ReLU6 of an array of any shape, behind a norm."""
        ...

    def max_pool(self, x: jax.Array, window: int, padding: int) -> jax.Array:
        """Max-pooling with a square window and stride 2.

        Args:
          x: maps, `(B, H, W, C)`.
          window: its side.
          padding: pixels at each side.
        """
        ...

    def dropout(self, rate: float, axis_name: str | None, *, name: str) -> Callable[[jax.Array], jax.Array]:
        """Dropout in training; `axis_name` is a mapped axis over which a batch is spread.

        Args:
          rate: of what is dropped.
          axis_name: of the mapped axis, or None.
          name: of the layer.
        """
        ...


@dataclass(frozen=True)
class LeanActivation:
    """Activations that keep their output only, or a bit an element; pooling that keeps a few bits an output.

    Attributes:
      gain: constant factor on the output of every ReLU, as g relu(x) = relu(g x), for the latter keeps nothing.
    """

    gain: float = 1.0

    def relu(self, x: jax.Array, *, output_saved_anyway: bool, saved: bool, rectified: bool) -> jax.Array:
        """See `Activation.relu`."""
        relu = activations.relu if output_saved_anyway else activations.relu_save_mask
        return relu(x if rectified or self.gain == 1.0 else self.gain * x, saved=saved)

    def relu6(self, x: jax.Array) -> jax.Array:
        """See `Activation.relu6`."""
        return activations.relu6(x, saved=False)

    def max_pool(self, x: jax.Array, window: int, padding: int) -> jax.Array:
        """See `Activation.max_pool`."""
        return max_pool(x, (window, window), (2, 2), padding)

    def dropout(self, rate: float, axis_name: str | None, *, name: str) -> Callable[[jax.Array], jax.Array]:
        """See `Activation.dropout`."""
        # The backward pass draws the mask again from its key.
        return nn.remat(Dropout)(rate, axis_name, name=name)


@dataclass(frozen=True)
class FlaxActivation:
    """Flax's own activations and pooling, the same functions: what a program without a backward pass needs.

    Attributes:
      gain: as in `LeanActivation`.
    """

    gain: float = 1.0

    def relu(self, x: jax.Array, *, output_saved_anyway: bool, saved: bool, rectified: bool) -> jax.Array:
        """See `Activation.relu`."""
        return nn.relu(x if rectified or self.gain == 1.0 else self.gain * x)

    def relu6(self, x: jax.Array) -> jax.Array:
        """See `Activation.relu6`."""
        return nn.relu6(x)

    def max_pool(self, x: jax.Array, window: int, padding: int) -> jax.Array:
        """See `Activation.max_pool`."""
        edges: Any = [(padding, padding)] * 2
        return nn.max_pool(x, (window, window), (2, 2), edges)

    def dropout(self, rate: float, axis_name: str | None, *, name: str) -> Callable[[jax.Array], jax.Array]:
        """See `Activation.dropout`."""
        return nn.Dropout(rate, deterministic=False, name=name)


LEAN = LeanActivation()
"""Without a gain."""
