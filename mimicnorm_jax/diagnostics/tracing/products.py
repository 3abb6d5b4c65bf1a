"""Canonical form of a product of activations with a kernel, whatever dimension numbers wrote it.

A dense layer, a convolution of any stride, dilation, padding and number of groups, and an einsum are one thing:
at each position s and for each group g, `y[s, g, c] = sum_f patch[s, g, f] kernel[g, f, c]`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax


class Product(Protocol):
    """How one product reads in canonical form."""

    def patches(self, x: jax.Array) -> jax.Array:
        """The activations' operand as `(S, G, F)`."""
        ...

    def outputs(self, y: jax.Array) -> jax.Array:
        """The product, or a cotangent of it, as `(S, G, C)`."""
        ...

    def kernel(self, w: jax.Array) -> jax.Array:
        """The kernel's operand as `(G, F, C)`."""
        ...

    def unkernel(self, w: jax.Array) -> jax.Array:
        """The inverse of `kernel`."""
        ...

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Of the activations' operand, of which a convolution of one position need not read everything."""
        ...

    @property
    def example_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The axes of the activations' operand that may count a batch's examples, and those of the product."""
        ...

    @property
    def kernel_map(self) -> tuple[Any, ...]:
        """What `kernel` depends on; of two products with equal ones, it is the same map."""
        ...

    @property
    def fan_in_axes(self) -> tuple[int, ...]:
        """The kernel's axes that are summed over."""
        ...

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The product's axes of groups and channels."""
        ...


def _complement(rank: int, *taken: Sequence[int]) -> tuple[int, ...]:
    used = {axis for axes in taken for axis in axes}
    return tuple(axis for axis in range(rank) if axis not in used)


def _size(shape: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(shape[axis] for axis in axes)


def _inverse(permutation: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(permutation)), key=lambda i: permutation[i]))


@dataclass(frozen=True)
class Dot:
    """A `dot_general`; `kernel_first` says which operand the kernel is."""

    x_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    x_contract: tuple[int, ...]
    x_batch: tuple[int, ...]
    kernel_contract: tuple[int, ...]
    kernel_batch: tuple[int, ...]
    kernel_first: bool

    @staticmethod
    def of(params: dict[str, Any], shapes: Sequence[tuple[int, ...]], kernel_first: bool) -> "Dot":
        contract, batch = params["dimension_numbers"]
        x, kernel = (1, 0) if kernel_first else (0, 1)
        return Dot(
            shapes[x],
            shapes[kernel],
            tuple(contract[x]),
            tuple(batch[x]),
            tuple(contract[kernel]),
            tuple(batch[kernel]),
            kernel_first,
        )

    @property
    def _free(self) -> tuple[int, ...]:
        return _complement(len(self.x_shape), self.x_contract, self.x_batch)

    @property
    def _kernel_axes(self) -> tuple[int, ...]:
        free = _complement(len(self.kernel_shape), self.kernel_contract, self.kernel_batch)
        return (*self.kernel_batch, *self.kernel_contract, *free)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """S, G, F and C."""
        groups, fan_in = _size(self.kernel_shape, self.kernel_batch), _size(self.kernel_shape, self.kernel_contract)
        return _size(self.x_shape, self._free), groups, fan_in, math.prod(self.kernel_shape) // (groups * fan_in)

    def patches(self, x: jax.Array) -> jax.Array:
        positions, groups, fan_in, _ = self.sizes
        return x.transpose(*self._free, *self.x_batch, *self.x_contract).reshape(positions, groups, fan_in)

    def outputs(self, y: jax.Array) -> jax.Array:
        positions, groups, _, channels = self.sizes
        if self.kernel_first:
            return y.reshape(groups, channels, positions).transpose(2, 0, 1)
        return y.reshape(groups, positions, channels).transpose(1, 0, 2)

    def kernel(self, w: jax.Array) -> jax.Array:
        return w.transpose(self._kernel_axes).reshape(self.sizes[1:])

    @property
    def kernel_map(self) -> tuple[Any, ...]:
        return "dot", self.kernel_shape, self.kernel_batch, self.kernel_contract

    @property
    def fan_in_axes(self) -> tuple[int, ...]:
        return self.kernel_contract

    @property
    def channel_axes(self) -> tuple[int, ...]:
        groups, others = len(self.kernel_batch), len(self._free)
        count = len(self._kernel_axes) - len(self.kernel_contract)
        if self.kernel_first:
            return tuple(range(count))
        return (*range(groups), *range(groups + others, others + count))

    @property
    def example_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rank = len(self.channel_axes) + len(self._free)
        return self._free, _complement(rank, self.channel_axes)

    def unkernel(self, w: jax.Array) -> jax.Array:
        axes = self._kernel_axes
        return w.reshape([self.kernel_shape[axis] for axis in axes]).transpose(_inverse(axes))


