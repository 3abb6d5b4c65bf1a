"""How fast images are streamed: pure decoding, the pipeline, others' loaders, a step that waits, memory over time.

Writes 400 JPEGs of 500 x 375 pixels, parts of the photographs that scikit-learn carries, into a temporary folder, and
reads them as in training on ImageNet (random cuts to 224 x 224). All arms take turns, in processes of their own. Wants
a machine on which nothing else runs: threads that share a lock lose more to other programs than processes do. Adds a
record for each measurement to results/streaming.jsonl as soon as it is made, and goes on where it stopped; then writes
streaming.md.

  python -m benchmarks.streaming
  python -m benchmarks.streaming --grain_python=VENV/bin/python --torch_python=VENV/bin/python
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
from PIL import Image, ImageFile
from tqdm import tqdm

from benchmarks import _results
from benchmarks._results import ROOT, Record, Store
from mimicnorm_jax.data import BadImages, Cut, Encoded, ImageSource, StreamingPipeline, decode, get_spec, open_streams
from mimicnorm_jax.data.batching import BatchLayout
from mimicnorm_jax.data.decoding import cut_generator

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
        decode(files[count % len(files)], Cut(SIZE, MIN_AREA), cut_generator(SEED, 0, count))
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
        rows[count % BATCH] = decode(data, Cut(SIZE, MIN_AREA), cut_generator(SEED, 0, start + count))
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
    data = data.map(lambda i: decode(source[i].data, cut, cut_generator(SEED, 0, i)))
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
NAMES = {
    "decoding": "decoding alone, processes",
    "reading": "reading, decoding, into a row: processes",
    "bare": "the same, bare threads",
    "pipeline": "the pipeline, threads",
    "grain": "grain around the same decoding, processes",
    "torch": "PyTorch's DataLoader with Pillow, processes",
}
"""The arms that are compared."""
OURS = ("decoding", "reading", "bare", "pipeline")


def _command(arm: str, root: str, workers: int, arguments: argparse.Namespace) -> list[str]:
    if arm == "torch":
        script = str(ROOT / "benchmarks" / "_torch_loader.py")
        return [arguments.torch_python, script, f"{root}/train", *map(str, (SIZE, BATCH, workers, arguments.seconds))]
    python = arguments.grain_python if arm == "grain" else sys.executable
    return [python, "-m", "benchmarks.streaming", "--measure", arm, root, str(workers), str(arguments.seconds)]


def _in_process(command: list[str]) -> Record:
    """What a command prints last, with the most memory that it and its children had together.

    Pages that processes share count once: each process has its share of them.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    peak = 0
    while True:
        try:
            output, _ = process.communicate(timeout=0.5)
            break
        except subprocess.TimeoutExpired:
            peak = max(peak, _memory(process.pid))
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(output.splitlines()[-1]) | {"peak_mib": peak / 2**20}


