"""Runs of training, and networks compared: curves, lines and bars."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mimicnorm_jax.plots.figure import Series, picture

Rows = Sequence[Mapping[str, Any]]
"""Lines of a run's metrics.jsonl or diagnostics.jsonl."""


def curves(runs: Mapping[str, Sequence[Rows]], path: Path, title: str = "") -> None:
    """Draws loss and accuracy by epoch and saves them as a picture.

    Args:
      runs: by label, the runs to show in one color, each the lines of its metrics.jsonl. Several
        runs of a label show as their mean and range at the epochs that all of them reached.
      path: of the picture; written in one step.
      title: above the figure.
    """
    with picture(path, (11, 4), columns=2) as (figure, grid):
        left, right = grid[0]
        for i, (label, seeds) in enumerate(runs.items()):
            length = min((len(rows) for rows in seeds), default=0)
            if not length:
                continue
            epochs = [row["epoch"] for row in seeds[0][:length]]
            for axes, metric, scale in ((left, "loss", 1), (right, "accuracy", 100)):
                for split, style in (("train", ":"), ("test", "-")):
                    values = scale * np.array([[row[f"{split}_{metric}"] for row in rows[:length]] for rows in seeds])
                    name = f"{label} ({split})" if len(runs) == 1 else (label if split == "test" else None)
                    marker = "." if length < 40 else ""
                    axes.plot(epochs, values.mean(0), style, color=f"C{i}", label=name, marker=marker)
                    if len(seeds) > 1 and split == "test":
                        axes.fill_between(epochs, values.min(0), values.max(0), color=f"C{i}", alpha=0.2, linewidth=0)
        left.set(xlabel="epoch", ylabel="cross entropy (nats)")
        right.set(xlabel="epoch", ylabel="accuracy (%)")
        figure.legend(*right.get_legend_handles_labels(), frameon=False, loc="outside right center")
        for axes in (left, right):
            axes.grid(alpha=0.3)
            axes.xaxis.get_major_locator().set_params(integer=True)
        subtitle = "solid: test, dotted: train" if len(runs) > 1 else ""
        figure.suptitle("\n".join(filter(None, (title, subtitle))))


def lines(series: Mapping[str, Series], path: Path, title: str, xlabel: str, ylabel: str, xscale: str) -> None:
    """Draws points joined by lines, one color a name; `NAME (paper)` is dashed and has the color of `NAME`.

    Args:
      series: by name.
      path: of the picture; written in one step.
      title: above the figure.
      xlabel, ylabel: of the axes.
      xscale: linear or log.
    """
    with picture(path, (8.5, 4.5)) as (figure, grid):
        axes = grid[0, 0]
        names = list(dict.fromkeys(name.removesuffix(" (paper)") for name in series))
        for name, points in series.items():
            ours = name.removesuffix(" (paper)")
            style = {"linestyle": "-" if name == ours else "--", "marker": "." if len(points.x) < 100 else ""}
            axes.errorbar(
                points.x, points.y, points.error, color=f"C{names.index(ours)}", label=name, capsize=2, **style
            )
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale=xscale, title=title)
        axes.grid(alpha=0.3)
        figure.legend(frameon=False, loc="outside right center")


def along_run(rows: Rows, path: Path, title: str) -> bool:
    """Draws the diagnostics of a run by epoch: condition numbers, chi, the last BatchNorm's running variance,
    and the tangent kernel's alignment with the labels.

    Args:
      rows: the lines of its diagnostics.jsonl; a quantity may be missing or None.
      path: of the picture.
      title: above the figure.

    Returns:
      Whether there is a picture: none without anything measured.
    """
    panels = {
        "condition number of the tangent kernel": ("kappa", "kappa_unit_diagonal"),
        "growth of a perturbation per layer, chi": ("chi",),
        "running variance of the last BatchNorm": ("last_bn_variance",),
        "alignment of the tangent kernel with the labels": ("alignment", "alignment_centered"),
    }
    shown = {label: names for label, names in panels.items() if any(row.get(names[0]) is not None for row in rows)}
    if not shown:
        return False
    with picture(path, (4.5 * len(shown), 3.6), 1, len(shown)) as (figure, grid):
        for axes, (label, names) in zip(grid[0], shown.items(), strict=True):
            for name in names:
                points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
                axes.plot(*zip(*points, strict=True), marker=".", label=name.replace("_", " "))
            axes.set(xlabel="epoch", ylabel=label, yscale="log" if names[0] == "kappa" else "linear")
            axes.grid(alpha=0.3)
            if len(names) > 1:
                axes.legend(frameon=False)
        figure.suptitle(title)
    return True


