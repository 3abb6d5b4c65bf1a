"""Which kernels are a parameter, scaled or centered, and which biases are added as they are, by their forms.

What does not match is differentiated without assuming anything.
"""

from dataclasses import dataclass

from mimicnorm_jax.diagnostics.tracing.forms import Entries
from mimicnorm_jax.diagnostics.tracing.interpreter import LayerCall, TracedNetwork


@dataclass(frozen=True)
class Kernel:
    """A layer whose kernel is one parameter, perhaps centered, times a factor of other parameters.

    Attributes:
      layer: the product.
      leaf: the parameter.
      centered: whether the fan-in's mean is subtracted.
      scaled: whether there is a factor other than 1; its value may depend on the parameters.
      scalars: single numbers that the kernel depends on as well.
      bias: a parameter that is added to the product's channels and used nowhere else, or None.
    """

    layer: LayerCall
    leaf: int
    centered: bool
    scaled: bool
    scalars: tuple[int, ...]
    bias: int | None


def match_kernels(network: TracedNetwork) -> dict[int, Kernel]:
    """The kernels of known form, by layer."""
    uses = [leaf for layer in network.layers for leaf in layer.leaves]
    found: dict[int, Kernel] = {}
    for layer in network.layers:
        form, shape = layer.form, layer.product.kernel_shape
        if not isinstance(form, Entries) or form.single or form.repeated:
            continue
        if uses.count(form.leaf) != 1 or form.leaf in network.direct:
            continue
        # Of a larger one the form allows no derivative: it comes through stop_gradient.
        scalars = tuple(leaf for leaf in layer.leaves if leaf != form.leaf and network.sizes[leaf] == 1)
        fan_in = {axis for axis in layer.product.fan_in_axes if shape[axis] > 1}
        if form.centered not in (frozenset(), fan_in):
            continue
        scaled = bool(form.scales) or form.factor != 1
        bias = layer.bias if _adds_entries(layer) else None
        found[layer.index] = Kernel(layer, form.leaf, bool(form.centered), scaled, scalars, bias)
    return found


def _adds_entries(layer: LayerCall) -> bool:
    """Whether each channel of the product is given its own entry of the bias, at every position."""
    form, shape = layer.bias_form or (None, ())
    if not isinstance(form, Entries) or form.centered or form.scales or form.factor != 1:
        return False
    varying = {axis for axis, side in enumerate(shape) if side > 1 and axis not in form.repeated}
    channels = {axis for axis in layer.product.channel_axes if layer.shape[axis] > 1}
    return len(shape) == len(layer.shape) and varying == channels
