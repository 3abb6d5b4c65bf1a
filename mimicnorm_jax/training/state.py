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
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema_params: Any

    @property
    def eval_variables(self) -> dict[str, Any]:
        """What `model.apply` takes to evaluate."""
        params = self.params if self.ema_params is None else self.ema_params
        return {"params": params, "batch_stats": self.batch_stats}


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
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
    )
