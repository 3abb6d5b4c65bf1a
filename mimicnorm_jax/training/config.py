"""Every field of a training run: its type, its default, its meaning, what it may be. Imports no JAX."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from ml_collections import ConfigDict

from mimicnorm_jax.errors import ConfigError, unknown


def _field(default: Any, summary: str, allowed: str, check: Callable[[Any], bool]) -> Any:
    metadata = {"summary": summary, "allowed": allowed, "check": check}
    return dataclasses.field(default=default, metadata=metadata)


def _any(default: Any, summary: str) -> Any:
    return _field(default, summary, "of any value", lambda value: True)


def _one_of(summary: str, *choices: str) -> Any:
    return _field(choices[0], summary, " or ".join(map(repr, choices)), lambda value: value in choices)


def _at_least(default: float, bound: float, summary: str) -> Any:
    return _field(default, summary, f"at least {bound}", lambda value: bound <= value < float("inf"))


def _above_zero(default: float, summary: str) -> Any:
    return _field(default, summary, "above 0", lambda value: 0 < value < float("inf"))


def _fraction(default: float, summary: str) -> Any:
    return _field(default, summary, "at least 0 and below 1", lambda value: 0 <= value < 1)


def _increasing(value: tuple[Any, ...]) -> bool:
    return all(isinstance(v, int) and v > 0 for v in value) and list(value) == sorted(set(value))


_COLORS = "numbers above 0 and below 1"


def _are_colors(value: tuple[Any, ...]) -> bool:
    return all(isinstance(v, float) and 0 < v < 1 for v in value)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run. `validate` makes one; config files and flags edit the ConfigDict of `base`."""

    seed: int = _field(
        0,
        "of parameters, order of images, augmentation and dropout",
        "at least 0 and below 2**32",
        lambda value: 0 <= value < 2**32,
    )
    dataset: str = _any(
        "digits",
        "name, see mimicnorm_jax.data.DATASETS; folder:DIR of train/CLASS/FILE and val/CLASS/FILE; "
        "records:DIR, see mimicnorm prepare-data; tfds:NAME",
    )
    data_dir: str = _any("", "folder of TFDS datasets; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    image_size: int = _at_least(0, 0, "side of the squares that images are cut to; 0: the data set's own")
    streaming: bool = _any(
        False, "decode images as they are needed instead of keeping all on every device; large data sets always do"
    )
    decoding_threads: int = _at_least(0, 0, "that decode streamed images; 0: one for each core")
    max_bad_images: int = _at_least(0, 0, "streamed images that cannot be decoded and are skipped; one more stops")
    mean: tuple[float, ...] = _field((), "of training pixels, a channel; empty: measured", _COLORS, _are_colors)
    std: tuple[float, ...] = _field((), "their standard deviation; empty: measured", _COLORS, _are_colors)
    model: str = _any("resnet8", "network, see mimicnorm_jax.models")
    method: str = _any("mimicnorm", "what stands in for BatchNorm, see mimicnorm_jax.methods")
    init_scheme: str = _any("published", "initialization, see mimicnorm_jax.init_schemes")
    init_from: str = _any("", "folder of a run whose best checkpoint's variables this run starts from; empty: none")
    width_multiplier: float = _field(
        1.0, "factor on the network's channels", "above 0 and at most 100", lambda value: 0 < value <= 100
    )
    dtype: str = _one_of("of activations; parameters and statistics are float32", "float32", "bfloat16")
    centering: str = _one_of(
        "center kernels inside the layers or, as the published code, after each step", "in_call", "after_step"
    )
    parallelism: str = _one_of("how a step is mapped over devices: jax.pmap, or its successor", "pmap", "shard_map")
    sync_bn: bool = _any(True, "synchronize the last BatchNorm, or every one, over all devices")
    running_variance: Literal["biased", "unbiased"] = _one_of(
        "of the last BatchNorm: Flax's or PyTorch's convention", "biased", "unbiased"
    )
    logit_scale: float = _above_zero(1.0, "constant that the last BatchNorm multiplies logits by; the paper has 1")
    batch_size: int = _at_least(64, 2, "images in a step, over all devices")
    steps_per_call: int = _at_least(
        1, 1, "steps that the devices do in one go, for small networks on fast devices; slow on a CPU if above 1"
    )
    remat: str = _one_of(
        "what the backward pass recomputes to save memory: no convolution; pointwise ones that do not narrow, and "
        "elementwise work (and normalization, under batchnorm); or each whole stage",
        "none",
        "cheap",
        "stage",
    )
    microbatches: int = _at_least(
        1,
        1,
        "parts of each device's images, run one after another to save memory (slow on a CPU): the same gradient, "
        "except that BatchNorms before the last one normalize each part by itself",
    )
    epochs: int = _at_least(30, 1, "passes over the training images")
    learning_rate: float = _above_zero(0.1, "after the warm-up")
    warmup_epochs: float = _at_least(2.0, 0, "linear from 0")
    schedule: str = _one_of(
        "after the warm-up: times decay_factor at each of decay_epochs, a cosine to 0, or a line to 0",
        "step",
        "cosine",
        "linear",
    )
    decay_epochs: tuple[int, ...] = _field((), "of schedule=step", "increasing positive whole numbers", _increasing)
    decay_factor: float = _field(0.1, "of schedule=step", "above 0 and at most 1", lambda value: 0 < value <= 1)
    optimizer: str = _one_of("adamw and lion decouple weight decay from the gradient", "sgd", "adam", "adamw", "lion")
    constraint: str = _one_of(
        "kernels keep their norm: after free_epochs (optim.lawn), or always (optim.hyperball); wants weight_decay=0",
        "none",
        "lawn",
        "hyperball",
    )
    free_epochs: float = _at_least(0.0, 0, "of constraint=lawn, before norms are frozen")
    momentum: float = _fraction(0.9, "of SGD")
    nesterov: bool = _any(False, "Nesterov's momentum")
    weight_decay: float = _at_least(5e-4, 0, "added to the gradient (coupled), on every parameter")
    decay_scalars: bool = _any(
        True, "whether weight_decay acts on parameters of one number too, such as residual scalars"
    )
    scalar_rate: float = _at_least(1.0, 0, "factor on the learning rate of parameters of one number; 0: they stay")
    clip_norm: float = _at_least(0.0, 0, "bound on the gradient's global norm; 0: none")
    adaptive_clip: float = _at_least(
        0.0, 0, "bound on a gradient's norm relative to its unit's weights, but for the classifier; 0: none"
    )
    max_consecutive_nonfinite: int = _at_least(
        0, 0, "steps in a row with a non-finite loss or gradient that are left out; one more stops the run"
    )
    label_smoothing: float = _fraction(0.0, "probability spread over all classes")
    ema_decay: float = _fraction(
        0.0, "of an average of the parameters that evaluation uses, with BatchNorm statistics of its own; 0: none"
    )
    min_crop_area: float = _fraction(
        0.0, "smallest share of a streamed image's area that a random cut has, see data.streaming.Cut; 0: the middle"
    )
    crop_padding: int = _at_least(0, 0, "pixels around an image before a random crop")
    flip: bool = _any(False, "mirror images with probability 1/2")
    rotation: float = _field(0.0, "rotate by up to so many degrees", "from 0 to 180", lambda value: 0 <= value <= 180)
    keep_checkpoints: int = _at_least(2, 1, "newest ones kept, besides the best")
    diagnostics_epochs: float = _at_least(
        0.0,
        0,
        "epochs, or a fraction of one, from one line of diagnostics.jsonl (kappa, chi, the last BatchNorm's variance) "
        "to the next; 0: none",
    )
    checkpoint_epochs: int = _at_least(1, 1, "epochs from one checkpoint to the next")


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
"""Every field by name."""


def base(**overrides: Any) -> ConfigDict:
    """A config with every field: its default, or the value given.

    Raises:
      ConfigError: names a field that there is not.
    """
    foreign = overrides.keys() - FIELDS.keys()
    if foreign:
        raise ConfigError(unknown("config field", sorted(foreign)[0], FIELDS))
    return ConfigDict({name: field.default for name, field in FIELDS.items()} | overrides)


METHOD_FIELDS: dict[str, dict[str, Any]] = {"bnn_nobn": {"adaptive_clip": 0.02}}
"""What a method's own recipe adds to any other, by method (Chen et al. 2021)."""


def with_model(config: ConfigDict, argument: str) -> ConfigDict:
    """Applies what follows the colon of `--config=FILE:MODEL,METHOD` to a config, and the method's `METHOD_FIELDS`.

    Args:
      config: is changed.
      argument: `MODEL`, `MODEL,METHOD` or empty.

    Raises:
      ConfigError: if there are more than two parts.
    """
    parts = argument.split(",") if argument else []
    if len(parts) > 2:
        raise ConfigError(f"after the config file comes :MODEL or :MODEL,METHOD; got :{argument}")
    for field, value in zip(("model", "method"), parts, strict=False):
        if value:
            config[field] = value
    config.update(METHOD_FIELDS.get(str(config.method), {}))
    return config


def validate(config: ConfigDict) -> TrainConfig:
    """Checks every field by itself, without touching data or devices.

    Raises:
      ConfigError: names the field, its value and what it may be.
    """
    for name in config:
        if name not in FIELDS:
            raise ConfigError(unknown("config field", name, FIELDS))
    for name, field in FIELDS.items():
        metadata = field.metadata
        if name not in config:
            raise ConfigError(f"config lacks the field {name!r} ({metadata['summary']})")
        value, kind = config[name], type(field.default)
        right_type = isinstance(value, (kind, int) if kind is float else kind)
        if isinstance(value, bool) and kind is not bool:
            right_type = False
        if not right_type:
            raise ConfigError(f"config.{name} is {value!r}: it must be of type {kind.__name__}, {metadata['allowed']}")
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"config.{name} is {value!r}: nothing has a null character in its name")
        if not metadata["check"](value):
            raise ConfigError(f"config.{name} is {value!r}: it must be {metadata['allowed']} ({metadata['summary']})")
    return TrainConfig(**config.to_dict())


def describe() -> str:
    """One line a field, for `--help`."""
    return "\n".join(
        f"  --config.{name}={field.default!r}\n      {field.metadata['summary']}" for name, field in FIELDS.items()
    )
