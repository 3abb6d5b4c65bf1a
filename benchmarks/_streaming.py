"""What the benchmark of streaming measures: pipelines, others' loaders and decoding alone, on photographs."""

import itertools
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image, ImageFile

from benchmarks._results import Record
from mimicnorm_jax.data import BatchLayout, get_spec, open_streams
from mimicnorm_jax.data.streaming import BadImages, Cut, Encoded, ImageSource, StreamingPipeline, decode

SIZE, BATCH, MIN_AREA, SEED = 224, 64, 0.08, 0
FILES, LONG_RUN, WARM_UP = 400, 10_000, 4
HALF = ((0.5,) * 3, (0.5,) * 3)


def write_photographs(root: Path) -> None:
    """FILES JPEGs of two classes, an eighth of them to test with."""
    from sklearn.datasets import load_sample_images

    rng, pictures = np.random.default_rng(SEED), [Image.fromarray(image) for image in load_sample_images().images]
    for i in range(FILES):
        left, top = int(rng.integers(140)), int(rng.integers(52))
        folder = root / ("val" if i % 8 == 0 else "train") / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        part = pictures[i % 2].crop((left, top, left + 500, top + 375))
        part.save(folder / f"{i:03}.jpg", quality=90)


class Repeated:
    """A source over and over, as long as an epoch of ImageNet: what an epoch's end costs is not asked here."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return 1_281_167

    def __getitem__(self, index: int) -> Encoded:
        return self.source[index % len(self.source)]


def _pipeline(root: str, workers: int, size: int, batch: int) -> StreamingPipeline:
    data = open_streams(get_spec(f"folder:{root}", "", size), "", BadImages(0), HALF)
    layout = BatchLayout(batch, 1, (0,))
    return StreamingPipeline(
        (Repeated(data.train), data.test), Cut(size, MIN_AREA), SEED, layout, BadImages(0), workers, lambda feed: feed
    )


def _rate(batches: Iterator[Any], workers: int, seconds: float) -> Record:
    """Images a second, after what lies ready when the last worker has started, and the process's CPU time."""
    for _ in range(WARM_UP * workers):
        next(batches)
    count, started, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - started < seconds:
        count += len(next(batches))
    used, elapsed = time.process_time() - used, time.perf_counter() - started
    return {"images_per_second": count / elapsed, "cpu_ms": 1e3 * used / count}


_BARRIER: list[Any] = []


def _start_together(barrier: Any) -> None:
    _BARRIER.append(barrier)


def _decode_only(arguments: tuple[str, float]) -> float:
    root, seconds = arguments
    files = [path.read_bytes() for path in sorted(Path(root).glob("train/*/*.jpg"))]
    _BARRIER[0].wait()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        decode(files[count % len(files)], Cut(SIZE, MIN_AREA), Random(count))
        count += 1
    return count / (time.perf_counter() - started)


def measure_decoding(root: str, workers: int, seconds: float) -> Record:
    """Images a second of so many processes that only decode what lies in their memory."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_together, (context.Barrier(workers),)) as pool:
        return {"images_per_second": sum(pool.map(_decode_only, [(root, seconds)] * workers, chunksize=1))}


def _train_feeds(pipeline: StreamingPipeline) -> Iterator[Any]:
    return (feed for epoch in itertools.count() for feed, _ in pipeline.train_feeds(epoch, 0))


def _work(root: str, seconds: float, start: int = 0) -> tuple[int, float]:
    """Number of images that are read, decoded and put into a batch's row, and images a second."""
    files = sorted(Path(root).glob("train/*/*.jpg"))
    rows, count, started = np.zeros((BATCH, SIZE, SIZE, 3), np.uint8), 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        data = files[(start + count) % len(files)].read_bytes()
        rows[count % BATCH] = decode(data, Cut(SIZE, MIN_AREA), Random(start + count))
        count += 1
    return count, count / (time.perf_counter() - started)


def _work_in_process(arguments: tuple[str, float]) -> tuple[int, float, float]:
    _work(arguments[0], 0.2)
    _BARRIER[0].wait()
    used = time.process_time()
    return *_work(*arguments), time.process_time() - used


