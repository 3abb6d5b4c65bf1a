"""One training step and one evaluation step: pure functions that know a mapped axis' name, no devices."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax

from mimicnorm_jax.data.augment import Augmentation, augment, normalize
from mimicnorm_jax.training.gradients import LossAndGrad
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.training.state import TrainState

AXIS = "devices"
"""Name of the mapped axis."""


@dataclass(frozen=True)
class StepConfig:
    """What both steps close over.

    Attributes:
      model: the network; its BatchNorms are synchronized over `AXIS` or not, as it was created.
      tx: the optimizer.
      augmentation: of training images.
      image_shape: `(H, W, C)`.
      mean, std: of the training images, per channel in [0, 1].
      dtype: of the images that the network gets.
      label_smoothing: probability spread over all classes.
      ema_decay: of the averaged parameters.
      seed: of augmentation and dropout.
      microbatches: see `gradients.Objective`.
    """

    model: nn.Module
    tx: optax.GradientTransformation
    augmentation: Augmentation
    image_shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any = jnp.float32
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    seed: int = 0
    microbatches: int = 1


def train_step(
    task: StepConfig, state: TrainState, data: tuple[jax.Array, jax.Array], index: jax.Array
) -> tuple[TrainState, Metrics]:
    """One step of SGD on a batch.

    Args:
      task: what to train, closed over.
      state: the same on every device.
      data: all training images `(N, H W C)` uint8 and labels `(N,)`, the same on every device. Images are flat, as
        a TPU would copy all of them at every step into a layout that pads their few channels.
      index: this device's part of the batch, `(b,)`.

    Returns:
      The next state, the same on every device, and the whole batch's metrics before the update,
      with dropout and augmentation, without label smoothing. Where the loss or its gradient is not
      finite, the loss is not a number and nothing of the state changes but the step.
    """
    step_key = jax.random.fold_in(jax.random.key(task.seed), state.step)
    device, b = lax.axis_index(AXIS), index.shape[0]
    # One key for each place in the whole batch, so that the number of devices changes nothing.
    image_keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, device * b + jnp.arange(b))
    dropout_key = jax.random.fold_in(step_key, 2**32 - 1)  # no image's place
    images, labels = data[0][index].reshape(b, *task.image_shape), data[1][index]
    images = normalize(augment(image_keys, images, task.augmentation), task.mean, task.std, task.dtype)

    objective = LossAndGrad(task.model, task.label_smoothing, task.microbatches)
    grads, logits, batch_stats = objective.gradient(state.params, state.batch_stats, images, labels, dropout_key)
    # Running averages of unsynchronized BatchNorms differ between devices; the state does not.
    grads, batch_stats = lax.pmean((grads, batch_stats), AXIS)
    updates, opt_state = task.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(params, ema_params, 1 - task.ema_decay)
    metrics = Metrics.from_logits(logits, labels).psum(AXIS)
    finite = jnp.isfinite(metrics.loss_sum) & jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
    after = TrainState(state.step + 1, params, batch_stats, opt_state, ema_params)
    before = state.replace(step=state.step + 1)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    return state, metrics.replace(loss_sum=jnp.where(finite, metrics.loss_sum, jnp.nan))


def train_steps(
    task: StepConfig, state: TrainState, data: tuple[jax.Array, jax.Array], index: jax.Array, count: jax.Array
) -> tuple[TrainState, Metrics]:
    """Several steps of SGD without the host, each as `train_step`.

    Args:
      task: what to train, closed over.
      state: the same on every device.
      data: as in `train_step`.
      index: this device's part of each batch, `(K, b)`.
      count: how many of the K to do, the first ones; not known to the compiler, so that any number of them
        takes the same program.

    Returns:
      The state after the last of them, and each step's metrics, `(K,)`, 0 for steps that were not done.
    """
    if len(index) == 1:
        # In a loop XLA is slow at the gradients of convolutions on a CPU (jax issue 12868).
        state, metrics = train_step(task, state, data, index[0])
        return state, jax.tree.map(lambda value: value[None], metrics)

    def one(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, done = carry
        state, metrics = train_step(task, state, data, index[i])
        return state, jax.tree.map(lambda all_steps, value: all_steps.at[i].set(value), done, metrics)

    nothing = jnp.zeros(len(index), jnp.promote_types(task.dtype, jnp.float32))
    return lax.fori_loop(0, count, one, (state, Metrics(nothing, nothing, nothing)))


def eval_step(
    task: StepConfig, variables: dict[str, Any], data: tuple[jax.Array, jax.Array], index: jax.Array, mask: jax.Array
) -> Metrics:
    """Metrics of a batch of test images.

    Args:
      task: what to evaluate, closed over.
      variables: `TrainState.eval_variables`, the same on every device.
      data: all images `(N, H W C)` uint8 and labels `(N,)`, the same on every device.
      index: this device's part of the batch, `(b,)`.
      mask: `(b,)`, 0 for images that do not count.
    """
    images = data[0][index].reshape(len(index), *task.image_shape)
    images = normalize(images, task.mean, task.std, task.dtype)
    logits: Any = task.model.apply(variables, images, train=False)
    return Metrics.from_logits(logits, data[1][index], mask).psum(AXIS)
