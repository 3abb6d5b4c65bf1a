r"""Sharpness: the largest eigenvalue of the curvature, the learning rate that it allows, what BatchNorm does to both.

Two parts (Wei, Stokes & Schwab 2019; Karakida, Akaho & Amari 2019):

map: networks trained on the digits for a few epochs of heavy ball at many learning rates, without warm-up, beside
  eta* = 2 (1 + mu) / lambda_max at initialization: the theory's dense stack of four layers with BatchNorm of scale
  gamma, and without, on the squared loss (for which the theory is made); resnet8 under batchnorm, its scales starting
  at gamma, and under mimicnorm, lastbn and none, on cross entropy.
norms: lambda_max of the squared loss, where the Fisher information of a Gaussian likelihood is meant, at initialization
  with BatchNorm in the hidden layers, on the logits, in both or in neither.

Runs what results/sharpness.jsonl does not hold yet, whole seeds one after another, then writes sharpness.md and .png.

  python -m benchmarks.sharpness [--data_dir=DIR]    # with CIFAR-100 there: norms of resnet18 and vgg11 as well
  python -m benchmarks.sharpness --form=full --data_dir=DIR    # full width, for a GPU
  python -m benchmarks.sharpness --render
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _results
from benchmarks._results import Record, Store
from benchmarks._sharpness import (
    BATCH,
    COARSE,
    CURVED,
    DEPTH,
    EPOCHS,
    FORMS,
    MOMENTUM,
    NETS,
    NORMS,
    RATES,
    measure_map,
    measure_norms,
)
from mimicnorm_jax import plots
from mimicnorm_jax.data import require_prepared
from mimicnorm_jax.diagnostics import curvature
from mimicnorm_jax.errors import DataError

CHANCE = 0.999 * math.log(10)
"""A thousandth below the cross entropy of ten classes that are told apart by nothing."""
GAMMAS = (0.1, 0.3, 1.0, 3.0, 10.0)
BOUNDS = ("bound", "last_bound")
"""Theory's bounds on the curvature: of all layers, and of the last one, where the two are not the same thing."""
ARMS = (
    *(("stack", "batchnorm", gamma) for gamma in GAMMAS),
    ("stack", "none", 1.0),
    *(("resnet8", "batchnorm", gamma) for gamma in GAMMAS),
    *(("resnet8", method, 1.0) for method in ("mimicnorm", "lastbn", "none")),
)
"""Network, method and gamma of every row of the map."""
FIGURES = {"stack": "stack", "resnet8": "rates"}
"""Networks whose loss by rate is drawn, and what the figure is called."""
NAMES = ("part", "net", "method", "gamma", "seed", "form")
STORE = Store("sharpness", lambda record: tuple(record[name] for name in NAMES))


def missing(form: str, done: set[Any], seeds: list[int], data_dir: str) -> Iterator[tuple[Any, Callable[[], Record]]]:
    """What is to be measured of a form, by key, seed after seed."""
    has_photographs = True
    try:
        require_prepared("cifar100", data_dir)
    except DataError:
        has_photographs = False
    for seed in seeds:
        for net, method, gamma in ARMS:
            if (key := ("map", net, method, gamma, seed, form)) not in done:
                yield key, functools.partial(measure_map, net, method, gamma, seed, form)
        for net in NETS:
            for where in NORMS if has_photographs or NETS[net] == "digits" else ():
                if (key := ("norms", net, where, 1.0, seed, form)) not in done:
                    yield key, functools.partial(measure_norms, net, where, seed, form, data_dir)


def stable_rate(record: Record) -> float:
    """The largest rate up to which training ended below the loss that it began with; 0 if there is none.

    A cross entropy has to be below that of chance too, which networks begin above.
    Where that is the largest of all, it is a lower bound.
    """
    stable, bound = 0.0, record["initial_loss"]
    if record["net"] != "stack":
        bound = min(bound, CHANCE)
    for rate, loss in zip(record["rates"], record["losses"], strict=True):
        if loss is None or loss >= bound:
            break
        stable = rate
    return stable


def best_rate(record: Record) -> float:
    """The rate of the least loss."""
    losses = [np.inf if loss is None else loss for loss in record["losses"]]
    return record["rates"][int(np.argmin(losses))]


def predicted(record: Record, eigenvalue: str = "eigenvalue") -> float:
    """eta* of a row."""
    return curvature.largest_stable_rate(record[eigenvalue], MOMENTUM)


