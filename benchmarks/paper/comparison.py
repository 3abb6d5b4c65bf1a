"""Finished runs to a page with a table beside the paper's numbers, and figures."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _results
from benchmarks._results import Record, Store
from benchmarks.paper.experiments import Accuracy, Arm, Experiment
from mimicnorm_jax import plots
from mimicnorm_jax.training import base

CHANCE = 1.0
"""Per cent, at 100 classes: what a run counts that ended before its first epoch did."""


APART = ("init_scheme", "decay_scalars", "scalar_rate", "logit_scale", "adaptive_clip")
"""Fields, besides those of every arm and the recipe's, that set an arm apart: at their default where it names none."""
DEFAULTS = base()


def _set(fields: Mapping[str, Any], name: str) -> Any:
    """A field of a run or arm; runs of before the field was there are as its default."""
    return fields.get(name, DEFAULTS[name])


def belongs(record: Record, arm: Arm, seed: int | None = None) -> bool:
    """Whether a run is of this arm (and seed)."""
    config = record["config"]
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in arm.fields.items()}
    return (
        all(_set(config, name) == value for name, value in fields.items())
        and all(_set(config, name) == _set(fields, name) for name in APART)
        and seed in (None, record["seed"])
    )


def seconds(record: Record) -> float:
    """What a run took, evaluation included."""
    return sum(row["seconds"] for row in record["curve"])


def best(record: Record) -> float:
    """Best test accuracy of a run, in per cent."""
    return max((100 * row["test_accuracy"] for row in record["curve"]), default=CHANCE)


def final(record: Record) -> float:
    """Test accuracy at the end, in per cent; chance for a run that did not survive."""
    return CHANCE if record["ended"] else 100 * record["curve"][-1]["test_accuracy"]


def difference(a: Accuracy | None, b: Accuracy | None) -> str:
    """`a` minus `b`, and the same in joint standard errors, where both have a spread over runs."""
    if a is None or b is None:
        return ""
    text = f"{a.mean - b.mean:+.2f}"
    if a.std is None or b.std is None:
        return text
    error = math.hypot(a.std / math.sqrt(a.runs), b.std / math.sqrt(b.runs))
    return f"{text} ({(a.mean - b.mean) / error:+.1f} SE)" if error else text


