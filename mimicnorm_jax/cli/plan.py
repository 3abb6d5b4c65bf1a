"""What a run of `mimicnorm train` takes on a GPU or TPU, planned by its compiler; the device need not be there.

  mimicnorm plan --config=configs/cifar100.py:resnet50,mimicnorm --config.batch_size=128 \\
      --target=h100,v5e --compare=batchnorm,batchnorm_remat,mimicnorm --out=DIR
  mimicnorm plan --config=configs/cifar100.py:resnet18,mimicnorm --target=l4 --largest_batch
  mimicnorm plan --config=configs/cifar100.py:resnet50,mimicnorm --target=h100 --frontier

Compiling takes from 10 seconds to minutes a program; plans are kept, so the same command is quick the second time. The
dataset is not read. `METHOD_remat` is the method's network under jax.checkpoint, which keeps what convolutions return.

Exit code: 0 when done, 1 if a run does not fit its target, 2 for bad input."""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from mimicnorm_jax.cli import command
from mimicnorm_jax.data.streaming import Cut
from mimicnorm_jax.data.streaming.decoding_rate import decoding_rate
from mimicnorm_jax.errors import ConfigError, DoesNotFitError, UserError, unknown
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.planning import Cache, targets
from mimicnorm_jax.planning.cache import default_folder
from mimicnorm_jax.training import config as config_lib
from mimicnorm_jax.training import fit, plan_report
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.dataset import dataset_of, is_streamed
from mimicnorm_jax.training.plan import REMAT_SUFFIX, TrainingPlan, plan_training
from mimicnorm_jax.training.plan_report import Row
from mimicnorm_jax.training.spec import build_spec
from mimicnorm_jax.training.workdir import as_json
from mimicnorm_jax.utils.console import log_line
from mimicnorm_jax.utils.files import write_json

MICROBATCHES = (1, 2, 4)


def _define(values: flags.FlagValues) -> None:
    names = ", ".join(targets.NAMES)
    flags.DEFINE_list(
        "target", ["h100"], f"Devices to compile for, of {names}; TPUs also by grid, as in v5e:2x4.", values
    )
    flags.DEFINE_list(
        "compare",
        [],
        "Methods to plan, the first one to compare with; behind one may stand _remat. Default: the config's.",
        values,
    )
    flags.DEFINE_integer(
        "devices", None, "That share a batch; default: as the target's name says.", 1, flag_values=values
    )
    flags.DEFINE_bool("largest_batch", False, "Find the largest batch that fits, in steps of 8 images.", values)
    flags.DEFINE_bool("frontier", False, "The config's run by its ways to recompute and by microbatches.", values)
    flags.DEFINE_string(
        "target_config", None, "File with the text GpuTargetConfigProto of the one GPU that --target names.", values
    )
    flags.DEFINE_string("out", None, "Folder for plan.json and figures; default: print only.", values)
    flags.DEFINE_string("cache", None, f"Folder of plans made before; default: {default_folder()}.", values)


@contextlib.contextmanager
def _clock(title: str) -> Iterator[None]:
    """Shows what is compiled and for how long, on a terminal."""
    done = threading.Event()
    started = time.monotonic()

    def show() -> None:
        while not done.wait(1):
            print(f"\r{title}: {time.monotonic() - started:.0f} s", end="", file=sys.stderr, flush=True)

    ticker = threading.Thread(target=show, daemon=True)
    if sys.stderr.isatty():
        ticker.start()
    else:
        print(title, file=sys.stderr, flush=True)
    try:
        yield
    finally:
        done.set()
        if sys.stderr.isatty():
            ticker.join()
            print(f"\r{' ' * (len(title) + 12)}\r", end="", file=sys.stderr, flush=True)


def _variant(config: TrainConfig) -> str:
    fields = {"microbatches": 1, "remat": "none"}
    changed = {name: getattr(config, name) for name in fields}
    return "".join(f", {name} {value}" for name, value in changed.items() if value != fields[name])


@dataclasses.dataclass(frozen=True)
class _Planner:
    """Plans runs on one target, shows what it does, and keeps what it found.

    Attributes:
      target: of all plans.
      devices: that share a batch.
      cache: of plans.
      largest_batch: whether a row says the largest batch that fits.
    """

    target: targets.Target
    devices: int
    cache: Cache
    largest_batch: bool

    def __call__(self, config: TrainConfig, method: str | None = None) -> TrainingPlan:
        method = method or config.method
        checkpointed = method.endswith(REMAT_SUFFIX)
        config = dataclasses.replace(config, method=method.removesuffix(REMAT_SUFFIX))
        with _clock(
            f"compiling {config.model}, {method}, batch {config.batch_size}{_variant(config)}, for {self.target.name}"
        ):
            return plan_training(config, self.target, self.devices, checkpointed, self.cache)

    def row(self, config: TrainConfig, method: str, label: str) -> Row:
        """One row; a TPU compiler's refusal is one too."""
        found: TrainingPlan | DoesNotFitError
        try:
            found = self(config, method)
        except DoesNotFitError as error:
            found = error
        largest = None
        if self.largest_batch:
            largest = fit.largest_batch(lambda changed: self(changed, method), config, self.devices)
        return Row(self.target.name, method, label, found, largest)

    def explain(self, config: TrainConfig, method: str) -> str:
        """How much a run that does not fit lacks, and what would make it fit."""
        try:
            fit.require_fit(lambda changed: self(changed, method), config, self.devices)
        except DoesNotFitError as error:
            return f"{self.target.name}: {error}"
        return ""


