"""What the README's first command costs and gives: wall time, peak memory and accuracy of the default run.

Runs train.py in fresh processes, compilation included, and writes results/quickstart.jsonl and .md.

  python -m benchmarks.quickstart
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import _process, _results
from benchmarks._results import Record, Store

SEEDS = (0, 1, 2)


def run(seed: int) -> Record:
    """Trains the default with a seed in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        usage = _process.train(Path(folder), seed=seed)
        seconds = time.perf_counter() - started
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


STORE = Store("quickstart", lambda record: (record["machine"]["device"], record["seed"]))


def page(records: list[Record]) -> str:
    """The table of all seeds."""
    header = ["seed", "wall s", "CPU s", "peak memory MiB", "best accuracy", "final accuracy"]
    rows = [
        (
            record["seed"],
            record["wall_seconds"],
            record["cpu_seconds"],
            f"{record['peak_host_bytes'] / 2**20:.0f}",
            f"{record['best_accuracy']:.2%}",
            f"{record['final_accuracy']:.2%}",
        )
        for record in records
    ]
    final = _results.mean_and_deviation([100 * record["final_accuracy"] for record in records])
    start = "Fresh processes, start and compilation included."
    return f"""# The default run: `python train.py`

{_results.table(header, rows)}

Final accuracy on 360 test images: {final} % (standard deviation over {len(records)} seeds). {start}

Command: `python -m benchmarks.quickstart`. Machine: {_results.machines(records)}.
"""


def main() -> None:
    arguments = _results.make_parser("quickstart", __doc__).parse_args()
    for seed in () if arguments.render else SEEDS:
        STORE.add(arguments.results, run(seed))
    STORE.write_page(arguments.results, page)
    print((arguments.results / "quickstart.md").read_text())


if __name__ == "__main__":
    main()