def measured(values: Sequence[float]) -> Accuracy | None:
    """Mean and standard deviation; the latter from two runs on."""
    if not values:
        return None
    return Accuracy(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def shown(value: Accuracy | None) -> str:
    """A mean with its standard deviation."""
    if value is None:
        return ""
    return f"{value.mean:.2f}" if value.std is None else f"{value.mean:.2f} ± {value.std:.2f}"


def _key(record: Record) -> _results.Key:
    config = record["config"]
    own = (config[name] for name in ("model", "method", "learning_rate"))
    return (*own, *(_set(config, name) for name in ("warmup_epochs", *APART)), record["seed"])


@dataclass(frozen=True)
class Study:
    """An experiment in one of its forms.

    Attributes:
      name: of its files.
      experiment: in that form.
      command: that runs it.
    """

    name: str
    experiment: Experiment
    command: str

    @property
    def store(self) -> Store:
        """Its finished runs."""
        return Store(self.name, _key)

    def runs(self, records: Sequence[Record]) -> list[tuple[Arm, list[Record]]]:
        """The runs of every arm."""
        return [(arm, [record for record in records if belongs(record, arm)]) for arm in self.experiment.arms]


def page(study: Study, folder: Path, records: Sequence[Record]) -> str:
    """The page of a study; arms that were not run say so.

    Args:
      study: whose page it is.
      folder: in which the figures lie that it shows.
      records: of finished runs.
    """
    experiment, runs = study.experiment, study.runs(records)
    planned, done = len(runs), sum(bool(found) for _, found in runs)
    drawn = [f"![{name}]({name})\n" for name in figures(study, records) if (folder / name).exists()]
    text = [
        f"# {study.name}: {experiment.summary}",
        "",
        f"{done} of {planned} rows have been run, {experiment.epochs} epoch{'s' * (experiment.epochs > 1)} each. "
        f"{_setting(records)}Test accuracy in per cent, mean and standard deviation over runs; a run that did not "
        f"survive counts as its best epoch before, or chance ({CHANCE:g}). SE: joint standard errors of a difference.",
        "",
        _table(runs),
        "",
        *drawn,
        f"Records: {study.name}.jsonl, each with its config, seed, command and machine. Command: `{study.command}`. "
        f"Machine: {_results.machines(records)}.",
        "",
    ]
    return "\n".join(text)


def _setting(records: Sequence[Record]) -> str:
    """What all runs have in common."""
    names = ("model", "width_multiplier", "dtype", "batch_size", "learning_rate", "warmup_epochs", "schedule")
    values = {name: {record["config"].get(name) for record in records} for name in names}
    common = ", ".join(f"{name} {next(iter(found))}" for name, found in values.items() if len(found) == 1)
    return f"All: {common}. " if common else ""


def _table(runs: Sequence[tuple[Arm, list[Record]]]) -> str:
    header = ["network", "rate", "method", "runs", "best epoch", "final", "the paper's best", "ours - paper"]
    header += ["ours - batchnorm", "paper - its batchnorm", "ended early"]
    rows = []
    baselines = {
        arm.comparison: (arm.published, measured([best(record) for record in found]))
        for arm, found in runs
        if arm.method == "batchnorm"
    }
    for arm, found in runs:
        ours, at_end = (measured([value(record) for record in found]) for value in (best, final))
        published, ran = (None, None) if arm.method == "batchnorm" else baselines.get(arm.comparison, (None, None))
        rate = found[0]["config"]["learning_rate"] if found else arm.fields.get("learning_rate", "")
        ended = [f"seed {record['seed']}: {record['ended']}" for record in found if record["ended"]]
        rows.append(
            (
                arm.net,
                rate,
                arm.method,
                len(found) or "not run",
                shown(ours),
                shown(at_end),
                shown(arm.published),
                difference(ours, arm.published),
                difference(ours, ran),
                difference(arm.published, published),
                "; ".join(ended),
            )
        )
    return _results.table(header, rows)


def figures(study: Study, records: Sequence[Record]) -> dict[str, Callable[[Path], None]]:
    """The figures of a study by file, and what draws them: accuracy by rate, the last BN's variance, or curves."""
    name, runs = study.name, study.runs(records)
    done = [(arm, found) for arm, found in runs if found]
    if not done:
        return {}
    if len({arm.comparison for arm, _ in runs}) > len({arm.net for arm, _ in runs}):
        return {f"{name}.png": partial(_draw_rates, name, done)}
    if all("diagnostics" in record for _, found in done for record in found):
        return {f"{name}.png": partial(_draw_variances, name, done)}
    nets = dict.fromkeys(arm.net for arm, _ in done)
    return {f"{name}-{net}.png": partial(draw_curves, f"{name}: {net}", net, done) for net in nets}


def draw_curves(title: str, net: str, runs: Sequence[tuple[Arm, list[Record]]], path: Path) -> None:
    """Draws loss and accuracy by epoch of a network's arms, of the runs that survived."""
    curves = {arm.method: [r["curve"] for r in found if not r["ended"]] for arm, found in runs if arm.net == net}
    plots.curves({method: survived for method, survived in curves.items() if survived}, path, title)


def _draw_rates(name: str, runs: Sequence[tuple[Arm, list[Record]]], path: Path) -> None:
    """Best accuracy by method: ours with standard errors, and the paper's."""
    series = {}
    for method in dict.fromkeys(arm.method for arm, _ in runs):
        mine = [(arm, measured([best(record) for record in found])) for arm, found in runs if arm.method == method]
        points = [(arm.fields["learning_rate"], value) for arm, value in mine if value is not None]
        errors = [(value.std or 0.0) / math.sqrt(value.runs) for _, value in points]
        series[method] = plots.Series(
            np.array([rate for rate, _ in points]), np.array([value.mean for _, value in points]), np.array(errors)
        )
        published = [(arm.fields["learning_rate"], arm.published.mean) for arm, _ in mine if arm.published]
        if published:
            series[f"{method} (paper)"] = plots.Series(*map(np.array, zip(*published, strict=True)))
    plots.lines(series, path, name, "learning rate", "best test accuracy (%)", "log")


def _draw_variances(name: str, runs: Sequence[tuple[Arm, list[Record]]], path: Path) -> None:
    series = {}
    for arm, found in runs:
        for record in found:
            points = [(row["epoch"], row["last_bn_variance"]) for row in record["diagnostics"]]
            label = f"{arm.net}, {arm.method}, seed {record['seed']}"
            series[label] = plots.Series(*map(np.array, zip(*points, strict=True)))
    plots.lines(series, path, name, "epoch", "running variance of the last BatchNorm, mean over classes", "linear")
