"""Follows the axis of a batch's examples through a network: proves that no example influences another.

Every value is either free of the inputs, or has one axis along which each example has a place of its own, the same
function of that example at every place; or that is lost, at an operation that the error can name. Programs within
(jit, remat, custom derivatives, loops and branches) are entered. Of a custom derivative the value is followed, and the
derivative by its rule.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend import core

from mimicnorm_jax.diagnostics.tracing.jaxprs import called, closed, derivative, moving, replaced, scan_counts, where


@dataclass(frozen=True)
class Free:
    """A value without the inputs; along any axis but `varies` all its slices are equal."""

    varies: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Along:
    """A value whose axis `axis` counts (outer, example, inner), the last of `inner` places."""

    axis: int
    inner: int = 1


@dataclass(frozen=True)
class Lost:
    """A value of which that is not so (`coupled`), or not known; `reason` names the operation."""

    coupled: bool
    reason: str


State = Free | Along | Lost


class CoupledError(Exception):
    """An operation brings examples together."""


class UnfollowedError(Exception):
    """An operation that no rule follows."""


@dataclass(frozen=True)
class Step:
    """An operation on values of known states.

    Attributes:
      equation: of the jaxpr.
      states: of its operands.
      size: number of examples.
    """

    equation: Any
    states: Sequence[State]
    size: int

    @property
    def name(self) -> str:
        return self.equation.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.equation.params

    def shape(self, i: int = 0) -> tuple[int, ...]:
        """Of an operand."""
        return self.equation.invars[i].aval.shape

    def out_shape(self, i: int = 0) -> tuple[int, ...]:
        """Of a result."""
        return self.equation.outvars[i].aval.shape


Rule = Callable[[Step], State | list[State]]


class BatchAxisInterpreter:
    """One pass over a jaxpr.

    Args:
      rules: by an operation's name, for operands of which at least one follows the inputs.
      free: the rule for operations without any.
      size: number of examples.
      derivatives: whether derivatives are followed where an operation has its own.
    """

    def __init__(self, rules: dict[str, Rule], free: Rule, size: int, derivatives: bool = True) -> None:
        self.rules, self.free, self.size, self.derivatives = rules, free, size, derivatives
        self.control: dict[str, Rule] = {
            "scan": self._scan,
            "while": self._while,
            "cond": self._cond,
            "custom_linear_solve": self._linear_solve,
        }

    def run(self, program: core.ClosedJaxpr, states: Sequence[State]) -> list[State]:
        """States of a program's results, from those of its arguments."""
        jaxpr = program.jaxpr
        known: dict[Any, State] = dict(zip(jaxpr.invars, states, strict=True))
        known |= {v: self._constant(value) for v, value in zip(jaxpr.constvars, program.consts, strict=True)}

        def read(atom: Any) -> State:
            return Free() if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            results = self._step(Step(equation, [read(atom) for atom in equation.invars], self.size))
            known |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def _constant(self, value: Any) -> State:
        """A constant's values are looked at where they could meet the batch: an axis of so many examples."""
        shape = np.shape(value)
        varies = {axis for axis, side in enumerate(shape) if side > 1}
        batches = {axis for axis in varies if shape[axis] % self.size == 0}
        known = isinstance(value, np.ndarray | jax.Array) and not isinstance(value, Tracer)
        if batches and known and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            values = np.asarray(value)
            varies -= {axis for axis in batches if (values == values.take([0], axis)).all()}
        return Free(frozenset(varies))

    def _step(self, step: Step) -> list[State]:
        count = len(step.equation.outvars)
        if (program := called(step.equation)) is not None:
            return [_placed(state, step) for state in self.run(program, step.states)]
        if (program := replaced(step.equation)) is not None:
            values = [_placed(state, step) for state in self._values(program, step.states)]
            followed = self.derivatives and any(isinstance(state, Along) for state in (*step.states, *values))
            return self._derived(step, values) if followed else values
        try:
            if step.name in self.control:
                found = self.control[step.name](step)
            elif all(isinstance(state, Free) for state in step.states):
                found = self.free(step)
            elif lost := [state for state in step.states if isinstance(state, Lost)]:
                found = max(lost, key=lambda state: state.coupled)
            elif step.name in self.rules:
                found = self.rules[step.name](step)
            else:
                raise UnfollowedError("no rule follows it")
        except CoupledError as error:
            found = Lost(True, f"{where(step.equation)} {error}")
        except UnfollowedError as error:
            found = Lost(False, f"{where(step.equation)}: {error}")
        return found if isinstance(found, list) else [found] * count

    def _values(self, program: core.ClosedJaxpr, states: Sequence[State]) -> list[State]:
        """Of a program that is not differentiated."""
        return BatchAxisInterpreter(self.rules, self.free, self.size, derivatives=False).run(program, states)

    def _derived(self, step: Step, values: list[State]) -> list[State]:
        """What is known of values and of their derivatives, which an operation has its own rule for."""
        operands, results = moving(step.equation.invars), moving(step.equation.outvars)
        backward = "custom_vjp" in step.name
        carried = [values[i] for i in results] if backward else [step.states[i] for i in operands]
        try:
            found = self._values(derivative(step.equation), [*step.states, *carried])
        except Exception as error:  # the rule is the user's code
            reason = f"{where(step.equation)}: its derivative cannot be traced ({type(error).__name__}: {error})"
            return [Lost(False, reason)] * len(values)
        if backward:  # a cotangent of what is free of the inputs is a sum over the batch
            pairs = [(step.states[i], state) for i, state in zip(operands, found, strict=True)]
            joined = [_differentiated(step, *pair) for pair in pairs if isinstance(pair[0], Along)]
            lost = next((state for state in joined if isinstance(state, Lost)), None)
            return values if lost is None else [lost for _ in values]
        tangents = dict(zip(results, found, strict=True))
        return [_differentiated(step, v, tangents[i]) if i in tangents else v for i, v in enumerate(values)]

    def _scan(self, step: Step) -> list[State]:
        consts, carries = scan_counts(step.equation)
        program = closed(step.params["jaxpr"])
        fixed, carry, xs = step.states[:consts], step.states[consts : consts + carries], step.states[consts + carries :]
        if any(isinstance(x, Along) and x.axis == 0 for x in xs):
            return self._map(step, [*fixed, *carry], xs, carries)
        inside = [_moved(x, -1) for x in xs]
        shapes = [v.aval.shape for v in program.jaxpr.invars[consts : consts + carries]]
        carry, results = self._fixpoint(program, fixed, carry, inside, shapes)
        return [*carry, *(_moved(y, 1) for y in results[carries:])]

    def _map(self, step: Step, others: Sequence[State], xs: Sequence[State], carries: int) -> list[State]:
        """One example a turn, and nothing handed on."""
        alone = all(
            x == Along(0) if isinstance(x, Along) else isinstance(x, Free) and 0 not in x.varies for x in xs
        ) and all(isinstance(state, Free) for state in others)
        if carries or not alone or step.params["length"] != self.size:
            raise CoupledError("runs along the batch, each example after those before it")
        return [Along(0)] * len(step.equation.outvars)

    def _while(self, step: Step) -> list[State]:
        conditions, consts = step.params["cond_nconsts"], step.params["body_nconsts"]
        body, cond = closed(step.params["body_jaxpr"]), closed(step.params["cond_jaxpr"])
        asked, fixed = step.states[:conditions], step.states[conditions : conditions + consts]
        carry = step.states[conditions + consts :]
        shapes = [v.aval.shape for v in body.jaxpr.invars[consts:]]
        carry, _ = self._fixpoint(body, fixed, carry, [], shapes)
        decision = self.run(cond, [*asked, *carry])[0]
        if isinstance(decision, Free):
            return list(carry)
        reason = f"{where(step.equation)}: the number of its turns depends on the inputs of the whole batch"
        return [state if isinstance(state, Free) else Lost(False, reason) for state in carry]

    def _fixpoint(
        self,
        program: core.ClosedJaxpr,
        fixed: Sequence[State],
        carry: Sequence[State],
        xs: Sequence[State],
        shapes: Sequence[tuple[int, ...]],
    ) -> tuple[list[State], list[State]]:
        """States of what a loop hands on that its body leaves as they are; and the body's results."""
        carry = list(carry)
        while True:
            results = self.run(program, [*fixed, *carry, *xs])
            joined = [join(before, after) for before, after in zip(carry, results, strict=False)]
            if joined == carry:
                return carry, results
            assert len(joined) == len(shapes)
            carry = joined

    def _linear_solve(self, step: Step) -> list[State]:
        lengths = step.params["const_lengths"]
        start = lengths.matvec + lengths.vecmat
        consts = step.states[start : start + lengths.solve]
        return self.run(closed(step.params["jaxprs"].solve), [*consts, *step.states[sum(lengths) :]])

    def _cond(self, step: Step) -> list[State]:
        branches = [self.run(closed(branch), step.states[1:]) for branch in step.params["branches"]]
        results = branches[0]
        for branch in branches[1:]:
            results = [join(a, b) for a, b in zip(results, branch, strict=True)]
        index = step.states[0]
        if isinstance(index, Free):
            return results
        assert isinstance(index, Lost)  # a single number has no axis of examples
        return [index] * len(results)


