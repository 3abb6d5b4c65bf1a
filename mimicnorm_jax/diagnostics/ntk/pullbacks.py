"""What one example's backward sweeps start from, and the one sweep for all outputs of what is pooled."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.tracing.network import TracedNetwork
from mimicnorm_jax.diagnostics.tracing.pooled import pooled, pooled_at, pooled_size

_ByIndex = Mapping[int, jax.Array]
Pull = Callable[[jax.Array], tuple[dict[int, jax.Array], dict[int, jax.Array], jax.Array]]
"""From the outputs' cotangent to derivatives: by leaf, by layer, and by what pooled layers reach the outputs by."""


def linearized(
    network: TracedNetwork,
    leaves: Sequence[jax.Array],
    x: jax.Array,
    direct: _ByIndex,
    perturbations: _ByIndex,
    with_pooled: bool,
) -> tuple[jax.Array, Pull, list[Any]]:
    """The outputs, their pullback, and what the layers multiply.

    Args:
      network: traced for these inputs.
      leaves: values of all parameters.
      x: a group of examples.
      direct: by leaf, parameters that the derivative is taken by; kernels of layers are held fixed.
      perturbations: by layer, zeros that are added to its product.
      with_pooled: whether to pull to what pooled layers reach the outputs by; else nothing is there.
    """
    after = pooled_at(network) if with_pooled else None

    def forward(direct: _ByIndex, perturbations: _ByIndex, shift: jax.Array) -> tuple[jax.Array, list[Any]]:
        values = [direct.get(i, leaf) for i, leaf in enumerate(leaves)]
        shifted = {} if after is None else {after: lambda h: h + shift.reshape(h.shape).astype(h.dtype)}
        outputs, evaluation = network.run(values, x, perturbations=perturbations, operands=shifted, frozen_kernels=True)
        moved = outputs + shift.reshape(outputs.shape) if with_pooled and after is None else outputs
        return moved, evaluation.operands

    shift = jnp.zeros(pooled_size(network) if with_pooled else 0, network.outputs.dtype)
    return jax.vjp(forward, direct, perturbations, shift, has_aux=True)


def maps(network: TracedNetwork, leaves: Sequence[jax.Array], x: jax.Array, patches: _ByIndex) -> dict[int, jax.Array]:
    """The derivatives by kernels of the numbers that pooled layers reach the outputs by, `(f, c)`.

    Args:
      network, leaves, x: as above.
      patches: by pooled layer, `(s, 1, f)`.
    """
    if not patches:
        return {}
    moved = {i: jnp.zeros(network.layers[i].shape, network.layers[i].dtype) for i in patches}
    h, pull = jax.vjp(lambda moved: pooled(network, leaves, x, moved), moved)
    (cotangents,) = pull(jnp.ones_like(h))
    outputs = {i: network.layers[i].product.outputs(cotangents[i]) for i in patches}
    return {i: jnp.einsum("sgf,sgc->fc", patches[i], y.astype(patches[i].dtype)) for i, y in outputs.items()}
