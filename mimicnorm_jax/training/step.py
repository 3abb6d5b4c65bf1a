"""One training step and one evaluation step: pure functions that know a mapped axis' name, no devices."""

from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax

from mimicnorm_jax.data.augment import Augmentation, augment, normalize
from mimicnorm_jax.data.pipeline import Batch, Feed, MakeBatch, Resident
from mimicnorm_jax.training.gradients import LossAndGrad
from mimicnorm_jax.training.metrics import Metrics
from mimicnorm_jax.training.model import AXIS, eval_logits
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.utils.trees import all_finite


@dataclass(frozen=True)
class StepConfig:
    """What both steps close over.

    Attributes:
      model: the network; its BatchNorms are synchronized over `AXIS` or not, as it was created.
      tx: the optimizer.
      augmentation: of training images.
      mean, std: of the training images, per channel in [0, 1].
      dtype: of the images that the network gets.
      label_smoothing: probability spread over all classes.
      ema_decay: of the averaged parameters.
      seed: of augmentation and dropout.
      microbatches: see `gradients.LossAndGrad`.
      dropout_by_device: whether each device has a dropout key of its own, for networks whose dropout does not ask on
        which device it is, as `flax.linen.Dropout`: it would drop the same units on all of them.
    """

    model: nn.Module
    tx: optax.GradientTransformation
    augmentation: Augmentation
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Any = jnp.float32
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    seed: int = 0
    microbatches: int = 1
    dropout_by_device: bool = False


def training_inputs(config: StepConfig, step: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """What the network gets of a batch in training.

    Args:
      config: of augmentation and normalization.
      step: done before this one.
      batch: this device's part.

    Returns:
      Augmented and normalized images `(b, H, W, C)`, and the key of dropout.
    """
    step_key = jax.random.fold_in(jax.random.key(config.seed), step)
    device, b = lax.axis_index(AXIS), len(batch.labels)
    # One key for each place in the whole batch, so that the number of devices changes nothing.
    image_keys = jax.vmap(jax.random.fold_in, (None, 0))(step_key, device * b + jnp.arange(b))
    dropout_key = jax.random.fold_in(step_key, 2**32 - 1)  # no image's place
    if config.dropout_by_device:
        dropout_key = jax.random.fold_in(dropout_key, device)
    images = augment(image_keys, batch.images, config.augmentation)
    return normalize(images, config.mean, config.std, config.dtype), dropout_key


def train_step(config: StepConfig, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One step of SGD on a batch.

    Args:
      config: what to train and how, closed over.
      state: the same on every device.
      batch: this device's part, without a mask.

    Returns:
      The next state, the same on every device, and the whole batch's metrics before the update,
      with dropout and augmentation, without label smoothing. Where the loss or its gradient is not
      finite, the loss is not a number and nothing of the state changes but the step.
    """
    chex.assert_rank([batch.images, batch.labels], [4, 1])
    chex.assert_equal_shape_prefix([batch.images, batch.labels], 1)
    images, dropout_key = training_inputs(config, state.step, batch)
    loss_and_grad = LossAndGrad(config.model, config.label_smoothing, config.microbatches)
    found = loss_and_grad.gradient(state.params, state.batch_stats, images, batch.labels, dropout_key)
    # Running averages of unsynchronized BatchNorms differ between devices; the state does not.
    grads, batch_stats = lax.pmean(found.grads, AXIS), jax.tree.map(_agreed, found.batch_stats)
    updates, opt_state = config.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = optax.incremental_update(params, ema_params, 1 - config.ema_decay)
    metrics = Metrics.from_logits(found.logits, batch.labels).psum(AXIS)
    finite = jnp.isfinite(metrics.loss_sum) & all_finite(grads)
    after = TrainState(state.step + 1, params, batch_stats, opt_state, ema_params, state.ema_batch_stats)
    before = state.replace(step=state.step + 1)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)
    return state, metrics.replace(loss_sum=jnp.where(finite, metrics.loss_sum, jnp.nan))


def _agreed(leaf: jax.Array) -> jax.Array:
    """What the devices have of `batch_stats` on average; of what has none, such as a counter, the largest."""
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return lax.pmean(leaf, AXIS)
    return lax.pmax(leaf.astype(jnp.int32), AXIS).astype(leaf.dtype) if leaf.dtype == bool else lax.pmax(leaf, AXIS)


def train_steps(
    config: StepConfig, make_batch: MakeBatch, state: TrainState, resident: Resident, feeds: Feed, num_steps: jax.Array
) -> tuple[TrainState, Metrics]:
    """Several steps of SGD without the host, each as `train_step`.

    Args:
      config: what to train and how, closed over.
      make_batch: of the pipeline, closed over.
      state: the same on every device.
      resident: what the pipeline keeps on every device of the training split.
      feeds: this device's feed of each batch, every leaf `(K, ...)`.
      num_steps: how many of the K to do, the first ones; not known to the compiler, so that any number of them
        takes the same program.

    Returns:
      The state after the last of them, and each step's metrics, `(K,)`, 0 for steps that were not done.
    """

    def step(i: int | jax.Array, state: TrainState) -> tuple[TrainState, Metrics]:
        return train_step(config, state, make_batch(resident, jax.tree.map(lambda leaf: leaf[i], feeds)))

    (count,) = {len(leaf) for leaf in jax.tree.leaves(feeds)}
    if count == 1:
        # In a loop XLA is slow at the gradients of convolutions on a CPU (jax issue 12868).
        state, metrics = step(0, state)
        return state, jax.tree.map(lambda value: value[None], metrics)

    def one(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, done = carry
        state, metrics = step(i, state)
        return state, jax.tree.map(lambda all_steps, value: all_steps.at[i].set(value), done, metrics)

    nothing = jnp.zeros(count, jnp.promote_types(config.dtype, jnp.float32))
    return lax.fori_loop(0, num_steps, one, (state, Metrics(nothing, nothing, nothing)))


def eval_step(config: StepConfig, variables: dict[str, Any], batch: Batch) -> Metrics:
    """Metrics of a batch of test images.

    Args:
      config: what to evaluate, closed over.
      variables: `TrainState.eval_variables`, the same on every device.
      batch: this device's part.
    """
    images = normalize(batch.images, config.mean, config.std, config.dtype)
    logits = eval_logits(config.model, variables, images)
    return Metrics.from_logits(logits, batch.labels, batch.mask).psum(AXIS)


def eval_feed(
    config: StepConfig, make_batch: MakeBatch, variables: dict[str, Any], resident: Resident, feed: Feed
) -> Metrics:
    """`eval_step` of the batch that a pipeline makes of a feed; arguments as in `train_steps`."""
    return eval_step(config, variables, make_batch(resident, feed))
