"""Which part of MimicNorm does what: the methods on one network, same seeds and budget, on real CIFAR-100.

Runs what benchmarks/results/NAME.jsonl does not hold yet, one line a run, then writes the table NAME.md and the
curves NAME.png beside it. A run that ends in a non-finite loss is a result too: its line says where it ended.

  python benchmarks/ablation.py --data_dir=DIR                     # the small study, for a machine without GPU
  python benchmarks/ablation.py --data_dir=DIR --study=vgg16_10_epochs    # the paper's figure 6 in its first epochs
  python benchmarks/ablation.py --render                           # table and curves only
"""

import argparse
import json
import shlex
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import logging

from mimicnorm_jax import plots
from mimicnorm_jax.errors import NonFiniteLossError
from mimicnorm_jax.training import config, loop, machine
from mimicnorm_jax.training.logs import read_metrics, say
from mimicnorm_jax.training.workdir import as_json, write_text

RESULTS = Path(__file__).parent / "results"
ARMS: dict[str, dict[str, str]] = {
    "batchnorm": {"method": "batchnorm"},
    "mimicnorm": {"method": "mimicnorm"},
    "weightmean": {"method": "weightmean"},
    "lastbn": {"method": "lastbn"},
    "none": {"method": "none"},
    "none, plain He": {"method": "none", "init": "he"},
}
RECIPE: dict[str, Any] = {
    "dataset": "cifar100",
    "crop_padding": 4,
    "flip": True,
    "rotation": 15.0,
    "keep_checkpoints": 1,
}
STUDIES: dict[str, dict[str, Any]] = {
    "ablation_small": {
        "model": "vgg11",
        "width": 0.25,
        "batch_size": 128,
        "epochs": 3,
        "learning_rate": 0.05,
        "warmup_epochs": 0.5,
        "schedule": "cosine",
    },
    "vgg16_10_epochs": {
        "model": "vgg16",
        "batch_size": 256,
        "epochs": 10,
        "learning_rate": 0.1,
        "warmup_epochs": 2.0,
    },
}


def run(study: str, arm: str, seed: int, data_dir: str) -> dict[str, Any]:
    """Trains one network and returns its line."""
    overrides = RECIPE | STUDIES[study] | ARMS[arm]
    fields = config.validate(config.base(**overrides, seed=seed, data_dir=data_dir))
    folder = Path(tempfile.mkdtemp(prefix="ablation"))
    ended = ""
    try:
        loop.run(fields, folder)
    except NonFiniteLossError as error:
        ended = str(error).split(". ")[0]
    curve = read_metrics(folder)
    shutil.rmtree(folder)
    saved = as_json(fields)
    del saved["data_dir"]  # where the data lies says nothing about the result
    return {"arm": arm, "seed": seed, "ended": ended, "curve": curve, "config": saved, "machine": machine.describe()}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def render(study: str) -> None:
    """Writes the table and the curves of what has been run."""
    lines = read(RESULTS / f"{study}.jsonl")
    chance = 1.0  # per cent, at 100 classes
    rows = []
    for arm in ARMS:
        runs = [line for line in lines if line["arm"] == arm]
        if not runs:
            continue
        best = [max((100 * row["test_accuracy"] for row in r["curve"]), default=chance) for r in runs]
        final = [100 * r["curve"][-1]["test_accuracy"] if r["curve"] and not r["ended"] else chance for r in runs]
        ended = "; ".join(f"seed {r['seed']}: {r['ended']}" for r in runs if r["ended"])
        cells = (arm, len(runs), _spread(best), _spread(final), ended or "no")
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    setting = ", ".join(
        f"{name} {value}" for name, value in (RECIPE | STUDIES[study]).items() if name != "keep_checkpoints"
    )
    where = sorted({json.dumps(line["machine"], sort_keys=True) for line in lines})
    text = [
        f"# {study}",
        "",
        f"Setting: {setting}. Test accuracy in per cent, mean and standard deviation over the seeds "
        f"{sorted({line['seed'] for line in lines})}; a run that did not survive counts as chance ({chance:g}).",
        "",
        "| method | runs | best epoch | final | ended early |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"![curves]({study}.png)",
        "",
        f"Command: `python benchmarks/ablation.py --data_dir=DIR --study={study}`. Machine: {'; '.join(where)}. "
        "The seconds in the lines are no timing: other work may have run beside.",
        "",
    ]
    write_text(RESULTS / f"{study}.md", "\n".join(text))
    by_arm = {arm: [r["curve"] for r in lines if r["arm"] == arm and not r["ended"]] for arm in ARMS}
    plots.curves({arm: runs for arm, runs in by_arm.items() if runs}, RESULTS / f"{study}.png", study)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=STUDIES, default="ablation_small")
    parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--render", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{arguments.study}.jsonl"
    for seed in arguments.seeds:
        for arm in arguments.arms:
            if arguments.render or any(line["arm"] == arm and line["seed"] == seed for line in read(path)):
                continue
            say(f"{arguments.study}: {arm}, seed {seed}")
            line = run(arguments.study, arm, seed, arguments.data_dir)
            line["command"] = shlex.join(["python", "benchmarks/ablation.py", f"--study={arguments.study}"])
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            render(arguments.study)
    if not read(path):
        sys.exit(f"{path} holds no results yet")
    render(arguments.study)


if __name__ == "__main__":
    main()
