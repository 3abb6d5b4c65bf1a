"""What a training run carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from mimicnorm_jax.training.model import init_variables


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

    def with_variables(self, params: Any, batch_stats: Any) -> "TrainState":
        """The state with other variables, in what is kept for evaluation too.

        Args:
          params: as the state's.
          batch_stats: as the state's.
        """
        averages = {} if self.ema_params is None else _first_averages(params, batch_stats)
        return self.replace(params=params, batch_stats=batch_stats, **averages)


def _first_averages(params: Any, batch_stats: Any) -> dict[str, Any]:
    """What is kept for evaluation before any step; copies, as a step gives up every buffer of its state once."""
    params, batch_stats = jax.tree.map(jnp.copy, (params, batch_stats))
    return {"ema_params": params, "ema_batch_stats": batch_stats if jax.tree.leaves(batch_stats) else None}


def create_state(
    model: nn.Module, tx: optax.GradientTransformation, image_shape: tuple[int, ...], seed: int, ema: bool
) -> TrainState:
    """A fresh state.

    Args:
      model: maps images to logits.
      tx: the optimizer.
      image_shape: `(H, W, C)`.
      seed: of the parameters.
      ema: whether to keep an average of the parameters.
    """
    variables = init_variables(model, jax.random.key(seed), image_shape)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        **(_first_averages(params, batch_stats) if ema else {}),
    )
