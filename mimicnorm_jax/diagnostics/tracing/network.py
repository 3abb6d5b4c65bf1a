"""Finds where a network multiplies activations with kernels, and runs it with a hand on each of these products.

Works on the network's jaxpr, so it sees any pure function: Flax modules, ours or not, and networks written by hand,
through jit, remat and custom derivatives. A product inside a loop (`scan`, `while`, `cond`) is not looked into: its
parameters count as used directly. Of `TracedNetwork.unrolled`, scans of few turns are read turn by turn.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.tracing import factors, forms, jaxprs
from mimicnorm_jax.diagnostics.tracing.jaxpr_interpreter import JaxprInterpreter, Value
from mimicnorm_jax.diagnostics.tracing.outputs import check_outputs
from mimicnorm_jax.diagnostics.tracing.parameters import (
    ApplyFn,
    bind,
    is_array,
    is_differentiated,
    titles,
    unique,
)
from mimicnorm_jax.diagnostics.tracing.products import Conv, Dot
from mimicnorm_jax.utils.trees import Path, path_names


@dataclass(frozen=True)
class LayerCall:
    """A product of activations with a kernel that is a function of parameters only.

    Attributes:
      index: its place in the order of evaluation.
      name: path of the layer, joined by slashes; made unique by a number where a layer is used again.
      product: its canonical form.
      leaves: indices of the parameters that its kernel depends on.
      bias: index of the parameter that is added to the product, perhaps transformed; neither has another use. Or None.
      dtype: of the product.
      shape: of the product.
      form: what the kernel is as a function of parameters.
      bias_form: what is added, likewise, and its shape.
      scaled: the kernel taken apart into a parameter and a factor, its arrays left out; or None.
    """

    index: int
    name: str
    product: Conv | Dot
    leaves: tuple[int, ...]
    bias: int | None
    dtype: Any
    shape: tuple[int, ...]
    form: forms.Form
    bias_form: tuple[forms.Form, tuple[int, ...]] | None
    scaled: factors.Scaled | None = None


@dataclass(frozen=True)
class Evaluation:
    """What one evaluation saw at each layer: the activations' operands, the kernels and the products."""

    operands: list[Any]
    kernels: list[Any]
    products: list[Any]


