"""Panels beside each other: lines in one style, and maps of a quantity with boundaries drawn in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mimicnorm_jax.plots.figure import Series, picture


@dataclass(frozen=True)
class HeatMap:
    """A quantity over two axes, both logarithmic.

    Attributes:
      x: `(X,)`, ascending.
      y: `(Y,)`, ascending.
      values: `(Y, X)`; NaN where there is none, drawn gray.
      boundaries: lines drawn in, by label.
    """

    x: np.ndarray
    y: np.ndarray
    values: np.ndarray
    boundaries: Mapping[str, Series] = field(default_factory=dict)


@dataclass(frozen=True)
class Axes:
    """Labels and scales (linear or log) of two axes."""

    xlabel: str
    ylabel: str
    xscale: str = "linear"
    yscale: str = "linear"


def heat_maps(panels: Mapping[str, HeatMap], path: Path, title: str, axes: Axes, colors: str) -> None:
    """Draws maps beside each other in one range of colors.

    Args:
      panels: by title.
      path: of the picture; written in one step.
      title: above the figure.
      axes: of all panels.
      colors: what the colors are.
    """
    finite = np.concatenate([panel.values[np.isfinite(panel.values)].ravel() for panel in panels.values()])
    with picture(path, (5 * len(panels) + 1, 4.2), columns=len(panels)) as (figure, grid):
        meshes = []
        for place, (name, panel) in zip(grid[0], panels.items(), strict=True):
            place.set_facecolor("lightgray")
            edges = [_edges(values) for values in (panel.x, panel.y)]
            limits = {"vmin": float(finite.min()), "vmax": float(finite.max())}
            meshes.append(place.pcolormesh(*edges, panel.values, cmap="viridis", rasterized=True, **limits))
            for i, (label, line) in enumerate(panel.boundaries.items()):
                style, color = ("-", "--", ":")[i % 3], ("red", "white", "orange")[i % 3]
                place.plot(line.x, line.y, style, color=color, label=label)
            place.set(title=name, xlabel=axes.xlabel, ylabel=axes.ylabel, xscale="log", yscale="log")
            place.set(xlim=(edges[0][0], edges[0][-1]), ylim=(edges[1][0], edges[1][-1]))
            if panel.boundaries:
                place.legend(loc="lower left", fontsize="small", facecolor="gray", labelcolor="white")
        figure.colorbar(meshes[0], ax=grid, label=colors)
        figure.suptitle(title)


def _edges(centers: np.ndarray) -> np.ndarray:
    """Borders of cells about points, halfway on a logarithmic axis."""
    logs = np.log(centers)
    middle = (logs[1:] + logs[:-1]) / 2
    return np.exp(np.concatenate([[2 * logs[0] - middle[0]], middle, [2 * logs[-1] - middle[-1]]]))


def line_panels(
    panels: Mapping[str, Mapping[str, Series]],
    path: Path,
    title: str,
    axes: Axes,
    marks: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draws lines in panels beside each other, one color a name throughout.

    Args:
      panels: by title, lines by name; a band of plus and minus the error, where there is one.
      path: of the picture; written in one step.
      title: above the figure.
      axes: of all panels.
      marks: by name, abscissas `(K,)` of vertical dashed lines in its color in every panel that has the name.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    with picture(path, (4.5 * len(panels) + 2, 4.2), columns=len(panels)) as (figure, grid):
        for place, (panel, lines) in zip(grid[0], panels.items(), strict=True):
            for name, line in lines.items():
                color = f"C{names.index(name)}"
                place.plot(line.x, line.y, marker=".", color=color, label=name)
                if line.error is not None:
                    place.fill_between(line.x, line.y - line.error, line.y + line.error, color=color, alpha=0.2)
                for mark in (marks or {}).get(name, ()):
                    place.axvline(mark, linestyle="--", color=color, linewidth=1)
            place.set(title=panel, xlabel=axes.xlabel, ylabel=axes.ylabel, xscale=axes.xscale, yscale=axes.yscale)
            place.grid(alpha=0.3)
        handles = {line.get_label(): line for place in grid[0] for line in place.get_legend_handles_labels()[0]}
        figure.legend(handles.values(), handles.keys(), frameon=False, loc="outside right center")
        figure.suptitle(title)
