"""Finished runs to a table beside the paper's numbers, and figures."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from experiments import Arm, Experiment, Published

from mimicnorm_jax import plots
from mimicnorm_jax.utils.files import write_text

Line = dict[str, Any]
CHANCE = 1.0
"""Per cent, at 100 classes: what a run counts that ended before its first epoch did."""


def read(path: Path) -> list[Line]:
    """The lines of a results file; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def belongs(line: Line, arm: Arm, seed: int | None = None) -> bool:
    """Whether a line is of this arm (and seed)."""
    config = line["config"]
    init = arm.fields.get("init", "published")
    return (
        all(config.get(name) == value for name, value in arm.fields.items())
        and config.get("init") == init
        and seed in (None, line["seed"])
    )


def seconds(line: Line) -> float:
    """What a run took, evaluation included."""
    return sum(row["seconds"] for row in line["curve"])


def best(line: Line) -> float:
    """Best test accuracy of a run, in per cent."""
    return max((100 * row["test_accuracy"] for row in line["curve"]), default=CHANCE)


def final(line: Line) -> float:
    """Test accuracy at the end, in per cent; chance for a run that did not survive."""
    return CHANCE if line["ended"] else 100 * line["curve"][-1]["test_accuracy"]


def difference(a: Published | None, b: Published | None) -> str:
    """`a` minus `b`, and the same in joint standard errors, where both have a spread over runs."""
    if a is None or b is None:
        return ""
    text = f"{a.mean - b.mean:+.2f}"
    if a.std is None or b.std is None:
        return text
    error = math.hypot(a.std / math.sqrt(a.runs), b.std / math.sqrt(b.runs))
    return f"{text} ({(a.mean - b.mean) / error:+.1f} SE)" if error else text


def measured(values: Sequence[float]) -> Published | None:
    """Mean and standard deviation; the latter from two runs on."""
    if not values:
        return None
    return Published(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def shown(value: Published | None) -> str:
    """A mean with its standard deviation."""
    if value is None:
        return ""
    return f"{value.mean:.2f}" if value.std is None else f"{value.mean:.2f} ± {value.std:.2f}"


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


def render(study: Study, folder: Path) -> None:
    """Writes NAME.md and its figures from NAME.jsonl in the same folder; arms that were not run say so."""
    name, experiment = study.name, study.experiment
    lines = read(folder / f"{name}.jsonl")
    runs = [(arm, [line for line in lines if belongs(line, arm)]) for arm in experiment.arms]
    planned, done = len(runs), sum(bool(of_arm) for _, of_arm in runs)
    figures = _figures(name, runs, folder) if lines and plots.available() else []
    where = sorted({json.dumps(line["machine"], sort_keys=True) for line in lines})
    text = [
        f"# {name}: {experiment.summary}",
        "",
        f"{done} of {planned} rows have been run, {experiment.epochs} epoch{'s' * (experiment.epochs > 1)} each. "
        f"{_setting(lines)}Test accuracy in per cent, mean and standard deviation over runs; a run that did not "
        f"survive counts as its best epoch before, or chance ({CHANCE:g}). SE: joint standard errors of a difference.",
        "",
        *_table(runs),
        "",
        *[f"![{figure}]({figure})\n" for figure in figures],
        f"Lines: {name}.jsonl, each with its config, seed, command and machine. Command: `{study.command}`. "
        f"Machine: {'; '.join(where) or 'none yet'}.",
        "",
    ]
    write_text(folder / f"{name}.md", "\n".join(text))


def _setting(lines: Sequence[Line]) -> str:
    """What all runs have in common."""
    names = ("model", "width", "dtype", "batch_size", "learning_rate", "warmup_epochs", "schedule")
    values = {name: {line["config"].get(name) for line in lines} for name in names}
    common = ", ".join(f"{name} {next(iter(found))}" for name, found in values.items() if len(found) == 1)
    return f"All: {common}. " if common else ""


def _table(runs: Sequence[tuple[Arm, list[Line]]]) -> list[str]:
    rows = [
        "| network | rate | method | runs | best epoch | final | the paper's best | ours - paper | ours - batchnorm | "
        "paper - its batchnorm | ended early |",
        "|" + "---|" * 11,
    ]
    rivals = {
        arm.comparison: (arm, measured([best(r) for r in found])) for arm, found in runs if arm.method == "batchnorm"
    }
    for arm, found in runs:
        ours, at_end = (measured([value(line) for line in found]) for value in (best, final))
        rival, rivals_best = rivals.get(arm.comparison, (None, None))
        is_rival = arm.method == "batchnorm"
        rate = found[0]["config"]["learning_rate"] if found else arm.fields.get("learning_rate", "")
        cells = (
            arm.net,
            rate,
            arm.method,
            len(found) or "not run",
            shown(ours),
            shown(at_end),
            shown(arm.published),
            difference(ours, arm.published),
            "" if is_rival else difference(ours, rivals_best),
            "" if is_rival or rival is None else difference(arm.published, rival.published),
            "; ".join(f"seed {line['seed']}: {line['ended']}" for line in found if line["ended"]),
        )
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return rows


def _figures(name: str, runs: Sequence[tuple[Arm, list[Line]]], folder: Path) -> list[str]:
    """The names of the pictures made: of accuracy by rate, of the last BN's variance, or curves of each network."""
    done = [(arm, found) for arm, found in runs if found]
    if len({arm.comparison for arm, _ in runs}) > len({arm.net for arm, _ in runs}):
        plots.lines(_by_rate(done), folder / f"{name}.png", name, "learning rate", "best test accuracy (%)", "log")
        return [f"{name}.png"]
    if all("diagnostics" in line for _, found in done for line in found):
        label = "running variance of the last BatchNorm, mean over classes"
        plots.lines(_variances(done), folder / f"{name}.png", name, "epoch", label, "linear")
        return [f"{name}.png"]
    figures = []
    for net in dict.fromkeys(arm.net for arm, _ in done):
        curves = {
            arm.method: [line["curve"] for line in found if not line["ended"]] for arm, found in done if arm.net == net
        }
        figure = f"{name}-{net}.png"
        plots.curves({method: c for method, c in curves.items() if c}, folder / figure, f"{name}: {net}")
        figures.append(figure)
    return figures


def _by_rate(runs: Sequence[tuple[Arm, list[Line]]]) -> dict[str, plots.Series]:
    """Best accuracy by method: ours with standard errors, and the paper's."""
    series = {}
    for method in dict.fromkeys(arm.method for arm, _ in runs):
        mine = [(arm, measured([best(line) for line in found])) for arm, found in runs if arm.method == method]
        points = [(arm.fields["learning_rate"], value) for arm, value in mine if value is not None]
        errors = [(value.std or 0.0) / math.sqrt(value.runs) for _, value in points]
        series[method] = plots.Series(
            np.array([rate for rate, _ in points]), np.array([value.mean for _, value in points]), np.array(errors)
        )
        published = [(arm.fields["learning_rate"], arm.published.mean) for arm, _ in mine if arm.published]
        if published:
            series[f"{method} (paper)"] = plots.Series(*map(np.array, zip(*published, strict=True)))
    return series


def _variances(runs: Sequence[tuple[Arm, list[Line]]]) -> dict[str, plots.Series]:
    series = {}
    for arm, found in runs:
        for line in found:
            points = [(row["epoch"], row["last_bn_variance"]) for row in line["diagnostics"]]
            name = f"{arm.net}, {arm.method}, seed {line['seed']}"
            series[name] = plots.Series(*map(np.array, zip(*points, strict=True)))
    return series
