"""Derivatives of layers' kernels by the parameters that they are functions of; no activation is evaluated."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.ntk.matching import Kernel
from mimicnorm_jax.diagnostics.tracing.interpreter import LayerCall, TracedNetwork


def _kernels_of(network: TracedNetwork, leaves: Sequence[Any], chosen: Mapping[int, Any], layers: Sequence[int]) -> Any:
    values = list(leaves)
    for leaf, value in chosen.items():
        values[leaf] = value
    kernels = network.kernels(values)
    return [kernels[i] for i in layers]


def squared_scales(network: TracedNetwork, kernels: Sequence[Kernel], leaves: Sequence[jax.Array]) -> dict[int, Any]:
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
    layers = [kernel.layer.index for kernel in scaled]
    chosen = {kernel.leaf: leaves[kernel.leaf] for kernel in scaled}
    values, pull = jax.vjp(lambda chosen: _kernels_of(network, leaves, chosen, layers), chosen)
    entries = [jnp.zeros_like(k).at[(0,) * k.ndim].set(1) for k in values]
    pulled = pull(entries)[0]
    for kernel in scaled:
        fan_in = kernel.layer.product.sizes[2]
        share = 1 - 1 / fan_in if kernel.centered else 1.0
        scales[kernel.layer.index] = jnp.sum(pulled[kernel.leaf].astype(network.dtype) ** 2) / share
    return scales


def scalar_tangents(
    network: TracedNetwork, kernels: Sequence[Kernel], weights: Sequence[float], leaves: Sequence[jax.Array]
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
