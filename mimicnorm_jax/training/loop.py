"""Training from a config: check everything, resume if there is something to resume, train, summarize."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimicnorm_jax import distributed
from mimicnorm_jax.data.pipeline import Stop
from mimicnorm_jax.errors import ConfigError, DataError, NonFiniteLossError, WorkdirError
from mimicnorm_jax.training import data_record, report, workdir
from mimicnorm_jax.training.averaged import with_own_statistics
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.data_record import DataRecord
from mimicnorm_jax.training.epoch import DataEndedError, train_epoch
from mimicnorm_jax.training.evaluation import evaluate, of_one_process
from mimicnorm_jax.training.hook import Hook, MakeHook
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.training.resilience import CheckpointMetadata, Checkpoints
from mimicnorm_jax.training.resilience.preemption import InterruptedRunError, stop_requested
from mimicnorm_jax.training.restore import require_start, start
from mimicnorm_jax.training.spec import RunSpec, validate_run
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.training.trainer import Trainer, build_trainer
from mimicnorm_jax.training.writers import MetricWriter
from mimicnorm_jax.utils.console import log_line


def run(config: TrainConfig, folder: Path, model: Any = None, make_hook: MakeHook | None = None) -> dict[str, Any]:
    """Trains a network, or goes on where a run in the same folder stopped.

    Args:
      config: with the fields of `training.config`.
      folder: gets config.json, data.json, checkpoints/, metrics.jsonl, tensorboard/, curves.png, summary.json, and
        diagnostics.jsonl where `diagnostics_epochs` asks for it.
      model: a Flax module of your own that maps images to logits, called with `train=` if it takes it; the fields of
        the config that describe a network stay at their defaults. Default: the config's.
      make_hook: makes what is called after each call of steps, such as `monitoring.make_hook(config)`.

    Returns:
      The contents of summary.json; of several processes only the first one's.

    Raises:
      UserError: a subclass of it, before training starts where that is possible; for a non-finite
        loss after failure.json is written.
      InterruptedRunError: after SIGINT or SIGTERM, with a checkpoint of the step reached.
      PeerError: if another process of the run ended.
    """
    if config.diagnostics_epochs and make_hook is None:
        raise ConfigError("config.diagnostics_epochs asks for diagnostics: give the run monitoring.make_hook(config)")
    spec = validate_run(config, model)
    with distributed.translate_peer_errors():
        if not distributed.is_first():
            return _run_worker(spec)
        with workdir.lock_workdir(folder), workdir.raise_on_full_disk(folder):
            if not (folder / "checkpoints").is_dir():
                require_start(spec.config)
            workdir.prepare(folder, spec.config)
            return _run(spec, folder, make_hook)


def _run_worker(spec: RunSpec) -> dict[str, Any]:
    """Takes part in a run that the first process writes down."""
    trainer = _build_trainer(spec, None)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), spec.state_template())
    state, metadata = _broadcast(zeros, CheckpointMetadata(0, None))
    _train(trainer, trainer.data_parallel.replicate(state), metadata, None)
    return {}


def _build_trainer(spec: RunSpec, record: DataRecord | None) -> Trainer:
    config = data_record.shared(spec.config, record, spec.dataset.image_shape[-1])
    return build_trainer(replace(spec, config=config))


def _broadcast(state: TrainState, metadata: CheckpointMetadata) -> tuple[TrainState, CheckpointMetadata]:
    """The first process's state and metadata, in every process."""
    counts = np.array([metadata.epoch, metadata.skipped, metadata.consecutive], np.int32)
    state, counts, sums = distributed.broadcast_from_first((state, counts, np.array(metadata.partial, np.float32)))
    epoch, skipped, consecutive = map(int, counts)
    loss, correct, count = map(float, sums)
    told = replace(metadata, epoch=epoch, skipped=skipped, consecutive=consecutive, partial=(loss, correct, count))
    return state, told


