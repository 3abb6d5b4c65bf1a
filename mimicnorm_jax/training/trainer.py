"""What stays the same during a run: checked before it costs anything, then built once."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax

from mimicnorm_jax import models
from mimicnorm_jax.data import datasets
from mimicnorm_jax.data.augment import Augmentation
from mimicnorm_jax.errors import ConfigError
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.optim import center_params
from mimicnorm_jax.training import parallel
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.optimizer import CONV_KERNELS, make_optimizer, make_schedule
from mimicnorm_jax.training.resilience.nonfinite import NonFiniteMonitor
from mimicnorm_jax.training.state import TrainState, create_state
from mimicnorm_jax.training.step import AXIS, StepConfig


@dataclass(frozen=True)
class Trainer:
    """What stays the same during a run."""

    config: TrainConfig
    spread: parallel.DataParallel
    dataset: datasets.Dataset
    task: StepConfig
    schedule: optax.Schedule
    train_steps: parallel.TrainSteps
    eval_step: parallel.EvalStep
    train_data: Any
    test_data: Any
    guard: NonFiniteMonitor

    @property
    def devices(self) -> int:
        """How many devices share a batch, those of other processes included."""
        return len(self.spread.devices)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.dataset.train) // self.config.batch_size

    def learning_rate(self, step: int) -> float:
        """The learning rate of the `step`-th step, counted from 1."""
        rate: Any = self.schedule(step - 1)
        return float(rate)


def validate_run(config: TrainConfig) -> None:
    """Refuses a config that cannot be trained, before any data is read or anything compiled.

    Raises:
      ConfigError: names the field.
      DataError: if the dataset is unknown or not prepared.
    """
    datasets.require_prepared(config.dataset, config.data_dir)
    check_program(config, jax.device_count())


def check_program(config: TrainConfig, devices: int) -> None:
    """What `check` can say of so many devices without a dataset.

    Raises:
      ConfigError: names the field.
    """
    try:
        _model_to_train(config)
        models.check_image(config.model, datasets.SHAPES[config.dataset])
    except ValueError as error:
        raise ConfigError(
            f"config.model={config.model!r}, config.method={config.method!r}, config.remat={config.remat!r}: {error}"
        ) from error
    if config.centering == "after_step" and not METHODS[config.method].centers:
        raise ConfigError(f"config.centering is 'after_step', but config.method={config.method!r} centers no kernel")
    if config.batch_size % devices:
        raise ConfigError(
            f"config.batch_size is {config.batch_size}, which {devices} devices cannot share equally: "
            f"choose a multiple of {devices}"
        )
    if config.batch_size // devices < 2 and not config.sync_bn:
        raise ConfigError(
            f"config.batch_size is {config.batch_size}, one image for each of {devices} devices, which a BatchNorm "
            f"cannot normalize by itself: choose at least {2 * devices}, or --config.sync_bn"
        )
    _check_microbatches(config, config.batch_size // devices)


def _check_microbatches(config: TrainConfig, share: int) -> None:
    parts = config.microbatches
    if share % parts:
        raise ConfigError(
            f"config.microbatches is {parts}, into which the {share} images of each device (config.batch_size="
            f"{config.batch_size}) do not split equally: choose a divisor of {share}"
        )
    if parts > 1 and share // parts < 2 and METHODS[config.method].batch_norm:
        raise ConfigError(
            f"config.microbatches is {parts}, which leaves config.method={config.method!r} one image at a time on "
            f"each device to normalize: choose at most {share // 2}, or a larger --config.batch_size"
        )


def make_model(config: TrainConfig, **options: Any) -> Any:
    """The config's network; `options` are those of `models.create` that its purpose decides."""
    return models.create(
        config.model,
        method=config.method,
        num_classes=datasets.NUM_CLASSES[config.dataset],
        init=config.init,
        width=config.width,
        **options,
    )


def _model_to_train(config: TrainConfig) -> Any:
    return make_model(
        config,
        dtype=config.dtype,
        axis_name=AXIS if config.sync_bn else None,
        batch_axis_name=AXIS,
        center_in_call=config.centering == "in_call",
        running_variance=config.running_variance,
        remat=config.remat,
    )


def make_task(
    config: TrainConfig, count: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[StepConfig, optax.Schedule]:
    """What a config's steps close over, and the learning rate by step.

    Args:
      config: of the run.
      count: of training images.
      mean, std: of the training images, see `StepConfig`.
    """
    schedule = make_schedule(config, count // config.batch_size)
    task = StepConfig(
        model=_model_to_train(config),
        tx=make_optimizer(config, schedule),
        augmentation=Augmentation(config.crop_padding, config.flip, config.rotation),
        image_shape=datasets.SHAPES[config.dataset],
        mean=mean,
        std=std,
        dtype=config.dtype,
        label_smoothing=config.label_smoothing,
        ema_decay=config.ema_decay,
        seed=config.seed,
        microbatches=config.microbatches,
    )
    return task, schedule


def build_trainer(config: TrainConfig) -> Trainer:
    """Reads the data, puts it on the devices and builds the steps.

    Raises:
      ConfigError: if the training images do not fill one batch.
      DataError: if the data is damaged.
    """
    spread = parallel.DataParallel(tuple(jax.devices()), config.mapping)
    dataset = datasets.load(config.dataset, config.data_dir)
    if config.batch_size > len(dataset.train):
        raise ConfigError(
            f"config.batch_size is {config.batch_size}, more than the {len(dataset.train)} training images of "
            f"{config.dataset}"
        )
    task, schedule = make_task(config, len(dataset.train), dataset.mean, dataset.std)
    return Trainer(
        config,
        spread,
        dataset,
        task,
        schedule,
        spread.make_train_steps(task),
        spread.make_eval_step(task),
        spread.replicate(_flat(dataset.train)),
        spread.replicate(_flat(dataset.test)),
        NonFiniteMonitor(config.max_consecutive_nonfinite),
    )


def _flat(split: datasets.Split) -> tuple[np.ndarray, np.ndarray]:
    return split.images.reshape(len(split), -1), split.labels


def init_state(session: Trainer) -> TrainState:
    """A fresh state from the config's seed, on the host's first device."""
    return fresh_state(session.config, session.task)


def fresh_state(config: TrainConfig, task: StepConfig) -> TrainState:
    """A state from the config's seed; centered where steps keep it centered."""
    state = create_state(task.model, task.tx, datasets.SHAPES[config.dataset], config.seed, config.ema_decay > 0)
    if config.centering == "after_step":
        params, ema_params = (center_params(tree, CONV_KERNELS) for tree in (state.params, state.ema_params))
        state = state.replace(params=params, ema_params=ema_params)
    return state
