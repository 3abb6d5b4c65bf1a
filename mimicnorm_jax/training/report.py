"""What a run says at its start and leaves at its end: headline, summary with curves, report of a failure."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimicnorm_jax import plots
from mimicnorm_jax.errors import NonFiniteLossError, WorkdirError
from mimicnorm_jax.functional import cross_entropy_floor
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.training import workdir
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.spec import is_exact
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.training.trainer import Trainer
from mimicnorm_jax.training.writers import METRICS
from mimicnorm_jax.utils import environment
from mimicnorm_jax.utils.console import log_line, table
from mimicnorm_jax.utils.files import write_json
from mimicnorm_jax.utils.trees import path_names

FAILURE = "failure.json"
SUMMARY = "summary.json"


def headline(trainer: Trainer, state: TrainState, folder: Path) -> str:
    """A few lines: what is trained, on what, where to; of the state only shapes are read."""
    config, dataset = trainer.config, trainer.dataset
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return (
        f"{config.model} with {config.method}: {size:,} parameters, {config.dtype}{_floor(trainer)}\n"
        f"{config.dataset}: {len(dataset.train):,} training and {len(dataset.test):,} test images\n"
        f"{trainer.num_devices} x {trainer.data_parallel.devices[0].device_kind}; "
        f"{config.epochs} epochs of {trainer.steps_per_epoch} steps{_microbatches(trainer)}{_idle_schedule(config)}\n"
        f"into {folder}"
    )


def _floor(trainer: Trainer) -> str:
    method = METHODS.get(trainer.config.method)
    if method is None or not method.last_batch_norm:
        return ""
    classes, scale = trainer.dataset.spec.num_classes, trainer.spec.model.factory.method.logit_scale
    floor = f"{cross_entropy_floor(classes, scale):.2f}"
    if float(floor) == 0:
        return ""
    return f"\nnormalized logits of {classes} classes, logit_scale {scale:g}: no training loss below {floor}"


def _idle_schedule(config: TrainConfig) -> str:
    """What of the learning rate's schedule this run never comes to, as one that is made shorter by its epochs alone."""
    said = []
    if config.warmup_epochs >= config.epochs:
        said.append(f"the warm-up, {config.warmup_epochs:g} epochs, is all of the run: the learning rate never falls")
    elif config.schedule == "step":
        idle = [str(epoch) for epoch in config.decay_epochs if not config.warmup_epochs <= epoch < config.epochs]
        if idle:
            said.append(f"of decay_epochs {', '.join(idle)} do not lie between the warm-up and the last epoch")
    elif config.decay_epochs:
        said.append(f"schedule={config.schedule} does not look at decay_epochs")
    return "".join(f"\nnote: {one}" for one in said)


def _microbatches(trainer: Trainer) -> str:
    config = trainer.config
    if config.microbatches == 1:
        return ""
    size = config.batch_size // trainer.num_devices // config.microbatches
    text = f",\neach in {config.microbatches} microbatches of {size} images a device"
    if is_exact(trainer.spec):
        return f"{text}: the gradient of the whole batch"
    return f"{text} that BatchNorms normalize by themselves:\nnot the gradient of the whole batch"


def failure(folder: Path, trainer: Trainer, error: NonFiniteLossError, checkpoint: int | None) -> None:
    """Writes failure.json: what happened and where, the last good checkpoint's step, the config and the environment."""
    report = {
        "error": str(error),
        **error.where,
        "last_checkpoint": checkpoint,
        "config": workdir.as_json(trainer.config),
        "machine": environment.describe(),
    }
    write_json(folder / FAILURE, report)


def norms(state: TrainState) -> dict[str, float | str]:
    """Euclidean norm of every leaf of a state but its step, by path; as text where JSON has no number for it."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(state.replace(step=None)))
    found = {"/".join(path_names(path)): _norm(leaf) for path, leaf in leaves}
    return {path: norm if math.isfinite(norm) else str(norm) for path, norm in found.items()}


def _norm(leaf: Any) -> float:
    return float(np.linalg.norm(np.asarray(leaf, np.float64)))


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of the run in a folder; None if there is none, or none that can be read."""
    try:
        summary = json.loads((folder / SUMMARY).read_text())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def summarize(
    trainer: Trainer,
    folder: Path,
    rows: list[dict[str, Any]],
    diagnostics: list[dict[str, Any]],
    kept: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes summary.json and pictures from the lines of metrics.jsonl and diagnostics.jsonl, prints a table.

    Args:
      trainer: of the run.
      folder: of the run.
      rows, diagnostics: the lines.
      kept: what summary.json holds of a run that was complete before: memory, machine and skipped images are those
        of the processes that trained it.

    Returns:
      The summary.

    Raises:
      WorkdirError: if there are no lines of metrics.jsonl.
    """
    config = trainer.config
    if not rows:
        raise WorkdirError(
            f"{folder} holds a complete run without the lines of {METRICS}: restore that file, or choose another "
            "--workdir to train again"
        )
    best = max(rows, key=lambda row: (row["test_accuracy"], row["epoch"]))
    seconds = sum(row["seconds"] for row in rows)
    summary = kept or {
        "best_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "final_accuracy": rows[-1]["test_accuracy"],
        "final_test_loss": rows[-1]["test_loss"],
        "images_per_second": max(row["images_per_second"] for row in rows),
        "seconds": round(seconds, 1),
        **({"skipped_images": found} if (found := trainer.bad_images.found) else {}),
        **environment.peak_memory(),
        "config": workdir.as_json(config),
        "machine": environment.describe(),
    }
    if not kept:
        write_json(folder / SUMMARY, summary)
    (folder / FAILURE).unlink(missing_ok=True)
    skipped = summary.get("skipped_images")
    shown = {
        "run": f"{config.dataset}, {config.model}, {config.method}, seed {config.seed}",
        "best test accuracy": f"{best['test_accuracy']:.2%} (epoch {best['epoch']})",
        "final test accuracy": f"{rows[-1]['test_accuracy']:.2%} (epoch {rows[-1]['epoch']})",
        "speed": f"{max(row['images_per_second'] for row in rows):,.0f} images/s in the fastest epoch",
        "time": f"{seconds:.1f} s for {len(rows)} epochs, compilation included",
        **({} if kept else {"memory": environment.memory_line()}),
        **({"skipped images": f"{len(skipped)}, named in {SUMMARY}"} if skipped else {}),
        "folder": folder,
        "files": f"checkpoints, metrics.jsonl, {SUMMARY}",
    }
    if plots.available():
        title = f"{config.model} with {config.method} on {config.dataset}"
        plots.curves({config.method: [rows]}, folder / "curves.png", title)
        shown["figures"] = "curves.png"
        if plots.along_run(diagnostics, folder / "diagnostics.png", title):
            shown["figures"] += ", diagnostics.png"
    else:
        shown["figures"] = "none: pip install matplotlib to get curves.png"
    log_line(table(shown))
    return summary
