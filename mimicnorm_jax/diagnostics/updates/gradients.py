"""What a gradient is made of: terms that agree or cancel, and classes that dominate."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.tracing import forms
from mimicnorm_jax.diagnostics.tracing.layers import ByLayer, example_axis, select, trace
from mimicnorm_jax.diagnostics.tracing.network import LayerCall, TracedNetwork
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn
from mimicnorm_jax.diagnostics.updates.steps import Batch, LossFn, canonical, checked_arguments, checked_gradient


def _cotangents(
    network: TracedNetwork, chosen: Sequence[LayerCall], params: Any, x: jax.Array, loss: Callable[..., jax.Array]
) -> tuple[dict[int, jax.Array], Any]:
    """The loss's derivative by the products of layers, and what the layers saw."""

    def loss_of(perturbations: dict[int, jax.Array]) -> tuple[jax.Array, Any]:
        outputs, evaluation = network.run(params, x, perturbations=perturbations)
        return loss(outputs), evaluation.operands

    zeros = {layer.index: jnp.zeros(layer.shape, layer.dtype) for layer in chosen}
    return jax.grad(loss_of, has_aux=True)(zeros)


def _is_centered(layer: LayerCall) -> bool:
    form = layer.form
    return isinstance(form, forms.Entries) and form.centered == frozenset(layer.product.fan_in_axes)


@partial(jax.jit, static_argnames=("apply_fn", "loss", "layers"))
def _cancellation(
    apply_fn: ApplyFn, params: Any, x: jax.Array, targets: jax.Array, loss: LossFn, layers: tuple[str, ...] | None
) -> ByLayer:
    network = trace(apply_fn, params, x, batch_coupled=True)
    chosen = select(network, layers)
    cotangents, operands = _cotangents(network, chosen, params, x, lambda outputs: loss(outputs, targets))
    ratios = []
    for layer in chosen:
        cotangent = canonical(layer, cotangents[layer.index])
        patches = layer.product.patches(operands[layer.index]).astype(cotangent.dtype)
        if _is_centered(layer):
            patches = patches - patches.mean(2, keepdims=True)
        # Every term is a product, so the sum of their absolute values is one of products as well.
        sizes = jnp.einsum("sgf,sgc->gfc", abs(patches), abs(cotangent), precision="highest")
        sums = jnp.einsum("sgf,sgc->gfc", patches, cotangent, precision="highest")
        ratios.append(sizes.sum() / abs(sums).sum())
    return ByLayer(tuple(layer.name for layer in chosen), tuple(ratios))


def cancellation(apply_fn: ApplyFn, params: Any, batch: Batch, layers: Sequence[str] | None = None) -> dict[str, float]:
    r"""Whether the terms of a kernel's gradient cancel: $\sum_w \sum_s |d_{ws}| / \sum_w |\sum_s d_{ws}|$.

    The gradient of a weight w is a sum over images and positions s of what the layer saw there times the derivative by
    what it gave. At ratio 1 all terms agree; m terms of random signs have about $\sqrt{m}$.

    Args:
      apply_fn, params, batch: as in `relative_losses`.
      layers: by name (see `nngp.names`); None for all that can be seen.

    Returns:
      By layer, in the order of evaluation. The kernel is the one that multiplies; if that is a centered parameter, it
      is the parameter (what any other transform does to the terms is left out). Infinite where the terms cancel
      entirely, NaN where all of them are 0.

    Raises:
      ValueError: as `channel_moments`.

    Example:
      >>> batch = Batch(jnp.array([[1.0], [1.0]]), jnp.array([[3.0], [-1.0]]), lambda y, t: ((y - t) ** 2).sum() / 2)
      >>> cancellation(lambda params, x: x @ params["w"], {"w": jnp.zeros((1, 1))}, batch)  # |-3| + |1| over |-2|
      {'w': 2.0}
    """
    apply_fn, params, x, targets = checked_arguments(apply_fn, params, batch)
    checked_gradient(apply_fn, params, x, targets, batch.loss)
    names = None if layers is None else tuple(layers)
    found = jax.device_get(_cancellation(apply_fn, params, x, targets, batch.loss, names))
    return {name: float(ratio) for name, ratio in zip(found.names, found.values, strict=True)}


@partial(jax.jit, static_argnames=("apply_fn", "loss", "before"))
def _logit_gradient(
    apply_fn: ApplyFn, params: Any, x: jax.Array, targets: jax.Array, loss: LossFn, before: bool
) -> jax.Array:
    if not before:
        return jax.grad(loss)(apply_fn(params, x), targets)
    network = trace(apply_fn, params, x, batch_coupled=True)
    last = select(network, None)[-1]
    cotangents, _ = _cotangents(network, [last], params, x, lambda outputs: loss(outputs, targets))
    return _by_class(last, cotangents[last.index], len(x))


def _by_class(layer: LayerCall, cotangent: jax.Array, examples: int) -> jax.Array:
    """`(N, C)`, summed over positions."""
    channels, example = layer.product.channel_axes, example_axis(layer, examples, of_product=True)
    positions = [axis for axis in range(len(layer.shape)) if axis not in (*channels, example)]
    classes = math.prod(layer.shape[axis] for axis in channels)
    return cotangent.transpose(example, *channels, *positions).reshape(examples, classes, -1).sum(2)


def logit_gradient(apply_fn: ApplyFn, params: Any, batch: Batch, *, before_last_norm: bool = False) -> np.ndarray:
    """The loss's gradient by the logits, image by class.

    Args:
      apply_fn, params, batch: as in `relative_losses`.
      before_last_norm: by what the last layer's kernel gives instead, which is another thing where a norm stands on the
        logits; by a shift of a class at all positions, where that layer has some.

    Returns:
      `(N, O)`, of at least float32.

    Raises:
      ValueError: as `relative_losses`, and where it is not clear which axis of the last layer counts the examples.
    """
    apply_fn, params, x, targets = checked_arguments(apply_fn, params, batch)
    checked_gradient(apply_fn, params, x, targets, batch.loss)
    found = _logit_gradient(apply_fn, params, x, targets, batch.loss, before_last_norm)
    return np.asarray(found, jnp.promote_types(found.dtype, jnp.float32))


def dominance(gradient: np.ndarray) -> float:
    """Share of the class of the largest column in a gradient `(N, O)`'s sum of absolute values; 1/O if all are alike.

    Example:
      >>> dominance(np.array([[0.5, -0.5, 0.0, 0.0], [0.5, 0.0, -0.5, 0.0]]))
      0.5
    """
    columns = np.abs(np.asarray(gradient, np.float64)).sum(0)  # bfloat16 counts to 256
    return float(columns.max() / columns.sum())
