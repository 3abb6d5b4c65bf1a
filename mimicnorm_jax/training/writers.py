"""What a run writes as it goes: lines of JSON, TensorBoard events, a line on the terminal."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from mimicnorm_jax.utils.console import log_line
from mimicnorm_jax.utils.files import write_text

METRICS = "metrics.jsonl"


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one dict an epoch; a last line that a crash cut short is left out."""
    return read_lines(workdir / METRICS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines up to the first that is not whole; none where there is no file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class JsonlWriter:
    """A file of JSON lines, each with its `step`; those after the step that a run resumes from are dropped.

    Attributes:
      rows: every line so far, those before a resume included.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self._path = path
        self.rows = [row for row in read_lines(path) if row["step"] <= resumed_step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def append(self, row: dict[str, Any]) -> None:
        """Adds a line."""
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class MetricWriter:
    """Writes one line an epoch to everything that listens.

    Attributes:
      rows: every line so far, those before a resume included.
    """

    def __init__(self, workdir: Path, resumed_step: int) -> None:
        self._lines = JsonlWriter(workdir / METRICS, resumed_step)
        self.rows = self._lines.rows
        self._events: Any = None
        if importlib.util.find_spec("tensorboardX"):
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_step + 1)
        else:
            log_line("no TensorBoard events: pip install tensorboardX to get them")

    def epoch(self, row: dict[str, Any]) -> None:
        """Writes and prints the line of an epoch."""
        self._lines.append(row)
        self.scalars(row)
        log_line(
            f"epoch {row['epoch']:3d}  lr {row['learning_rate']:.4f}  "
            f"loss {row['train_loss']:.3f}, test {row['test_loss']:.3f}  "
            f"acc {row['train_accuracy']:.2%}, test {row['test_accuracy']:.2%}  {row['seconds']:.1f} s"
        )

    def scalars(self, row: dict[str, Any]) -> None:
        """Hands the numbers of a line to TensorBoard."""
        if self._events:
            for name, value in row.items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)):
                    self._events.add_scalar(name, value, row["step"])
            self._events.flush()

    def close(self) -> None:
        """Closes the event file."""
        if self._events:
            self._events.close()