def _planners(values: Any) -> list[_Planner]:
    if values.target_config is not None and len(values.target) != 1:
        raise UserError("--target_config describes one GPU: name one --target")
    found = [targets.target(name.strip(), values.target_config) for name in values.target]
    if values.largest_batch and (unbounded := [one.name for one in found if one.usable is None]):
        raise UserError(f"--largest_batch and --target={unbounded[0]}: its memory has no bound to fit; leave one out")
    cache = Cache(Path(values.cache) if values.cache else None)
    return [_Planner(target, values.devices or target.devices, cache, values.largest_batch) for target in found]


def _compare(config: TrainConfig, planners: Sequence[_Planner], names: Sequence[str]) -> list[Row]:
    methods = [name.strip() for name in names] or [config.method]
    for method in methods:
        if method.removesuffix(REMAT_SUFFIX) not in METHODS:
            raise ConfigError(unknown("method in --compare", method, METHODS))
    return [planner.row(config, method, method) for planner in planners for method in methods]


def _frontier(config: TrainConfig, planners: Sequence[_Planner]) -> list[Row]:
    rows = []
    for planner in planners:
        build_spec(config, planner.devices)
        for changes in _ways():
            changed = dataclasses.replace(config, **changes)
            label = ", ".join(f"{name}={value}" for name, value in changes.items())
            try:
                build_spec(changed, planner.devices)
            except ConfigError as error:  # not every network knows every value, nor every batch such parts
                log_line(f"left out {label}: {error}")
                continue
            rows.append(planner.row(changed, config.method, label))
    return rows


def _ways() -> list[dict[str, Any]]:
    return [{"remat": remat, "microbatches": parts} for remat in fit.remat_values() for parts in MICROBATCHES]


def _write(config: TrainConfig, rows: Sequence[Row], folder: Path, is_frontier: bool) -> None:
    written = [
        {"target": row.target, "run": row.label, "largest_batch": row.largest_batch}
        | (row.plan.as_json() if isinstance(row.plan, TrainingPlan) else {"fits": False, "needed": row.plan.needed})
        for row in rows
    ]
    write_json(folder / "plan.json", {"config": as_json(config), "rows": written})
    log_line(f"written: {folder / 'plan.json'}")
    drawn = plan_report.draw(rows, folder, f"{config.model}, batch {config.batch_size}, {config.dtype}")
    if is_frontier and drawn:
        for target in plan_report.references(rows):
            lines: dict[str, list[TrainingPlan]] = {}
            for row in rows:
                if row.target == target and isinstance(row.plan, TrainingPlan):
                    lines.setdefault(row.label.rpartition(", ")[0] or config.method, []).append(row.plan)
            drawn.append(folder / f"frontier_{target.replace(':', '_')}.png")
            plan_report.draw_frontier(lines, drawn[-1], f"{config.model} on {target}, by microbatches 1, 2, 4")
    for path in drawn:
        log_line(f"written: {path}")
    if not drawn:
        log_line("no figures: they need matplotlib (pip install matplotlib) and a run that could be planned")


def _plan(argv: Sequence[str]) -> int:
    values: Any = command.parse(_define, __doc__ or "", argv, None)
    if values is None:
        return 0
    if values.frontier and values.compare:
        raise UserError("--frontier shows the config's method alone: leave out --compare")
    if values.out:
        command.make_folder(Path(values.out))
    jax.config.update("jax_platforms", "cpu")  # what is attached is not touched
    config = config_lib.validate(values.config)
    planners = _planners(values)
    rows = _frontier(config, planners) if values.frontier else _compare(config, planners, values.compare)
    log_line(f"{config.model}, batch {config.batch_size}, {config.dtype}, {config.dataset}\n{plan_report.table(rows)}")
    log_line(plan_report.LEGEND)
    dataset = dataset_of(config)
    if is_streamed(config, dataset):
        rate = decoding_rate(Cut(dataset.image_shape[0], config.min_crop_area))
        log_line(plan_report.decoding(rows, rate))
    if values.out:
        _write(config, rows, Path(values.out), values.frontier)
    for planner in planners:
        for row in rows:
            if not values.frontier and row.target == planner.target.name and not row.fits:
                log_line(planner.explain(config, row.method))
    return 0 if all(row.fits for row in rows) else 1


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code.

    Args:
      argv: what follows the program's name; default: the process's.
    """
    arguments = sys.argv[1:] if argv is None else argv
    return command.run(lambda: _plan(arguments), "interrupted")
