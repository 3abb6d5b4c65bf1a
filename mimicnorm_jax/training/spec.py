"""What a run is, known before any data is read: checked, with the network built, once."""

import dataclasses
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mimicnorm_jax import models
from mimicnorm_jax.data import datasets
from mimicnorm_jax.data.augment import Augmentation
from mimicnorm_jax.data.specs import DatasetSpec
from mimicnorm_jax.errors import ConfigError
from mimicnorm_jax.linen import find_kernels
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.optim import Select, center_params
from mimicnorm_jax.training.config import FIELDS, TrainConfig
from mimicnorm_jax.training.dataset import check_dataset, dataset_of
from mimicnorm_jax.training.model import AXIS, head_of, init_variables, is_exact_in_parts, require_trainable
from mimicnorm_jax.training.optimizer import make_optimizer, make_schedule, scalars
from mimicnorm_jax.training.state import TrainState, first_state
from mimicnorm_jax.training.step import StepConfig
from mimicnorm_jax.utils.trees import path_names

NETWORK_FIELDS = (
    "model",
    "method",
    "init_scheme",
    "width_multiplier",
    "centering",
    "sync_bn",
    "running_variance",
    "logit_scale",
    "remat",
)
"""What a config says of a network of this package, and cannot say of one of your own."""
OWN_METHOD = "own"
"""What stands as the method of a network of your own."""


