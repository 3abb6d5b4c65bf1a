"""Results to figures. The only module that imports matplotlib."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Series:
    """Points `(K,)` of a graph, and their standard errors where there are some."""

    x: np.ndarray
    y: np.ndarray
    error: np.ndarray | None = None


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


@contextmanager
def _picture(path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1) -> Iterator[tuple["Figure", Any]]:
    """A figure and its array of axes, saved in one step on leaving."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        yield figure, grid
        for axes in grid.flat:
            axes.spines[["top", "right"]].set_visible(False)
        partial = path.with_name(f"{path.stem}.partial{path.suffix}")
        figure.savefig(partial, dpi=120)
        partial.replace(path)
    finally:
        plt.close(figure)


def curves(runs: Mapping[str, Sequence[Rows]], path: Path, title: str = "") -> None:
    """Draws loss and accuracy by epoch and saves them as a picture.

    Args:
      runs: by label, the runs to show in one color, each the lines of its metrics.jsonl. Several
        runs of a label show as their mean and range at the epochs that all of them reached.
      path: of the picture; written in one step.
      title: above the figure.
    """
    with _picture(path, (11, 4), columns=2) as (figure, grid):
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
    with _picture(path, (8.5, 4.5)) as (figure, grid):
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


def transition_maps(lines: Mapping[str, Series], points: Mapping[str, Series], path: Path, title: str) -> None:
    """Draws maps of correlations: the theory's lines and simulated points, in one color a name."""
    with _picture(path, (6, 6)) as (_, grid):
        axes = grid[0, 0]
        axes.plot([-1, 1], [-1, 1], ":", color="gray", linewidth=1, label="unchanged")
        for i, (name, line) in enumerate(lines.items()):
            axes.plot(line.x, line.y, color=f"C{i}", label=name)
            _points(axes, points[name], f"C{i}")
        axes.plot([], [], "o", color="gray", markersize=4, label="simulated, ± standard error")
        axes.set(xlabel=r"correlation of two inputs, $\rho$", ylabel=r"correlation after one layer, $T(\rho)$")
        axes.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", title=title)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="lower right")


def condition_numbers(
    lines: Mapping[str, Series], scaled: Mapping[str, Series], raw: Mapping[str, Series], path: Path, title: str
) -> None:
    """Draws condition numbers by depth: limits as lines, networks' as full (scaled) and hollow (raw) points."""
    with _picture(path, (8.5, 4.8)) as (figure, grid):
        axes = grid[0, 0]
        for i, name in enumerate(scaled):
            if name in lines:
                axes.plot(lines[name].x, lines[name].y, color=f"C{i}", label=f"{name}, infinite width")
            _points(axes, scaled[name], f"C{i}", label=f"{name}, scaled to unit diagonal")
            _points(axes, raw[name], f"C{i}", markerfacecolor="none", label=f"{name}, as it is")
        axes.set(xlabel="weight layers", ylabel="condition number of the tangent kernel", yscale="log", title=title)
        axes.set_yticks([1, 2, 5, 10, 20, 50], minor=False)
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        figure.legend(frameon=False, loc="outside right center")


def _points(axes: "Axes", series: Series, color: str, **style: Any) -> None:
    looks = {"linestyle": "", "marker": "o", "markersize": 4, "elinewidth": 1, "capsize": 2}
    axes.errorbar(series.x, series.y, series.error, color=color, **looks, **style)


def _by_layer(axes: "Axes", samples: np.ndarray, edges: np.ndarray, most: float) -> Any:
    """One histogram a column, of samples `(L, K)` of layers 1 to L, in per cent of K; darkest from `most` on."""
    shares = np.stack([np.histogram(layer, edges)[0] / layer.size for layer in samples])
    layers = np.arange(len(samples) + 1) + 0.5
    return axes.pcolormesh(layers, edges, 100 * shares.T, cmap="Blues", vmin=0, vmax=most, rasterized=True)


