"""The loss, and the channels' means and variances, after one step of gradient descent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.tracing.layers import ByLayer, prepared, select, trace
from mimicnorm_jax.diagnostics.tracing.network import LayerCall
from mimicnorm_jax.diagnostics.tracing.outputs import check_finite, evaluable
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn, Split

LossFn = Callable[[jax.Array, jax.Array], jax.Array]
"""Outputs `(N, O)` and targets `(N, ...)` to the scalar that is minimized."""
DIVERGED = 1e3
"""A loss that has grown by this factor has diverged, as in the paper."""


def softmax_loss(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross entropy of logits `(N, O)` at labels `(N,)`, in nats.

    Args:
      outputs: logits, `(N, O)`.
      labels: `(N,)`, from 0 to O - 1.
    """
    log_p = jax.nn.log_softmax(outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32)))
    return -jnp.take_along_axis(log_p, labels[:, None], axis=1).mean()


@dataclass(frozen=True)
class Batch:
    """What a gradient is taken of.

    Attributes:
      x: inputs, `(N, ...)`.
      targets: `(N, ...)`; labels `(N,)` for `softmax_loss`.
      loss: of outputs and targets; a function of module level, so that it compiles once.
    """

    x: jax.Array
    targets: jax.Array
    loss: LossFn = softmax_loss


@dataclass(frozen=True)
class Channels:
    """A layer's products by channel, before any bias, over images and positions, at every rate.

    Attributes:
      means: `(R, C)`.
      variances: `(R, C)`.
    """

    means: np.ndarray
    variances: np.ndarray


