r"""Contributions of kernels with a factor by output channel (see `tracing.channels`).

With $x = T w_c$, $a = A_c$ and $h = \partial A_c / \partial w_c$, the kernel's derivative $J = a T + x h^T$ has
$J J^T = a^2 T T^T + (y + z)(y + z)^T - z z^T$, where $y = |h| x$ and $z = a T h / |h|$. The first term is that of a
centered kernel with cotangents scaled by channel. The others are one number a channel of each output's derivative, the
last with a minus sign; no derivative by the kernel is formed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.ntk.matching import MatchedKernel
from mimicnorm_jax.diagnostics.tracing.network import TracedNetwork


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChannelFactors:
    """Of one kernel.

    Attributes:
      factor: a, `(G, C)`.
      base: x, `(G, F, C)`.
      plus: y + z, likewise; None if the factor does not depend on the kernel's parameter.
      minus: z, likewise.
    """

    factor: jax.Array
    base: jax.Array
    plus: jax.Array | None = None
    minus: jax.Array | None = None


def _taken_apart(
    network: TracedNetwork, kernels: Sequence[MatchedKernel], leaves: Sequence[Any], chosen: Mapping[int, Any]
) -> dict[int, tuple[jax.Array, jax.Array]]:
    """By layer, x `(G, F, C)` and a `(G, C)`, with `chosen` in place of some parameters."""
    if not kernels:
        return {}
    scaled = network.scaled_kernels([chosen.get(i, leaf) for i, leaf in enumerate(leaves)])
    found: dict[int, tuple[jax.Array, jax.Array]] = {}
    for kernel in kernels:
        both = scaled[kernel.layer.index]
        assert both is not None
        base, factor = map(kernel.layer.product.kernel, (both.base, both.factor))
        found[kernel.layer.index] = base.astype(network.dtype), factor[:, 0].astype(network.dtype)
    return found


def channel_factors(
    network: TracedNetwork, kernels: Sequence[MatchedKernel], leaves: Sequence[jax.Array]
) -> dict[int, ChannelFactors]:
    """What the kernels among these that have a factor by channel contribute by, by layer."""
    kernels = [kernel for kernel in kernels if kernel.by_channel]
    own = {kernel.layer.index: kernel.leaf for kernel in kernels if kernel.own}
    chosen = {leaf: leaves[leaf] for leaf in own.values()}
    values, pull = jax.vjp(lambda chosen: _taken_apart(network, kernels, leaves, chosen), chosen)
    found = {i: ChannelFactors(factor, base) for i, (base, factor) in values.items()}
    if not own:
        return found
    ones = {
        i: (jnp.zeros_like(base), jnp.full_like(factor, 1 if i in own else 0)) for i, (base, factor) in values.items()
    }
    # No channel's factor depends on another's entries: the sum's derivative holds each one's at its own place.
    gradient, push = jax.vjp(lambda cotangents: pull(cotangents)[0], ones)
    (moved,) = push(gradient)
    for i in own:
        (base, factor), (direction, square) = values[i], moved[i]
        norm = jnp.sqrt(jnp.maximum(square, 0))[:, None]
        minus = factor[:, None] * jnp.where(norm > 0, direction / jnp.where(norm > 0, norm, 1), 0)
        found[i] = ChannelFactors(factor, base, norm * base + minus, minus)
    return found


def pull_factors(
    network: TracedNetwork, kernels: Sequence[MatchedKernel], weights: Sequence[float], leaves: Sequence[jax.Array]
) -> Callable[[Mapping[int, jax.Array]], dict[int, jax.Array]]:
    """From derivatives by factors `(G, C)`, by layer, to those by the other parameters that the factors depend on."""
    kernels = [kernel for kernel in kernels if any(weights[leaf] for leaf in others(kernel))]
    if not kernels:
        return lambda by_factor: {}
    chosen = {leaf: leaves[leaf] for kernel in kernels for leaf in others(kernel) if weights[leaf]}

    def factors(chosen: Mapping[int, Any]) -> dict[int, jax.Array]:
        return {i: factor for i, (_, factor) in _taken_apart(network, kernels, leaves, chosen).items()}

    _, pull = jax.vjp(factors, chosen)
    return lambda by_factor: pull({kernel.layer.index: by_factor[kernel.layer.index] for kernel in kernels})[0]


def others(kernel: MatchedKernel) -> tuple[int, ...]:
    """The parameters that a factor by channel depends on beside the kernel's own."""
    return tuple(leaf for leaf in kernel.layer.leaves if leaf != kernel.leaf) if kernel.by_channel else ()


class ChannelScales:
    """The kernels among some that have a factor by channel, at certain parameters.

    Args:
      network: of the kernels.
      kernels: of known form.
      weights: by leaf of the parameters.
      leaves: values of all parameters.
    """

    def __init__(
        self,
        network: TracedNetwork,
        kernels: Sequence[MatchedKernel],
        weights: Sequence[float],
        leaves: Sequence[jax.Array],
    ) -> None:
        self.factors = channel_factors(network, kernels, leaves)
        self._pull = pull_factors(network, kernels, weights, leaves)
        self._own = {kernel.layer.index: kernel.leaf for kernel in kernels if kernel.own and weights[kernel.leaf]}

    def moved(self, patches: Mapping[int, jax.Array]) -> dict[tuple[int, str], jax.Array]:
        """By layer and kind, a group's patches `(S, G, F)` times x, y + z and z: `(S, G, C)`."""
        return {
            (i, name): jnp.einsum("sgf,gfc->sgc", patches[i], value)
            for i, factors in self.factors.items()
            for name in ("base", "plus", "minus")
            if (value := getattr(factors, name)) is not None
        }

    def rows(
        self, moved: Mapping[tuple[int, str], jax.Array], cotangents: Mapping[int, jax.Array]
    ) -> tuple[dict[int, jax.Array], dict[tuple[int, int], jax.Array]]:
        """One output's derivatives by the factors' other parameters, by leaf, and the numbers, by leaf and sign."""
        numbers = {key: jnp.einsum("sgc,sgc->gc", cotangents[key[0]], value) for key, value in moved.items()}
        signed = {
            (leaf, sign): numbers[i, name].reshape(-1)
            for i, leaf in self._own.items()
            for name, sign in (("plus", 1), ("minus", -1))
        }
        return self._pull({i: numbers[i, "base"] for i in self.factors}), signed
