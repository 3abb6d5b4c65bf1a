"""Images decoded as they are needed, by threads, ahead of the devices.

Pillow lets go of Python's lock while it decodes and resamples, so threads share the cores.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mimicnorm_jax.data import batching
from mimicnorm_jax.data.batching import BatchLayout
from mimicnorm_jax.data.pipeline import Batch, Feed, MakeBatch, Resident, Stop, never
from mimicnorm_jax.data.specs import ImageSource
from mimicnorm_jax.data.streaming.bad_images import BadImages
from mimicnorm_jax.data.streaming.decoding import BadImageError, Cut, cut_generator, decode
from mimicnorm_jax.data.streaming.decoding_threads import DecodingThreads
from mimicnorm_jax.errors import DataError
from mimicnorm_jax.utils.console import log_line

AHEAD = 2
"""Feeds that are decoded, or being decoded, while the devices work on another."""
AT_A_TIME = 8
"""Images that a thread is given at a time, at most."""
STALL_SECONDS = 60.0
"""After so long a wait for one feed the run says what it waits for."""
STOP_SECONDS = 5.0
"""So long a feed is waited for once the run is asked to stop."""
_POLL_SECONDS = 0.25


def take_feed(resident: Resident, feed: Feed) -> Batch:
    """The batch itself is fed."""
    del resident
    return feed


@dataclass(frozen=True)
class Reader:
    """Reads and decodes single images.

    Attributes:
      source: of a split.
      cut: what of each image.
      bad: counts what cannot be used.
      stream: what random cuts depend on beside an image's place: seed and epoch; None for no random cuts.
    """

    source: ImageSource
    cut: Cut
    bad: BadImages
    stream: tuple[int, int] | None = None

    def read(self, index: int) -> tuple[np.ndarray, int] | None:
        """Image and label, or None for a bad image.

        Raises:
          DataError: for one bad image too many.
        """
        name = f"image {index}"
        try:
            encoded = self.source[index]
            name = encoded.name
            rng = None if self.stream is None else cut_generator(*self.stream, index)
            return decode(encoded.data, self.cut, rng), encoded.label
        except BadImageError as error:
            self.bad.add(name, str(error))
        except MemoryError:
            raise
        except Exception as error:  # what a source raises is its own
            self.bad.add(name, f"{type(error).__name__}: {error}")
        return None

    def fill(self, images: np.ndarray, labels: np.ndarray, place: int, index: int) -> None:
        """Puts an image, or the next one that is not bad, into its place in a batch."""
        for other in range(index, index + len(self.source)):
            if (found := self.read(other % len(self.source))) is not None:
                images[place], labels[place] = found
                return
        raise DataError("no image of the split can be used")

    def fill_or_mask(self, images: np.ndarray, labels: np.ndarray, mask: np.ndarray, place: int, index: int) -> None:
        """Puts an image into its place in a batch, or masks the place."""
        found = self.read(index)
        images[place], labels[place] = (0, 0) if found is None else found
        if found is None:
            mask[place] = 0


@dataclass(frozen=True)
class _Started:
    """A feed in the making: where it goes, what is still to be done, and the images' places."""

    arrays: Batch
    futures: list[Future[None]]


