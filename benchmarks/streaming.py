"""How fast images are streamed: pure decoding, the pipeline, others' loaders, a step that waits, memory over time.

Writes 400 JPEGs of 500 x 375 pixels, parts of the photographs that scikit-learn carries, into a temporary folder, and
reads them as in training on ImageNet (random cuts to 224 x 224). All arms take turns, in processes of their own. Adds a
record to results/streaming.jsonl, then writes streaming.md.

  python -m benchmarks.streaming
  python -m benchmarks.streaming --grain_python=VENV/bin/python --torch_python=VENV/bin/python
"""

import argparse
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import _results
from benchmarks._results import ROOT, Record, Store
from mimicnorm_jax.data import BadImages, Cut, Encoded, ImageSource, StreamingPipeline, decode, get_spec, open_streams
from mimicnorm_jax.data.batching import BatchLayout
from mimicnorm_jax.data.decoding import cut_generator

SIZE, BATCH, MIN_AREA, SEED = 224, 64, 0.08, 0
FILES, LONG_RUN = 400, 10_000
HALF = ((0.5,) * 3, (0.5,) * 3)


def write_photographs(root: Path) -> None:
    """FILES JPEGs of two classes, an eighth of them to test with."""
    from PIL import Image
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


def _rate(batches: Iterator[Any], seconds: float) -> float:
    """Images a second, after two batches."""
    for _ in range(2):
        next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        count += len(next(batches))
    return count / (time.perf_counter() - started)


def _decode_only(arguments: tuple[str, float]) -> float:
    root, seconds = arguments
    files = [path.read_bytes() for path in sorted(Path(root).glob("train/*/*.jpg"))]
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        decode(files[count % len(files)], Cut(SIZE, MIN_AREA), cut_generator(SEED, 0, count))
        count += 1
    return count / (time.perf_counter() - started)


def measure_decoding(root: str, workers: int, seconds: float) -> float:
    """Images a second of so many processes that only decode what lies in their memory."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return sum(pool.map(_decode_only, [(root, seconds)] * workers))


def measure_pipeline(root: str, workers: int, seconds: float) -> float:
    """Images a second of the pipeline."""
    pipeline = _pipeline(root, workers, SIZE, BATCH)
    feeds = (feed.labels.reshape(-1) for epoch in itertools.count() for feed, _ in pipeline.train_feeds(epoch, 0))
    return _rate(feeds, seconds)


def measure_grain(root: str, workers: int, seconds: float) -> float:
    """Images a second of grain's worker processes around the same decoding."""
    import grain  # type: ignore[import-not-found]
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # grain reads some
    source = open_streams(get_spec(f"folder:{root}", "", SIZE), "", BadImages(0), HALF).train
    cut = Cut(SIZE, MIN_AREA)
    data = grain.MapDataset.range(len(source)).shuffle(seed=SEED).repeat()
    data = data.map(lambda i: decode(source[i].data, cut, cut_generator(SEED, 0, i))).batch(BATCH)
    options = grain.MultiprocessingOptions(num_workers=workers)
    return _rate(iter(data.to_iter_dataset().mp_prefetch(options)), seconds)


def measure_waiting(root: str, workers: int, seconds: float) -> float:
    """Share of the time that a training loop waits for its next feed, its step taking twice as long as decoding."""
    rate = measure_pipeline(root, workers, seconds / 2)
    pipeline, waited, turns = _pipeline(root, workers, SIZE, BATCH), 0.0, 0
    feeds = (feed for epoch in itertools.count() for feed, _ in pipeline.train_feeds(epoch, 0))
    next(feeds)
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        time.sleep(2 * BATCH / rate)  # A device that computes takes no core.
        asked = time.perf_counter()
        next(feeds)
        waited, turns = waited + time.perf_counter() - asked, turns + 1
    return waited / (time.perf_counter() - started)