def _spread(records: list[Record], of: Callable[[Record], float]) -> str:
    return _results.mean_and_deviation([of(record) for record in records], ".3g", ".2g")


def _or_more(records: list[Record]) -> str:
    """Where the largest rate of all is stable, by one seed at least, what is larger was not tried."""
    return " or more" if any(stable_rate(record) == record["rates"][-1] for record in records) else ""


def map_table(records: list[Record]) -> str:
    """Rows of the map: curvature, predicted and observed rates, mean and deviation over seeds."""
    rows = []
    for (net, method, gamma), found in _rows(records).items():
        bound = tuple(f"{predicted(found[0], name):.3g}" if name in found[0] else "-" for name in BOUNDS)
        rows.append(
            (
                *(net, method, f"{gamma:g}" if method == "batchnorm" else "-", len(found)),
                _spread(found, lambda r: r["eigenvalue"]),
                _spread(found, predicted),
                *bound,
                _spread(found, stable_rate) + _or_more(found),
                _spread(found, lambda r: stable_rate(r) / predicted(r)) + _or_more(found),
                _spread(found, lambda r: best_rate(r) / predicted(r)),
            )
        )
    header = ["network", "method", "gamma", "seeds", "lambda_max", "eta*", "by theory, statistics fixed"]
    header += ["by theory, last layer", "largest stable rate", "over eta*", "best rate over eta*"]
    return _results.table(header, rows)


def _label(net: str, form: str) -> str:
    return net if form == "small" else f"{net}, {form}"


def _rows(records: list[Record]) -> dict[tuple[str, str, float], list[Record]]:
    """Rows of the map by network (with its form where that is not `small`), method and gamma."""
    found = _results.grouped(
        (record for record in records if record["part"] == "map"),
        lambda r: (_label(r["net"], r["form"]), r["method"], r["gamma"]),
    )
    arms = [(_label(net, form), method, gamma) for form in FORMS for net, method, gamma in ARMS]
    return {arm: found[arm] for arm in arms if arm in found}


def norms_table(records: list[Record]) -> str:
    """Largest eigenvalue by where BatchNorm stands."""
    mine = [record for record in records if record["part"] == "norms"]
    rows = []
    for form, net, where in itertools.product(FORMS, NETS, NORMS):
        found = [r for r in mine if (r["form"], r["net"], r["method"]) == (form, net, where)]
        if found:
            cells = (
                _spread(found, lambda r: r["eigenvalue"]),
                _spread(found, lambda r: r["eigenvalue"] / r["trace"]),
                _spread(found, lambda r: r["output_variance"]),
            )
            rows.append((_label(net, form), where, len(found), *cells))
    header = ["network", "BatchNorm on", "seeds", "lambda_max", "over the trace", "variance of the outputs"]
    return _results.table(header, rows)


def page(records: list[Record]) -> str:
    """The tables and the figures."""
    seconds, (small, full) = sum(record["cpu_seconds"] for record in records), FORMS.values()
    return f"""# Sharpness

## Learning rate and scale of BatchNorm

Digits, {EPOCHS} epochs of heavy ball (momentum {MOMENTUM}) in batches of {BATCH}, one rate throughout, from
{RATES[0]:.2g} to {RATES[-1]:.3g} by factors of {RATES[1] / RATES[0]:.2g}, of resnet8 {COARSE[1] / COARSE[0]:.2g}; mean
and standard deviation over seeds. `stack`: dense, {DEPTH} layers of
width {small.width}, bias variance 0.5, squared loss to one-hot labels; resnet8 of half width, cross entropy. `full`:
width {full.width:,}, and resnet8 as it is. lambda_max is
that of the Gauss-Newton matrix at initialization on {CURVED} training images as one batch, derivatives going through
the statistics as in training; eta* = 2 (1 + mu) / lambda_max. By theory: eta* of `theory.fisher_bound` with the digits'
moments, of all layers, for statistics held fixed, and of the last layer alone, which is what is left with derivatives
through the statistics. Stable: the mean loss over the last epoch is below the loss at the start, and a cross entropy
below that of chance, at that rate and all lower ones.

{map_table(records)}
{_figures(records)}
## Where BatchNorm stands

lambda_max of the squared loss at initialization, in training mode: MLP of {DEPTH} layers and width {small.width} and
resnet8 of half width on {CURVED} digits, resnet18 and vgg11 of quarter width on {small.images} CIFAR-100 images;
`full`: width {full.width:,}, the others as they are, {full.images} photographs. `over the trace`: the share of all
curvature in that one direction (trace by 16 random probes), which no scale of the outputs changes.

{norms_table(records)}

Command: `python -m benchmarks.sharpness --data_dir=DIR`, for `full` with `--form=full`; {seconds:,.0f} CPU seconds.
Machine: {_results.machines(records)}.
"""