def _run(spec: RunSpec, folder: Path, make_hook: MakeHook | None) -> dict[str, Any]:
    record = data_record.read(folder)
    trainer, template = _build_trainer(spec, record), spec.state_template()
    log_line(report.headline(trainer, template, folder))
    with Checkpoints(folder / "checkpoints", spec.config.keep_checkpoints) as checkpoints:
        complete = False
        if (found := checkpoints.restore_newest(template)) is None:
            found = start(spec), CheckpointMetadata(0, None)
            data_record.write(folder, trainer.dataset)
        else:
            state, metadata = found
            complete = metadata.epoch == spec.config.epochs
            if not complete:
                _require_same_images(trainer, metadata, folder)
                if record is not None:
                    record.require_same_classes(folder, spec.dataset)
                if record is None or not record.complete:  # of an earlier version
                    data_record.write(folder, trainer.dataset)
            resuming = f"resuming after step {state.step}, epoch {metadata.epoch}"
            log_line("this run is complete" if complete else resuming)
        state, metadata = _broadcast(*found)
        # An epoch that was trained and not evaluated gets its line, perhaps not for the first time.
        unfinished = not complete and int(state.step) == (metadata.epoch + 1) * trainer.steps_per_epoch
        writer = MetricWriter(folder, resumed_step=int(state.step) - unfinished)
        hook = make_hook(trainer, folder, writer, int(state.step)) if make_hook else None
        try:
            state = trainer.data_parallel.replicate(state)
            if hook is not None:
                hook(state, int(state.step), 0)
            _train(trainer, state, metadata, RunWriters(checkpoints, writer, hook))
        except NonFiniteLossError as error:
            report.failure(folder, trainer, error, checkpoints.latest)
            raise NonFiniteLossError(f"{error}. The report is {folder / report.FAILURE}", error.where) from error
        finally:
            writer.close()
    kept = report.read_summary(folder) if complete else None
    return report.summarize(trainer, folder, writer.rows, hook.rows if hook is not None else [], kept)


def _images(trainer: Trainer) -> tuple[int, int]:
    return len(trainer.dataset.train), len(trainer.dataset.test)


def _require_same_images(trainer: Trainer, metadata: CheckpointMetadata, folder: Path) -> None:
    """Raises WorkdirError where a run would go on in the middle of another order of images."""
    if metadata.images not in ((0, 0), images := _images(trainer)):
        (there, tested), (here, test) = metadata.images, images
        raise WorkdirError(
            f"{folder} holds a run on {there} training and {tested} test images, and {trainer.config.dataset} has "
            f"{here} and {test} now: put back what was there (of a file that is lost, an empty one of its name, which "
            "config.max_bad_images lets pass), or choose another --workdir"
        )


@dataclass(frozen=True)
class RunWriters:
    """What the first process writes along a run."""

    checkpoints: Checkpoints
    metrics: MetricWriter
    hook: Hook | None


def _train(trainer: Trainer, state: TrainState, metadata: CheckpointMetadata, writers: RunWriters | None) -> None:
    config, epoch = trainer.config, metadata.epoch
    partial = Metrics(*map(np.float32, metadata.partial))
    trainer.nonfinite.skipped, trainer.nonfinite.consecutive = metadata.skipped, metadata.consecutive
    hook, before = writers.hook if writers else None, metadata.seconds
    with stop_requested() as stop:
        while epoch < config.epochs:
            started = time.perf_counter()
            try:
                state, train = train_epoch(trainer, state, epoch, partial, stop, hook)
                seconds = time.perf_counter() - started
                trained = _metadata(trainer, epoch, None, train, before + seconds)
                # A whole epoch is evaluated and logged first.
                if stop() and int(state.step) < (epoch + 1) * trainer.steps_per_epoch:
                    _stop_within(trainer, state, trained, stop, writers)
                    break
                saving = _saving(stop, lambda state=state, at=trained: writers and _save_partial(writers, state, at))
                state, test = _evaluate_epoch(trainer, state, epoch, train, saving)
            except DataEndedError as error:
                state, step = error.state, int(error.state.step)
                if writers and step:
                    seconds = before + time.perf_counter() - started
                    _save_partial(writers, state, _metadata(trainer, epoch, None, error.total, seconds))
                    log_line(f"saved after step {step}, where the data ends: the same command goes on")
                if not stop():
                    raise
                log_line(str(error))
                break
            epoch += 1
            _require_finite(trainer, state, epoch, test)
            stopped = bool(stop())
            if writers:
                row = _row(trainer, epoch, train, test) | {
                    "seconds": round(before + time.perf_counter() - started, 3),
                    "images_per_second": round(float(train.count - partial.count) / seconds, 1),
                }
                # The line first: if the save fails, resuming drops it again.
                writers.metrics.epoch(row)
                if epoch % config.checkpoint_epochs == 0 or epoch == config.epochs or stopped:
                    writers.checkpoints.save(state, _metadata(trainer, epoch, test.accuracy, Metrics.empty()))
            partial, before = Metrics.empty(), 0.0
            if stopped:
                break
        if epoch < config.epochs:
            raise InterruptedRunError(int(state.step), stop())


