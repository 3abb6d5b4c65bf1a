"""Which kernels are a parameter, scaled or centered, and which biases are added as they are, by their forms.

What does not match is differentiated without assuming anything.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mimicnorm_jax.diagnostics.tracing.channels import scales_by_channel
from mimicnorm_jax.diagnostics.tracing.forms import Entries
from mimicnorm_jax.diagnostics.tracing.network import LayerCall, TracedNetwork
from mimicnorm_jax.diagnostics.tracing.parts import disjoint


@dataclass(frozen=True)
class MatchedKernel:
    """A layer whose kernel is one parameter, perhaps centered, times a factor.

    Attributes:
      layer: the product.
      leaf: the parameter.
      centered: whether the fan-in's mean is subtracted.
      scaled: whether there is a factor other than 1; its value may depend on the parameters.
      scalars: single numbers that the kernel depends on as well.
      bias: a parameter that is added to the product's channels and used nowhere else, or None.
      by_channel: whether there is a factor by output channel, of any parameters; and the kernel's own among them,
        if `own`.
      own: see `by_channel`.
    """

    layer: LayerCall
    leaf: int
    centered: bool
    scaled: bool
    scalars: tuple[int, ...]
    bias: int | None
    by_channel: bool = False
    own: bool = False


def match_kernels(network: TracedNetwork) -> dict[int, MatchedKernel]:
    """The kernels of known form, by layer.

    A parameter that several layers use is known if any two of them use either parts of it that have no entry in common,
    or the same part in the same way: then the layer's positions are all of theirs (see `shared`).
    """
    found = {layer.index: kernel for layer in network.layers if (kernel := _match(network, layer)) is not None}
    for i, scale in scales_by_channel(network).items():
        kernel = MatchedKernel(network.layers[i], scale.leaf, scale.centered, False, (), None, True, scale.own)
        found.setdefault(i, kernel)
    unknown = set(network.direct)
    for layer in network.layers:
        kernel = found.get(layer.index)
        unknown |= {leaf for leaf in layer.leaves if kernel is None or leaf not in (kernel.leaf, *kernel.scalars)}
    for kernels in _by_leaf(kernel for kernel in found.values() if not kernel.by_channel).values():
        for group in shared(kernels):
            others = [other for other in kernels if other not in group]
            if not all(disjoint(_entries(group[0]), _entries(other)) for other in others):
                unknown.add(group[0].leaf)
    return {index: kernel for index, kernel in found.items() if kernel.leaf not in unknown}


def _match(network: TracedNetwork, layer: LayerCall) -> MatchedKernel | None:
    form, shape = layer.form, layer.product.kernel_shape
    if not isinstance(form, Entries) or form.single or form.repeated:
        return None
    # Of a larger one the form allows no derivative: it comes through stop_gradient.
    scalars = tuple(leaf for leaf in layer.leaves if leaf != form.leaf and network.sizes[leaf] == 1)
    fan_in = {axis for axis in layer.product.fan_in_axes if shape[axis] > 1}
    if form.centered not in (frozenset(), fan_in):
        return None
    scaled = bool(form.scales) or form.factor != 1
    bias = layer.bias if _adds_entries(layer) else None
    return MatchedKernel(layer, form.leaf, bool(form.centered), scaled, scalars, bias)


def shared(kernels: Iterable[MatchedKernel]) -> list[tuple[MatchedKernel, ...]]:
    """Kernels in groups of those that are the same function of the same parameter, read in the same way."""
    groups: dict[Any, list[MatchedKernel]] = {}
    for kernel in kernels:
        alone = kernel.layer.index if kernel.by_channel else None
        groups.setdefault((alone, kernel.layer.form, kernel.layer.product.kernel_map), []).append(kernel)
    return [tuple(group) for group in groups.values()]


def _by_leaf(kernels: Iterable[MatchedKernel]) -> dict[int, list[MatchedKernel]]:
    found: dict[int, list[MatchedKernel]] = {}
    for kernel in kernels:
        found.setdefault(kernel.leaf, []).append(kernel)
    return found


def _entries(kernel: MatchedKernel) -> Entries:
    assert isinstance(kernel.layer.form, Entries)
    return kernel.layer.form


def _adds_entries(layer: LayerCall) -> bool:
    """Whether each channel of the product is given its own entry of the bias, at every position."""
    form, shape = layer.bias_form or (None, ())
    if not isinstance(form, Entries) or form.centered or form.scales or form.factor != 1:
        return False
    varying = {axis for axis, side in enumerate(shape) if side > 1 and axis not in form.repeated}
    channels = {axis for axis in layer.product.channel_axes if layer.shape[axis] > 1}
    return len(shape) == len(layer.shape) and varying == channels