def _figures(records: list[Record]) -> str:
    """The map of every form, and resnet8 under all methods, where there are any."""
    parts = []
    for form in FORMS:
        mine = {(r["net"], r["gamma"]) for r in records if (r["part"], r["form"]) == ("map", form)}
        parts += [f"\n![map]({_name('', form)})\n"] if mine else []
        parts += [f"\n![rates]({_name('-rates', form)})\n"] if ("resnet8", 1.0) in mine else []
    return "".join(parts)


def _name(figure: str, form: str) -> str:
    return f"sharpness{figure}{'' if form == 'small' else f'-{form}'}.png"


def draw(records: list[Record], folder: Path) -> None:
    """The maps of every form with their boundaries, and the lines of the methods without gamma."""
    for form in FORMS:
        rows = {
            (net.partition(",")[0], method, gamma): found
            for (net, method, gamma), found in _rows([r for r in records if r["form"] == form]).items()
        }
        _draw_map(rows, folder / _name("", form))
        _draw_rates(rows, {net: folder / _name(f"-{part}", form) for net, part in FIGURES.items()})


def _draw_map(rows: dict[tuple[str, str, float], list[Record]], path: Path) -> None:
    panels = {}
    for net, title in (("stack", "dense stack, BatchNorm, squared loss"), ("resnet8", "resnet8, batchnorm")):
        mine = {gamma: rows[net, "batchnorm", gamma] for gamma in GAMMAS if (net, "batchnorm", gamma) in rows}
        if len(mine) < 2:
            continue
        gammas = np.array(list(mine))
        lines = {"eta*, measured curvature": "eigenvalue"}
        lines |= {"eta*, theory, fixed statistics": "bound", "eta*, theory, last layer": "last_bound"}
        boundaries = {
            label: plots.Series(
                np.array([np.mean([predicted(r, name) for r in found]) for found in mine.values()]), gammas
            )
            for label, name in lines.items()
            if all(name in record for found in mine.values() for record in found)
        }
        values = np.stack([_mean_log_loss(found) for found in mine.values()])
        panels[title] = plots.HeatMap(_rates(next(iter(mine.values()))), gammas, values, boundaries)
    axes = plots.Axes("learning rate", "gamma", "log", "log")
    if panels:
        plots.heat_maps(panels, path, "after 5 epochs of digits", axes, "log10 of loss over initial")


def _draw_rates(rows: dict[tuple[str, str, float], list[Record]], paths: dict[str, Path]) -> None:
    curves: dict[str, dict[str, plots.Series]] = {}
    marks = {}
    for (net, method, gamma), found in rows.items():
        if gamma == 1.0:
            curves.setdefault(net, {})[method] = plots.Series(_rates(found), 10 ** _mean_log_loss(found))
            marks[f"{net}/{method}"] = np.mean([predicted(record) for record in found])
    for net, lines in curves.items():
        title = f"{net}: loss after 5 epochs of digits; dashed: eta* by the curvature at initialization"
        shown = {name: [marks[f"{net}/{name}"]] for name in lines}
        axes = plots.Axes("learning rate", "loss over initial loss", "log", "log")
        plots.line_panels({"": lines}, paths[net], title, axes, shown)


def _rates(found: list[Record]) -> np.ndarray:
    return np.array(found[0]["rates"])


def _mean_log_loss(found: list[Record]) -> np.ndarray:
    """log10 of the final over the initial loss, at most 0.5, NaN where any seed diverged."""
    logs = []
    for record in found:
        losses = np.array([np.nan if loss is None else loss for loss in record["losses"]])
        logs.append(np.minimum(np.log10(losses / record["initial_loss"]), 0.5))
    return np.mean(logs, axis=0)


def main() -> None:
    parser = _results.study_parser("sharpness", __doc__, (0, 1, 2))
    parser.add_argument("--form", choices=FORMS, default="small")
    arguments = parser.parse_args()
    todo = missing(arguments.form, set(STORE.read(arguments.results)), arguments.seeds, arguments.data_dir)
    told = lambda record: f"lambda_max {record['eigenvalue']:.4g}"  # noqa: E731
    records = _results.go_on(STORE, arguments, NAMES, todo, told)
    draw(records, arguments.results)
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
