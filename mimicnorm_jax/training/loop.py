"""Training from a config: check everything, resume if there is something to resume, train, summarize."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mimicnorm_jax import distributed
from mimicnorm_jax.data import batching
from mimicnorm_jax.errors import ConfigError, NonFiniteLossError, WorkdirError
from mimicnorm_jax.training import report, workdir
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.hook import Hook, MakeHook
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.training.resilience.checkpoints import CheckpointMetadata, Checkpoints
from mimicnorm_jax.training.resilience.preemption import InterruptedRunError, stop_requested
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.training.trainer import Trainer, build_trainer, init_state, validate_run
from mimicnorm_jax.training.writers import MetricWriter
from mimicnorm_jax.utils.console import log_line, progress, table


def train_epoch(
    session: Trainer,
    state: TrainState,
    epoch: int,
    total: Metrics,
    stop: Callable[[], int] = lambda: 0,
    watch: Callable[[TrainState, int, int], None] | None = None,
) -> tuple[TrainState, Metrics]:
    """Trains one epoch, or the rest of it, or less where `stop` says so.

    The host reads a dispatch's metrics after it has made the next, so the devices never wait.

    Args:
      session: of the run.
      state: replicated; its buffers are given up.
      epoch: from 0.
      total: metrics of the steps of this epoch that `state` has done.
      stop: asked after each dispatch; anything but 0 ends the epoch there.
      watch: called after each dispatch with the state, the steps done since the run began, and the dispatch's.

    Returns:
      The state and the metrics of this epoch's steps so far.

    Raises:
      NonFiniteLossError: names the step.
    """
    config = session.config
    pending = iter(())
    step = int(state.step)
    first = step - epoch * session.steps_per_epoch
    count, batch = len(session.dataset.train), config.batch_size
    indices = batching.train_batches(config.seed, epoch, count, batch, session.devices, first)
    title = f"epoch {epoch + 1}/{config.epochs}"
    groups = batching.grouped(indices, config.steps_per_call)
    try:
        for index, taken in progress(groups, title, session.steps_per_epoch - first, lambda group: group[1]):
            state, metrics = session.train_steps(state, session.train_data, index, taken)
            for done in pending:
                total += _guarded(session, *done)
            pending, step = _steps(metrics, step, taken), step + taken
            if watch is not None:
                watch(state, step, taken)
            if stop():
                break
        for done in pending:
            total += _guarded(session, *done)
    except NonFiniteLossError as error:
        error.where["norms"] = report.norms(state)
        raise
    return state, total


def _steps(metrics: Metrics, step: int, taken: int) -> Iterator[tuple[Metrics, int]]:
    """Each of the `taken` steps after `step` with its metrics; fetches them when asked for the first."""
    metrics = jax.device_get(metrics)
    for i in range(taken):
        yield jax.tree.map(lambda values, i=i: values[i], metrics), step + i + 1


def _guarded(session: Trainer, metrics: Metrics, step: int) -> Metrics:
    epoch = (step - 1) // session.steps_per_epoch + 1
    return session.guard(metrics, step, epoch, session.learning_rate(step))


def evaluate(session: Trainer, state: TrainState) -> Metrics:
    """Metrics of the whole test set, every image once."""
    pairs = batching.eval_batches(len(session.dataset.test), session.config.batch_size, session.devices)
    variables = state.eval_variables
    total = Metrics.empty()
    for index, mask in pairs:
        total += jax.device_get(session.eval_step(variables, session.test_data, index, mask))
    return total


def run(config: TrainConfig, folder: Path, make_hook: MakeHook | None = None) -> dict[str, Any]:
    """Trains a network, or goes on where a run in the same folder stopped.

    Args:
      config: with the fields of `training.config`.
      folder: gets config.json, checkpoints/, metrics.jsonl, tensorboard/, curves.png, summary.json, and
        diagnostics.jsonl where `diagnostics_epochs` asks for it.
      make_hook: makes what is called after each group of steps, such as `monitoring.make_hook(config)`.

    Returns:
      The contents of summary.json; of several processes only the first one's.

    Raises:
      UserError: a subclass of it, before training starts where that is possible; for a non-finite
        loss after failure.json is written.
      InterruptedRunError: after SIGINT or SIGTERM, with a checkpoint of the step reached.
      PeerError: if another process of the run ended.
    """
    validate_run(config)
    if config.diagnostics_epochs and make_hook is None:
        raise ConfigError("config.diagnostics_epochs asks for diagnostics: give the run monitoring.make_hook(config)")
    with distributed.translate_peer_errors():
        if not distributed.is_first():
            return _run_worker(config)
        with workdir.lock(folder), workdir.raise_on_full_disk(folder):
            workdir.prepare(folder, config)
            return _run(config, folder, make_hook)


def _run_worker(config: TrainConfig) -> dict[str, Any]:
    """Takes part in a run that the first process writes down."""
    session = build_trainer(config)
    state, record = _agree(init_state(session), CheckpointMetadata(0, None))
    _train(session, session.spread.replicate(state), record, None)
    return {}


def _agree(state: TrainState, record: CheckpointMetadata) -> tuple[TrainState, CheckpointMetadata]:
    """The first process's state and record, in every process."""
    state, numbers = distributed.broadcast_from_first((state, np.array([record.epoch, *record.partial], np.float32)))
    epoch, *partial = map(float, numbers)
    return state, CheckpointMetadata(int(epoch), record.accuracy, (partial[0], partial[1], partial[2]))


