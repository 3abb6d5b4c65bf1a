"""Which images make up a batch: a function of seed and step, so that a resumed run needs nothing else."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np


@dataclass(frozen=True)
class BatchLayout:
    """How batches lie on devices.

    Attributes:
      batch_size: over all devices; a multiple of `num_devices`.
      num_devices: that share a batch, those of other processes included.
      local_devices: places, among them, of this process's devices.
      steps_per_call: batches that the devices get at a time.
    """

    batch_size: int
    num_devices: int
    local_devices: tuple[int, ...]
    steps_per_call: int = 1

    def local(self, rows: np.ndarray) -> np.ndarray:
        """This process's rows `(local devices, ...)` of those of all devices `(num_devices, ...)`."""
        return rows if len(self.local_devices) == self.num_devices else rows[list(self.local_devices)]


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which epoch `epoch` (from 0) visits `count` images: a permutation of int32."""
    return np.random.default_rng((seed, epoch)).permutation(count).astype(np.int32)


def train_batches(order: np.ndarray, batch_size: int, num_devices: int, first: int = 0) -> Iterator[np.ndarray]:
    """The batches of one epoch; what does not fill a batch at its end is left for other epochs.

    Args:
      order: from `epoch_order`.
      batch_size: over all devices; a multiple of `num_devices`.
      num_devices: that share a batch.
      first: batches of this epoch to leave out, because they were trained on before.

    Yields:
      Indices `(num_devices, batch_size / num_devices)`.
    """
    for start in range(first * batch_size, len(order) - batch_size + 1, batch_size):
        yield order[start : start + batch_size].reshape(num_devices, -1)


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


def eval_batches(count: int, batch_size: int, num_devices: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All of `count` images once, the last batch filled up with masked repeats.

    Args:
      count: number of images.
      batch_size: over all devices; a multiple of `num_devices`.
      num_devices: that share a batch.

    Yields:
      Indices and a mask that is 1 for images that count and 0 for filling, both
      `(num_devices, batch_size / num_devices)`.
    """
    for start in range(0, count, batch_size):
        position = np.arange(start, start + batch_size, dtype=np.int32)
        mask = (position < count).astype(np.float32)
        yield np.minimum(position, count - 1).reshape(num_devices, -1), mask.reshape(num_devices, -1)
