"""What a search chooses from: layers of inverted residuals, each with a window and an expansion of its own."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Path = tuple[int, ...]
"""The choice at every layer: one architecture."""


class Layer(NamedTuple):
    """One layer of a space, whichever block is chosen.

    Attributes:
      channels: that it reads.
      features: that it gives.
      strides: of its depthwise convolution.
      number, sums: as `models.mobilenet.InvertedResidual` takes them.
    """

    channels: int
    features: int
    strides: int
    number: int | None
    sums: int


@dataclass(frozen=True)
class SearchSpace:
    """Networks of inverted residuals that differ in the block of each layer.

    All have a 3x3 stem, one fixed block without expansion, the layers, a last pointwise convolution and a classifier.

    Attributes:
      stages: channels, layers and stride of the first of them.
      stem: channels of the stem.
      first: channels of the fixed block.
      last: channels of the last convolution.
      windows: of the depthwise convolution, odd.
      expansions: factors on a block's input channels.

    Example:
      >>> PUBLISHED.num_layers, PUBLISHED.choices
      (21, ((3, 3), (3, 6), (5, 3), (5, 6), (7, 3), (7, 6)))
    """

    stages: tuple[tuple[int, int, int], ...]
    stem: int = 32
    first: int = 16
    last: int = 1280
    windows: tuple[int, ...] = (3, 5, 7)
    expansions: tuple[int, ...] = (3, 6)

    def __post_init__(self) -> None:
        if not self.stages or not self.choices:
            raise ValueError("a search space needs stages, windows and expansions; one of them is empty")
        if even := [window for window in self.windows if window % 2 == 0]:
            raise ValueError(f"windows={self.windows}: {even[0]} is even, and a block that is summed keeps its size")
        numbers = (*itertools.chain(*self.stages), self.stem, self.first, self.last, *self.windows, *self.expansions)
        if min(numbers) < 1:
            raise ValueError(f"{self} holds {min(numbers)}: channels, layers, strides and factors are at least 1")

    @property
    def num_layers(self) -> int:
        """Layers with a choice."""
        return sum(layers for _, layers, _ in self.stages)

    @property
    def choices(self) -> tuple[tuple[int, int], ...]:
        """Window and expansion of every choice, the same at every layer."""
        return tuple(itertools.product(self.windows, self.expansions))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer with a choice; a block is summed onto its input where that has its shape."""
        found, channels = [], self.first
        count = sums = int(self.stem == self.first)
        for features, repeats, first_stride in self.stages:
            for strides in (first_stride, *(1,) * (repeats - 1)):
                summed = strides == 1 and features == channels
                count += summed
                found.append(Layer(channels, features, strides, count if summed else None, sums))
                sums = sums + 1 if summed else 0
                channels = features
        return tuple(found)

    def check(self, path: Sequence[int]) -> Path:
        """A path as plain integers; raises ValueError naming the place that is no choice of this space."""
        if len(path) != self.num_layers:
            raise ValueError(f"a path has {len(path)} choices, and the space {self.num_layers} layers: {tuple(path)}")
        for layer, choice in enumerate(path):
            if not 0 <= choice < len(self.choices):
                raise ValueError(f"the choice {choice} at layer {layer} is not one of 0 to {len(self.choices) - 1}")
        return tuple(int(choice) for choice in path)

    def sample(self, generator: np.random.Generator) -> Path:
        """A path, every choice of every layer being as likely."""
        return tuple(generator.integers(len(self.choices), size=self.num_layers).tolist())


PUBLISHED = SearchSpace(((32, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1)))
"""21 layers of 6 choices, as in BN-NAS (Chen et al. 2021), for images of at least 16 x 16 pixels.

The stem has no stride, which is for small images. Layers and choices are the published ones; the channels are those
that one-shot searches of this kind usually take, recalled and not checked.
"""
SMALL = SearchSpace(((16, 2, 1), (24, 2, 2), (32, 2, 2)), stem=8, first=8, last=64)
"""6 layers of 6 choices, for images of 8 x 8 pixels on a CPU."""
