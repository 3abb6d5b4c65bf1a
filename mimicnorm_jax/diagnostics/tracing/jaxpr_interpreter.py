"""One evaluation of a jaxpr that knows of each value whether the inputs reach it, and what it is of the parameters."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from mimicnorm_jax.diagnostics.tracing import factors, forms, jaxprs, loops, parts
from mimicnorm_jax.diagnostics.tracing.products import Conv, Dot


@dataclass(frozen=True)
class Value:
    """A value on the way through the network: whether the inputs reach it, and which parameters do without them.

    `layer` is the product that it is, unchanged; `form` says what it is as a function of parameters, `scaled` how it
    falls apart into a parameter and a factor.
    """

    value: Any
    depends_on_input: bool = False
    leaves: frozenset[int] = frozenset()
    layer: int | None = None
    form: forms.Form = forms.OTHER
    scaled: factors.Scaled | None = None


OnProduct = Callable[[Any, Sequence[Value], Conv | Dot, bool], Any]


class JaxprInterpreter:
    """One evaluation of a jaxpr, with `on_product` in place of every product with a kernel.

    A `params_only` one evaluates only what depends on parameters alone; everything else is None. With `unroll`, loops
    of few turns are read turn by turn.

    Attributes:
      direct: how often each parameter meets the inputs in another way than through a kernel.
      uses: by layer, of its product.
      biases: by layer, what is added to its product.
      looped: layers within loops.
      kept: loops that may hold layers and are not unrolled, and why.
    """

    def __init__(self, on_product: OnProduct, params_only: bool = False, unroll: bool = False) -> None:
        self.on_product, self.params_only, self.unroll = on_product, params_only, unroll
        self.num_layers = 0
        self.direct: Counter[int] = Counter()
        self.uses: Counter[int | None] = Counter()
        self.biases: dict[int, Value] = {}
        self.looped: set[int] = set()
        self.kept: list[str] = []
        self._known: dict[int, tuple[list[Value], Sequence[Value]]] = {}

    def run(self, closed: core.ClosedJaxpr, arguments: Sequence[Value]) -> list[Value]:
        jaxpr = closed.jaxpr
        environment: dict[Any, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
        environment |= zip(jaxpr.constvars, map(constant, closed.consts), strict=True)

        def read(atom: Any) -> Value:
            return constant(atom.val) if isinstance(atom, core.Literal) else environment[atom]

        for equation in jaxpr.eqns:
            outputs = self._once(equation, [read(atom) for atom in equation.invars])
            environment |= zip(equation.outvars, outputs, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _once(self, equation: Any, inputs: Sequence[Value]) -> Sequence[Value]:
        """What is of parameters alone, and was the same at an earlier turn of a loop, is that value."""
        literal = [isinstance(atom, core.Literal) for atom in equation.invars]
        operands = [value for value, known in zip(inputs, literal, strict=True) if not known]
        before, outputs = self._known.get(id(equation), ([], ()))
        if operands and len(before) == len(operands) and all(a is b for a, b in zip(before, operands, strict=True)):
            return outputs
        outputs = self._equation(equation, inputs)
        if self.unroll and not any(value.depends_on_input for value in inputs):
            self._known[id(equation)] = operands, outputs
        return outputs

    def _equation(self, equation: Any, inputs: Sequence[Value]) -> Sequence[Value]:
        name, depends_on_input = equation.primitive.name, any(value.depends_on_input for value in inputs)
        if (program := jaxprs.called(equation)) is not None:
            return self.run(program, inputs)
        if self._unrolls(equation, inputs):
            return self._turns(equation, inputs)
        self.uses.update(value.layer for value in inputs)
        if depends_on_input and (found := _product(equation, inputs)) is not None:
            self.num_layers += 1
            return [Value(self.on_product(equation, inputs, *found), depends_on_input=True, layer=self.num_layers - 1)]
        if depends_on_input and self.params_only:
            results = [None] * len(equation.outvars)
        else:
            results = jaxprs.evaluate(equation, [value.value for value in inputs])
            results = results if equation.primitive.multiple_results else [results]
        leaves = frozenset().union(*(value.leaves for value in inputs))
        if not depends_on_input:
            found = forms.transfer(equation, [value.form for value in inputs], bool(leaves))
            scaled = factors.transfer(equation, inputs) if leaves else None
            return [
                Value(result, leaves=leaves, form=form, scaled=scaled)
                for result, form in zip(results, found, strict=True)
            ]
        self.direct.update(leaves)
        if name == "add":
            self._note_bias(*inputs)
        return [Value(result, depends_on_input=True) for result in results]

    def _unrolls(self, equation: Any, inputs: Sequence[Value]) -> bool:
        moved = [bool(value.leaves) for value in inputs]
        if not self.unroll or not loops.has_layers(equation, [value.depends_on_input for value in inputs], moved):
            return False
        if reason := loops.too_long(equation):
            self.kept.append(reason)
        return not reason

    def _turns(self, equation: Any, inputs: Sequence[Value]) -> Sequence[Value]:
        """A scan, turn by turn."""
        consts, carries = jaxprs.scan_counts(equation)
        program, length = jaxprs.closed(equation.params["jaxpr"]), equation.params["length"]
        reached = loops.reached_carry(equation, [value.depends_on_input for value in inputs])
        fixed, xs = inputs[:consts], inputs[consts + carries :]
        carry = [
            self._joined([value], lambda only: only[0]) if now and not value.depends_on_input else value
            for value, now in zip(inputs[consts : consts + carries], reached, strict=True)
        ]
        turns, first = range(length), self.num_layers
        ys: dict[int, Sequence[Value]] = {}
        for turn in reversed(turns) if equation.params["reverse"] else turns:
            results = self.run(program, [*fixed, *carry, *(self._part(value, turn) for value in xs)])
            carry, ys[turn] = results[:carries], results[carries:]
        self.looped.update(range(first, self.num_layers))
        columns = zip(*(ys[turn] for turn in turns), strict=True)
        return [*carry, *(self._stacked(column) for column in columns)]

    def _part(self, whole: Value, index: int) -> Value:
        if whole.depends_on_input:
            self.uses[whole.layer] += 1
            nothing = whole.value is None
            value = None if nothing else lax.index_in_dim(whole.value, index, 0, keepdims=False)
            return Value(value, depends_on_input=True)
        value = lax.index_in_dim(whole.value, index, 0, keepdims=False)
        return Value(value, leaves=whole.leaves, form=parts.part(whole.form, index, int(np.size(value))))

    def _stacked(self, values: Sequence[Value]) -> Value:
        if any(value.depends_on_input for value in values):
            return self._joined(values, jnp.stack)
        leaves = frozenset().union(*(value.leaves for value in values))
        form = parts.stacked([value.form for value in values])
        return Value(jnp.stack([value.value for value in values]), leaves=leaves, form=form)

    def _joined(self, values: Sequence[Value], join: Callable[[list[Any]], Any]) -> Value:
        """A value that depends on the inputs, of some of which not every one does."""
        for value in values:
            self.direct.update(value.leaves)
            self.uses[value.layer] += 1
        return Value(None if self.params_only else join([value.value for value in values]), depends_on_input=True)

    def _note_bias(self, first: Value, second: Value) -> None:
        for product, bias in ((first, second), (second, first)):
            if product.layer is not None and len(bias.leaves) == 1 and not bias.depends_on_input:
                self.biases[product.layer] = bias


def _product(equation: Any, inputs: Sequence[Value]) -> tuple[Conv | Dot, bool] | None:
    """The product's form and whether the kernel is its first operand, if the equation is one."""
    if equation.primitive.name not in ("dot_general", "conv_general_dilated"):
        return None
    first, second = inputs
    shapes = [atom.aval.shape for atom in equation.invars]
    if not all(jnp.issubdtype(atom.aval.dtype, jnp.floating) for atom in (*equation.invars, *equation.outvars)):
        return None  # an integer product's kernel has no derivative, a complex one's is not what is wanted
    kernel_first = not first.depends_on_input and bool(first.leaves)
    if not kernel_first and (second.depends_on_input or not second.leaves):
        return None
    if equation.primitive.name == "dot_general":
        return Dot.of(equation.params, shapes, kernel_first), kernel_first
    if kernel_first or equation.params["batch_group_count"] != 1:
        return None
    return Conv.of(equation.params, shapes), False


def constant(value: Any) -> Value:
    """A value that depends on neither inputs nor parameters."""
    return Value(value, form=forms.of_constant(value))
