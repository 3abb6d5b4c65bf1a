"""Binary networks with and without BatchNorm on CIFAR-100, in the two steps of training that are usual for them.

Three arms of one ReActNet: BatchNorm; scaled standardization and sums of known variance (BNN without BatchNorm); weight
mean and a last BatchNorm. The first step has binary activations and real kernels, the second goes on from its best
checkpoint with both binary. A finished run is a record and never repeated; a stopped one resumes.

  python -m benchmarks.binary --data_dir=DIR --budget=1h           # the small form, for two cores
  python -m benchmarks.binary --data_dir=DIR --form=full --steps_per_call=8
"""

import argparse
import json
import shlex
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _results
from benchmarks._results import Record, Store, mean_and_deviation
from benchmarks.paper import comparison, reproduce
from benchmarks.paper.paired import paired
from mimicnorm_jax import interop, models
from mimicnorm_jax.training import read_metrics
from mimicnorm_jax.utils import log_line

ARMS = ("batchnorm", "bnn_nobn", "bnn_mimic")
SEEDS = (0, 1, 2)
STEPS = (1, 2)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("reactnet8", {"epochs": 2, "batch_size": 128, "learning_rate": 2e-3}),
    "full": ("reactnet18", {"epochs": 256, "batch_size": 256, "learning_rate": 5e-4}),
}
"""The network, and what its runs set of the config; `full` is the published recipe, whose best test epoch counts."""


class Run(NamedTuple):
    """One training.

    Attributes:
      form: one of `FORMS`.
      arm: the method.
      step: 1 or 2.
      seed: of all random numbers.
    """

    form: str
    arm: str
    step: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(map(str, self))


STORE = Store("binary", lambda record: tuple(record[name] for name in Run._fields), lambda record: _order(record))


def _order(record: Record) -> tuple[Any, ...]:
    return list(FORMS).index(record["form"]), record["seed"], ARMS.index(record["arm"]), record["step"]


def fields_of(run: Run, folder: Path, steps_per_call: int = 1) -> dict[str, Any]:
    """What the command of a run sets of the config; `folder` holds the folders of all runs."""
    model, fields = FORMS[run.form]
    fields = {"model": model, "method": run.arm, "seed": run.seed, **fields, "steps_per_call": steps_per_call}
    fields |= {"optimizer": "adam", "schedule": "linear", "warmup_epochs": 0.0, "keep_checkpoints": 1}
    # The published recipe, for both arms without BatchNorm alike.
    fields["adaptive_clip"] = 0.0 if run.arm == "batchnorm" else 0.02
    if run.step == 1:
        return fields | {"model": f"{model}_step1", "weight_decay": 1e-5}
    return fields | {"weight_decay": 0.0, "init_from": str((folder / run._replace(step=1).name).absolute())}


def next_run(
    form: str, seeds: Sequence[int], done: Callable[[Run], bool], trained: Callable[[Run], bool]
) -> Run | None:
    """What to run next, seed by seed, so that whole comparisons get done; None if all is done.

    Args:
      form: of the study.
      seeds: of it.
      done: whether a run is recorded.
      trained: whether its folder is there with a finished run, from which a second step can start.
    """
    for seed in seeds:
        for arm in ARMS:
            first, second = (Run(form, arm, step, seed) for step in STEPS)
            if not done(second):
                return second if trained(first) else first
    return None


def record_of(run: Run, folder: Path, command: Sequence[str], ended: str) -> Record:
    """A finished run's record, from the files of its folder."""
    about = json.loads((folder / ("failure.json" if ended else "summary.json")).read_text())
    config = {name: value for name, value in about["config"].items() if name not in ("data_dir", "init_from")}
    model = models.create(FORMS[run.form][0], method=run.arm)
    size = interop.packed_size(model, (32, 32, 3))
    return run._asdict() | {
        "ended": ended,
        "curve": read_metrics(folder),
        "packed_bytes": size.packed_bytes,
        "stored_bytes": size.stored_bytes,
        "binary_weights": size.binary_weights,
        "config": config,
        "command": shlex.join(command),
        "machine": about["machine"],
    }