def _placed(state: State, step: Step) -> State:
    """With the line of a call, where the operation within was JAX's own."""
    if isinstance(state, Lost) and state not in step.states and " at " not in state.reason:
        return Lost(state.coupled, f"{state.reason} (in {where(step.equation)})")
    return state


def _differentiated(step: Step, value: State, derivative: State) -> State:
    """A value's state, if its derivative follows the examples like the value."""
    joined = join(value, derivative)
    if isinstance(joined, Lost) and not isinstance(value, Lost):
        return Lost(joined.coupled, f"{joined.reason}, in the derivative of {where(step.equation)}")
    return joined


def _moved(state: State, by: int) -> State:
    """A scanned value within its loop (-1), or a loop's value outside (1)."""
    if isinstance(state, Along):
        return Along(state.axis + by, state.inner)
    if isinstance(state, Free):
        return Free(frozenset(axis + by for axis in state.varies if axis + by >= 0) | ({0} if by > 0 else set()))
    return state


def join(first: State, second: State) -> State:
    """What is known of a value that is one or the other."""
    lost = [state for state in (first, second) if isinstance(state, Lost)]
    if lost:
        return max(lost, key=lambda state: state.coupled)
    if isinstance(first, Free) and isinstance(second, Free):
        return Free(first.varies | second.varies)
    if first == second:
        return first
    if isinstance(second, Along):
        first, second = second, first
    assert isinstance(first, Along)
    if isinstance(second, Free) and first.axis not in second.varies:
        return first
    return Lost(False, "a loop or a branch hands on the batch along different axes")
