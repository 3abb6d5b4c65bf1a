"""Where batches come from, in two halves: the host's feeds, and what the devices make of a feed inside the step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from mimicnorm_jax.data import batching
from mimicnorm_jax.data.batching import BatchLayout
from mimicnorm_jax.data.specs import Dataset, Split

Resident = Any
"""A tree of arrays that stay on every device for the whole run; `()` for a pipeline that keeps nothing there."""
Feed = Any
"""A tree of arrays that the host hands over for one batch, or for several at a time."""


class Batch(NamedTuple):
    """One device's part of a batch, as a step takes it.

    Attributes:
      images: `(b, H, W, C)` uint8.
      labels: `(b,)` int32.
      mask: `(b,)`, 0 for images that do not count; None where all do. Training takes none.
    """

    images: jax.Array
    labels: jax.Array
    mask: jax.Array | None = None


MakeBatch = Callable[[Resident, Feed], Batch]
Stop = Callable[[], int]
"""Says whether this process is asked to stop: anything but 0 if it is. May be asked at any time, and any number."""


def never() -> int:
    """A `Stop` that asks for nothing."""
    return 0


class Pipeline(Protocol):
    """Where a run's batches come from.

    A step of the run is `train_step(state, make_batch(train, feed))`, compiled as one program. A resident pipeline
    feeds indices and gathers images from `train`; a streaming one feeds the batch itself and returns it.

    Attributes:
      train, test: what stays on every device.
      steps_per_epoch: number of batches in an epoch.
    """

    @property
    def train(self) -> Resident:
        """What of the training split stays on the devices."""
        ...

    @property
    def test(self) -> Resident:
        """What of the test split stays on the devices."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches of an epoch; the images left over are others in each epoch."""
        ...

    @property
    def make_batch(self) -> MakeBatch:
        """A pure function of what is resident and one device's feed of one batch; traced inside the step."""
        ...

    def train_feeds(self, epoch: int, first: int, stop: Stop = never) -> Iterator[tuple[Feed, int]]:
        """Feeds of epoch `epoch` (from 0) without its `first` batches: a function of the seed, epoch and place alone.

        Yields:
          A feed, every leaf `(local devices, steps_per_call, ...)`, and how many of its batches count, the first ones.

        Raises:
          DataError: where data cannot be read on, or is not there when `stop` asks to stop.
        """
        ...

    def test_feeds(self, stop: Stop = never) -> Iterator[Feed]:
        """Feeds that show every test image once, every leaf `(local devices, ...)`; filling is masked.

        Raises:
          DataError: as `train_feeds`.
        """
        ...


class Selection(NamedTuple):
    """A resident pipeline's feed: places `(b,)` of images, and the mask of `Batch`."""

    index: Any
    mask: Any = None


def gather_batch(image_shape: tuple[int, int, int], split: tuple[jax.Array, jax.Array], selection: Selection) -> Batch:
    """The images at the places of a selection.

    Args:
      image_shape: `(H, W, C)`.
      split: all images `(N, H W C)` and labels `(N,)`. Images are flat, as a TPU would copy all of them at every step
        into a layout that pads their few channels.
      selection: of a batch.
    """
    index, mask = selection
    return Batch(split[0][index].reshape(len(index), *image_shape), split[1][index], mask)


@dataclass(frozen=True)
class ResidentPipeline:
    """A data set that stays on every device, from which each step gathers its images there.

    Attributes:
      image_shape: `(H, W, C)`.
      train, test: flat images and labels of both splits, on every device.
      seed: of the order of training images.
      layout: of batches.
    """

    image_shape: tuple[int, int, int]
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]
    seed: int
    layout: BatchLayout

    @classmethod
    def put(
        cls, dataset: Dataset, replicate: Callable[[Any], Any], seed: int, layout: BatchLayout
    ) -> "ResidentPipeline":
        """Puts a data set on devices with `replicate`, which puts a tree on every one."""
        train, test = replicate(_flat(dataset.train)), replicate(_flat(dataset.test))
        return cls(dataset.spec.image_shape, train, test, seed, layout)

    @property
    def steps_per_epoch(self) -> int:
        """See `Pipeline.steps_per_epoch`."""
        return len(self.train[1]) // self.layout.batch_size

    @property
    def make_batch(self) -> MakeBatch:
        """See `Pipeline.make_batch`."""
        return partial(gather_batch, self.image_shape)

    def train_feeds(self, epoch: int, first: int, stop: Stop = never) -> Iterator[tuple[Selection, int]]:
        """See `Pipeline.train_feeds`; never waits."""
        del stop
        order = batching.epoch_order(self.seed, epoch, len(self.train[1]))
        batches = batching.train_batches(order, self.layout.batch_size, self.layout.num_devices, first)
        for index, num_steps in batching.grouped(batches, self.layout.steps_per_call):
            yield Selection(self.layout.local(index)), num_steps

    def test_feeds(self, stop: Stop = never) -> Iterator[Selection]:
        """See `Pipeline.test_feeds`; never waits."""
        del stop
        for rows in batching.eval_batches(len(self.test[1]), self.layout.batch_size, self.layout.num_devices):
            yield Selection(*map(self.layout.local, rows))


def _flat(split: Split) -> tuple[np.ndarray, np.ndarray]:
    return split.images.reshape(len(split), -1), split.labels
