"""What runs left in their folders, read back for a comparison."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimicnorm_jax.errors import UserError, WorkdirError
from mimicnorm_jax.monitoring.hook import DIAGNOSTICS
from mimicnorm_jax.training import workdir
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.report import FAILURE, SUMMARY
from mimicnorm_jax.training.writers import METRICS, read_lines, read_metrics

NO_LABEL = ("seed", *workdir.MUTABLE_ON_RESUME)
"""Fields that do not tell one arm of a comparison from another."""


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run as its folder tells it.

    Attributes:
      path: of the folder.
      config: of the run.
      rows: lines of metrics.jsonl, at least one.
      diagnostics: lines of diagnostics.jsonl.
      summary: of a finished run, else None.
      failure: why it stopped, where it left a failure.json.
    """

    path: Path
    config: TrainConfig
    rows: list[dict[str, Any]]
    diagnostics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    failure: str | None

    @property
    def is_finished(self) -> bool:
        """Whether it reached the last epoch of its config."""
        return self.summary is not None and self.rows[-1]["epoch"] >= self.config.epochs


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """Reads the folders of runs of `mimicnorm train`, finished or not.

    Args:
      folders: at least one, each given once.

    Raises:
      UserError: if a folder is named twice.
      WorkdirError: names the first folder without a run, without one whole epoch, or with a damaged file.
    """
    known: dict[Path, Path] = {}
    for folder in folders:
        if (same := known.setdefault(folder.resolve(), folder)) is not folder:
            raise UserError(f"{folder} is given twice (as {same} before): name each run once")
    return [_read(folder) for folder in folders]


def _read(folder: Path) -> RunFolder:
    config = workdir.read_config(folder)
    rows = read_metrics(folder)
    if not rows:
        raise WorkdirError(f"{folder}: no epoch in {METRICS} yet. Leave it out, or wait for its first epoch")
    failure = _json(folder / FAILURE)
    summary = _json(folder / SUMMARY)
    said = None if failure is None else str(failure.get("error", f"see {FAILURE}"))
    return RunFolder(folder, config, rows, read_lines(folder / DIAGNOSTICS), summary, said)


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it does not hold a JSON object")
        return content
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} is damaged: {error}. Restore it, or leave out the run") from error


def differing_fields(runs: Sequence[RunFolder]) -> list[str]:
    """Names of the config's fields that are not the same in all runs, in the config's order."""
    configs = [workdir.as_json(run.config) for run in runs]
    return [name for name in configs[0] if any(config[name] != configs[0][name] for config in configs)]


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """A label a run: the values that tell it from others. Runs that differ by seed alone share theirs."""
    fields = [name for name in differing_fields(runs) if name not in NO_LABEL]
    found = []
    for run in runs:
        config = workdir.as_json(run.config)
        plain = [
            f"{config[name]}" if name in ("model", "method", "dataset") else f"{name} {config[name]}" for name in fields
        ]
        found.append(", ".join(plain) or f"{run.config.model}, {run.config.method}")
    return found
