"""The figure that everything is drawn on. Matplotlib is imported when something is drawn."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
def picture(path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1) -> Iterator[tuple["Figure", Any]]:
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