class TracedNetwork:
    """A network with its products laid open, for inputs of one shape.

    Args:
      apply_fn: the network.
      params: its parameters, a tree of arrays or shapes; leaves that are neither are held fixed.
      x: inputs, an array or a shape.

    Attributes:
      paths: of the parameters that are arrays, in the order of the tree's leaves.
      titles: the same as text, all different.
      shapes: shapes and types of these.
      sizes: number of entries of each.
      layers: every product of activations with a kernel, in the order of evaluation.
      direct: indices of the parameters that reach the outputs in another way than through layers' kernels.
      outputs: shape and dtype of the outputs.
      program: the network's jaxpr, of parameters and inputs, without what its outputs do not need.
      looped: indices of the layers within loops that are unrolled.
      kept_loops: loops that may hold layers and are too long to be unrolled, and why.

    Raises:
      ValueError: if the network does not return one array `(N, O)`.
    """

    def __init__(self, apply_fn: ApplyFn, params: Any, x: Any) -> None:
        apply_fn, params = bind(apply_fn, params)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        self.paths: list[Path] = [path_names(path) for path, _ in leaves]
        self.titles: list[str] = titles(self.paths)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (params, x))
        self.sizes = [int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes[0])]
        self._differentiated = [is_differentiated(leaf) for leaf in jax.tree.leaves(shapes[0])]
        program, outputs = jax.make_jaxpr(apply_fn, return_shape=True)(*shapes)
        check_outputs(outputs, x.shape)
        self.program = jaxprs.pruned(program)  # a head that is left out of the outputs is no layer
        self.outputs: Any = outputs
        self.shapes, self._unroll = jax.tree.leaves(shapes[0]), False
        self._analyze()

    def unrolled(self) -> "TracedNetwork":
        """The same network with the layers in its scans of few turns laid open; itself, if there are none."""
        other = copy.copy(self)
        other._unroll = True
        other._analyze()
        return other if other.looped or other.kept_loops else self

    def _analyze(self) -> None:
        """Finds the layers."""
        found: list[Any] = []

        def note(equation: Any, inputs: Sequence[Value], form: Conv | Dot, kernel_first: bool) -> None:
            found.append((form, inputs[not kernel_first], equation.outvars[0].aval))

        interpreter = JaxprInterpreter(note, params_only=True, unroll=self._unroll)

        def analyze(leaves: Sequence[jax.Array]) -> None:
            for value in interpreter.run(self.program, self._arguments(leaves, None)):
                interpreter.direct.update(value.leaves)
                interpreter.uses[value.layer] += 1

        jax.eval_shape(analyze, self.shapes)
        self.direct = frozenset(interpreter.direct)
        self.looped, self.kept_loops = frozenset(interpreter.looped), tuple(interpreter.kept)
        names = unique([self._name(kernel.leaves) for _, kernel, _ in found])
        in_kernels = {leaf for _, kernel, _ in found for leaf in kernel.leaves}
        candidates = {
            layer: leaf
            for layer, value in interpreter.biases.items()
            for leaf in value.leaves
            if interpreter.direct[leaf] == interpreter.uses[layer] == 1 and leaf not in in_kernels
        }
        bias_forms = {
            layer: (value.form, np.shape(value.value))
            for layer, value in interpreter.biases.items()
            if layer in candidates
        }
        self.layers = [
            LayerCall(
                *(i, name, form, tuple(sorted(kernel.leaves)), candidates.get(i), aval.dtype, aval.shape),
                kernel.form,
                bias_forms.get(i),
                None if kernel.scaled is None else replace(kernel.scaled, base=None, factor=None),
            )
            for i, (name, (form, kernel, aval)) in enumerate(zip(names, found, strict=True))
        ]

    def _arguments(self, leaves: Sequence[Any], x: Any) -> list[Value]:
        arguments = []
        for i, (leaf, differentiated) in enumerate(zip(leaves, self._differentiated, strict=True)):
            form = forms.of_parameter(i, leaf.size) if differentiated else forms.of_constant(leaf)
            arguments.append(Value(leaf, leaves=frozenset([i] if differentiated else []), form=form))
        return [*arguments, Value(x, depends_on_input=True)]

    def _name(self, leaves: frozenset[int]) -> str:
        """Path of the layer that a kernel's parameters belong to: what their paths share."""
        paths = [self.paths[leaf] for leaf in sorted(leaves)]
        shared = paths[0][:-1] if len(paths[0]) > 1 else paths[0]
        while any(path[: len(shared)] != shared for path in paths):
            shared = shared[:-1]
        return "/".join(shared) or "+".join("/".join(path) for path in paths)

    def run(
        self,
        params: Any,
        x: jax.Array,
        *,
        perturbations: Mapping[int, jax.Array] | None = None,
        operands: Mapping[int, Callable[[jax.Array], jax.Array]] | None = None,
        frozen_kernels: bool = False,
    ) -> tuple[jax.Array, Evaluation]:
        """Evaluates the network.

        Args:
          params: parameters.
          x: inputs, of the shape given at construction.
          perturbations: by layer, what is added to its product; the derivative by it is the product's cotangent.
          operands: by layer, what takes the place of its activations' operand, a function of that.
          frozen_kernels: whether derivatives stop at the kernels of all layers.

        Returns:
          The outputs and what the layers saw.
        """
        perturbations, operands = perturbations or {}, operands or {}
        evaluation = Evaluation([], [], [])

        def on_product(equation: Any, inputs: Sequence[Value], form: Conv | Dot, kernel_first: bool) -> jax.Array:
            index = len(evaluation.products)
            kernel, operand = inputs[not kernel_first].value, inputs[kernel_first].value
            if index in operands:
                operand = operands[index](operand)
            if frozen_kernels:
                kernel = jax.lax.stop_gradient(kernel)
            y = jaxprs.evaluate(equation, [kernel, operand] if kernel_first else [operand, kernel])
            if index in perturbations:
                y = y + perturbations[index]
            evaluation.operands.append(operand)
            evaluation.kernels.append(kernel)
            evaluation.products.append(y)
            return y

        outputs = JaxprInterpreter(on_product, unroll=self._unroll).run(
            self.program, self._arguments(self.arrays(params), x)
        )
        return outputs[0].value, evaluation

    @property
    def dtype(self) -> Any:
        """What contributions are added up in, and kernels returned in: the outputs' type, at least float32."""
        return jnp.promote_types(self.outputs.dtype, jnp.float32)

    @staticmethod
    def arrays(params: Any) -> list[Any]:
        """The leaves that are arrays, in order."""
        return [leaf for leaf in jax.tree.leaves(params) if is_array(leaf)]

    def kernels(self, params: Any) -> list[jax.Array]:
        """The kernel of every layer, in the layer's own shape; evaluates no activation."""
        return [kernel.value for kernel in self._kernels(params)]

    def scaled_kernels(self, params: Any) -> list[factors.Scaled | None]:
        """The kernel of every layer taken apart, likewise."""
        return [kernel.scaled for kernel in self._kernels(params)]

    def _kernels(self, params: Any) -> list[Value]:
        kernels: list[Value] = []

        def on_product(equation: Any, inputs: Sequence[Value], form: Conv | Dot, kernel_first: bool) -> None:
            kernels.append(inputs[not kernel_first])

        interpreter = JaxprInterpreter(on_product, params_only=True, unroll=self._unroll)
        interpreter.run(self.program, self._arguments(self.arrays(params), None))
        return kernels