@dataclass(frozen=True)
class RunSpec:
    """A run that can be trained, by `build_spec`.

    Attributes:
      config: of the run.
      dataset: that the config names.
      model: the network.
    """

    config: TrainConfig
    dataset: DatasetSpec
    model: Any

    @cached_property
    def centered(self) -> Select | None:
        """Which kernels are centered after every step: those that the network of `in_call` centers; None for none."""
        if self.config.centering != "after_step":
            return None
        image = jax.ShapeDtypeStruct((1, *self.dataset.image_shape), jnp.float32)
        found = find_kernels(make_model(self.config, self.dataset), image)
        taken = {path for path, one in found.items() if one.transform.centers(one.layout.flat_shape, one.layout.groups)}
        return lambda path, leaf: path in taken

    def make_step(
        self, num_train: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> tuple[StepConfig, optax.Schedule]:
        """What the run's steps close over, and the learning rate by step.

        Args:
          num_train: number of training images.
          mean, std: of the training images, see `StepConfig`.
        """
        config = self.config
        steps_per_epoch = num_train // config.batch_size
        schedule = make_schedule(config, steps_per_epoch)
        step_config = StepConfig(
            model=self.model,
            tx=make_optimizer(config, schedule, steps_per_epoch, self.centered),
            augmentation=Augmentation(config.crop_padding, config.flip, config.rotation),
            mean=mean,
            std=std,
            dtype=config.dtype,
            label_smoothing=config.label_smoothing,
            ema_decay=config.ema_decay,
            seed=config.seed,
            microbatches=config.microbatches,
            # Dropout of this package's networks folds the device in by itself, so that their number changes nothing.
            dropout_by_device=config.method == OWN_METHOD,
        )
        return step_config, schedule

    def init_state(self) -> TrainState:
        """`first_state` of a network from the config's seed, on the host's first device."""
        variables = init_variables(self.model, jax.random.key(self.config.seed), self.dataset.image_shape)
        return self.first_state(variables["params"], variables.get("batch_stats", {}))

    def first_state(self, params: Any, batch_stats: Any) -> TrainState:
        """The state before the run's first step, from given variables.

        Args:
          params: raw parameters; kernels are centered here where steps keep them centered.
          batch_stats: running averages.
        """
        config = self.config
        if self.centered is not None:
            params = center_params(params, self.centered)
        # The state of an optimizer does not depend on its schedule.
        tx = make_optimizer(config, optax.constant_schedule(0.0), centered=self.centered)
        return first_state(params, batch_stats, tx, config.ema_decay > 0)

    def state_template(self) -> TrainState:
        """Shapes and dtypes of the run's state, without computing any of it."""
        return jax.eval_shape(self.init_state)


def build_spec(
    config: TrainConfig, num_devices: int | None = None, model: Any = None, dataset: DatasetSpec | None = None
) -> RunSpec:
    """Checks what a config asks for and builds its network, before any data is read or anything compiled.

    Args:
      config: of the run.
      num_devices: that share a batch; default: all there are.
      model: a network of your own, `NETWORK_FIELDS` of the config then stay at their defaults; default: the config's.
      dataset: what is known of the data set that the config names; default: as it is now.

    Raises:
      ConfigError: names the field.
      DataError: if the dataset is unknown.
    """
    devices = jax.device_count() if num_devices is None else num_devices
    if model is None and config.method == OWN_METHOD:
        raise ConfigError(
            f"config.method is {OWN_METHOD!r}: that run has a network of its own, {config.model}, which no config "
            "builds. Give the network as model= to training.run or training.evaluate_checkpoints"
        )
    dataset = dataset or dataset_of(config)
    check_dataset(config, dataset)
    if model is None:
        model = _build_model(config, dataset)
    else:
        config = _with_own_model(config, model)
        require_trainable(model, dataset, config.dtype)
    if config.batch_size > dataset.num_train:
        raise ConfigError(
            f"config.batch_size is {config.batch_size}, more than the {dataset.num_train} training images of "
            f"{config.dataset}"
        )
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
    if config.constraint != "none" and config.weight_decay:
        raise ConfigError(
            f"config.constraint is {config.constraint!r}, under which kernels keep their norm, and config.weight_decay "
            f"is {config.weight_decay}, which would shrink them: add --config.weight_decay=0.0"
        )
    if config.free_epochs and config.constraint != "lawn":
        raise ConfigError(
            f"config.free_epochs is {config.free_epochs}, of config.constraint='lawn': set it, or 0 epochs"
        )
    spec = RunSpec(config, dataset, model)
    _check_microbatches(spec, config.batch_size // devices)
    _check_scalars(spec)
    _check_averages(spec)
    return spec


def validate_run(config: TrainConfig, model: Any = None) -> RunSpec:
    """`build_spec` for the devices there are, and that the data set is prepared.

    Raises:
      ConfigError: names the field.
      DataError: if the dataset is unknown or not prepared.
    """
    datasets.require_prepared(config.dataset, config.data_dir, config.image_size)
    return build_spec(config, model=model)


def make_model(config: TrainConfig, dataset: DatasetSpec, **options: Any) -> Any:
    """The config's network for a data set; `options` are those of `models.create` that its purpose decides."""
    method, known = config.method, METHODS.get(config.method)
    # A record of the user's own may have another scale than 1.
    if known is not None and config.logit_scale != FIELDS["logit_scale"].default:
        method = replace(known, logit_scale=config.logit_scale)
    return models.create(
        config.model,
        method=method,
        num_classes=dataset.num_classes,
        init=config.init_scheme,
        width=config.width_multiplier,
        **options,
    )


def _build_model(config: TrainConfig, dataset: DatasetSpec) -> Any:
    try:
        model = make_model(
            config,
            dataset,
            dtype=config.dtype,
            axis_name=AXIS if config.sync_bn else None,
            batch_axis_name=AXIS,
            center_in_call=config.centering == "in_call",
            running_variance=config.running_variance,
            remat=config.remat,
        )
        models.check_image(config.model, dataset.image_shape)
    except ValueError as error:
        raise ConfigError(
            f"config.model={config.model!r}, config.method={config.method!r}, config.init_scheme="
            f"{config.init_scheme!r}, config.remat={config.remat!r}: {error}"
        ) from error
    if config.centering == "after_step" and not METHODS[config.method].centers:
        raise ConfigError(f"config.centering is 'after_step', but config.method={config.method!r} centers no kernel")
    return model


def _with_own_model(config: TrainConfig, model: Any) -> TrainConfig:
    """The config of a run of such a network, as it stands in the run's folder."""
    named = {"model": type(model).__name__, "method": OWN_METHOD}
    for field in NETWORK_FIELDS:
        value = getattr(config, field)
        if value not in (FIELDS[field].default, named.get(field)):
            raise ConfigError(
                f"config.{field} is {value!r}, but the run has a network of its own, {type(model).__name__}, which it "
                f"does not reach: leave it at {FIELDS[field].default!r} and build the network as you want it"
            )
    return dataclasses.replace(config, **named)


def _check_microbatches(spec: RunSpec, share: int) -> None:
    config, parts = spec.config, spec.config.microbatches
    if share % parts:
        raise ConfigError(
            f"config.microbatches is {parts}, into which the {share} images of each device (config.batch_size="
            f"{config.batch_size}) do not split equally: choose a divisor of {share}"
        )
    if parts > 1 and share // parts < 2 and not is_exact(spec):
        raise ConfigError(
            f"config.microbatches is {parts}, which leaves config.method={config.method!r} one image at a time on "
            f"each device to normalize: choose at most {share // 2}, or a larger --config.batch_size"
        )


def _check_scalars(spec: RunSpec) -> None:
    config = spec.config
    if (config.scalar_rate == 1 and config.decay_scalars) or any(jax.tree.leaves(scalars(_shapes(spec)["params"]))):
        return
    field = "decay_scalars" if config.scalar_rate == 1 else "scalar_rate"
    raise ConfigError(
        f"config.{field} is {getattr(config, field)}, but config.model={config.model!r} has no parameter of one number "
        f"under config.method={config.method!r}: leave it at {FIELDS[field].default}, or choose another method"
    )


def _check_averages(spec: RunSpec) -> None:
    if not spec.config.ema_decay:
        return
    for path, leaf in jax.tree.leaves_with_path(_shapes(spec)["params"]):
        if jnp.promote_types(leaf.dtype, jnp.float32) != leaf.dtype:
            raise ConfigError(
                f"config.ema_decay is {spec.config.ema_decay}, but {'/'.join(path_names(path))} is {leaf.dtype}, in "
                "which an average stands still by rounding: keep parameters in float32 (param_dtype), or leave it 0"
            )


def _shapes(spec: RunSpec) -> Any:
    """Shapes and dtypes of the network's variables."""
    return jax.eval_shape(lambda key: init_variables(spec.model, key, spec.dataset.image_shape), jax.random.key(0))


def is_exact(spec: RunSpec) -> bool:
    """Whether the run's microbatches give the gradient of the whole batch."""
    if head_of(spec.model) is not None:
        return True
    return is_exact_in_parts(spec.model, _shapes(spec).get("batch_stats", {}))
