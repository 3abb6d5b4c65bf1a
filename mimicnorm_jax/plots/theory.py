"""The theory beside simulations."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mimicnorm_jax.plots.figure import Series, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def transition_maps(lines: Mapping[str, Series], points: Mapping[str, Series], path: Path, title: str) -> None:
    """Draws maps of correlations: the theory's lines and simulated points, in one color a name.

    Args:
      lines, points: by name, correlations after a layer by those before.
      path: of the picture; written in one step.
      title: above the figure.
    """
    with picture(path, (6, 6)) as (_, grid):
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
    """Draws condition numbers by depth: limits as lines, networks' as full (scaled) and hollow (raw) points.

    Args:
      lines, scaled, raw: by name, condition numbers by depth.
      path: of the picture; written in one step.
      title: above the figure.
    """
    with picture(path, (8.5, 4.8)) as (figure, grid):
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
    """Draws, for every name, the distribution of pair correlations `(L, pairs)` by layer.

    Args:
      correlations: by name, `(L, pairs)`.
      path: of the picture; written in one step.
      title: above the figure.
    """
    edges = np.linspace(-0.5, 1, 61)
    with picture(path, (11, 4), columns=len(correlations)) as (figure, grid):
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
    """Draws pre-activations `(L, N, n)` by layer: of all units (above), and of one unit over the inputs (below).

    Args:
      activations: by name, `(L, N, n)`.
      path: of the picture; written in one step.
      title: above the figure.
    """
    edges = np.linspace(-4, 4, 65)
    with picture(path, (11, 6), rows=2, columns=len(activations)) as (figure, grid):
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
      by_layers: by number of layers, 1 among them, squared singular values over their mean, `(S,)`.
      density: theory's for one layer.
      path: of the picture; written in one step.
      title: above the figure.
    """
    with picture(path, (11, 4.2), columns=2) as (figure, grid):
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
