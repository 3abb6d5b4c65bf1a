"""Reproduces the paper's tables and figures on CIFAR-100: runs what is missing, then writes table and figures.

Every finished run is a record of results/NAME.jsonl and never repeated; a stopped one resumes from its checkpoint.

  python -m benchmarks.paper.reproduce table2 --data_dir=DIR --budget=9m   # resumes next time, whole comparisons first
  python -m benchmarks.paper.reproduce table1 --data_dir=DIR --nets vgg11 resnet18 --seeds 0 1 2 --dtype=bfloat16
  python -m benchmarks.paper.reproduce figure6 --small --data_dir=DIR      # for a machine without GPU
  python -m benchmarks.paper.reproduce table1 --render                     # table and figures only
  python -m benchmarks.paper.reproduce table1 --dry_run                    # without GPU: would it run, how fast at best

Several processes share one study: each takes runs that no other living one has. Where a step gains little from a second
core, as of resnet8 on a CPU, one on each core does twice as much:

  for core in 0 1; do taskset -c $core python -m benchmarks.paper.reproduce convergence --data_dir=DIR & done; wait

On Linux GLIBC_TUNABLES=glibc.malloc.hugetlb=1 spares a CPU most page faults of a step's temporary memory.
"""

import argparse
import contextlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import _results
from benchmarks._results import ROOT, Record
from benchmarks.paper import calibration, comparison, last_norm, pages
from benchmarks.paper import dry_run as dry_run_lib
from benchmarks.paper.experiments import EXPERIMENTS, Arm, Experiment, small_form
from benchmarks.paper.queue import claim, next_run
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.training import read_metrics
from mimicnorm_jax.utils import log_line

DTYPES = ("float32", "bfloat16")


def budget(text: str) -> float:
    """Seconds of a text like 9m, 90s or 1h30m."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not text or not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write it like 9m, 90s or 1h30m")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return 3600.0 * hours + 60 * minutes + seconds


def make_study(name: str, small: bool, epochs: int | None, dtype: str) -> comparison.Study:
    """An experiment in the form that the flags of the same names ask for.

    Raises:
      SystemExit: if the experiment has no such form.
    """
    experiment = EXPERIMENTS[name]
    command = ["python", "-m", "benchmarks.paper.reproduce", name]
    if small:
        try:
            name, experiment = f"{name}_small", small_form(experiment)
        except ValueError as error:
            sys.exit(f"error: {name} --small: {error}")
        command.append("--small")
    if epochs is not None and epochs != experiment.epochs:
        if any("epochs" in arm.fields for arm in experiment.arms):
            sys.exit(f"error: {name} --epochs={epochs}: its schedules are made for the epochs that its arms name")
        name, experiment = f"{name}_{epochs}_epochs", replace(experiment, epochs=epochs)
        command.append(f"--epochs={epochs}")
    if dtype != "float32":
        name = f"{name}_{dtype}"
        arms = tuple(replace(arm, fields={**arm.fields, "dtype": dtype}) for arm in experiment.arms)
        experiment = replace(experiment, arms=arms)
        command.append(f"--dtype={dtype}")
    return comparison.Study(name, experiment, shlex.join([*command, "--data_dir=DIR"]))


def studies(folder: Path) -> list[comparison.Study]:
    """Every experiment as the paper has it, and every other form of which a folder holds finished runs."""
    form = re.compile(rf"({'|'.join(EXPERIMENTS)})(_small)?(?:_(\d+)_epochs)?(?:_({'|'.join(DTYPES[1:])}))?")
    names = sorted({*EXPERIMENTS, *(path.stem for path in folder.glob("*.jsonl"))})
    found = [match for match in map(form.fullmatch, names) if match]
    return [make_study(m[1], bool(m[2]), int(m[3]) if m[3] else None, m[4] or DTYPES[0]) for m in found]


def chosen(experiment: Experiment, nets: Sequence[str], methods: Sequence[str]) -> tuple[Arm, ...]:
    """The arms of these networks and methods; all, where none is named.

    Raises:
      SystemExit: names what there is instead.
    """
    for flag, wanted, there in (
        ("nets", nets, {arm.net for arm in experiment.arms}),
        ("methods", methods, {arm.method for arm in experiment.arms}),
    ):
        if foreign := set(wanted) - there:
            sys.exit(
                f"error: --{flag} {sorted(foreign)[0]!r}: this experiment has {', '.join(map(repr, sorted(there)))}"
            )
    return tuple(
        arm for arm in experiment.arms if (not nets or arm.net in nets) and (not methods or arm.method in methods)
    )


def train(command: Sequence[str], remaining: float) -> int:
    """Runs train.py until it ends, or asks it after the remaining seconds to save and stop; its exit code."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait(None if remaining == float("inf") else max(remaining, 0.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        return process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()  # the terminal has sent it the signal too
        return 130


def record_of(folder: Path, arm: Arm, seed: int, command: Sequence[str], ended: str) -> Record:
    """A finished run's record, from the files of its folder."""
    about = json.loads((folder / ("failure.json" if ended else "summary.json")).read_text())
    config = {name: value for name, value in about["config"].items() if name != "data_dir"}
    record = {"net": arm.net, "arm": arm.method, "seed": seed, "ended": ended, "curve": read_metrics(folder)}
    names = ("best_accuracy", "final_accuracy", "seconds", "peak_host_bytes", "peak_device_bytes")
    record |= {name: about[name] for name in names if name in about}
    diagnostics = folder / "diagnostics.jsonl"
    if diagnostics.exists():
        record["diagnostics"] = [json.loads(text) for text in diagnostics.read_text().splitlines()]
    return record | {"config": config, "machine": about["machine"], "command": shlex.join(command)}


