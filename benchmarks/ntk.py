"""Speed and memory of the empirical tangent kernel against neural_tangents 0.6.5, its fastest implementation.

Every contestant is a process of its own on one core; the timed evaluations go round in turn, so that all see the same
machine. Times are process CPU time; memory is the growth of peak resident memory, compilation included. An
implementation that takes longer than --patience to its first result is out. Writes benchmarks/results/ntk.json, one
entry a case, and the table ntk.md; cases that are there already are not run again.

  python benchmarks/ntk.py --neural_tangents=OTHER_ENVIRONMENT/bin/python
  python benchmarks/ntk.py --neural_tangents=... --cases "a full" c --rounds 9
  python benchmarks/ntk.py --floor
  python benchmarks/ntk.py --render

The other environment: pip install neural_tangents==0.6.5 jax==0.4.38 jaxlib==0.4.38.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from mimicnorm_jax.utils import environment
from mimicnorm_jax.utils.console import log_line
from mimicnorm_jax.utils.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
WORKER = Path(__file__).parent / "ntk_cases.py"
RIVALS = ("STRUCTURED_DERIVATIVES", "NTK_VECTOR_PRODUCTS", "JACOBIAN_CONTRACTION")
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


class Worker:
    """A contestant's process, pinned to one core."""

    def __init__(self, python: str, who: str, case: str, patience: float, core: int) -> None:
        flags = "--xla_cpu_multi_thread_eigen=false"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        self.who = who
        self.process = subprocess.Popen(
            ["taskset", "-c", str(core), python, str(WORKER), who, case],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
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


def measure(case: str, rounds: int, patience: float, other: str, core: int) -> dict[str, Any]:
    """One case: picks the rival's fastest implementation by one evaluation each, then goes round."""
    out, rivals = [], []
    for name in RIVALS:
        rival = Worker(other, name, case, patience, core)
        if rival.ready is None:
            out.append(name)
        else:
            rival.run()
            rivals.append(rival)
        log_line(f"{case}: {name} {rival.rows[0]['cpu'] if rival.rows else f'out after {patience:g} s'}")
    rivals.sort(key=lambda rival: rival.rows[0]["cpu"])
    for rival in rivals[1:]:
        rival.close()
    best = rivals[0] if rivals else None
    racers = [Worker(sys.executable, who, case, 600, core) for who in ("ours", "floor")] + rivals[:1]
    ours, floor = racers[:2]
    if ours.ready is None or floor.ready is None:
        raise RuntimeError(f"our own worker fails on {case}")
    for racer in racers:
        racer.rows.clear()
    for _ in range(rounds):
        for racer in racers:
            racer.run()
    result: dict[str, Any] = {
        "about": ABOUT.get(case, ""),
        "rounds": rounds,
        "out": out,
        "machine": environment.describe(),
    }
    result["ours"], result["floor"] = ours.result(), floor.result()
    if best is not None and best.ready is not None:
        result["theirs"] = best.result()
        result["first_tries"] = {rival.who: rival.rows[0]["cpu"] for rival in rivals[1:]}
        result["speedup"] = result["theirs"]["median_seconds"] / result["ours"]["median_seconds"]
        # Traces are summed here and averaged over outputs there.
        ratio = ours.ready["sum"] / best.ready["sum"]
        result["sums_ratio"] = ratio
    for racer in racers:
        racer.close()
    return result


def _multiplications(plan: str) -> str:
    found = re.search(r"(?:multiplications: layerwise|MACs: structured_derivatives) ([0-9.e+]+)", plan)
    return f"{float(found[1]) / 1e9:.3g}" if found else ""


def refresh_floor(case: str, rounds: int, core: int) -> dict[str, Any]:
    """The sweeps alone."""
    worker = Worker(sys.executable, "floor", case, 600, core)
    if worker.ready is None:
        raise RuntimeError(f"our own worker fails on {case}")
    for _ in range(rounds):
        worker.run()
    worker.close()
    return worker.result()


def render(results: dict[str, Any]) -> None:
    """The table of what has been run."""
    head = (
        "case",
        "GMAC",
        "ours, s",
        "theirs, s",
        "times faster",
        "sweeps, s",
        "ours, MB",
        "theirs, MB",
        "their choice",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in (*MAIN, *GROWTH):
        if case not in results:
            continue
        row = results[case]
        ours, theirs = row["ours"], row.get("theirs")
        cells = [
            f"{case}: {row['about']}" if row["about"] else case,
            _multiplications(ours["chosen"]),
            f"{ours['median_seconds']:.3f}",
            f"{theirs['median_seconds']:.3f}" if theirs else "none in time",
            f"{row['speedup']:.2f}" if theirs else "",
            f"{row['floor']['median_seconds']:.3f}",
            f"{ours['peak_rss_mb']:.0f}",
            f"{theirs['peak_rss_mb']:.0f}" if theirs else "",
            theirs["chosen"].lower().replace("_", " ") if theirs else ", ".join(row["out"]).lower(),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    where = sorted({json.dumps(row["machine"], sort_keys=True) for row in results.values()})
    text = f"""# The tangent kernel against neural_tangents 0.6.5

Medians of process CPU time on one core, evaluations in turn; float32. *GMAC*: multiplications that our plan counts.
*sweeps*: the bare backward sweeps, one for each output, from the outputs to the first layer: what any method pays that
needs cotangents. MB: growth of the peak resident memory, compilation included.

{chr(10).join(lines)}

Command: `python benchmarks/ntk.py --neural_tangents=PYTHON`, where PYTHON has neural_tangents 0.6.5 with JAX 0.4.38.
Implementations without a first result within the patience are out; `ntk.json` lists them. Machine: {"; ".join(where)}.
"""
    write_text(RESULTS / "ntk.md", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neural_tangents", help="Python of the environment that has it")
    parser.add_argument("--cases", nargs="+", choices=(*MAIN, *GROWTH), default=list(MAIN))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--patience", type=float, default=60.0, help="seconds to a first result (default: 60)")
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument(
        "--floor", action="store_true", help="measure only the sweeps of the cases that are there again"
    )
    arguments = parser.parse_args()
    path = RESULTS / "ntk.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if arguments.floor:
        for case in results:
            results[case]["floor"] = refresh_floor(case, arguments.rounds, arguments.core)
            write_json(path, results)
    elif not arguments.render:
        if not arguments.neural_tangents:
            parser.error("--neural_tangents names the Python of an environment that has neural_tangents")
        for case in arguments.cases:
            if case not in results:
                found = measure(case, arguments.rounds, arguments.patience, arguments.neural_tangents, arguments.core)
                results[case] = found
                write_json(path, results)
                log_line(f"{case}: {found.get('speedup', float('nan')):.2f} times faster")
    render(results)


if __name__ == "__main__":
    main()
