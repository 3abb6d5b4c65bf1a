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
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
from tqdm import tqdm

from benchmarks import _results
from benchmarks._results import ROOT, Record, Store
from benchmarks._streaming import ARMS, BATCH, LONG_RUN, SIZE, write_photographs

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
