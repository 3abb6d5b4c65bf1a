"""The optimizer that a config asks for, and its schedules."""

from typing import Any

import jax
import optax

from mimicnorm_jax.optim import Select, hyperball, keep_kernels_centered, lawn
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.utils.trees import path_names


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by step: linear warm-up from 0, then steps down, or a cosine or line to 0.

    Args:
      config: of the run.
      steps_per_epoch: steps in an epoch.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    rest = max(1, config.epochs * steps_per_epoch - warmup)
    if config.schedule == "cosine":
        decay: optax.Schedule = optax.cosine_decay_schedule(config.learning_rate, rest)
    elif config.schedule == "linear":
        decay = optax.linear_schedule(config.learning_rate, 0.0, rest)
    else:
        boundaries = {epoch * steps_per_epoch - warmup: config.decay_factor for epoch in config.decay_epochs}
        decay = optax.piecewise_constant_schedule(config.learning_rate, boundaries)
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, max(1, warmup)), decay], [warmup])


def make_optimizer(
    config: TrainConfig, schedule: optax.Schedule, steps_per_epoch: int = 1, centered: Select | None = None
) -> optax.GradientTransformation:
    """Clipping, the optimizer, its constraint; centering after the step.

    Args:
      config: of the run.
      schedule: from `make_schedule`.
      steps_per_epoch: steps in an epoch, of which the length of LAWN's free phase is made.
      centered: which kernels are centered after the step; None for none.
    """
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.adaptive_clip:
        parts.append(optax.masked(optax.adaptive_grad_clip(config.adaptive_clip), not_classifier))
    if config.constraint == "hyperball":
        parts.append(hyperball(_direction(config), schedule))
    elif config.constraint == "lawn":
        parts.append(lawn(optax.chain(*_free(config, schedule)), round(config.free_epochs * steps_per_epoch)))
    else:
        parts += _free(config, schedule)
    if config.scalar_rate != 1:
        parts.append(optax.masked(optax.scale(config.scalar_rate), scalars))
    if centered is not None:
        parts.append(keep_kernels_centered(centered))
    return optax.chain(*parts)


def _free(config: TrainConfig, schedule: optax.Schedule) -> list[optax.GradientTransformation]:
    """The optimizer by itself; weight decay is coupled but for adamw and lion."""
    decayed = None if config.decay_scalars else _not_scalars
    if config.optimizer == "adamw":
        return [optax.adamw(schedule, weight_decay=config.weight_decay, mask=decayed)]
    if config.optimizer == "lion":
        return [optax.lion(schedule, weight_decay=config.weight_decay, mask=decayed)]
    coupled = optax.add_decayed_weights(config.weight_decay, decayed)
    if config.optimizer == "adam":
        return [coupled, optax.adam(schedule)]
    return [coupled, optax.sgd(schedule, momentum=config.momentum or None, nesterov=config.nesterov)]


def _direction(config: TrainConfig) -> optax.GradientTransformation:
    """What the optimizer would follow, before the learning rate."""
    if config.optimizer == "lion":
        return optax.scale_by_lion()
    if config.optimizer == "sgd":
        return optax.trace(config.momentum, config.nesterov)
    return optax.scale_by_adam()


def scalars(params: optax.Params) -> Any:
    """True for parameters of one number, in the params' tree: those of `scalar_rate` and `decay_scalars`."""
    return jax.tree.map(lambda leaf: leaf.ndim == 0, params)


def _not_scalars(params: optax.Params) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim != 0, params)


def not_classifier(params: optax.Params) -> Any:
    """True but for the classifier, which adaptive clipping leaves alone (Brock et al. 2021, section 4.1)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "classifier" not in path_names(path), params)