def correlations_by_depth(correlations: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """Draws, for every name, the distribution of pair correlations `(L, pairs)` by layer."""
    edges = np.linspace(-0.5, 1, 61)
    with _picture(path, (11, 4), columns=len(correlations)) as (figure, grid):
        meshes = []
        for axes, (name, values) in zip(grid[0], correlations.items(), strict=True):
            meshes.append(_by_layer(axes, values, edges, most=25))
            axes.axhline(0, color="gray", linewidth=0.6, zorder=3)
            axes.set(title=name, xlabel="layer")
            axes.label_outer()
        grid[0, 0].set_ylabel("correlation of two inputs")
        figure.colorbar(meshes[0], ax=grid, label="pairs (%)", extend="max")
        figure.suptitle(title)


def activations_by_layer(activations: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """Draws pre-activations `(L, N, n)` by layer: of all units (above), and of one unit over the inputs (below)."""
    edges = np.linspace(-4, 4, 65)
    with _picture(path, (11, 6), rows=2, columns=len(activations)) as (figure, grid):
        meshes = []
        for column, (name, values) in enumerate(activations.items()):
            meshes.append(_by_layer(grid[0, column], values.reshape(len(values), -1), edges, most=12))
            _by_layer(grid[1, column], values[:, :, 0], edges, most=12)
            grid[0, column].set_title(name)
            grid[1, column].set_xlabel("layer")
        for axes in grid.flat:
            axes.label_outer()
        grid[0, 0].set_ylabel("all units' pre-activations")
        grid[1, 0].set_ylabel("one unit's pre-activations")
        figure.colorbar(meshes[0], ax=grid, label="share in a bin of 1/8 (%)", extend="max")
        figure.suptitle(title)


def spectra(
    by_layers: Mapping[int, np.ndarray], density: Callable[[np.ndarray], np.ndarray], path: Path, title: str
) -> None:
    """Draws squared singular values of a layer's Jacobian beside their density, and those of products of layers.

    Args:
      by_layers: by number of layers, 1 among them, squared singular values over their mean.
      density: theory's for one layer.
      path: of the picture; written in one step.
      title: above the figure.
    """
    with _picture(path, (11, 4.2), columns=2) as (figure, grid):
        left, right = grid[0]
        x = np.linspace(0.05, 7, 700)
        left.hist(by_layers[1], np.linspace(0, 7, 71), density=True, color="C0", alpha=0.4, label="simulated")
        left.plot(x, density(x), color="C3", label="Marchenko-Pastur")
        left.set(ylabel="density", title="one layer", xlabel="squared singular value over the mean")
        for i, (layers, values) in enumerate(by_layers.items()):
            shares = np.full(len(values), 1 / len(values))
            name = f"{layers} layer{'s' * (layers > 1)}"
            edges = np.linspace(-8, 2, 101)
            right.hist(np.log10(values), edges, weights=shares, histtype="step", color=f"C{i}", label=name)
        right.set(ylabel="share in a bin of 0.1", title="products of layers")
        right.set_xlabel("log10 of squared singular value over the mean")
        right.legend(frameon=False, loc="upper left")
        left.legend(frameon=False)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        figure.suptitle(title)


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
    with _picture(path, (5.5 * len(quantities), 4), 1, len(quantities)) as (figure, grid):
        for axes, (quantity, label) in zip(grid[0], quantities.items(), strict=True):
            for i, method in enumerate(methods):
                places = [place for place, net in enumerate(nets) if (net, method) in groups]
                values = [np.asarray(groups[nets[place], method][quantity]) for place in places]
                x = np.array(places) + (i - (len(methods) - 1) / 2) * width
                axes.bar(x, [v.mean() for v in values], 0.9 * width, color=f"C{i}", alpha=0.6, label=method)
                for place, points in zip(x, values, strict=True):
                    axes.plot(np.full(len(points), place), points, ".", color="black", markersize=4)
            axes.set(ylabel=label, yscale="log")
            axes.set_xticks(range(len(nets)), nets)
            axes.grid(alpha=0.3, axis="y", which="both")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), frameon=False, loc="outside right center")
        figure.suptitle(title)


def along_run(rows: Rows, path: Path, title: str) -> None:
    """Draws the diagnostics of a run by epoch: condition numbers, chi, and the last BatchNorm's running variance.

    Args:
      rows: the lines of its diagnostics.jsonl; a quantity may be missing or None.
      path: of the picture.
      title: above the figure.
    """
    panels = {
        "condition number of the tangent kernel": ("kappa", "kappa_unit_diagonal"),
        "growth of a perturbation per layer, chi": ("chi",),
        "running variance of the last BatchNorm": ("last_bn_variance",),
    }
    shown = {label: names for label, names in panels.items() if any(row.get(names[0]) is not None for row in rows)}
    if not shown:
        return
    with _picture(path, (4.5 * len(shown), 3.6), 1, len(shown)) as (figure, grid):
        for axes, (label, names) in zip(grid[0], shown.items(), strict=True):
            for name in names:
                points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
                axes.plot(*zip(*points, strict=True), marker=".", label=name.replace("_", " "))
            axes.set(xlabel="epoch", ylabel=label, yscale="log" if names[0] == "kappa" else "linear")
            axes.grid(alpha=0.3)
            if len(names) > 1:
                axes.legend(frameon=False)
        figure.suptitle(title)


def stacked_bars(panels: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path, title: str, label: str) -> None:
    """Draws in every panel a bar a name, stacked of its parts, one color a part."""
    parts = list(dict.fromkeys(part for bars in panels.values() for bar in bars.values() for part in bar))
    with _picture(path, (4.5 * len(panels) + 2.5, 4), columns=len(panels)) as (figure, grid):
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