def fields_of(experiment: Experiment, arm: Arm, seed: int, steps_per_call: int) -> dict[str, Any]:
    """What the command of a run sets of the config."""
    fields = {"epochs": experiment.epochs, **arm.fields, "seed": seed, "keep_checkpoints": 1}
    return {**fields, "steps_per_call": steps_per_call}


def dry_run(arguments: argparse.Namespace, study: comparison.Study) -> str:
    """A table of what the study's programs would take on a GPU; each has taken its steps here."""
    arms = chosen(study.experiment, arguments.nets, arguments.methods)
    return dry_run_lib.dry_run(
        arms,
        lambda arm: fields_of(study.experiment, arm, 0, arguments.steps_per_call),
        lambda folder, arm: record_of(folder, arm, 0, [], ""),
    )


def folder_of(runs: Path, study: comparison.Study, arm: Arm, seed: int) -> Path:
    """In which a run is under way."""
    rate = f"-lr{arm.fields['learning_rate']:g}" if "learning_rate" in arm.fields else ""
    return runs / study.name / f"{arm.net}-{arm.method.replace(', ', '-')}{rate}-seed{seed}"


def run(arguments: argparse.Namespace, study: comparison.Study) -> bool:
    """Runs what is missing and no other process has, until nothing is left or the budget spent; whether all is done."""
    deadline = time.monotonic() + arguments.budget
    arms = chosen(study.experiment, arguments.nets, arguments.methods)
    elsewhere: set[Path] = set()

    def folder(arm: Arm, seed: int) -> Path:
        return folder_of(arguments.workdir, study, arm, seed)

    def find() -> tuple[Arm, int] | None:
        records = list(study.store.read(arguments.results).values())
        return next_run(
            arms,
            arguments.seeds,
            records,
            lambda arm, seed: folder(arm, seed).exists(),
            deadline - time.monotonic(),
            lambda arm, seed: folder(arm, seed) in elsewhere,
        )

    while found := find():
        if time.monotonic() >= deadline:
            return False
        claimed = claim(folder(*found))
        if claimed is None:
            elsewhere.add(folder(*found))
            continue
        with claimed:
            # Another process may have finished it between the look at the records and the claim.
            if find() == found and not _run(arguments, study, *found, deadline):
                return False
        elsewhere.clear()
    return not elsewhere


def _run(arguments: argparse.Namespace, study: comparison.Study, arm: Arm, seed: int, deadline: float) -> bool:
    """Runs one run and records it; whether it came to its end."""
    name, experiment, folder = study.name, study.experiment, folder_of(arguments.workdir, study, arm, seed)
    fields = fields_of(experiment, arm, seed, arguments.steps_per_call)
    command = ["train.py", "--config=configs/cifar100.py", *(f"--config.{k}={v}" for k, v in fields.items())]
    log_line(f"{name}: {folder.name}")
    where = [f"--config.data_dir={arguments.data_dir}", f"--workdir={folder.absolute()}"]
    code = train([sys.executable, *command, *where], deadline - time.monotonic())
    if code in (130, 143, -signal.SIGTERM):
        return False
    if code not in (0, 3):
        sys.exit(f"error: train.py ended with exit code {code}; its folder is {folder}")
    ended = json.loads((folder / "failure.json").read_text())["error"].split(". ")[0] if code else ""
    record = record_of(folder, arm, seed, ["python", *command], ended)
    if experiment.converged and not ended:
        record["calibration"] = calibration.of_run(folder)
        method = METHODS[arm.fields["method"]]
        if method.last_batch_norm and not method.batch_norm:
            record["last_norm"] = last_norm.of_run(folder)
    study.store.add(arguments.results, record)
    shutil.rmtree(folder)
    pages.write(study, arguments.results)
    return True


def make_parser() -> argparse.ArgumentParser:
    parser = _results.make_parser("paper.reproduce", __doc__)
    summaries = "; ".join(f"{name}: {experiment.summary}" for name, experiment in EXPERIMENTS.items())
    parser.add_argument("experiment", choices=EXPERIMENTS, help=summaries)
    parser.add_argument("--small", action="store_true", help="in a form for a CPU, without published numbers")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help=f"record nothing: compile every program for an {dry_run_lib.TARGET}, take {dry_run_lib.STEPS} steps here",
    )
    parser.add_argument("--nets", nargs="+", default=[], help="default: all of the experiment's")
    parser.add_argument("--methods", nargs="+", default=[], help="default: all of the experiment's")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the experiment's; 0 for the paper's, of three")
    parser.add_argument("--epochs", type=int, help="default: the paper's; others go to files of their own")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of activations")
    parser.add_argument("--steps_per_call", type=int, default=1, help="of train.py; 1 on a CPU, 8 or so on a GPU")
    parser.add_argument(
        "--budget",
        type=budget,
        default=float("inf"),
        help="like 9m; stops with a checkpoint then, or once a compilation under way is done",
    )
    parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    parser.add_argument("--workdir", type=Path, default=Path("runs/reproduce"), help="of runs under way")
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    asked = make_study(arguments.experiment, arguments.small, arguments.epochs, arguments.dtype)
    if arguments.dry_run:
        log_line(dry_run(arguments, asked))
        return
    finished = arguments.render or run(arguments, asked)
    pages.write(asked, arguments.results)
    log_line((arguments.results / f"{asked.name}.md").read_text())
    if not finished:
        sys.exit("stopped before all was done, or the rest is under way in other processes: the same command resumes")


if __name__ == "__main__":
    main()
