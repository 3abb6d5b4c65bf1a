"""What a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


class TrainState(struct.PyTreeNode):
    """Everything that a step reads and writes; with the seed it determines the rest of the run.

    Attributes:
      step: number of steps done, int32.
      params: raw parameters.
      batch_stats: running averages of BatchNorms; empty for a network without.
      opt_state: the optimizer's.
      ema_params: average of the parameters for evaluation; None if the run keeps none.
      ema_batch_stats: of the network of `ema_params`, as they were last estimated, see `averaged.with_own_statistics`;
        no step changes them. None for a run without `ema_params` or a network without `batch_stats`.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema_params: Any = None
    ema_batch_stats: Any = None

    @property
    def eval_variables(self) -> dict[str, Any]:
        """What `model.apply` takes to evaluate."""
        params = self.params if self.ema_params is None else self.ema_params
        stats = self.batch_stats if self.ema_batch_stats is None else self.ema_batch_stats
        return {"params": params, "batch_stats": stats}


def first_state(params: Any, batch_stats: Any, tx: optax.GradientTransformation, ema: bool) -> TrainState:
    """A state before its first step.

    Args:
      params: raw parameters, from which the optimizer's state is made.
      batch_stats: running averages; empty for a network without.
      tx: the optimizer.
      ema: whether to keep an average of the parameters.
    """
    averages = {}
    if ema:
        # Copies, as a step gives up every buffer of its state once.
        ema_params, ema_stats = jax.tree.map(jnp.copy, (params, batch_stats))
        averages = {"ema_params": ema_params, "ema_batch_stats": ema_stats if jax.tree.leaves(ema_stats) else None}
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, tx.init(params), **averages)
