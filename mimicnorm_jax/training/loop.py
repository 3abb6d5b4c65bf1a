"""Training from a config: check everything, resume if there is something to resume, train, summarise."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from mimicnorm_jax import models, plots
from mimicnorm_jax.data import batches, sources
from mimicnorm_jax.data.augment import Augmentation
from mimicnorm_jax.errors import ConfigError, NonFiniteLossError, WorkdirError
from mimicnorm_jax.training import config as config_lib
from mimicnorm_jax.training import machine, parallel, workdir
from mimicnorm_jax.training.checkpoints import Checkpoints, Record
from mimicnorm_jax.training.logs import Logs, progress, say, table
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.training.optimizer import make_optimizer, make_schedule
from mimicnorm_jax.training.state import TrainState, create_state
from mimicnorm_jax.training.step import AXIS, Task

FAILURE = "failure.json"
SUMMARY = "summary.json"


@dataclass(frozen=True)
class Session:
    """What stays the same during a run."""

    config: ConfigDict
    devices: Sequence[jax.Device]
    dataset: sources.Dataset
    task: Task
    schedule: optax.Schedule
    train_step: parallel.TrainStep
    eval_step: parallel.EvalStep
    train_data: Any
    test_data: Any

    @property
    def steps_per_epoch(self) -> int:
        return len(self.dataset.train) // self.config.batch_size


def check(config: ConfigDict) -> None:
    """Refuses a config that cannot be trained, before any data is read or anything compiled.

    Raises:
      ConfigError: names the field.
      DataError: if the dataset is unknown or not prepared.
    """
    config_lib.validate(config)
    sources.check(config.dataset, config.data_dir)
    try:
        _model(config)
        models.check_image(config.model, sources.SHAPES[config.dataset])
    except ValueError as error:
        raise ConfigError(f"config.model={config.model!r}, config.method={config.method!r}: {error}") from error
    devices = jax.local_device_count()
    if config.batch_size % devices:
        raise ConfigError(
            f"config.batch_size is {config.batch_size}, which {devices} devices cannot share equally: "
            f"choose a multiple of {devices}"
        )
    if config.batch_size // devices < 2 and not config.sync_bn:
        raise ConfigError(
            f"config.batch_size is {config.batch_size}, one image for each of {devices} devices, which a BatchNorm "
            f"cannot normalise by itself: choose at least {2 * devices}, or --config.sync_bn"
        )


def _model(config: ConfigDict) -> Any:
    return models.create(
        config.model,
        method=config.method,
        num_classes=sources.NUM_CLASSES[config.dataset],
        init=config.init,
        width=config.width,
        dtype=config.dtype,
        axis_name=AXIS if config.sync_bn else None,
        centre_in_call=config.centring == "in_call",
        running_variance=config.running_variance,
    )


def start(config: ConfigDict) -> Session:
    """Reads the data, puts it on the devices and builds the steps.

    Raises:
      ConfigError: if the training images do not fill one batch.
      DataError: if the data is damaged.
    """
    devices = jax.local_devices()
    dataset = sources.load(config.dataset, config.data_dir)
    if config.batch_size > len(dataset.train):
        raise ConfigError(
            f"config.batch_size is {config.batch_size}, more than the {len(dataset.train)} training images of "
            f"{config.dataset}"
        )
    schedule = make_schedule(config, len(dataset.train) // config.batch_size)
    task = Task(
        model=_model(config),
        tx=make_optimizer(config, schedule),
        augmentation=Augmentation(config.crop_padding, config.flip, config.rotation),
        mean=dataset.mean,
        std=dataset.std,
        dtype=config.dtype,
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema_decay,
        seed=config.seed,
    )
    data = [parallel.replicate((split.images, split.labels), devices) for split in (dataset.train, dataset.test)]
    return Session(
        config,
        devices,
        dataset,
        task,
        schedule,
        parallel.make_train_step(task, devices),
        parallel.make_eval_step(task, devices),
        *data,
    )


def initial_state(session: Session) -> TrainState:
    """A fresh state from the config's seed, on the host's first device."""
    config = session.config
    shape = sources.SHAPES[config.dataset]
    return create_state(session.task.model, session.task.tx, shape, config.seed, config.ema_decay > 0)


def train_epoch(session: Session, state: TrainState, epoch: int) -> tuple[TrainState, Metrics]:
    """Trains one epoch.

    The host reads a step's metrics after it has dispatched the next, so the devices never wait.

    Args:
      session: of the run.
      state: replicated; its buffers are given up.
      epoch: from 0.

    Raises:
      NonFiniteLossError: names the step.
    """
    config = session.config
    total, pending = Metrics.zero(), None
    count, batch, devices = len(session.dataset.train), config.batch_size, len(session.devices)
    indices = batches.train_batches(config.seed, epoch, count, batch, devices)
    title = f"epoch {epoch + 1}/{config.epochs}"
    step = epoch * session.steps_per_epoch
    for index in progress(indices, title, session.steps_per_epoch):
        state, metrics = session.train_step(state, session.train_data, index)
        if pending is not None:
            total += _finite(session, pending, step)
        pending, step = metrics, step + 1
    assert pending is not None
    return state, total + _finite(session, pending, step)


def _finite(session: Session, metrics: Metrics, step: int) -> Metrics:
    """Metrics of the `step`-th step, counted from 1, on the host."""
    metrics = jax.device_get(metrics)
    if not math.isfinite(metrics.loss):
        raise NonFiniteLossError(
            f"the loss is {metrics.loss} at step {step} (epoch {(step - 1) // session.steps_per_epoch + 1}), where "
            f"the learning rate is {float(session.schedule(step - 1)):.4g}. Lower --config.learning_rate, lengthen "
            f"--config.warmup_epochs or bound gradients with --config.clip_norm"
        )
    return metrics


def evaluate(session: Session, state: TrainState) -> Metrics:
    """Metrics of the whole test set, every image once."""
    pairs = batches.eval_batches(len(session.dataset.test), session.config.batch_size, len(session.devices))
    variables = state.eval_variables
    total = Metrics.zero()
    for index, mask in pairs:
        total += jax.device_get(session.eval_step(variables, session.test_data, index, mask))
    return total


@contextmanager
def _checkpoints(folder: Path, keep: int) -> Iterator[Checkpoints]:
    checkpoints = Checkpoints(folder / "checkpoints", keep)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def run(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Trains a network, or goes on where a run in the same folder stopped.

    Args:
      config: with the fields of `training.config`.
      folder: gets config.json, checkpoints/, metrics.jsonl, tensorboard/, curves.png, summary.json.

    Returns:
      The contents of summary.json.

    Raises:
      UserError: a subclass of it, before training starts where that is possible; for a non-finite
        loss after failure.json is written.
    """
    started = time.perf_counter()
    check(config)
    workdir.prepare(folder, config)
    session = start(config)
    state = initial_state(session)
    say(_headline(session, state, folder))
    with _checkpoints(folder, config.keep_checkpoints) as checkpoints:
        epoch = 0
        if checkpoints.latest is not None:
            state, record = checkpoints.restore(checkpoints.latest, state)
            epoch = record.epoch
            say(f"resuming after epoch {epoch} of {config.epochs}")
        logs = Logs(folder, resumed_step=int(state.step))
        try:
            _train(session, parallel.replicate(state, session.devices), epoch, checkpoints, logs)
        except NonFiniteLossError as error:
            _report_failure(folder, session, error, checkpoints.latest)
            raise
        finally:
            logs.close()
    return _summarise(session, folder, logs.rows, time.perf_counter() - started)


