"""Inputs that are a tree of arrays (tokens and a mask, a graph) as one array, which the diagnostics take."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn


@dataclass(frozen=True)
class _Leaf:
    shape: tuple[int, ...]
    dtype: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class TreeInputs:
    """How a tree of arrays, each with the examples along its first axis, is kept as bytes `(N, B)`.

    Bit by bit the same: `unpack(pack(x))` is x. Nothing can be differentiated by packed inputs.

    Attributes:
      tree: the structure.
      leaves: shape of an example and type of each array.

    Example:
      >>> x = {"tokens": jnp.array([[1, 2]]), "mask": jnp.array([[True, False]])}
      >>> inputs = TreeInputs.of(x)
      >>> inputs.pack(x).shape, inputs.unpack(inputs.pack(x))["mask"].tolist()
      ((1, 10), [[True, False]])
    """

    tree: Any
    leaves: tuple[_Leaf, ...]

    @staticmethod
    def of(x: Any) -> "TreeInputs":
        """The way to keep trees like this one.

        Raises:
          ValueError: unless all leaves are real arrays of equally many examples.
        """
        leaves, tree = jax.tree.flatten(x)
        arrays = [jnp.asarray(leaf) for leaf in leaves]
        if not arrays or any(a.ndim == 0 or len(a) != len(arrays[0]) for a in arrays):
            shapes = [a.shape for a in arrays]
            raise ValueError(f"inputs hold arrays of shapes {shapes}: every one has the examples along its first axis")
        for array in arrays:
            if not (array.dtype == bool or jnp.issubdtype(array.dtype, jnp.number)) or array.dtype.kind == "c":
                raise ValueError(f"inputs hold an array of {array.dtype}: only real numbers and booleans can be packed")
        return TreeInputs(tree, tuple(_Leaf(a.shape[1:], a.dtype) for a in arrays))

    def pack(self, x: Any) -> jax.Array:
        """A tree as bytes, `(N, B)` uint8.

        Raises:
          ValueError: for a tree of another structure, or arrays of other shapes or types.
        """
        if TreeInputs.of(x) != self:
            raise ValueError(f"inputs are {jax.tree.map(jnp.shape, x)}; they were described as {self.leaves}")
        parts = [np.ascontiguousarray(jnp.asarray(leaf)) for leaf in jax.tree.leaves(x)]
        return jnp.asarray(np.concatenate([part.reshape(len(part), -1).view(np.uint8) for part in parts], 1))

    def unpack(self, packed: jax.Array) -> Any:
        """The tree; may be traced."""
        arrays, start = [], 0
        for leaf in self.leaves:
            part = packed[:, start : start + leaf.nbytes]
            start += leaf.nbytes
            arrays.append(self._array(leaf, part))
        return jax.tree.unflatten(self.tree, arrays)

    @staticmethod
    def _array(leaf: _Leaf, part: jax.Array) -> jax.Array:
        shape = (len(part), *leaf.shape)
        if leaf.dtype == bool:
            return part.reshape(shape) != 0
        size = leaf.dtype.itemsize
        flat = part if size == 1 else part.reshape(len(part), -1, size)
        return jax.lax.bitcast_convert_type(flat, leaf.dtype).reshape(shape)

    def of_packed(self, apply_fn: ApplyFn) -> ApplyFn:
        """A network of trees as one of packed inputs; equal ones compile once."""
        return _OfPacked(apply_fn, self)


@dataclass(frozen=True)
class _OfPacked:
    apply_fn: Any
    inputs: TreeInputs

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        return self.apply_fn(params, self.inputs.unpack(x))