@dataclass(frozen=True)
class StreamingPipeline:
    """A data set that is read and decoded as it is needed; see `Pipeline`.

    The order of images and every random cut are functions of seed, epoch and place, so that a run can go on anywhere
    with any number of threads. In the place of a training image that cannot be used stands the next one; a test image
    that cannot be used does not count.

    Attributes:
      sources: of the training and the test images.
      cut: what of each image; random in training if it has a smallest area.
      seed: of order and cuts.
      layout: of batches.
      bad: counts images that cannot be used.
      num_threads: that decode.
      place: puts a feed, every leaf `(local devices, ...)`, on the devices.
    """

    sources: tuple[ImageSource, ImageSource]
    cut: Cut
    seed: int
    layout: BatchLayout
    bad: BadImages
    num_threads: int
    place: Callable[[Any], Any]
    train: Resident = ()
    test: Resident = ()

    @property
    def steps_per_epoch(self) -> int:
        """See `Pipeline.steps_per_epoch`."""
        return len(self.sources[0]) // self.layout.batch_size

    @property
    def make_batch(self) -> MakeBatch:
        """See `Pipeline.make_batch`."""
        return take_feed

    def train_feeds(self, epoch: int, first: int, stop: Stop = never) -> Iterator[tuple[Batch, int]]:
        """See `Pipeline.train_feeds`."""
        order = batching.epoch_order(self.seed, epoch, len(self.sources[0]))
        batches = batching.train_batches(order, self.layout.batch_size, self.layout.num_devices, first)
        groups = batching.grouped(batches, self.layout.steps_per_call)
        local = [(self.layout.local(index), num_steps) for index, num_steps in groups]
        reader = Reader(self.sources[0], self.cut, self.bad, (self.seed, epoch))
        # What fills up a last group of steps is never looked at.
        starts = (partial(self._start_train, reader, index, num_steps) for index, num_steps in local)
        sizes = (num_steps for _, num_steps in local)
        for feed in self._feeds(starts, stop):  # zip would keep one feed more on the devices, in a tuple that it reuses
            yield feed, next(sizes)

    def test_feeds(self, stop: Stop = never) -> Iterator[Batch]:
        """See `Pipeline.test_feeds`."""
        reader = Reader(self.sources[1], self.cut, self.bad)
        rows = batching.eval_batches(len(self.sources[1]), self.layout.batch_size, self.layout.num_devices)
        local = ((self.layout.local(index), self.layout.local(mask)) for index, mask in rows)
        yield from self._feeds((partial(self._start_test, reader, index, mask) for index, mask in local), stop)

    def _arrays(self, shape: tuple[int, ...], mask: np.ndarray | None = None) -> Batch:
        side = self.cut.size
        return Batch(np.zeros((*shape, side, side, 3), np.uint8), np.zeros(shape, np.int32), mask)  # type: ignore

    def _start_train(self, reader: Reader, index: np.ndarray, num_steps: int, threads: DecodingThreads) -> _Started:
        arrays = self._arrays(index.shape)
        wanted = np.zeros(index.shape, bool)
        wanted[:, :num_steps] = True
        images, labels = _rows(arrays)
        fill = partial(reader.fill, images, labels)
        return self._started(arrays, threads, fill, np.flatnonzero(wanted), index)

    def _start_test(self, reader: Reader, index: np.ndarray, mask: np.ndarray, threads: DecodingThreads) -> _Started:
        mask = np.array(mask)
        arrays = self._arrays(index.shape, mask)
        images, labels = _rows(arrays)
        counts = mask.reshape(-1)
        fill = partial(reader.fill_or_mask, images, labels, counts)
        return self._started(arrays, threads, fill, np.flatnonzero(counts), index)

    def _started(
        self,
        arrays: Batch,
        threads: DecodingThreads,
        fill: Callable[[int, int], None],
        places: np.ndarray,
        index: np.ndarray,
    ) -> _Started:
        """Has images put into places of a batch, some at a time: handing a thread its work takes Python's lock."""
        pairs = list(zip(places.tolist(), index.ravel()[places].tolist(), strict=True))
        size = min(AT_A_TIME, max(1, len(pairs) // self.num_threads))
        parts = (pairs[i : i + size] for i in range(0, len(pairs), size))
        return _Started(arrays, [threads.submit(partial(_fill_some, fill, part)) for part in parts])

    def _feeds(self, starts: Iterator[Callable[[DecodingThreads], _Started]], stop: Stop) -> Iterator[Batch]:
        """Feeds in order, on the devices, those behind them started; ends all threads however it is left."""
        threads = DecodingThreads(self.num_threads)
        started: deque[_Started] = deque()
        try:
            for start in starts:
                started.append(start(threads))
                if len(started) > AHEAD:
                    yield self.place(_finished(started.popleft(), stop))
            while started:
                yield self.place(_finished(started.popleft(), stop))
        finally:
            threads.close()


def _fill_some(fill: Callable[[int, int], None], pairs: list[tuple[int, int]]) -> None:
    for place, image in pairs:
        fill(place, image)


def _rows(arrays: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a feed, one row an image, in the same memory."""
    images, labels = np.asarray(arrays.images), np.asarray(arrays.labels)
    return images.reshape(-1, *images.shape[-3:]), labels.reshape(-1)


def _finished(feed: _Started, stop: Stop) -> Batch:
    """A feed, once all of its images are there.

    Raises:
      DataError: if one cannot be used, or all are not there `STOP_SECONDS` after the run was asked to stop.
    """
    said = time.monotonic()
    waited, stopped = 0.0, None
    while True:
        done, missing = wait(feed.futures, _POLL_SECONDS, FIRST_EXCEPTION)
        for future in done:
            future.result()
        if not missing:
            return feed.arrays
        now = time.monotonic()
        images = f"up to {AT_A_TIME * len(missing)} images of the next batch are not read yet"
        if stop():
            stopped = now if stopped is None else stopped
            if now - stopped >= STOP_SECONDS:
                raise DataError(f"asked to stop, and not waiting for data: {images}")
        if now - said >= STALL_SECONDS:
            said, waited = now, waited + now - said
            log_line(f"waiting for data for {waited:.0f} s: {images}")
