"""One epoch of training, or what is left of it."""

from collections.abc import Iterator

import jax

from mimicnorm_jax.data.pipeline import Stop, never
from mimicnorm_jax.errors import DataError, NonFiniteLossError
from mimicnorm_jax.training import report
from mimicnorm_jax.training.evaluation import of_one_process
from mimicnorm_jax.training.hook import Hook
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.training.trainer import Trainer
from mimicnorm_jax.utils.console import progress


class DataEndedError(DataError):
    """An epoch ended early, as its data cannot be read on.

    Attributes:
      state, total: what the steps before gave: the state, and the metrics of this epoch.
    """

    def __init__(self, message: str, state: TrainState, total: Metrics) -> None:
        super().__init__(message)
        self.state, self.total = state, total


def train_epoch(
    trainer: Trainer, state: TrainState, epoch: int, total: Metrics, stop: Stop = never, hook: Hook | None = None
) -> tuple[TrainState, Metrics]:
    """Trains one epoch, or the rest of it, or less where `stop` says so.

    The host reads a call's metrics after it has made the next, so the devices never wait.

    Args:
      trainer: of the run.
      state: replicated; its buffers are given up.
      epoch: from 0.
      total: metrics of the steps of this epoch that `state` has done.
      stop: asked after each call of steps; anything but 0 ends the epoch there, and a wait for data within seconds.
      hook: called after each call of steps.

    Returns:
      The state and the metrics of this epoch's steps so far.

    Raises:
      NonFiniteLossError: names the step.
      DataEndedError: where the data cannot be read on.
    """
    in_flight = iter(())
    step = int(state.step)
    first = step - epoch * trainer.steps_per_epoch
    title = f"epoch {epoch + 1}/{trainer.config.epochs}"
    feeds = trainer.pipeline.train_feeds(epoch, first, of_one_process(stop))
    try:
        for feed, num_steps in progress(feeds, title, trainer.steps_per_epoch - first, lambda item: item[1]):
            state, metrics = trainer.train_steps(state, trainer.pipeline.train, feed, num_steps)
            for done in in_flight:
                total += _checked(trainer, *done)
            in_flight, step = _steps(metrics, step, num_steps), step + num_steps
            if hook is not None:
                hook(state, step, num_steps)
            if stop():
                break
        for done in in_flight:
            total += _checked(trainer, *done)
    except NonFiniteLossError as error:
        error.where["norms"] = report.norms(state)
        raise
    except DataError as error:
        for done in in_flight:
            total += _checked(trainer, *done)
        raise DataEndedError(str(error), state, total) from error
    return state, total


def _steps(metrics: Metrics, step: int, num_steps: int) -> Iterator[tuple[Metrics, int]]:
    """Each of the `num_steps` steps after `step` with its metrics; fetches them when asked for the first."""
    metrics = jax.device_get(metrics)
    for i in range(num_steps):
        yield jax.tree.map(lambda values, i=i: values[i], metrics), step + i + 1


def _checked(trainer: Trainer, metrics: Metrics, step: int) -> Metrics:
    epoch = (step - 1) // trainer.steps_per_epoch + 1
    return trainer.nonfinite(metrics, step, epoch, trainer.learning_rate(step))