def study(arguments: argparse.Namespace) -> bool:
    """Runs what is missing until all is done or the budget spent; whether all is done."""
    deadline = time.monotonic() + arguments.budget

    def trained(run: Run) -> bool:
        return (arguments.workdir / run.name / "summary.json").exists()

    while True:
        done = set(STORE.read(arguments.results)).__contains__
        run = next_run(arguments.form, arguments.seeds, done, trained)
        if run is None or (remaining := deadline - time.monotonic()) <= 0:
            return run is None
        folder = arguments.workdir / run.name
        fields = fields_of(run, arguments.workdir, arguments.steps_per_call)
        command = ["train.py", "--config=configs/cifar100.py", *(f"--config.{k}={v}" for k, v in fields.items())]
        log_line(f"binary: {run.name}")
        where = [f"--config.data_dir={arguments.data_dir}", f"--workdir={folder.absolute()}"]
        code = reproduce.train([sys.executable, *command, *where], remaining)
        if code in (130, 143, -signal.SIGTERM):
            return False
        if code not in (0, 3):
            sys.exit(f"error: train.py ended with exit code {code}; its folder is {folder}")
        ended = json.loads((folder / "failure.json").read_text())["error"].split(". ")[0] if code else ""
        shown = [part for part in command if not part.startswith("--config.init_from")]
        STORE.add(arguments.results, record_of(run, folder, ["python", *shown], ended))
        if ended and run.step == 1:
            sys.exit(f"error: {run.name}: {ended}; there is nothing to start the second step from")
        if run.step == 2:
            for step in STEPS:
                shutil.rmtree(arguments.workdir / run._replace(step=step).name)
        STORE.write_page(arguments.results, page)


def page(records: list[Record]) -> str:
    """The table of every form of which there are runs."""
    parts = ["# Binary networks without BatchNorm on CIFAR-100"]
    for form in FORMS:
        if runs := [record for record in records if record["form"] == form]:
            parts.append(_form(form, runs))
    parts.append(
        "Records: binary.jsonl, each with its config, seed, command and machine; a second step starts from the best "
        f"checkpoint of the first. Machine: {_results.machines(records)}.\n"
    )
    return "\n\n".join(parts)


def _form(form: str, records: list[Record]) -> str:
    name, fields = FORMS[form]
    header = ["method", "seeds", "step 1, best", "step 2, best", "final", "final - batchnorm", "bytes", "as floats"]
    header += ["s an epoch", "ended early"]
    rows = []
    for arm in ARMS:
        first, second = (_of(records, arm, step) for step in STEPS)
        apart = None if arm == "batchnorm" else paired(second, _of(records, "batchnorm", 2), comparison.final)
        seconds = [row["seconds"] for record in second for row in record["curve"]]
        rows.append(
            (
                f"`{arm}`",
                ", ".join(str(record["seed"]) for record in second) or "not run",
                mean_and_deviation([comparison.best(record) for record in first]),
                mean_and_deviation([comparison.best(record) for record in second]),
                mean_and_deviation([comparison.final(record) for record in second]),
                "" if apart is None else apart,
                *((f"{second[0][key]:,}" for key in ("packed_bytes", "stored_bytes")) if second else ("", "")),
                f"{statistics.median(seconds):.0f}" if seconds else "",
                "; ".join(f"seed {record['seed']}: {record['ended']}" for record in second if record["ended"]),
            )
        )
    setting = ", ".join(f"{field} {value:g}" for field, value in fields.items())
    return (
        f"## {name}, twice {fields['epochs']} epochs\n\n{_results.table(header, rows)}\n\n"
        f"Test accuracy in per cent. Each step: {setting}, Adam, the rate falling linearly to 0; weight decay 1e-5 in "
        "the first step, 0 in the second; the two without BatchNorm with adaptive clipping at 0.02. Mean and standard "
        "deviation over seeds; brackets are 95 % intervals of the mean difference by seed, by Student's t. `best` is "
        "chosen on the test images. Bytes: binary weights as bits, one number a channel, all else as floats. "
        f"Command: `python -m benchmarks.binary --data_dir=DIR --form={form}`."
    )


def _of(records: Sequence[Record], arm: str, step: int) -> list[Record]:
    return [record for record in records if (record["arm"], record["step"]) == (arm, step)]


def make_parser() -> argparse.ArgumentParser:
    parser = _results.make_parser("binary", __doc__)
    parser.add_argument("--form", choices=FORMS, default="small")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps_per_call", type=int, default=1, help="of train.py; 1 on a CPU, 8 or so on a GPU")
    parser.add_argument("--budget", type=reproduce.budget, default=float("inf"), help="like 9m or 1h")
    parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    parser.add_argument("--workdir", type=Path, default=Path("runs/binary"), help="of runs under way")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    finished = arguments.render or study(arguments)
    STORE.write_page(arguments.results, page)
    log_line((arguments.results / "binary.md").read_text())
    if not finished:
        sys.exit("stopped before all was done: the same command resumes")


if __name__ == "__main__":
    main()