def _train(session: Session, state: TrainState, epoch: int, checkpoints: Checkpoints, logs: Logs) -> None:
    config = session.config
    while epoch < config.epochs:
        started = time.perf_counter()
        state, train = train_epoch(session, state, epoch)
        trained = time.perf_counter()
        test = evaluate(session, state)
        if not math.isfinite(test.loss):
            raise NonFiniteLossError(f"the test loss is {test.loss} after epoch {epoch + 1}")
        epoch += 1
        step = epoch * session.steps_per_epoch
        row = {
            "epoch": epoch,
            "step": step,
            "learning_rate": float(session.schedule(step - 1)),
            "train_loss": train.loss,
            "train_accuracy": train.accuracy,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "seconds": round(time.perf_counter() - started, 3),
            "images_per_second": round(float(train.count) / (trained - started), 1),
        }
        # The line first: if the save fails, resuming drops it again.
        logs.epoch(row)
        if epoch % config.checkpoint_epochs == 0 or epoch == config.epochs:
            checkpoints.save(state, Record(epoch, test.accuracy))


def _headline(session: Session, state: TrainState, folder: Path) -> str:
    config, dataset = session.config, session.dataset
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return (
        f"{config.model} with {config.method}: {size:,} parameters, {config.dtype}; {config.dataset}: "
        f"{len(dataset.train):,} training and {len(dataset.test):,} test images; {len(session.devices)} x "
        f"{session.devices[0].device_kind}; {config.epochs} epochs of {session.steps_per_epoch} steps; into {folder}"
    )