@partial(jax.jit, static_argnames=("apply_fn", "loss"))
def _gradient(apply_fn: ApplyFn, params: Any, x: jax.Array, targets: jax.Array, loss: LossFn) -> Any:
    """The loss, the outputs, and the gradient by the leaves that are differentiated."""
    split = Split.of(params)

    def loss_of(arrays: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        outputs = apply_fn(split.join(arrays), x)
        return loss(outputs, targets), outputs

    (value, outputs), grads = jax.value_and_grad(loss_of, has_aux=True)(split.arrays)
    return value, outputs, grads


def _stepped(params: Any, grads: Any, rate: float) -> Any:
    split = Split.of(params)
    return split.join([(p - rate * g).astype(p.dtype) for p, g in zip(split.arrays, grads, strict=True)])


@partial(jax.jit, static_argnames=("apply_fn", "loss"))
def _loss_at(apply_fn: ApplyFn, params: Any, grads: Any, rate: float, batch: Any, loss: LossFn) -> jax.Array:
    x, targets = batch
    return loss(apply_fn(_stepped(params, grads, rate), x), targets)


def checked_arguments(apply_fn: ApplyFn, params: Any, batch: Batch) -> tuple[ApplyFn, Any, jax.Array, jax.Array]:
    """The network, its parameters, inputs and targets in the form that `jax.jit` takes.

    Raises:
      ValueError: if these cannot be a network's, or targets do not fit.
    """
    apply_fn, params, x = prepared(apply_fn, params, batch.x)
    targets = jnp.asarray(batch.targets)
    outputs = evaluable(apply_fn, params, x)
    if targets.ndim == 0 or len(targets) != len(x):
        raise ValueError(f"targets have shape {targets.shape} for {len(x)} inputs: give one for each")
    if batch.loss is softmax_loss:
        integers = jnp.issubdtype(targets.dtype, jnp.integer) and targets.ndim == 1
        if not integers or int(targets.min()) < 0 or int(targets.max()) >= outputs.shape[1]:
            raise ValueError(
                f"targets of softmax_loss are labels (N,), whole numbers from 0 to {outputs.shape[1] - 1}; got "
                f"{targets.dtype} of shape {targets.shape}" + ("" if not integers else f", up to {targets.max()}")
            )
    return apply_fn, params, x, targets


def checked_gradient(apply_fn: ApplyFn, params: Any, x: jax.Array, targets: jax.Array, loss: LossFn) -> Any:
    """The loss, and its gradient by the leaves that are differentiated.

    Raises:
      ValueError: if outputs or loss are not finite.
    """
    value, outputs, grads = _gradient(apply_fn, params, x, targets, loss)
    check_finite(outputs)
    if jnp.shape(value) or not jnp.isfinite(value):
        raise ValueError(f"the loss is {value}: it must be one finite number")
    return value, grads


def _rates(rates: Sequence[float]) -> list[float]:
    if not len(rates) or not all(0 <= rate < np.inf for rate in rates):
        raise ValueError(f"rates are {list(rates)}: give at least one, each at least 0 and finite")
    return [float(rate) for rate in rates]


def relative_losses(apply_fn: ApplyFn, params: Any, batch: Batch, rates: Sequence[float]) -> np.ndarray:
    r"""The loss after one step of plain gradient descent, over the loss before: $L(\theta - \eta g) / L(\theta)$.

    Args:
      apply_fn: the network; its examples may influence one another.
      params: its parameters; leaves that are not floating-point arrays are held fixed.
      batch: what the gradient is taken of, and the loss before and after.
      rates: $\eta$, R of them.

    Returns:
      `(R,)`; infinite where the loss after the step is not finite.

    Raises:
      ValueError: for rates below 0, targets that do not fit, or a loss that is not finite and above 0 before the step.

    Example:
      >>> batch = Batch(jnp.ones((1, 1)), jnp.zeros((1, 1)), lambda y, t: ((y - t) ** 2).mean() / 2)
      >>> relative_losses(lambda w, x: x * w, jnp.ones(()), batch, [0.0, 0.5, 1.0]).tolist()  # (1 - rate)^2
      [1.0, 0.25, 0.0]
    """
    apply_fn, params, x, targets = checked_arguments(apply_fn, params, batch)
    value, grads = checked_gradient(apply_fn, params, x, targets, batch.loss)
    if not value > 0:
        raise ValueError(f"the loss is {value} before the step: a relative loss needs one above 0")
    after = [float(_loss_at(apply_fn, params, grads, rate, (x, targets), batch.loss)) for rate in _rates(rates)]
    found = np.array(after) / float(value)
    return np.where(np.isfinite(found), found, np.inf)


@partial(jax.jit, static_argnames=("apply_fn", "layers"))
def _moments_at(
    apply_fn: ApplyFn, params: Any, grads: Any, rate: float, x: jax.Array, layers: tuple[str, ...] | None
) -> ByLayer:
    network = trace(apply_fn, params, x, batch_coupled=True)
    chosen = select(network, layers)
    _, evaluation = network.run(_stepped(params, grads, rate), x)
    moments = []
    for layer in chosen:
        values = canonical(layer, evaluation.products[layer.index])
        moments.append((values.mean(0).ravel(), values.var(0).ravel()))
    return ByLayer(tuple(layer.name for layer in chosen), tuple(moments))


def canonical(layer: LayerCall, products: jax.Array) -> jax.Array:
    """A product, or a cotangent of it, as `(S, G, C)`, S images and positions."""
    values = layer.product.outputs(products)
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def channel_moments(
    apply_fn: ApplyFn, params: Any, batch: Batch, rates: Sequence[float], layers: Sequence[str] | None = None
) -> dict[str, Channels]:
    r"""Means and variances of every layer's channels after a step of each rate; rate 0 is the network as it is.

    Args:
      apply_fn, params, batch, rates: as in `relative_losses`.
      layers: by name (see `nngp.names`); None for all that can be seen.

    Returns:
      By layer, in the order of evaluation; what overflows is infinite or NaN.

    Raises:
      ValueError: as `relative_losses`, and for an unknown layer or a network without one.
    """
    apply_fn, params, x, targets = checked_arguments(apply_fn, params, batch)
    _, grads = checked_gradient(apply_fn, params, x, targets, batch.loss)
    names = None if layers is None else tuple(layers)
    found = [jax.device_get(_moments_at(apply_fn, params, grads, rate, x, names)) for rate in _rates(rates)]
    means, variances = (
        [np.stack([np.asarray(each.values[i][part]) for each in found]) for i in range(len(found[0].names))]
        for part in (0, 1)
    )
    return {name: Channels(m, v) for name, m, v in zip(found[0].names, means, variances, strict=True)}