def _memory(pid: int) -> int:
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (parent := psutil.Process(pid), *parent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_full_info().pss
    return total


def _cases(arguments: argparse.Namespace, cores: int) -> Iterator[tuple[str, int, int]]:
    """Arm, workers, round; the long run last."""
    counts = sorted({2**i for i in range(cores.bit_length())} | {cores, 2 * cores})
    arms = [arm for arm in NAMES if arm in OURS or getattr(arguments, f"{arm}_python")]
    for turn in range(arguments.rounds):
        yield from ((arm, workers, turn) for workers in counts for arm in arms)
        yield "waiting", cores, turn
        yield "lock", 1, turn
    yield "growth", cores, 0


def key(record: Record) -> _results.Key:
    return *_where(record), record["arm"], record["workers"], record["round"]


def _where(record: Record) -> _results.Key:
    return record["machine"]["device"], record["cores"]


STORE = Store("streaming", key)


def measure(arguments: argparse.Namespace) -> None:
    """Measures what no record has yet."""
    cores = len(os.sched_getaffinity(0))
    about = {"seconds": arguments.seconds, "cores": cores, "machine": _results.machine()}
    cases = [{"arm": arm, "workers": n, "round": turn} | about for arm, n, turn in _cases(arguments, cores)]
    done = STORE.read(arguments.results)
    with tempfile.TemporaryDirectory() as root:
        write_photographs(Path(root))
        for case in tqdm([case for case in cases if key(case) not in done], "streaming", leave=False):
            command = _command(case["arm"], root, case["workers"], arguments)
            STORE.add(arguments.results, case | _in_process(command))


def table(records: list[Record]) -> str:
    """Images a second, the ratio to pure decoding by as many processes in the same round, and memory."""
    limits = {
        (*_where(record), record["workers"], record["round"]): record["images_per_second"]
        for record in records
        if record["arm"] == "decoding"
    }
    rows = []
    compared = [record for record in records if record["arm"] in NAMES]
    for found in _results.grouped(
        compared, lambda record: (*_where(record), record["arm"], record["workers"])
    ).values():
        rates = [record["images_per_second"] for record in found]
        ratios = [
            record["images_per_second"] / limits[*_where(record), record["workers"], record["round"]]
            for record in found
        ]
        rows.append(
            (
                NAMES[found[0]["arm"]],
                found[0]["workers"],
                found[0]["cores"],
                f"{statistics.median(rates):,.0f}",
                f"{min(rates):,.0f} to {max(rates):,.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{statistics.median(cpu):.2f}" if (cpu := [r["cpu_ms"] for r in found if "cpu_ms" in r]) else "",
                f"{max(record['peak_mib'] for record in found):,.0f}",
            )
        )
    header = [
        "measured",
        "workers",
        "cores",
        "images/s",
        "range",
        "of decoding alone",
        "CPU ms an image",
        "memory, MiB",
    ]
    return _results.table(header, rows) if rows else "Not run yet."


def facts(records: list[Record]) -> str:
    """What a loop waits and keeps, a paragraph a machine."""
    parts = []
    for found in _results.grouped(records, _where).values():
        loops = [record for record in found if record["arm"] == "waiting"]
        growth = [record for record in found if record["arm"] == "growth"]
        if not loops or not growth:
            continue
        waited, rates = [r["waited"] for r in loops], [r["images_per_second"] for r in loops]
        early, late = growth[0]["resident_mib"]
        parts.append(
            f"{found[0]['cores']} cores: a loop whose step takes twice as long as its batch's decoding gets "
            f"{statistics.median(rates):,.0f} images/s and waits\n{statistics.median(waited):.1%} of the time "
            f"({min(waited):.1%} to {max(waited):.1%}). Resident after {LONG_RUN // 10:,} batches: {early:,.0f} MiB; "
            f"after {LONG_RUN:,}: {late:,.0f} MiB."
        )
    return "\n\n".join(parts)


def lock(records: list[Record]) -> str:
    """How much of an image's work holds Python's lock, a paragraph a machine."""
    parts = []
    for found in _results.grouped([r for r in records if r["arm"] == "lock"], _where).values():
        held = statistics.median(r["held"] for r in found)
        parts.append(
            f"{found[0]['cores']} cores: at least {held:.0%} of an image's CPU time holds Python's lock (headers, the "
            f"cut, pixels from Pillow to NumPy),\nso that threads of one process never do the work of more than "
            f"{1 / held:.1f} cores, however many they are."
        )
    return "\n\n".join(parts)


def page(records: list[Record]) -> str:
    """The table, and what a loop waits and keeps."""
    rounds, seconds = max(record["round"] for record in records) + 1, records[0]["seconds"]
    return f"""# How fast images are streamed

{table(records)}

JPEGs of 500 x 375 pixels, random cuts to {SIZE} x {SIZE}, batches of {BATCH}; medians of {rounds} rounds of {seconds} s
in which all take turns. A ratio is to decoding alone in as many processes in the same round. Memory is the peak of the
process and its children together, imports included. Decoding alone has its files in memory and drops what it decodes;
reading them and putting pixels into a batch's row is work too, which the next row has; what bare threads lose beside it
is the lock's, and what the pipeline loses beside bare threads its own.

{facts(records)}

{lock(records)}

Command: `python -m benchmarks.streaming --grain_python=VENV/bin/python --torch_python=VENV/bin/python`.
Machine: {_results.machines(records)}.
"""


def main() -> None:
    if "--measure" in sys.argv:
        arm, root, workers, seconds = sys.argv[sys.argv.index("--measure") + 1 :]
        print(json.dumps(ARMS[arm](root, int(workers), float(seconds))), flush=True)
        return
    parser = _results.make_parser("streaming", __doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="of a measurement")
    parser.add_argument("--grain_python", default="", help="with grain beside this package; default: left out")
    parser.add_argument("--torch_python", default="", help="with torch, pillow, numpy; default: left out")
    arguments = parser.parse_args()
    if not arguments.render:
        measure(arguments)
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
