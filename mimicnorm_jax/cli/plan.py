"""What a run of train.py will take on a GPU or TPU, planned by the device's compiler; the device need not be there.

  python -m mimicnorm_jax plan --config=configs/cifar100.py:resnet50,mimicnorm --config.batch_size=128 \\
      --target=h100,v5e --compare=batchnorm,batchnorm_remat,mimicnorm --out=DIR
  python -m mimicnorm_jax plan --config=configs/cifar100.py:resnet18,mimicnorm --target=l4 --largest_batch
  python -m mimicnorm_jax plan --config=configs/cifar100.py:resnet50,mimicnorm --target=h100 --frontier

Compiling takes from 10 seconds to minutes a program; plans are kept, so the same command is quick the second time. The
dataset is not read. `METHOD_remat` is the method's network under jax.checkpoint, which keeps what convolutions return.

Exit code: 0 when done, 1 if a run does not fit its target, 2 for bad input."""

import contextlib
import dataclasses
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from mimicnorm_jax.errors import ConfigError, DoesNotFitError, UserError, unknown
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.planning import Cache, targets
from mimicnorm_jax.planning.cache import default_folder
from mimicnorm_jax.training import config as config_lib
from mimicnorm_jax.training import fit, plan_report
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.plan import REMAT_SUFFIX, TrainingPlan, plan_training
from mimicnorm_jax.training.plan_report import Row
from mimicnorm_jax.training.trainer import check_program
from mimicnorm_jax.training.workdir import as_json
from mimicnorm_jax.utils.console import log_line
from mimicnorm_jax.utils.files import write_json

_CONFIG = config_flags.DEFINE_config_file("config", None, "FILE[:MODEL[,METHOD]], as for train.py.")
_TARGET = flags.DEFINE_list(
    "target", ["h100"], f"Devices to compile for, of {', '.join(targets.NAMES)}; TPUs also by grid, as in v5e:2x4."
)
_COMPARE = flags.DEFINE_list(
    "compare", [], "Methods to plan, the first one to compare with; behind one may stand _remat. Default: the config's."
)
_DEVICES = flags.DEFINE_integer("devices", None, "That share a batch; default: as the target's name says.", 1)
_LARGEST = flags.DEFINE_bool("largest_batch", False, "Find the largest batch that fits, in steps of 8 images.")
_FRONTIER = flags.DEFINE_bool("frontier", False, "The config's run by its ways to recompute and by microbatches.")
_TARGET_CONFIG = flags.DEFINE_string(
    "target_config", None, "File with the text GpuTargetConfigProto of the one GPU that --target names."
)
_OUT = flags.DEFINE_string("out", None, "Folder for plan.json and figures; default: print only.")
_CACHE = flags.DEFINE_string("cache", None, f"Folder of plans made before; default: {default_folder()}.")

MICROBATCHES = (1, 2, 4)


@contextlib.contextmanager
def _clock(title: str) -> Iterator[None]:
    """Shows what is compiled and for how long, on a terminal."""
    done = threading.Event()
    begun = time.monotonic()

    def show() -> None:
        while not done.wait(1):
            print(f"\r{title}: {time.monotonic() - begun:.0f} s", end="", file=sys.stderr, flush=True)

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
    changed = {name: getattr(config, name, usual) for name, usual in fields.items()}
    return "".join(f", {name} {value}" for name, value in changed.items() if value != fields[name])


class _Planner:
    """Plans runs on one target, shows what it does, and keeps what it found.

    Args:
      target: of all plans.
    """

    def __init__(self, target: targets.Target) -> None:
        self.target = target
        self.devices = _DEVICES.value or target.devices
        self._cache = Cache(Path(_CACHE.value) if _CACHE.value else default_folder())

    def __call__(self, config: TrainConfig, method: str | None = None) -> TrainingPlan:
        method = method or config.method
        checkpointed = method.endswith(REMAT_SUFFIX)
        config = dataclasses.replace(config, method=method.removesuffix(REMAT_SUFFIX))
        with _clock(
            f"compiling {config.model}, {method}, batch {config.batch_size}{_variant(config)}, for {self.target.name}"
        ):
            return plan_training(config, self.target, self.devices, checkpointed, self._cache)

    def row(self, config: TrainConfig, method: str, label: str) -> Row:
        """One row; a TPU compiler's refusal is one too."""
        found: TrainingPlan | DoesNotFitError
        try:
            found = self(config, method)
        except DoesNotFitError as error:
            found = error
        largest = None
        if _LARGEST.value:
            largest = fit.largest_batch(lambda changed: self(changed, method), config, self.devices)
        return Row(self.target.name, method, label, found, largest)

    def explain(self, config: TrainConfig, method: str) -> str:
        """How much a run that does not fit lacks, and what would make it fit."""
        try:
            fit.require_fit(lambda changed: self(changed, method), config, self.devices)
        except DoesNotFitError as error:
            return f"{self.target.name}: {error}"
        return ""


