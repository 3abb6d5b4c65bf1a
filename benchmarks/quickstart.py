"""What the README's first command costs and gives: wall time, peak memory and accuracy of the default run.

Runs train.py in fresh processes, compilation included, and writes results/default_run.json and .md.

  python benchmarks/default_run.py
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mimicnorm_jax.utils.files import write_json, write_text

RESULTS = Path(__file__).parent / "results"
TRAIN = Path(__file__).parents[1] / "train.py"
SEEDS = (0, 1, 2)


def run(seed: int) -> dict[str, Any]:
    """Trains the default with a seed in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        command = [sys.executable, str(TRAIN), f"--config.seed={seed}", f"--workdir={folder}"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            sys.exit(f"{' '.join(command)} failed with status {status}")
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return {
        "seed": seed,
        "wall_seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_host_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "best_accuracy": summary["best_accuracy"],
        "final_accuracy": summary["final_accuracy"],
        "machine": summary["machine"],
    }


def main() -> None:
    runs = [run(seed) for seed in SEEDS]
    write_json(RESULTS / "default_run.json", runs)
    final = [100 * r["final_accuracy"] for r in runs]
    rows = [
        f"| {r['seed']} | {r['wall_seconds']} | {r['cpu_seconds']} | {r['peak_host_bytes'] / 2**20:.0f} | "
        f"{r['best_accuracy']:.2%} | {r['final_accuracy']:.2%} |"
        for r in runs
    ]
    text = [
        "# The default run: `python train.py`",
        "",
        "| seed | wall s | CPU s | peak memory MiB | best accuracy | final accuracy |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        f"Final accuracy on 360 test images: {statistics.mean(final):.2f} ± {statistics.stdev(final):.2f} % "
        f"(standard deviation over {len(runs)} seeds). Fresh processes, start and compilation included.",
        "",
        f"Command: `python benchmarks/default_run.py`. Machine: {json.dumps(runs[0]['machine'])}.",
        "",
    ]
    write_text(RESULTS / "default_run.md", "\n".join(text))
    print("\n".join(text))


if __name__ == "__main__":
    main()
