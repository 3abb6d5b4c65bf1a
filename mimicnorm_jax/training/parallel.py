"""The one place that spreads steps over devices: pmap, with state and data the same on every device."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimicnorm_jax.training import step
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.training.state import TrainState

Tree = TypeVar("Tree")
Device = Any  # jax.Device, which type checkers do not see
TrainSteps = Callable[[TrainState, Any, np.ndarray, int], tuple[TrainState, Metrics]]
EvalStep = Callable[[Any, Any, np.ndarray, np.ndarray], Metrics]


def replicate(tree: Tree, devices: Sequence[Device]) -> Tree:
    """Puts a copy of every leaf on every device, once; steps then take it without a transfer."""
    everywhere = NamedSharding(Mesh(np.array(devices), (step.AXIS,)), PartitionSpec())
    return jax.device_put(tree, everywhere)


def make_train_steps(task: step.Task, devices: Sequence[Device]) -> TrainSteps:
    """`train_steps` over devices: `(state, data, index (D, K, B / D), count) -> (state, metrics (K,))`.

    Donates the state.
    """
    return jax.pmap(
        partial(step.train_steps, task),
        axis_name=step.AXIS,
        in_axes=(None, None, 0, None),
        out_axes=None,  # type: ignore[arg-type]  # None is documented for outputs that are the same everywhere
        donate_argnums=(0,),
        devices=devices,
    )


def make_eval_step(task: step.Task, devices: Sequence[Device]) -> EvalStep:
    """`eval_step` over devices: `(variables, data, index (D, B / D), mask (D, B / D)) -> metrics`."""
    return jax.pmap(
        partial(step.eval_step, task),
        axis_name=step.AXIS,
        in_axes=(None, None, 0, 0),
        out_axes=None,  # type: ignore[arg-type]
        devices=devices,
    )