def _planners() -> list[_Planner]:
    if _TARGET_CONFIG.value is not None and len(_TARGET.value) != 1:
        raise UserError("--target_config describes one GPU: name one --target")
    return [_Planner(targets.target(name.strip(), _TARGET_CONFIG.value)) for name in _TARGET.value]


def _methods(config: TrainConfig) -> list[str]:
    methods = [method.strip() for method in _COMPARE.value] or [config.method]
    for method in methods:
        if method.removesuffix(REMAT_SUFFIX) not in METHODS:
            raise ConfigError(unknown("method in --compare", method, METHODS))
    return methods


def _compare(config: TrainConfig, planners: Sequence[_Planner]) -> list[Row]:
    methods = _methods(config)
    return [planner.row(config, method, method) for planner in planners for method in methods]


def _frontier(config: TrainConfig, planners: Sequence[_Planner]) -> list[Row]:
    rows = []
    for planner in planners:
        check_program(config, planner.devices)
        for changes in _ways():
            changed = dataclasses.replace(config, **changes)
            label = ", ".join(f"{name}={value}" for name, value in changes.items())
            try:
                check_program(changed, planner.devices)
            except ConfigError as error:  # not every network knows every value, nor every batch such parts
                log_line(f"left out {label}: {error}")
                continue
            rows.append(planner.row(changed, config.method, label))
    return rows


def _ways() -> list[dict[str, Any]]:
    remats = [{"remat": value} for value in fit.remat_values()] or [{}]
    return [{**remat, "microbatches": parts} for remat in remats for parts in MICROBATCHES]


def _write(config: TrainConfig, rows: Sequence[Row], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = [
        {"target": row.target, "run": row.label, "largest_batch": row.largest_batch}
        | (row.plan.as_json() if isinstance(row.plan, TrainingPlan) else {"fits": False, "needed": row.plan.needed})
        for row in rows
    ]
    write_json(folder / "plan.json", {"config": as_json(config), "rows": about})
    log_line(f"written: {folder / 'plan.json'}")
    drawn = plan_report.draw(rows, folder, f"{config.model}, batch {config.batch_size}, {config.dtype}")
    if _FRONTIER.value and drawn:
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


def _parse(argv: Sequence[str]) -> list[str]:
    argv = [re.sub(r"^--?[a-z\-]+(?==|$)", lambda m: "--" + m[0].lstrip("-").replace("-", "_"), a) for a in argv]
    for field in (match[1] for match in map(re.compile(r"--?config\.(\w+)").match, argv) if match):
        if field not in config_lib.FIELDS:
            raise ConfigError(unknown("config field", field, config_lib.FIELDS))
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None:
            raise UserError("--config=FILE[:MODEL[,METHOD]] is needed, as for train.py (see --help)")
        _CONFIG.value.to_dict()  # a file that could not be loaded says so when it is first used
    except flags.Error as error:
        raise UserError(f"{error} (see --help)") from error
    except OSError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return rest


def _plan(argv: Sequence[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"do not know what to do with {' '.join(argv[1:])!r}. See --help")
    if _FRONTIER.value and _COMPARE.value:
        raise UserError("--frontier shows the config's method alone: leave out --compare")
    import jax

    jax.config.update("jax_platforms", "cpu")  # what is attached is not touched
    config = config_lib.validate(_CONFIG.value)
    planners = _planners()
    rows = (_frontier if _FRONTIER.value else _compare)(config, planners)
    log_line(f"{config.model}, batch {config.batch_size}, {config.dtype}, {config.dataset}\n{plan_report.table(rows)}")
    log_line(plan_report.LEGEND)
    if _OUT.value:
        _write(config, rows, Path(_OUT.value))
    for planner in planners:
        for row in rows:
            if not _FRONTIER.value and row.target == planner.target.name and not row.fits:
                log_line(planner.explain(config, row.method))
    return 0 if all(row.fits for row in rows) else 1


def main() -> None:
    """Runs the command line, and ends the process with its exit code."""
    logging.set_verbosity(logging.ERROR)
    try:
        app.run(_plan, flags_parser=_parse)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