def _saving(stop: Stop, save: Callable[[], None]) -> Stop:
    """Asks whether to stop, and saves the first time that it is so: who stops a run may not wait for an evaluation."""
    saved = False

    def asked() -> int:
        nonlocal saved
        if (signal := stop()) and not saved:
            saved = True
            save()
        return signal

    return asked


def _evaluate_epoch(
    trainer: Trainer, state: TrainState, epoch: int, train: Metrics, stop: Stop
) -> tuple[TrainState, Metrics]:
    """The state with the statistics that it was evaluated with, and the test images' metrics."""
    try:
        of_one_process(stop)()
        state = with_own_statistics(trainer, state, epoch, stop)
        return state, evaluate(trainer, state, stop)
    except DataError as error:
        raise DataEndedError(str(error), state, train) from error


def _metadata(
    trainer: Trainer, epoch: int, accuracy: float | None, total: Metrics, seconds: float = 0.0
) -> CheckpointMetadata:
    """What stands beside a state after `epoch` epochs, and the steps of the next one that `total` is of."""
    sums, left_out = (float(total.loss_sum), float(total.correct), float(total.count)), trainer.nonfinite
    return CheckpointMetadata(epoch, accuracy, sums, left_out.skipped, seconds, left_out.consecutive, _images(trainer))


def _stop_within(
    trainer: Trainer, state: TrainState, metadata: CheckpointMetadata, stop: Stop, writers: RunWriters | None
) -> None:
    """Saves in the middle of an epoch, and again with statistics for whoever evaluates that checkpoint.

    Whoever stopped the run may end it before those are there, or its data may not be.
    """
    if writers:
        _save_partial(writers, state, metadata)
    if state.ema_batch_stats is None:
        return
    with contextlib.suppress(DataError):
        state = with_own_statistics(trainer, state, metadata.epoch, stop)
        if writers:
            writers.checkpoints.save(state, metadata)


def _save_partial(writers: RunWriters, state: TrainState, metadata: CheckpointMetadata) -> None:
    """Saves in the middle of an epoch, or at its end before it is evaluated, what is not saved yet."""
    if writers.checkpoints.latest != int(state.step):
        writers.checkpoints.save(state, metadata)


def _require_finite(trainer: Trainer, state: TrainState, epoch: int, test: Metrics) -> None:
    if not math.isfinite(test.loss):
        rate = trainer.learning_rate(int(state.step))
        where = {"step": int(state.step), "epoch": epoch, "learning_rate": rate, "norms": report.norms(state)}
        raise NonFiniteLossError(f"the test loss is {test.loss} after epoch {epoch}", where)


def _row(trainer: Trainer, epoch: int, train: Metrics, test: Metrics) -> dict[str, Any]:
    step = epoch * trainer.steps_per_epoch
    return {
        "epoch": epoch,
        "step": step,
        "learning_rate": trainer.learning_rate(step),
        "train_loss": train.loss,
        "train_accuracy": train.accuracy,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
    }
