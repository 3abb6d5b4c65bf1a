"""Which images make up a batch: a function of seed and step, so that a resumed run needs nothing else."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which epoch `epoch` (from 0) visits `count` images: a permutation of int32."""
    return np.random.default_rng((seed, epoch)).permutation(count).astype(np.int32)


def train_batches(
    seed: int, epoch: int, count: int, batch_size: int, devices: int, first: int = 0
) -> Iterator[np.ndarray]:
    """The batches of one epoch; what does not fill a batch at its end is left for other epochs.

    Args:
      seed: of the run.
      epoch: from 0.
      count: number of training images.
      batch_size: over all devices; a multiple of `devices`.
      devices: number of devices.
      first: batches of this epoch to leave out, because they were trained on before.

    Yields:
      Indices `(devices, batch_size / devices)`.
    """
    order = epoch_order(seed, epoch, count)
    for start in range(first * batch_size, count - batch_size + 1, batch_size):
        yield order[start : start + batch_size].reshape(devices, -1)


def grouped(indices: Iterable[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches in groups of one shape, the last filled up with repeats.

    Args:
      indices: of each batch, `(devices, b)`.
      size: batches in a group.

    Yields:
      Indices `(devices, size, b)`, and how many of the group's batches count, the first ones.
    """
    indices = iter(indices)
    while group := list(islice(indices, size)):
        yield np.stack(group + group[-1:] * (size - len(group)), 1), len(group)


def eval_batches(count: int, batch_size: int, devices: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All of `count` images once, the last batch filled up with masked repeats.

    Args:
      count: number of images.
      batch_size: over all devices; a multiple of `devices`.
      devices: number of devices.

    Yields:
      Indices and a mask that is 1 for images that count and 0 for filling, both
      `(devices, batch_size / devices)`.
    """
    for start in range(0, count, batch_size):
        position = np.arange(start, start + batch_size, dtype=np.int32)
        mask = (position < count).astype(np.float32)
        yield np.minimum(position, count - 1).reshape(devices, -1), mask.reshape(devices, -1)