def measure_growth(root: str, workers: int, seconds: float) -> list[float]:
    """Resident MiB after a tenth and after all of LONG_RUN batches of eight images of 32 x 32."""
    del seconds
    pipeline, found = _pipeline(root, workers, 32, 8), []
    feeds = (feed for epoch in itertools.count() for feed, _ in pipeline.train_feeds(epoch, 0))
    for i, _ in enumerate(itertools.islice(feeds, LONG_RUN), start=1):
        if i in (LONG_RUN // 10, LONG_RUN):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found.append(pages * resource.getpagesize() / 2**20)
    return found


ARMS = {"decoding": measure_decoding, "pipeline": measure_pipeline, "grain": measure_grain, "waiting": measure_waiting}
RATES = ("decoding", "pipeline", "grain", "torch")


def _in_process(arm: str, root: str, workers: int, arguments: argparse.Namespace) -> Any:
    """What an arm prints last in a process of its own."""
    if arm == "torch":
        script = str(ROOT / "benchmarks" / "_torch_loader.py")
        numbers = (SIZE, BATCH, workers, arguments.seconds)
        command = [arguments.torch_python, script, f"{root}/train", *map(str, numbers)]
    else:
        python = arguments.grain_python if arm == "grain" else sys.executable
        command = [python, "-m", "benchmarks.streaming", "--measure", arm, root, str(workers), str(arguments.seconds)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace) -> Record:
    """The record of all arms."""
    arms = [arm for arm in RATES if arm in ("decoding", "pipeline") or getattr(arguments, f"{arm}_python")]
    cores = len(os.sched_getaffinity(0))
    workers = sorted({1, cores, 2 * cores})
    cases = list(itertools.product(arms, workers))
    rates: dict[str, list[float]] = {f"{arm} {n}": [] for arm, n in cases}
    waiting: list[float] = []
    with tempfile.TemporaryDirectory() as root:
        write_photographs(Path(root))
        for _ in tqdm(range(arguments.rounds), "rounds", leave=False):
            for arm, n in cases:
                rates[f"{arm} {n}"].append(_in_process(arm, root, n, arguments))
            waiting.append(_in_process("waiting", root, cores, arguments))
        growth = _in_process("growth", root, cores, arguments)
    about = {"rounds": arguments.rounds, "seconds": arguments.seconds, "cores": cores, "machine": _results.machine()}
    return {"images_per_second": rates, "waiting": waiting, "memory_mib": growth, **about}


def key(record: Record) -> _results.Key:
    return record["machine"]["device"], record["cores"]


STORE = Store("streaming", key)
NAMES = {
    "decoding": "decoding alone, processes",
    "pipeline": "the pipeline, threads",
    "grain": "grain around the same decoding, processes",
    "torch": "PyTorch's DataLoader with Pillow, processes",
}


def table(records: list[Record]) -> str:
    """Images a second and the ratio to pure decoding by as many as there are cores."""
    rows = []
    for record in records:
        limit = record["images_per_second"][f"decoding {record['cores']}"]
        for case, values in record["images_per_second"].items():
            arm, n = case.split()
            ratio = statistics.median(value / best for value, best in zip(values, limit, strict=True))
            low, high = min(values), max(values)
            rows.append(
                (NAMES[arm], n, f"{statistics.median(values):,.0f}", f"{low:,.0f} to {high:,.0f}", f"{ratio:.2f}")
            )
    return _results.table(["measured", "workers", "images/s", "range", "of decoding on all cores"], rows)


def page(records: list[Record]) -> str:
    """The table, and what a loop waits and keeps."""
    text = "# How fast images are streamed\n"
    for record in records:
        waited, (early, late) = record["waiting"], record["memory_mib"]
        text += f"""
{table([record])}

JPEGs of 500 x 375 pixels, random cuts to {SIZE} x {SIZE}, batches of {BATCH}, {record["cores"]} cores; medians of
{record["rounds"]} rounds of {record["seconds"]} s in which all take turns, ratios within a round. A loop whose step
takes twice as long as its batch's decoding waits {statistics.median(waited):.1%} of the time ({min(waited):.1%} to
{max(waited):.1%}). Resident after {LONG_RUN // 10:,} batches: {early:,.0f} MiB; after {LONG_RUN:,}: {late:,.0f} MiB.

Command: `python -m benchmarks.streaming`. Machine: {_results.machines([record])}.
"""
    return text


def main() -> None:
    if "--measure" in sys.argv:
        arm, root, workers, seconds = sys.argv[sys.argv.index("--measure") + 1 :]
        function = (ARMS | {"growth": measure_growth})[arm]
        print(json.dumps(function(root, int(workers), float(seconds))), flush=True)
        return
    parser = _results.make_parser("streaming", __doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="of a measurement")
    parser.add_argument("--grain_python", default="", help="with grain beside this package; default: left out")
    parser.add_argument("--torch_python", default="", help="with torch, pillow, numpy; default: left out")
    arguments = parser.parse_args()
    if not arguments.render:
        STORE.add(arguments.results, measure(arguments))
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
