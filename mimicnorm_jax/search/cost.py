"""Operations of an architecture, counted from its path."""

from typing import NamedTuple

import numpy as np

from mimicnorm_jax.search.space import SearchSpace


class Flops(NamedTuple):
    """Operations of the forward pass of one image, two for each multiplication of convolutions.

    Attributes:
      table: `(L, K)`, of every choice at every layer; the sum of a path is `total(table, path)`.
      fixed: of the rest.
    """

    table: np.ndarray
    fixed: int


def flops(space: SearchSpace, image: tuple[int, int, int], num_classes: int) -> Flops:
    """Counts the convolutions of a space; multiplications with padding do not count, as in XLA's own count.

    Args:
      space: of the choices.
      image: `(H, W, C)`.
      num_classes: number of logits.

    Example:
      >>> from mimicnorm_jax.search import SMALL
      >>> found = flops(SMALL, (8, 8, 1), 10)
      >>> int(found.table[0].min()), int(found.table[0].max())
      (96960, 333312)
    """
    height, width, channels = image
    size = (height, width)
    fixed = 2 * channels * space.stem * _pairs(size, 3, 1)
    fixed += _block(size, space.stem, space.first, (3, 1), 1)
    table = np.zeros((space.num_layers, len(space.choices)), np.int64)
    for place, layer in enumerate(space.layers):
        for number, choice in enumerate(space.choices):
            table[place, number] = _block(size, layer.channels, layer.features, choice, layer.strides)
        size = tuple(-(-side // layer.strides) for side in size)
    features = space.layers[-1].features
    return Flops(table, fixed + 2 * size[0] * size[1] * features * space.last + 2 * space.last * num_classes)


def _block(size: tuple[int, ...], channels: int, features: int, choice: tuple[int, int], strides: int) -> int:
    """An inverted residual on maps of this size."""
    window, expansion = choice
    wide = expansion * channels
    outputs = np.prod([-(-side // strides) for side in size])
    pointwise = int(np.prod(size)) * channels + int(outputs) * features
    return 2 * wide * (pointwise + _pairs(size, window, strides))


def _pairs(size: tuple[int, ...], window: int, strides: int) -> int:
    """Pairs of a pixel and a place of the kernel that multiply, of a channel padded by half the window."""
    pairs = 1
    for side in size:
        reach = np.arange(0, side, strides)[:, None] + np.arange(window) - window // 2
        pairs *= int(((reach >= 0) & (reach < side)).sum())
    return pairs