def _report_failure(folder: Path, session: Session, error: NonFiniteLossError, checkpoint: int | None) -> None:
    report = {
        "error": str(error),
        "last_checkpoint": checkpoint,
        "config": workdir.as_json(session.config),
        "machine": machine.describe(),
    }
    workdir.write_json(folder / FAILURE, report)


def _summarise(session: Session, folder: Path, rows: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    config = session.config
    best = max(rows, key=lambda row: row["test_accuracy"])
    summary = {
        "best_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "final_accuracy": rows[-1]["test_accuracy"],
        "final_test_loss": rows[-1]["test_loss"],
        "images_per_second": max(row["images_per_second"] for row in rows),
        "seconds": round(seconds, 1),
        **machine.peak_memory(),
        "config": workdir.as_json(config),
        "machine": machine.describe(),
    }
    workdir.write_json(folder / SUMMARY, summary)
    (folder / FAILURE).unlink(missing_ok=True)
    shown = {
        "run": f"{config.dataset}, {config.model}, {config.method}, seed {config.seed}",
        "best test accuracy": f"{best['test_accuracy']:.2%} (epoch {best['epoch']})",
        "final test accuracy": f"{rows[-1]['test_accuracy']:.2%} (epoch {rows[-1]['epoch']})",
        "speed": f"{summary['images_per_second']:,.0f} images/s in the fastest epoch",
        "this call": f"{seconds:.1f} s, {machine.memory_line()}",
        "files": f"{folder}: checkpoints, metrics.jsonl, summary.json",
    }
    if plots.available():
        title = f"{config.model} with {config.method} on {config.dataset}"
        plots.curves({config.method: [rows]}, folder / "curves.png", title)
        shown["files"] += ", curves.png"
    else:
        shown["curves"] = "none: pip install matplotlib to get curves.png"
    say(table(shown))
    return summary


def evaluate_checkpoints(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Evaluates the newest and the best checkpoint of a run on the whole test set.

    Args:
      config: of the run, see `workdir.read_config`.
      folder: of the run.

    Returns:
      By `latest` and `best`: epoch, test_loss and test_accuracy.

    Raises:
      WorkdirError: if there is no checkpoint or it cannot be restored.
    """
    check(config)
    if not (folder / "checkpoints").is_dir():
        raise WorkdirError(f"{folder} holds no checkpoint to evaluate")
    session = start(config)
    results = {}
    with _checkpoints(folder, config.keep_checkpoints) as checkpoints:
        for name, step in (("latest", checkpoints.latest), ("best", checkpoints.best)):
            if step is None:
                raise WorkdirError(f"{folder} holds no complete checkpoint to evaluate")
            state, record = checkpoints.restore(step, initial_state(session))
            metrics = evaluate(session, parallel.replicate(state, session.devices))
            results[name] = {"epoch": record.epoch, "test_loss": metrics.loss, "test_accuracy": metrics.accuracy}
    say(table({
        f"{name} checkpoint": f"epoch {r['epoch']}: test loss {r['test_loss']:.4f}, accuracy {r['test_accuracy']:.2%}"
        for name, r in results.items()
    }))  # fmt: skip
    return results
