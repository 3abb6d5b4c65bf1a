"""The last BatchNorm apart from the network below it, so that a batch can be taken in parts without changing it."""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import linen as nn

from mimicnorm_jax.linen.last_norm import LAST_BN


class SplitNetwork(NamedTuple):
    """A network in two parts.

    Attributes:
      body: maps images to what the head takes; reads the network's `params`, and no example influences another.
      head: maps the body's outputs of the whole batch to logits, as in training; it has no `params`.
      name: under which the head's `batch_stats` stand in the network's; the body has none.
    """

    body: nn.Module
    head: nn.Module
    name: str


@runtime_checkable
class HasHead(Protocol):
    """A network that can say which of its parts alone couples the examples of a batch."""

    def split_head(self) -> SplitNetwork | None:
        """The network in two parts; None if there is no such head. In a Flax module it needs `@nn.nowrap`."""
        ...


class LastBatchNormHead:
    """Gives the networks of this package `split_head`: mixed into each beside `nn.Module`."""

    factory: Any

    def split_head(self) -> SplitNetwork | None:
        """The network without its last BatchNorm, and that; None where there is none, or where it is not the only."""
        method = self.factory.method
        if not method.last_batch_norm or method.batch_norm:
            return None
        headless = dataclasses.replace(self.factory, method=dataclasses.replace(method, last_norm=None))
        module: Any = self
        return SplitNetwork(module.clone(factory=headless), self.factory.last_batch_norm(train=True), LAST_BN)
