"""SGD with momentum and coupled weight decay, and its schedules."""

import optax

from mimicnorm_jax.optim import keep_kernels_centered, select_conv_kernels
from mimicnorm_jax.training.config import TrainConfig


def make_schedule(config: TrainConfig, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by step: linear warm-up from 0, then steps down or a cosine to 0.

    Args:
      config: of the run.
      steps_per_epoch: steps in an epoch.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "cosine":
        decay: optax.Schedule = optax.cosine_decay_schedule(
            config.learning_rate, max(1, config.epochs * steps_per_epoch - warmup)
        )
    else:
        boundaries = {epoch * steps_per_epoch - warmup: config.decay_factor for epoch in config.decay_epochs}
        decay = optax.piecewise_constant_schedule(config.learning_rate, boundaries)
    return optax.join_schedules([optax.linear_schedule(0.0, config.learning_rate, max(1, warmup)), decay], [warmup])


CONV_KERNELS = select_conv_kernels(window=2)
"""Those of our networks that are centered after a step: all their convolutions are 2-D, and none is stacked."""


def make_optimizer(config: TrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, coupled weight decay and SGD; centering after the step where the config has it so.

    Args:
      config: of the run.
      schedule: from `make_schedule`.
    """
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts += [
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(schedule, momentum=config.momentum or None, nesterov=config.nesterov),
    ]
    if config.centering == "after_step":
        parts.append(keep_kernels_centered(CONV_KERNELS))
    return optax.chain(*parts)