def _run(config: TrainConfig, folder: Path, make_hook: MakeHook | None) -> dict[str, Any]:
    session = build_trainer(config)
    state = init_state(session)
    log_line(report.headline(session, state, folder))
    with Checkpoints(folder / "checkpoints", config.keep_checkpoints) as checkpoints:
        record = CheckpointMetadata(0, None)
        if (found := checkpoints.restore_newest(state)) is not None:
            state, record = found
            complete = record.epoch == config.epochs
            log_line("this run is complete" if complete else f"resuming after step {state.step}, epoch {record.epoch}")
        state, record = _agree(state, record)
        logs = MetricWriter(folder, resumed_step=int(state.step))
        probe = make_hook(session, folder, logs, int(state.step)) if make_hook else None
        try:
            if probe is not None:
                probe(state, int(state.step), 0)
            _train(session, session.spread.replicate(state), record, RunWriters(checkpoints, logs, probe))
        except NonFiniteLossError as error:
            report.failure(folder, session, error, checkpoints.latest)
            raise NonFiniteLossError(f"{error}. The report is {folder / report.FAILURE}", error.where) from error
        finally:
            logs.close()
    return report.summarize(session, folder, logs.rows, probe.rows if probe is not None else [])


@dataclass(frozen=True)
class RunWriters:
    """What the first process writes along a run."""

    checkpoints: Checkpoints
    logs: MetricWriter
    probe: Hook | None


def _train(session: Trainer, state: TrainState, record: CheckpointMetadata, books: RunWriters | None) -> None:
    config, epoch = session.config, record.epoch
    begun = Metrics(*map(np.float32, record.partial))
    watch = books.probe if books else None
    with stop_requested() as stop:
        while epoch < config.epochs:
            started = time.perf_counter()
            state, train = train_epoch(session, state, epoch, begun, stop, watch)
            seconds = time.perf_counter() - started
            # A whole epoch is evaluated and logged first: two checkpoints of one step cannot stand side by side.
            if stop() and int(state.step) < (epoch + 1) * session.steps_per_epoch:
                partial = float(train.loss_sum), float(train.correct), float(train.count)
                if books:
                    books.checkpoints.save(state, CheckpointMetadata(epoch, None, partial))
                break
            test = evaluate(session, state)
            epoch += 1
            if not math.isfinite(test.loss):
                rate = session.learning_rate(int(state.step))
                where = {"step": int(state.step), "epoch": epoch, "learning_rate": rate, "norms": report.norms(state)}
                raise NonFiniteLossError(f"the test loss is {test.loss} after epoch {epoch}", where)
            stopped = bool(stop())
            if books:
                row = _row(session, epoch, train, test) | {
                    "seconds": round(time.perf_counter() - started, 3),
                    "images_per_second": round(float(train.count - begun.count) / seconds, 1),
                }
                # The line first: if the save fails, resuming drops it again.
                books.logs.epoch(row)
                if epoch % config.checkpoint_epochs == 0 or epoch == config.epochs or stopped:
                    books.checkpoints.save(state, CheckpointMetadata(epoch, test.accuracy))
            begun = Metrics.empty()
            if stopped:
                break
        if epoch < config.epochs:
            raise InterruptedRunError(int(state.step), stop())


def _row(session: Trainer, epoch: int, train: Metrics, test: Metrics) -> dict[str, Any]:
    step = epoch * session.steps_per_epoch
    return {
        "epoch": epoch,
        "step": step,
        "learning_rate": session.learning_rate(step),
        "train_loss": train.loss,
        "train_accuracy": train.accuracy,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
    }


def evaluate_checkpoints(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Evaluates the newest and the best checkpoint of a run on the whole test set.

    Args:
      config: of the run, see `workdir.read_config`.
      folder: of the run.

    Returns:
      By `latest` and `best`: epoch, test_loss and test_accuracy.

    Raises:
      WorkdirError: if there is no checkpoint or it cannot be restored.
    """
    validate_run(config)
    if not (folder / "checkpoints").is_dir():
        raise WorkdirError(f"{folder} holds no checkpoint to evaluate")
    session = build_trainer(config)
    like = init_state(session)
    results, shown = {}, {}
    with Checkpoints(folder / "checkpoints", config.keep_checkpoints) as checkpoints:
        for name, step in (("latest", checkpoints.latest), ("best", checkpoints.best)):
            if step is None:
                raise WorkdirError(f"{folder} holds no complete checkpoint to evaluate")
            state, record = checkpoints.restore(step, like)
            metrics = evaluate(session, session.spread.replicate(state))
            results[name] = {"epoch": record.epoch, "test_loss": metrics.loss, "test_accuracy": metrics.accuracy}
            shown[f"{name} checkpoint"] = (
                f"epoch {record.epoch}: test loss {metrics.loss:.4f}, accuracy {metrics.accuracy:.2%}"
            )
    log_line(table(shown))
    return results
