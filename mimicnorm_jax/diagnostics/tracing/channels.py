r"""Kernels that are a parameter times a factor by output channel, which may depend on that channel's own entries.

Of weight standardization and normalization, and of scales by channel, the kernel of channel c is $A_c\, T w_c$, with T
the identity or centering over the fan-in: its derivative is $A_c T + (T w_c) (\partial A_c / \partial w_c)^T$. That
$A_c$ is one number for all of the fan-in is seen where it is multiplied; that it depends on no other channel's entries
is proved like the independence of a batch's examples, with the channels in their place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.extend import core

from mimicnorm_jax.diagnostics.tracing.batch_axis import Along, BatchAxisInterpreter, Free, State
from mimicnorm_jax.diagnostics.tracing.batch_rules import RULES, free
from mimicnorm_jax.diagnostics.tracing.jaxprs import CUSTOM, operations, pruned
from mimicnorm_jax.diagnostics.tracing.network import LayerCall, TracedNetwork


@dataclass(frozen=True)
class ChannelScale:
    """What is known of such a kernel.

    Attributes:
      leaf: the parameter.
      centered: whether the fan-in's mean is subtracted from it.
      own: whether the factor may depend on it.
    """

    leaf: int
    centered: bool
    own: bool


def scales_by_channel(network: TracedNetwork) -> dict[int, ChannelScale]:
    """The kernels that are proved to be of this form, by layer."""
    candidates = [(layer, scale) for layer in network.layers if (scale := _candidate(network, layer)) is not None]
    if not candidates:
        return {}
    indices = [layer.index for layer, _ in candidates]

    def both(leaves: Sequence[jax.Array]) -> list[Any]:
        kernels = network.scaled_kernels(leaves)
        return [part for i in indices if (kernel := kernels[i]) is not None for part in (kernel.base, kernel.factor)]

    program = jax.make_jaxpr(both)(network.shapes)
    return {
        layer.index: scale
        for i, (layer, scale) in enumerate(candidates)
        if not scale.own or _separable(network, layer, scale.leaf, pruned(program, (2 * i, 2 * i + 1)))
    }


def _candidate(network: TracedNetwork, layer: LayerCall) -> ChannelScale | None:
    """What the kernel is, if its factor does not mix channels."""
    if (scaled := layer.scaled) is None or scaled.leaves != {scaled.form.leaf}:
        return None
    form, leaf, shape = scaled.form, scaled.form.leaf, layer.product.kernel_shape
    fan_in = frozenset(axis for axis in layer.product.fan_in_axes if shape[axis] > 1)
    alone = leaf not in network.direct and sum(leaf in other.leaves for other in network.layers) == 1
    whole = not form.repeated and not form.scales and form.factor == 1
    if not alone or not whole or form.centered not in (frozenset(), fan_in) or not fan_in <= scaled.shape.repeated:
        return None
    if any(kind == "part" for kind, *_ in form.layout):
        return None  # the factor might depend on another part
    return ChannelScale(leaf, bool(form.centered), leaf in scaled.factor_leaves)


def _separable(network: TracedNetwork, layer: LayerCall, leaf: int, program: core.ClosedJaxpr) -> bool:
    """Whether parameter and factor, the results of a program, depend at each channel on its own entries only."""
    if any(operation.primitive.name in CUSTOM for operation in operations(program)):
        return False  # a derivative of its own may be any
    shape, fan_in = layer.product.kernel_shape, layer.product.fan_in_axes
    channels = [axis for axis, side in enumerate(shape) if side > 1 and axis not in fan_in]
    return all(
        any(
            _follows(network, program, (leaf, source), axis, others_too)
            for source, side in enumerate(network.shapes[leaf].shape)
            if side == shape[axis]
            for others_too in (True, False)
        )
        for axis in channels
    )


def _follows(
    network: TracedNetwork, program: core.ClosedJaxpr, source: tuple[int, int], target: int, others_too: bool
) -> bool:
    """Whether each place along an axis of a parameter reaches that place of an axis of all results only.

    Other parameters are taken to have the same places along an axis of that length, if `others_too`.
    """
    leaf, axis = source
    size = network.shapes[leaf].shape[axis]
    states: list[State] = []
    for i, other in enumerate(network.shapes):
        wide = frozenset(axis for axis, side in enumerate(other.shape) if side > 1)
        fitting = [axis for axis, side in enumerate(other.shape) if side == size]
        states.append(Along(axis) if i == leaf else Along(fitting[-1]) if others_too and fitting else Free(wide))
    results = BatchAxisInterpreter(RULES, free, size).run(program, states)
    return all(result == Along(target) for result in results)
