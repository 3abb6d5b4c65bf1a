"""What a conversion does to each layer of a network, in records that say why."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from mimicnorm_jax.functional.kernels import fan_in, gain
from mimicnorm_jax.functional.rules import PUBLISHED_CIFAR_RULE, Rule
from mimicnorm_jax.utils.trees import Path

OWN_CALL = "a subclass with a __call__ of its own"
OWN_STATISTICS = "keeps statistics of its own, and may couple a batch"
OTHER_LAYER = "no layer whose kernel is centered here"

Action = Literal["centered", "identity", "left", "last norm"]


@dataclass(frozen=True)
class Layer:
    """A layer of a network.

    Attributes:
      path: of its parameters in the tree of the network that is converted.
      kind: name of its class.
      shape: of its kernel, in one layer of a stack; None without a kernel.
      groups: of its convolution.
    """

    path: Path
    kind: str
    shape: tuple[int, ...] | None = None
    groups: int = 1


Select = Callable[[Layer], bool]
"""Whether to center the kernel of a convolution or dense layer."""


@dataclass(frozen=True)
class Choice:
    """Which kernels are centered.

    Attributes:
      rule: of the convolutions, asked with shape and groups.
      select: in place of the rule, asked with each convolution and dense layer; None for the rule, which takes no dense
        layers.
    """

    rule: Rule = PUBLISHED_CIFAR_RULE
    select: Select | None = None

    def reason_to_leave(self, layer: Layer, *, convolution: bool) -> str | None:
        """Why the layer's kernel, which it has, is not centered; None if it is."""
        assert layer.shape is not None
        n = fan_in(layer.shape)
        if self.select is not None:
            chosen, reason = self.select(layer), "not selected"
        elif convolution:
            chosen, reason = self.rule(layer.shape, layer.groups), f"by the rule: fan-in {n}, groups {layer.groups}"
        else:
            chosen, reason = False, "a dense layer, which the rule does not take"
        if chosen and n < 2:
            chosen, reason = False, "a fan-in of 1, of which centering leaves nothing"
        return None if chosen else reason


@dataclass(frozen=True)
class LayerRecord(Layer):
    """What was done to a layer.

    Attributes:
      action: its kernel is `centered`; it is a norm that became the `identity`; it was `left` as it is; it is the
        `last norm`.
      reason: why, in words; empty where there is nothing to say.
      gain: the factor on He's standard deviation that its kernel should start with: Theorem 3's of a centered one, 1 of
        another whose scale a BatchNorm made up for; None where its own initialization is to stay.
      block: l, if it ends the l-th residual branch, whose share is one l-th; else None.
    """

    action: Action = "left"
    reason: str = ""
    gain: float | None = None
    block: int | None = None

    @property
    def stddev(self) -> float | None:
        """What the kernel's standard deviation should start with, `gain * sqrt(2 / fan-in) / block`; None as `gain`."""
        if self.gain is None or self.shape is None:
            return None
        return self.gain * (2 / fan_in(self.shape)) ** 0.5 / (self.block or 1)


@dataclass(frozen=True)
class Report:
    """What was done to a network; its text is a table of one line a layer.

    Attributes:
      layers: one record each, in the order in which they are called; a shared one once.
    """

    layers: tuple[LayerRecord, ...]

    def paths(self, action: Action) -> list[str]:
        """Paths, such as `block1/conv2`, of the layers with which this was done."""
        return ["/".join(one.path) for one in self.layers if one.action == action]

    def __str__(self) -> str:
        rows = [("layer", "kind", "kernel", "done", "gain", "why"), *map(_row, self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


def exact_gain(shape: tuple[int, ...]) -> float:
    """Theorem 3's gain of a centered kernel of this shape."""
    return gain(fan_in(shape))


def nothing_centered(name: str, reasons: Iterable[str]) -> str:
    """The sentence for a network without a centered kernel, from the reasons why each was left."""
    each = ", ".join(sorted(set(reasons)))
    if not each:
        return (
            f"{name} has no convolution and no dense layer of Flax's own (ours keep their transform): there is no "
            "kernel to center"
        )
    return f"no kernel of {name} is centered. What it has is left: {each}. Give a rule or select that takes some"


def _row(one: LayerRecord) -> tuple[str, ...]:
    shape = "x".join(map(str, one.shape or ()))
    groups = f" /{one.groups}" if one.groups > 1 else ""
    block = f" / {one.block}" if one.block is not None else ""
    number = "" if one.gain is None else f"{one.gain:.4g}{block}"
    return "/".join(one.path) or ".", one.kind, shape + groups, one.action, number, one.reason
