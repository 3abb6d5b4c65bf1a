"""Speed and memory of the empirical tangent kernel against neural_tangents 0.6.5, its fastest implementation.

Every contestant is a process of its own on one core; the timed evaluations go round in turn, so that all see the same
machine. Times are process CPU time; memory is the growth of peak resident memory, compilation included. An
implementation that takes longer than --patience to its first result is out. Writes results/ntk.jsonl, one record a
case, and the table ntk.md; cases that are there already are not run again.

  python -m benchmarks.ntk.compare --neural_tangents=OTHER_ENVIRONMENT/bin/python
  python -m benchmarks.ntk.compare --neural_tangents=... --cases "a full" c --rounds 9
  python -m benchmarks.ntk.compare --lower_bound
  python -m benchmarks.ntk.compare --render

The other environment: pip install neural_tangents==0.6.5 jax==0.4.38 jaxlib==0.4.38.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import threading
from typing import Any

from benchmarks import _results
from benchmarks._results import ROOT, Record, Store
from mimicnorm_jax.utils import log_line

IMPLEMENTATIONS = ("STRUCTURED_DERIVATIVES", "NTK_VECTOR_PRODUCTS", "JACOBIAN_CONTRACTION")
MAIN = ("a full", "a trace", "b plain", "b centered", "c", "d centered", "d batchnorm", "d batchnorm, O = 1")
GROWTH = (
    *(f"a full, N = {n}" for n in (16, 32, 128)),
    *(f"a full, O = {o}" for o in (5, 20, 40)),
    *(f"a full, width {w}" for w in (256, 512, 2048)),
)
ABOUT = {
    "a full": "dense 784 - 5 x 1024 - 10, N = 64, all pairs of outputs",
    "a trace": "the same, summed over outputs",
    "b plain": "4 conv3x3 x 64 on 16 x 16 x 3, average, dense 10, N = 32",
    "b centered": "the same with centered kernels",
    "c": "ResNet-18 on 32 x 32, 10 outputs, N = 8",
    "d centered": "as a full, with centered kernels",
    "d batchnorm": "as a full, with BatchNorm over the batch, N = 32",
    "d batchnorm, O = 1": "the same with one output",
}

ONE_THREAD = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
"""Environment of a process whose computations stay on the core that it is pinned to."""


class Worker:
    """A contestant's process, pinned to one core."""

    def __init__(self, python: str, who: str, case: str, patience: float, core: int) -> None:
        self.who = who
        self.process = subprocess.Popen(
            ["taskset", "-c", str(core), python, "-m", "benchmarks.ntk.cases", who, case],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | ONE_THREAD,
        )
        clock = threading.Timer(patience, self.process.kill)
        clock.start()
        self.ready = self._answer()
        clock.cancel()
        self.rows: list[dict[str, float]] = []

    def _answer(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line.startswith("{") else None

    def run(self) -> None:
        """One timed evaluation."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        row = self._answer()
        if row is None:
            raise RuntimeError(f"{self.who} ended in the middle of a measurement")
        self.rows.append(row)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    def result(self) -> dict[str, Any]:
        seconds = [row["cpu"] for row in self.rows]
        assert self.ready is not None
        return {
            "median_seconds": statistics.median(seconds),
            "seconds": seconds,
            "peak_rss_mb": max(row["rss_mb"] for row in self.rows),
            **{name: self.ready[name] for name in ("planned_mb", "chosen", "seconds_to_first")},
        }


def measure(case: str, rounds: int, patience: float, other: str, core: int) -> Record:
    """One record: picks the other library's fastest implementation by one evaluation each, then goes round."""
    out, others = [], []
    for name in IMPLEMENTATIONS:
        worker = Worker(other, name, case, patience, core)
        if worker.ready is None:
            out.append(name)
        else:
            worker.run()
            others.append(worker)
        log_line(f"{case}: {name} {worker.rows[0]['cpu'] if worker.rows else f'out after {patience:g} s'}")
    others.sort(key=lambda worker: worker.rows[0]["cpu"])
    for worker in others[1:]:
        worker.close()
    best = others[0] if others else None
    contestants = [Worker(sys.executable, who, case, 600, core) for who in ("ours", "lower_bound")] + others[:1]
    ours, lower_bound = contestants[:2]
    if ours.ready is None or lower_bound.ready is None:
        raise RuntimeError(f"our own worker fails on {case}")
    for contestant in contestants:
        contestant.rows.clear()
    for _ in range(rounds):
        for contestant in contestants:
            contestant.run()
    result: Record = {
        "case": case,
        "about": ABOUT.get(case, ""),
        "rounds": rounds,
        "out": out,
        "machine": _results.machine(),
    }
    result["ours"], result["lower_bound"] = ours.result(), lower_bound.result()
    if best is not None and best.ready is not None:
        result["theirs"] = best.result()
        result["first_tries"] = {worker.who: worker.rows[0]["cpu"] for worker in others[1:]}
        result["speedup"] = result["theirs"]["median_seconds"] / result["ours"]["median_seconds"]
        # Traces are summed here and averaged over outputs there.
        ratio = ours.ready["sum"] / best.ready["sum"]
        result["sums_ratio"] = ratio
    for contestant in contestants:
        contestant.close()
    return result


def _multiplications(plan: str) -> str:
    found = re.search(r"(?:multiplications: layerwise|MACs: structured_derivatives) ([0-9.e+]+)", plan)
    return f"{float(found[1]) / 1e9:.3g}" if found else ""


def measure_lower_bound(case: str, rounds: int, core: int) -> Record:
    """The sweeps alone."""
    worker = Worker(sys.executable, "lower_bound", case, 600, core)
    if worker.ready is None:
        raise RuntimeError(f"our own worker fails on {case}")
    for _ in range(rounds):
        worker.run()
    worker.close()
    return worker.result()


STORE = Store("ntk", lambda record: (record["case"],))


def _row(record: Record) -> list[str]:
    ours, theirs = record["ours"], record.get("theirs")
    return [
        f"{record['case']}: {record['about']}" if record["about"] else record["case"],
        _multiplications(ours["chosen"]),
        f"{ours['median_seconds']:.3f}",
        f"{theirs['median_seconds']:.3f}" if theirs else "none in time",
        f"{record['speedup']:.2f}" if theirs else "",
        f"{record['lower_bound']['median_seconds']:.3f}",
        f"{ours['peak_rss_mb']:.0f}",
        f"{theirs['peak_rss_mb']:.0f}" if theirs else "",
        theirs["chosen"].lower().replace("_", " ") if theirs else ", ".join(record["out"]).lower(),
    ]


def page(records: list[Record]) -> str:
    """The table of what has been run."""
    header = ["case", "GMAC", "ours, s", "theirs, s", "times faster", "sweeps, s", "ours, MB", "theirs, MB"]
    by_case = {record["case"]: record for record in records}
    rows = [_row(by_case[case]) for case in (*MAIN, *GROWTH) if case in by_case]
    where = _results.machines(records)
    return f"""# The tangent kernel against neural_tangents 0.6.5

Medians of process CPU time on one core, evaluations in turn; float32. *GMAC*: multiplications that our plan counts.
*sweeps*: the bare backward sweeps, one for each output, from the outputs to the first layer: what any method pays that
needs cotangents. MB: growth of the peak resident memory, compilation included.

{_results.table([*header, "their choice"], rows)}

Command: `python -m benchmarks.ntk.compare --neural_tangents=PYTHON`, where PYTHON has neural_tangents 0.6.5 with JAX
0.4.38. Implementations without a first result within the patience are out; `ntk.jsonl` lists them. Machine: {where}.
"""


def main() -> None:
    parser = _results.make_parser("ntk.compare", __doc__)
    parser.add_argument("--neural_tangents", help="Python of the environment that has it")
    parser.add_argument("--cases", nargs="+", choices=(*MAIN, *GROWTH), default=list(MAIN))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to a first result (default: 60)")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument(
        "--lower_bound", action="store_true", help="measure only the sweeps of the cases that are there again"
    )
    arguments = parser.parse_args()
    done = STORE.read(arguments.results)
    if arguments.lower_bound:
        for record in done.values():
            found = measure_lower_bound(record["case"], arguments.rounds, arguments.core)
            STORE.add(arguments.results, record | {"lower_bound": found})
    elif not arguments.render:
        if not arguments.neural_tangents:
            parser.error("--neural_tangents names the Python of an environment that has neural_tangents")
        for case in arguments.cases:
            if (case,) not in done:
                found = measure(case, arguments.rounds, arguments.patience, arguments.neural_tangents, arguments.core)
                STORE.add(arguments.results, found)
                log_line(f"{case}: {found.get('speedup', float('nan')):.2f} times faster")
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
