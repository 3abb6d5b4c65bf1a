"""How near training comes to the floor of normalized logits: ten classes, which have a high one, by `logit_scale`.

The default run (digits, a small ResNet) under MimicNorm with several scales, and under methods whose logits nothing
bounds. Each trains in a fresh process, as a user would; writes results/logit_scale.jsonl and .md.

  python -m benchmarks.logit_scale
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _process, _results
from benchmarks._results import Record, Store, mean_and_deviation
from mimicnorm_jax.functional import cross_entropy_floor
from mimicnorm_jax.training import read_metrics

CLASSES = 10
ARMS = (*(("mimicnorm", scale) for scale in (0.5, 1.0, 2.0, 3.0, 5.0)), ("weightmean", 1.0), ("batchnorm", 1.0))
"""Method and scale of its logits."""
NAMES = ("method", "logit_scale", "seed")
STORE = Store("logit_scale", lambda record: tuple(record[name] for name in NAMES))


def run(*case: Any) -> Record:
    """Trains in a fresh process; losses and accuracies are of the last epoch.

    Args:
      case: values of `NAMES`.
    """
    with tempfile.TemporaryDirectory() as folder:
        usage = _process.train(Path(folder), **dict(zip(NAMES, case, strict=True)))
        last = read_metrics(Path(folder))[-1]
    names = ("train_loss", "test_loss", "train_accuracy", "test_accuracy")
    return {name: last[name] for name in names} | {"cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}


def table(records: list[Record]) -> str:
    """A row an arm."""
    header = ["method", "scale", "seeds", "floor", "training loss", "test loss", "training accuracy, %"]
    rows = []
    for method, scale in ARMS:
        found = [record for record in records if (record["method"], record["logit_scale"]) == (method, scale)]
        bounded = method == "mimicnorm"
        of = {name: [record[name] for record in found] for name in ("train_loss", "test_loss")}
        rates = [[100 * record[f"{part}_accuracy"] for record in found] for part in ("train", "test")]
        rows.append(
            (
                method,
                f"{scale:g}" if bounded else "-",
                ", ".join(str(record["seed"]) for record in found) or "not run",
                f"{cross_entropy_floor(CLASSES, scale):.4f}" if bounded else "-",
                *(mean_and_deviation(values, ".4f", ".4f") for values in of.values()),
                *map(mean_and_deviation, rates),
            )
        )
    return _results.table([*header, "test accuracy, %"], rows)


def page(records: list[Record]) -> str:
    """The table, and what it is of."""
    return f"""# How near training comes to the floor of normalized logits

{table(records)}

The default run, `python train.py`, to its end: {CLASSES} classes, augmented training images; mean and standard
deviation over seeds. Floor: `functional.cross_entropy_floor`, below which no batch's loss is in training; a batch of 64
random images, whose classes are uneven, has a higher one. Evaluation normalizes by running averages, without a bound.

Command: `python -m benchmarks.logit_scale`. Machine: {_results.machines(records)}.
"""


def main() -> None:
    arguments = _results.study_parser("logit_scale", __doc__, (0, 1, 2), data_dir=False).parse_args()
    done = STORE.read(arguments.results)
    cases = [(*arm, seed) for seed in arguments.seeds for arm in ARMS]
    todo = ((case, functools.partial(run, *case)) for case in cases if case not in done)
    _results.go_on(STORE, arguments, NAMES, todo, lambda record: f"training loss {record['train_loss']:.4f}")
    STORE.write_page(arguments.results, page)
    print((arguments.results / "logit_scale.md").read_text())


if __name__ == "__main__":
    main()
