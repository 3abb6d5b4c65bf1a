"""Every field of a training run: its default, its meaning, what it may be. Imports no JAX."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from mimicnorm_jax.errors import ConfigError


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
      default: its value unless a config file or a flag says otherwise; its type is the field's.
      summary: what it means.
      allowed: says in words what it may be.
      check: whether a value of the right type is allowed.
    """

    default: Any
    summary: str
    allowed: str
    check: Callable[[Any], bool]


def _any(default: Any, summary: str) -> Field:
    return Field(default, summary, f"a {type(default).__name__}", lambda value: True)


def _one_of(summary: str, *choices: str) -> Field:
    return Field(choices[0], summary, " or ".join(map(repr, choices)), lambda value: value in choices)


def _at_least(default: float, bound: float, summary: str) -> Field:
    return Field(default, summary, f"at least {bound}", lambda value: bound <= value < float("inf"))


def _above_zero(default: float, summary: str) -> Field:
    return Field(default, summary, "above 0", lambda value: 0 < value < float("inf"))


def _fraction(default: float, summary: str) -> Field:
    return Field(default, summary, "at least 0 and below 1", lambda value: 0 <= value < 1)


def _increasing(value: tuple[int, ...]) -> bool:
    return all(isinstance(v, int) and v > 0 for v in value) and list(value) == sorted(set(value))


FIELDS: dict[str, Field] = {
    "seed": _at_least(0, 0, "of parameters, order of images, augmentation and dropout"),
    "dataset": _any("digits", "digits, cifar10 or cifar100"),
    "data_dir": _any("", "folder of TFDS datasets; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets"),
    "model": _any("resnet8", "network, see mimicnorm_jax.models"),
    "method": _any("mimicnorm", "what stands in for BatchNorm, see mimicnorm_jax.methods"),
    "init": _any("published", "initialisation, see mimicnorm_jax.initialisation"),
    "width": _above_zero(1.0, "factor on the network's channels"),
    "dtype": _one_of("of activations; parameters and statistics are float32", "float32", "bfloat16"),
    "centring": _one_of(
        "centre kernels inside the layers or, as the published code, after each step", "in_call", "after_step"
    ),
    "sync_bn": _any(True, "synchronise the last BatchNorm, or every one, over all devices"),
    "running_variance": _one_of("of the last BatchNorm: Flax's or PyTorch's convention", "biased", "unbiased"),
    "batch_size": _at_least(64, 2, "images in a step, over all devices"),
    "epochs": _at_least(30, 1, "passes over the training images"),
    "learning_rate": _above_zero(0.1, "after the warm-up"),
    "warmup_epochs": _at_least(2.0, 0, "linear from 0"),
    "schedule": _one_of("after the warm-up: times decay_factor at each of decay_epochs, or a cosine to 0", "step", "cosine"),
    "decay_epochs": Field((), "of schedule=step", "increasing positive whole numbers", _increasing),
    "decay_factor": Field(0.1, "of schedule=step", "above 0 and at most 1", lambda value: 0 < value <= 1),
    "momentum": _fraction(0.9, "of SGD"),
    "nesterov": _any(False, "Nesterov's momentum"),
    "weight_decay": _at_least(5e-4, 0, "added to the gradient (coupled), on every parameter"),
    "clip_norm": _at_least(0.0, 0, "bound on the gradient's global norm; 0: none"),
    "label_smoothing": _fraction(0.0, "probability spread over all classes"),
    "ema_decay": _fraction(0.0, "of an average of the parameters that evaluation uses; 0: none"),
    "crop_padding": _at_least(0, 0, "pixels around an image before a random crop"),
    "flip": _any(False, "mirror images with probability 1/2"),
    "rotation": Field(0.0, "rotate by up to so many degrees", "from 0 to 180", lambda value: 0 <= value <= 180),
    "keep_checkpoints": _at_least(2, 1, "newest ones kept, besides the best"),
    "checkpoint_epochs": _at_least(1, 1, "epochs from one checkpoint to the next"),
}
"""Every field by name."""


def base(**overrides: Any) -> ConfigDict:
    """A config with every field: its default, or the value given."""
    unknown = overrides.keys() - FIELDS
    if unknown:
        raise ConfigError(_unknown(sorted(unknown)[0]))
    return ConfigDict({name: field.default for name, field in FIELDS.items()} | overrides)


def with_model(config: ConfigDict, argument: str) -> ConfigDict:
    """Applies what follows the colon of `--config=FILE:MODEL,METHOD` to a config.

    Raises:
      ConfigError: if there are more than two parts.
    """
    parts = argument.split(",") if argument else []
    if len(parts) > 2:
        raise ConfigError(f"after the config file comes :MODEL or :MODEL,METHOD; got :{argument}")
    for field, value in zip(("model", "method"), parts, strict=False):
        if value:
            config[field] = value
    return config


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, FIELDS)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"config has no field {name!r}: {hint}The fields are {', '.join(FIELDS)}"


def validate(config: ConfigDict) -> None:
    """Checks every field by itself, without touching data or devices.

    Raises:
      ConfigError: names the field, its value and what it may be.
    """
    for name in config:
        if name not in FIELDS:
            raise ConfigError(_unknown(name))
    for name, field in FIELDS.items():
        if name not in config:
            raise ConfigError(f"config lacks the field {name!r} ({field.summary})")
        value, kind = config[name], type(field.default)
        right_type = isinstance(value, (kind, int) if kind is float else kind)
        if isinstance(value, bool) and kind is not bool:
            right_type = False
        if not right_type:
            raise ConfigError(f"config.{name} is {value!r}: it is {_article(kind.__name__)}, {field.allowed}")
        if not field.check(value):
            raise ConfigError(f"config.{name} is {value!r}: it must be {field.allowed} ({field.summary})")


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def describe() -> str:
    """One line a field, for `--help`."""
    return "\n".join(f"  --config.{name}={field.default!r}\n      {field.summary}" for name, field in FIELDS.items())