def bars(
    groups: Mapping[tuple[str, str], Mapping[str, Sequence[float]]],
    quantities: Mapping[str, str],
    path: Path,
    title: str,
) -> None:
    """Draws quantities of networks under methods as bars of the mean, with every value as a point.

    Args:
      groups: by network and method, by quantity, the values of all seeds.
      quantities: axis labels of those to draw, on a logarithmic axis each.
      path: of the picture.
      title: above the figure.
    """
    nets = list(dict.fromkeys(net for net, _ in groups))
    methods = list(dict.fromkeys(method for _, method in groups))
    width = 0.8 / len(methods)
    with picture(path, (5.5 * len(quantities), 4), 1, len(quantities)) as (figure, grid):
        for axes, (quantity, label) in zip(grid[0], quantities.items(), strict=True):
            for i, method in enumerate(methods):
                places = [place for place, net in enumerate(nets) if (net, method) in groups]
                values = [np.asarray(groups[nets[place], method][quantity]) for place in places]
                x = np.array(places) + (i - (len(methods) - 1) / 2) * width
                axes.bar(x, [v.mean() for v in values], 0.9 * width, color=f"C{i}", alpha=0.6, label=method)
                for place, points in zip(x, values, strict=True):
                    axes.plot(np.full(len(points), place), points, ".", color="black", markersize=4)
            axes.set(ylabel=label, yscale="log")
            slanted: Any = {"rotation": 25, "ha": "right"} if len(nets) > 4 else {}
            axes.set_xticks(range(len(nets)), nets, **slanted)
            axes.grid(alpha=0.3, axis="y", which="both")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), frameon=False, loc="outside right center")
        figure.suptitle(title)


def intervals(groups: Mapping[str, tuple[Sequence[float], float | None]], path: Path, title: str, label: str) -> None:
    """Draws, for every name, values as points and their mean with an interval, beside a line at 0.

    Args:
      groups: by name, the values and half the width of the interval about their mean, None for no interval.
      path: of the picture.
      title: above the figure.
      label: of the values' axis.
    """
    with picture(path, (8.5, 1.2 + 0.45 * len(groups))) as (_, grid):
        axes = grid[0, 0]
        for place, (values, half_width) in enumerate(groups.values()):
            axes.plot(values, np.full(len(values), place), ".", color="gray", markersize=5)
            axes.errorbar(np.mean(values), place, xerr=half_width, color="C0", marker="o", capsize=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(groups)), list(groups))
        axes.invert_yaxis()
        axes.set(xlabel=label, title=title)
        axes.grid(alpha=0.3, axis="x")


def stacked_bars(panels: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path, title: str, label: str) -> None:
    """Draws in every panel a bar a name, stacked of its parts, one color a part.

    Args:
      panels: by title, bars by name, their parts by name.
      path: of the picture; written in one step.
      title: above the figure.
      label: of the axis of values.
    """
    parts = list(dict.fromkeys(part for bars in panels.values() for bar in bars.values() for part in bar))
    with picture(path, (4.5 * len(panels) + 2.5, 4), columns=len(panels)) as (figure, grid):
        for axes, (name, bars) in zip(grid[0], panels.items(), strict=True):
            bottom = np.zeros(len(bars))
            for i, part in enumerate(parts):
                heights = np.array([bar.get(part, 0.0) for bar in bars.values()])
                axes.bar(list(bars), heights, bottom=bottom, color=f"C{i}", label=part)
                bottom += heights
            axes.set(title=name, ylabel=label)
            axes.set_xticks(range(len(bars)), list(bars), rotation=20, ha="right")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), frameon=False, loc="outside right center")
        figure.suptitle(title)
