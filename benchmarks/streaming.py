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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
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


def _rate(batches: Iterator[Any], workers: int, seconds: float) -> float:
    """Images a second, after what lies ready in queues when the last worker has started."""
    for _ in range(WARM_UP * workers):
        next(batches)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        count += len(next(batches))
    return count / (time.perf_counter() - started)


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


def measure_pipeline(root: str, workers: int, seconds: float) -> Record:
    """Images a second of the pipeline."""
    feeds = _train_feeds(_pipeline(root, workers, SIZE, BATCH))
    return {"images_per_second": _rate((feed.labels.reshape(-1) for feed in feeds), workers, seconds)}


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
    return {"images_per_second": _rate(iter(batches.mp_prefetch(options)), workers, seconds)}


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
    "pipeline": measure_pipeline,
    "grain": measure_grain,
    "waiting": measure_waiting,
    "growth": measure_growth,
}
NAMES = {
    "decoding": "decoding alone, processes",
    "pipeline": "the pipeline, threads",
    "grain": "grain around the same decoding, processes",
    "torch": "PyTorch's DataLoader with Pillow, processes",
}
"""The arms that are compared."""


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
    arms = [arm for arm in NAMES if arm in ("decoding", "pipeline") or getattr(arguments, f"{arm}_python")]
    for turn in range(arguments.rounds):
        yield from ((arm, workers, turn) for workers in counts for arm in arms)
        yield "waiting", cores, turn
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
                f"{max(record['peak_mib'] for record in found):,.0f}",
            )
        )
    header = ["measured", "workers", "cores", "images/s", "range", "of decoding alone", "memory, MiB"]
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


def page(records: list[Record]) -> str:
    """The table, and what a loop waits and keeps."""
    rounds, seconds = max(record["round"] for record in records) + 1, records[0]["seconds"]
    return f"""# How fast images are streamed

{table(records)}

JPEGs of 500 x 375 pixels, random cuts to {SIZE} x {SIZE}, batches of {BATCH}; medians of {rounds} rounds of {seconds} s
in which all take turns. A ratio is to decoding alone in as many processes in the same round. Memory is the peak of the
process and its children together, imports included.

{facts(records)}

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
