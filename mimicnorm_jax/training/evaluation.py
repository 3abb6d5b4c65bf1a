"""Accuracy and loss on the test set, of a state in training and of a run's checkpoints."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from mimicnorm_jax.data.pipeline import Stop, never
from mimicnorm_jax.errors import WorkdirError
from mimicnorm_jax.training import data_record
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.training.resilience import CheckpointReader
from mimicnorm_jax.training.spec import validate_run
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.training.trainer import Trainer, build_trainer
from mimicnorm_jax.utils.console import log_line, table


def of_one_process(stop: Stop) -> Stop:
    """May be asked while data is waited for: of several processes each has to ask equally often."""
    return stop if jax.process_count() == 1 else never


def evaluate(trainer: Trainer, state: TrainState, stop: Stop = never) -> Metrics:
    """Metrics of the whole test set, every image once.

    Args:
      trainer: of the run.
      state: replicated.
      stop: anything but 0 ends a wait for data within seconds; asked after every call of the devices too, where it may
        see to what a stop asks for.

    Raises:
      DataError: where the data cannot be read on.
    """
    variables, asked = state.eval_variables, of_one_process(stop)
    total = Metrics.empty()
    for feed in trainer.pipeline.test_feeds(asked):
        total += jax.device_get(trainer.eval_step(variables, trainer.pipeline.test, feed))
        asked()
    return total


def evaluate_checkpoints(config: TrainConfig, folder: Path, model: Any = None) -> dict[str, Any]:
    """Evaluates the newest and the best checkpoint of a run on the whole test set.

    Both are restored before any data is read.

    Args:
      config: of the run, see `workdir.read_config`.
      folder: of the run.
      model: of the run, if it had one of its own.

    Returns:
      By `latest` and `best`: epoch, test_loss and test_accuracy.

    Raises:
      WorkdirError: if there is no checkpoint or it cannot be restored, or labels have another meaning now.
      ConfigError: names a field at odds with another, or with the model.
    """
    spec = validate_run(config, model)
    if not (folder / "checkpoints").is_dir():
        raise WorkdirError(f"{folder} holds no checkpoint to evaluate")
    recorded = data_record.recorded(spec.config, folder, spec.dataset)
    restored, results, shown = {}, {}, {}
    checkpoints = CheckpointReader(folder / "checkpoints")
    for name, step in (("latest", checkpoints.latest), ("best", checkpoints.best)):
        if step is None:
            raise WorkdirError(f"{folder} holds no complete checkpoint to evaluate")
        restored[name] = checkpoints.restore(step, spec.state_template())
    trainer = build_trainer(replace(spec, config=recorded))
    for name, (state, metadata) in restored.items():
        metrics = evaluate(trainer, trainer.data_parallel.replicate(state))
        results[name] = {"epoch": metadata.epoch, "test_loss": metrics.loss, "test_accuracy": metrics.accuracy}
        shown[f"{name} checkpoint"] = (
            f"epoch {metadata.epoch}: test loss {metrics.loss:.4f}, accuracy {metrics.accuracy:.2%}"
        )
    log_line(table(shown))
    return results
