"""Running averages that belong to the averaged parameters: estimated anew before that network is evaluated."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.data.pipeline import Stop, never
from mimicnorm_jax.training.evaluation import of_one_process
from mimicnorm_jax.training.moments import Observed
from mimicnorm_jax.training.state import TrainState
from mimicnorm_jax.training.trainer import Trainer

MAX_BATCHES = 50
"""Training batches that an estimate takes, at most: the epoch's first ones."""
_MARGIN = 1e-5
"""How far a leaf's momentum has to be from 1: it is known to 1e-7, and what is left of 1 is divided by."""
_ROUNDINGS = 64
"""By how many of the type's two slopes of one line may differ, of numbers as large as the distance between them."""


def with_own_statistics(trainer: Trainer, state: TrainState, epoch: int, stop: Stop = never) -> TrainState:
    r"""The state, with `ema_batch_stats` of the network of `ema_params`; as it is if the run keeps none.

    The running averages along a run are those of the raw parameters, whose activations are others: logits before the
    last BatchNorm may differ in scale by orders of magnitude. As in stochastic weight averaging, the averaged network
    therefore sees some training batches, with augmentation and dropout, before it is evaluated.

    A norm's momentum m need not be known. No output depends on its running averages: they go from r to
    $f(r) = m r + (1 - m) s$ with the batch's statistics s. So $m = (f(c) - f(0)) / c$ for any c, here a bit larger
    than f(0) so that nothing cancels, and the mean of f(0) over batches, divided by 1 - m, is the mean of s. Leaves
    that a training step may depend on, as the statistics of a norm that is frozen, stay where they are in all passes.

    Leaves that are not averages of this kind keep the raw run's value: those that stay, those not of floating point,
    whose f is no such line, whose m is not in [0, 1), or whose estimate is not finite. The result depends on seed,
    epoch, `ema_params` and those leaves alone, so a resumed run finds the same.

    Args:
      trainer: of the run.
      state: replicated; its buffers are not given up.
      epoch: from 0, whose batches are taken.
      stop: see `evaluation.evaluate`.

    Raises:
      DataError: where the data cannot be read on.

    References:
      Izmailov et al. 2018, Averaging Weights Leads to Wider Optima and Better Generalization, section 3.2.
    """
    if state.ema_batch_stats is None:
        return state
    raw = jax.device_get(state.batch_stats)
    first_step = epoch * trainer.steps_per_epoch

    def summed(old: Any, done: int, feed: Any, count: int) -> Any:
        variables = {"params": state.ema_params, "batch_stats": trainer.data_parallel.replicate(old)}
        observed = Observed(variables, first_step + done)
        found = trainer.sum_of_moved(observed, trainer.pipeline.train, feed, count)
        return jax.tree.map(np.float64, jax.device_get(found))

    start, momentum, asked = raw, raw, of_one_process(stop)
    total, done = jax.tree.map(np.zeros_like, raw), 0
    for feed, num_steps in trainer.pipeline.train_feeds(epoch, 0, asked):
        if not done:
            start = jax.tree.map(_start, raw, trainer.statistics_read)
            momentum = _momenta(start, trainer.statistics_read, lambda old, feed=feed: summed(old, 0, feed, 1))
        count = min(num_steps, MAX_BATCHES - done)
        total = jax.tree.map(np.add, total, summed(start, done, feed, count))
        done += count
        asked()
        if done == MAX_BATCHES:
            break
    found = jax.tree.map(lambda leaf, f, m: _average(leaf, f / done, m), raw, total, momentum)
    return state.replace(ema_batch_stats=trainer.data_parallel.replicate(found))


def _start(raw: np.ndarray, is_read: bool) -> np.ndarray:
    return np.zeros_like(raw) if jnp.issubdtype(raw.dtype, jnp.floating) and not is_read else raw


def _momenta(start: Any, is_read: Any, moved: Callable[[Any], Any]) -> Any:
    """Of every leaf, NaN where it is no average.

    Args:
      start: where the leaves start, averages at 0.
      is_read: whether they stay there.
      moved: one batch's f.
    """
    low = moved(start)

    def at(distance: int) -> tuple[Any, Any]:
        probe = jax.tree.map(lambda f, leaf, stays: leaf if stays else _above(f, distance, leaf), low, start, is_read)
        return probe, moved(probe)

    return jax.tree.map(_momentum, start, low, *at(1), *at(2))


def _above(found: np.ndarray, distance: int, start: np.ndarray) -> np.ndarray:
    return (distance * (1 + np.abs(found))).astype(start.dtype)


def _momentum(start: Any, low: Any, near: Any, at_near: Any, far: Any, at_far: Any) -> Any:
    if not jnp.issubdtype(start.dtype, jnp.floating) or np.array_equal(near, far):
        return np.full_like(low, np.nan)
    with np.errstate(invalid="ignore"):  # of networks whose statistics are not finite
        near, far = near.astype(float), far.astype(float)
        momentum = (at_near - low) / near
        is_line = np.abs((at_far - at_near) / (far - near) - momentum) < _ROUNDINGS * jnp.finfo(start.dtype).eps
        return np.where(is_line, momentum, np.nan)


def _average(raw: np.ndarray, mean_of_f: np.ndarray, momentum: np.ndarray) -> np.ndarray:
    """The mean of a leaf's batch statistics; the raw run's value where it has none."""
    is_average = jnp.issubdtype(raw.dtype, jnp.floating) and ((momentum > -_MARGIN) & (momentum < 1 - _MARGIN)).all()
    if not (is_average and np.isfinite(mean_of_f).all()):
        return raw
    return (mean_of_f / (1 - momentum)).astype(raw.dtype)
