"""Results files to figures. The only module that imports matplotlib."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def curves(runs: Mapping[str, Sequence[Rows]], path: Path, title: str = "") -> None:
    """Draws loss and accuracy by epoch and saves them as a picture.

    Args:
      runs: by label, the runs to show in one colour, each the lines of its metrics.jsonl. Several
        runs of a label show as their mean and range at the epochs that all of them reached.
      path: of the picture; written in one step.
      title: above the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for i, (label, seeds) in enumerate(runs.items()):
        length = min((len(rows) for rows in seeds), default=0)
        if not length:
            continue
        epochs = [row["epoch"] for row in seeds[0][:length]]
        for axes, metric, scale in ((left, "loss", 1), (right, "accuracy", 100)):
            for split, style in (("train", ":"), ("test", "-")):
                values = scale * np.array([[row[f"{split}_{metric}"] for row in rows[:length]] for rows in seeds])
                name = f"{label} ({split})" if len(runs) == 1 else (label if split == "test" else None)
                axes.plot(epochs, values.mean(0), style, color=f"C{i}", label=name, marker="." if length < 40 else "")
                if len(seeds) > 1 and split == "test":
                    axes.fill_between(epochs, values.min(0), values.max(0), color=f"C{i}", alpha=0.2, linewidth=0)
    left.set(xlabel="epoch", ylabel="cross entropy (nats)")
    right.set(xlabel="epoch", ylabel="accuracy (%)")
    figure.legend(*right.get_legend_handles_labels(), frameon=False, loc="outside right center")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    subtitle = "solid: test, dotted: train" if len(runs) > 1 else ""
    figure.suptitle("\n".join(filter(None, (title, subtitle))))
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=120)
    partial.replace(path)
    plt.close(figure)