def measure_reading(root: str, workers: int, seconds: float) -> Record:
    """Images a second of so many processes that do what the pipeline's threads do, and nothing else."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start_together, (context.Barrier(workers),)) as pool:
        counts, rates, used = zip(*pool.map(_work_in_process, [(root, seconds)] * workers, chunksize=1), strict=True)
    return {"images_per_second": sum(rates), "cpu_ms": 1e3 * sum(used) / sum(counts)}


def measure_bare(root: str, workers: int, seconds: float) -> Record:
    """The same of so many threads of one process: what Python's lock costs, without a pipeline."""
    _work(root, 0.2)
    used = time.process_time()
    with ThreadPoolExecutor(workers) as pool:
        counts, rates = zip(*pool.map(lambda i: _work(root, seconds, FILES * i), range(workers)), strict=True)
    return {"images_per_second": sum(rates), "cpu_ms": 1e3 * (time.process_time() - used) / sum(counts)}


def measure_lock(root: str, workers: int, seconds: float) -> Record:
    """Share of a thread's CPU time outside of what lets go of Python's lock: reading, decoding, resampling."""
    del workers
    free, depth = 0.0, 0  # resampling loads what is not loaded yet

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal free, depth
            started, depth = time.thread_time(), depth + 1
            try:
                return function(*args, **kwargs)
            finally:
                depth -= 1
                free += 0.0 if depth else time.thread_time() - started

        return call

    started = time.thread_time()
    with (
        mock.patch.object(ImageFile.ImageFile, "load", timed(ImageFile.ImageFile.load)),
        mock.patch.object(Path, "read_bytes", timed(Path.read_bytes)),
        mock.patch.object(Image.Image, "resize", timed(Image.Image.resize)),
    ):
        count, _ = _work(root, seconds)
    total = time.thread_time() - started
    return {"held": 1 - free / total, "cpu_ms": 1e3 * total / count}


def measure_pipeline(root: str, workers: int, seconds: float) -> Record:
    """Images a second of the pipeline."""
    feeds = _train_feeds(_pipeline(root, workers, SIZE, BATCH))
    return _rate((feed.labels.reshape(-1) for feed in feeds), workers, seconds)


def measure_grain(root: str, workers: int, seconds: float) -> Record:
    """Images a second of grain's worker processes around the same decoding."""
    import grain  # type: ignore[import-not-found]
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # grain reads some
    source = open_streams(get_spec(f"folder:{root}", "", SIZE), "", BadImages(0), HALF).train
    cut = Cut(SIZE, MIN_AREA)
    data = grain.MapDataset.range(len(source)).shuffle(seed=SEED).repeat()
    data = data.map(lambda i: decode(source[i].data, cut, Random(i)))
    # By default each worker would read 500 images ahead, and a short measurement would be of those.
    batches = data.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=BATCH)).batch(BATCH)
    options = grain.MultiprocessingOptions(num_workers=workers)
    rate = _rate(iter(batches.mp_prefetch(options)), workers, seconds)["images_per_second"]
    return {"images_per_second": rate}


def measure_waiting(root: str, workers: int, seconds: float) -> Record:
    """What a training loop gets and waits, whose step takes twice as long as its batch's decoding."""
    rate = measure_pipeline(root, workers, seconds / 2)["images_per_second"]
    feeds, waited, turns = _train_feeds(_pipeline(root, workers, SIZE, BATCH)), 0.0, 0
    next(feeds)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        time.sleep(2 * BATCH / rate)  # A device that computes takes no core.
        asked = time.perf_counter()
        next(feeds)
        waited, turns = waited + time.perf_counter() - asked, turns + 1
    elapsed = time.perf_counter() - started
    return {"images_per_second": turns * BATCH / elapsed, "waited": waited / elapsed}


def measure_growth(root: str, workers: int, seconds: float) -> Record:
    """Resident MiB after a tenth and after all of LONG_RUN batches of four images of 32 x 32."""
    del seconds
    found = []
    for i, _ in enumerate(itertools.islice(_train_feeds(_pipeline(root, workers, 32, 4)), LONG_RUN), start=1):
        if i in (LONG_RUN // 10, LONG_RUN):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found.append(pages * resource.getpagesize() / 2**20)
    return {"resident_mib": found}


ARMS = {
    "decoding": measure_decoding,
    "reading": measure_reading,
    "bare": measure_bare,
    "pipeline": measure_pipeline,
    "grain": measure_grain,
    "waiting": measure_waiting,
    "growth": measure_growth,
    "lock": measure_lock,
}
