"""Derivatives of layers' kernels by the parameters that they are functions of; no activation is evaluated."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mimicnorm_jax.diagnostics.ntk.matching import MatchedKernel, shared
from mimicnorm_jax.diagnostics.tracing.network import LayerCall, TracedNetwork


def _kernels_of(network: TracedNetwork, leaves: Sequence[Any], chosen: Mapping[int, Any], layers: Sequence[int]) -> Any:
    values = list(leaves)
    for leaf, value in chosen.items():
        values[leaf] = value
    kernels = network.kernels(values)
    return [kernels[i] for i in layers]


def squared_scales(
    network: TracedNetwork, kernels: Sequence[MatchedKernel], leaves: Sequence[jax.Array]
) -> dict[int, Any]:
    """By layer, the a in `T T^T = a (identity or centering)`: the squared norm of T^T's image of one entry.

    Args:
      network: of the kernels.
      kernels: of known form, T times their parameter.
      leaves: values of all parameters.
    """
    scaled = [kernel for kernel in kernels if kernel.scaled]
    scales: dict[int, Any] = {kernel.layer.index: jnp.ones((), network.dtype) for kernel in kernels}
    if not scaled:
        return scales
    groups = shared(scaled)
    heads = [group[0] for group in groups]
    layers, of_leaf = [kernel.layer.index for kernel in heads], [kernel.leaf for kernel in heads]
    turns = [of_leaf[:i].count(leaf) for i, leaf in enumerate(of_leaf)]
    chosen = {kernel.leaf: leaves[kernel.leaf] for kernel in heads}
    values, pull = jax.vjp(lambda chosen: _kernels_of(network, leaves, chosen, layers), chosen)

    def squares(turn: jax.Array) -> dict[int, jax.Array]:
        """By leaf, of one kernel of each: several kernels may be parts of it."""
        entries = [jnp.zeros_like(k).at[(0,) * k.ndim].set(turn == mine) for k, mine in zip(values, turns, strict=True)]
        return {leaf: jnp.sum(pulled.astype(network.dtype) ** 2) for leaf, pulled in pull(entries)[0].items()}

    found = lax.map(squares, jnp.arange(max(turns) + 1))
    for group, turn in zip(groups, turns, strict=True):
        for kernel in group:
            share = 1 - 1 / kernel.layer.product.sizes[2] if kernel.centered else 1.0
            scales[kernel.layer.index] = found[kernel.leaf][turn] / share
    return scales


def scalar_tangents(
    network: TracedNetwork, kernels: Sequence[MatchedKernel], weights: Sequence[float], leaves: Sequence[jax.Array]
) -> dict[tuple[int, int], jax.Array]:
    """By scalar with a weight and by layer, the kernel's derivative by the scalar, `(G, F, C)`."""
    found: dict[tuple[int, int], jax.Array] = {}
    with_scalars = {kernel.layer.index: kernel for kernel in kernels if kernel.scalars}
    for scalar in sorted({s for kernel in with_scalars.values() for s in kernel.scalars if weights[s]}):
        layers = [i for i, kernel in with_scalars.items() if scalar in kernel.scalars]
        function = lambda value, s=scalar, t=layers: _kernels_of(network, leaves, {s: value}, t)  # noqa: E731
        for i, tangent in zip(layers, _tangents(function, leaves[scalar]), strict=True):
            found[scalar, i] = with_scalars[i].layer.product.kernel(tangent).astype(network.dtype)
    return found


def _tangents(function: Callable[[jax.Array], list[jax.Array]], at: jax.Array) -> list[jax.Array]:
    """The derivative by a single number, by reverse mode alone, which hand-written derivatives have too."""
    values, pull = jax.vjp(function, at)
    return jax.vjp(pull, [jnp.zeros_like(value) for value in values])[1]((jnp.ones_like(at),))[0]


def pullback(
    network: TracedNetwork, layers: Sequence[LayerCall], weights: Sequence[float], leaves: Sequence[jax.Array]
) -> Callable[[Mapping[int, jax.Array]], dict[int, jax.Array]]:
    """From derivatives by kernels `(G, F, C)`, by layer, to those by their parameters with a weight, by leaf."""
    if not layers:
        return lambda by_kernel: {}
    indices = [layer.index for layer in layers]
    chosen = {leaf: leaves[leaf] for layer in layers for leaf in layer.leaves if weights[leaf]}
    kernels, pull = jax.vjp(lambda chosen: _kernels_of(network, leaves, chosen, indices), chosen)
    dtypes = [kernel.dtype for kernel in kernels]

    def back(by_kernel: Mapping[int, jax.Array]) -> dict[int, jax.Array]:
        # In the kernel's own type, like a backward pass: the kernel may be a function of casts.
        zipped = zip(layers, dtypes, strict=True)
        return pull([layer.product.unkernel(by_kernel[layer.index]).astype(dtype) for layer, dtype in zipped])[0]

    return back