@dataclass(frozen=True)
class Conv:
    """A `conv_general_dilated` whose right operand is the kernel."""

    x_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    dimensions: lax.ConvDimensionNumbers
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    x_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int

    @staticmethod
    def of(params: dict[str, Any], shapes: Sequence[tuple[int, ...]]) -> "Conv":
        return Conv(
            shapes[0],
            shapes[1],
            params["dimension_numbers"],
            tuple(params["window_strides"]),
            tuple(map(tuple, params["padding"])),
            tuple(params["lhs_dilation"]),
            tuple(params["rhs_dilation"]),
            params["feature_group_count"],
        )

    @property
    def _window(self) -> tuple[int, ...]:
        return tuple(self.kernel_shape[axis] for axis in self.dimensions.rhs_spec[2:])

    @property
    def _image(self) -> tuple[int, ...]:
        """Spatial shape of the output."""
        sides = [self.x_shape[axis] for axis in self.dimensions.lhs_spec[2:]]
        each = zip(sides, self.padding, self.x_dilation, self._window, self.kernel_dilation, self.strides, strict=True)
        return tuple(
            (low + high + (side - 1) * dx + 1 - (window - 1) * dk - 1) // stride + 1
            for side, (low, high), dx, window, dk, stride in each
        )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """S, G, F and C."""
        features, channels, *_ = self.dimensions.rhs_spec
        positions = self.x_shape[self.dimensions.lhs_spec[0]] * math.prod(self._image)
        fan_in = self.kernel_shape[channels] * math.prod(self._window)
        return positions, self.groups, fan_in, self.kernel_shape[features] // self.groups

    def patches(self, x: jax.Array) -> jax.Array:
        positions, groups, _, _ = self.sizes
        batch, channels, *space = self.dimensions.lhs_spec
        x = x.transpose(batch, *space, channels)
        borders = [(low, high, d - 1) for (low, high), d in zip(self.padding, self.x_dilation, strict=True)]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *borders, (0, 0, 0)])
        taps = []
        for tap in product(*map(range, self._window)):
            start = [t * d for t, d in zip(tap, self.kernel_dilation, strict=True)]
            stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, self._image, self.strides, strict=True)]
            ends = ([0, *start, 0], [x.shape[0], *stop, x.shape[-1]], [1, *self.strides, 1])
            taps.append(lax.slice(x, *ends).reshape(positions, groups, -1))
        return jnp.concatenate(taps, 2)

    def outputs(self, y: jax.Array) -> jax.Array:
        positions, groups, _, channels = self.sizes
        batch, features, *space = self.dimensions.out_spec
        return y.transpose(batch, *space, features).reshape(positions, groups, channels)

    def kernel(self, w: jax.Array) -> jax.Array:
        _, groups, fan_in, channels = self.sizes
        features, inputs, *space = self.dimensions.rhs_spec
        return w.transpose(*space, inputs, features).reshape(fan_in, groups, channels).transpose(1, 0, 2)

    @property
    def kernel_map(self) -> tuple[Any, ...]:
        return "conv", self.kernel_shape, self.dimensions.rhs_spec, self.groups

    @property
    def fan_in_axes(self) -> tuple[int, ...]:
        return tuple(self.dimensions.rhs_spec[1:])

    @property
    def channel_axes(self) -> tuple[int, ...]:
        return (self.dimensions.out_spec[1],)

    @property
    def example_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.dimensions.lhs_spec[0],), (self.dimensions.out_spec[0],)

    def unkernel(self, w: jax.Array) -> jax.Array:
        features, inputs, *space = self.dimensions.rhs_spec
        axes = (*space, inputs, features)
        return w.transpose(1, 0, 2).reshape([self.kernel_shape[axis] for axis in axes]).transpose(_inverse(axes))
