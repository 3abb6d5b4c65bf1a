"""Which axes of a kernel are fan-in: all in which the kernels of transposed, local and attention layers differ."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mimicnorm_jax.functional.kernels import Shape
from mimicnorm_jax.functional.transform import KernelFunction, KernelTransform


def over_fan_in(function: KernelFunction, fan_in: Sequence[int]) -> KernelFunction:
    """The same function for kernels whose fan-in stands at other axes than all but the last.

    Args:
      function: of a kernel `(..., n_out)`, each of whose output channels it treats alone.
      fan_in: axes of the fan-in; all others are of output channels, heads, places, or layers of a stack.

    Returns:
      A function of such kernels. It raises ValueError where an axis is not the kernel's, or none is left for outputs.

    Example:
      >>> from mimicnorm_jax.functional import center
      >>> over_fan_in(center, [1])(jnp.array([[1.0, 3.0], [5.0, 5.0]])).tolist()
      [[-1.0, 1.0], [0.0, 0.0]]
    """

    def transformed(kernel: jax.Array) -> jax.Array:
        *others, last = _outputs(kernel.shape, fan_in)
        one = function if last == kernel.ndim - 1 else _over_all_but(last - len(others), function)
        for axis in others:  # the last, so outermost, first
            one = jax.vmap(one, in_axes=axis, out_axes=axis)
        return one(kernel)

    return transformed


def _over_all_but(output: int, function: KernelFunction) -> KernelFunction:
    return lambda kernel: jnp.moveaxis(function(jnp.moveaxis(kernel, output, -1)), -1, output)


def _outputs(shape: Shape, fan_in: Sequence[int]) -> list[int]:
    rank = len(shape)
    inputs = {axis % rank for axis in fan_in if -rank <= axis < rank}
    outputs = [axis for axis in range(rank) if axis not in inputs]
    if len(inputs) != len(fan_in) or not inputs or not outputs:
        raise ValueError(
            f"fan_in={tuple(fan_in)} of a kernel of shape {tuple(shape)}: name each axis of the inputs once, "
            "and leave one for the outputs"
        )
    return outputs


@dataclass(frozen=True)
class KernelLayout:
    """A kernel as its layer reads it.

    Attributes:
      shape: its shape.
      fan_in: axes of the fan-in.
      groups: of the layer's input channels.
    """

    shape: tuple[int, ...]
    fan_in: tuple[int, ...]
    groups: int = 1

    @property
    def flat_shape(self) -> tuple[int, ...]:
        """What rules are asked with: the axes of the fan-in, then all outputs as one axis.

        Example:
          >>> KernelLayout((64, 8, 16), (0,)).flat_shape  # an attention's query: 8 heads of 16
          (64, 128)
        """
        outputs = _outputs(self.shape, self.fan_in)
        return (*(self.shape[axis] for axis in self.fan_in), math.prod(self.shape[axis] for axis in outputs))

    def takes(self, transform: KernelTransform) -> bool:
        """Whether the transform takes this kernel."""
        return transform.takes(self.flat_shape, self.groups)

    def function(self, transform: KernelTransform) -> KernelFunction:
        """What the transform does to this kernel."""
        return over_fan_in(transform.at(self.flat_shape, self.groups), self.fan_in)

    def stacked(self, axes: Sequence[int]) -> tuple[int, ...]:
        """The axes of the fan-in in a stack of such kernels along `axes`."""
        rest = [axis for axis in range(len(self.shape) + len(axes)) if axis not in axes]
        return tuple(rest[axis] for axis in self.fan_in)
