"""Whether the examples of a batch are independent: proved on the jaxpr where that can be, else tried in numbers."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.tracing import sizes
from mimicnorm_jax.diagnostics.tracing.batch_axis import Along, BatchAxisInterpreter, Free, Lost, State
from mimicnorm_jax.diagnostics.tracing.batch_rules import RULES, free
from mimicnorm_jax.diagnostics.tracing.jaxprs import coarsest, derivative, operations, without_jvp
from mimicnorm_jax.diagnostics.tracing.outputs import evaluable, nonfinite_rows
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn, is_differentiated

_WAY_OUT = (
    "Either make each example's outputs a function of that example alone (BatchNorm: apply it with running averages, "
    "train=False; dropout: leave it out), or ask for the whole batch with batch_coupled=True: every derivative then "
    "includes that through the other examples, and x is the batch"
)


_KNOWN = 32
_verdicts: OrderedDict[Any, "Verdict"] = OrderedDict()


@dataclass(frozen=True)
class Verdict:
    """What is known of a batch's examples.

    Attributes:
      reason: the operation at which the proof of their independence ends; empty if nothing is missing.
      not_finite: the first example whose outputs are not finite, or None.
      compared: number of examples whose outputs were compared with those of the example alone.
      examples: number of examples.
    """

    reason: str
    compared: int
    examples: int
    not_finite: int | None = None

    @property
    def proven(self) -> bool:
        """Whether the jaxpr shows that no example influences another."""
        return not self.reason

    def __str__(self) -> str:
        some = "" if self.compared == self.examples else f" (compared on the first {self.compared} of {self.examples})"
        if self.proven:
            return f"examples independent by the jaxpr{some}"
        return f"examples independent in a numerical trial only: {self.reason}{some}"


def follow(program: Any, arguments: int, size: int) -> State:
    """What becomes of the batch's axis in a program of so many parameters, then inputs, whose first axis it is."""
    shapes = [np.shape(aval) for aval in program.in_avals[:arguments]]
    states: list[State] = [Free(frozenset(i for i, side in enumerate(shape) if side > 1)) for shape in shapes]
    return BatchAxisInterpreter(RULES, free, size).run(program, [*states, Along(0)])[0]


def prove(program: Any, arguments: int, size: int) -> str:
    """Follows the examples of a batch, at least two, through the jaxpr of a network.

    Returns:
      The operation at which they could not be followed any further; empty if no example influences another.

    Raises:
      ValueError: if an operation brings them together, with its name and line.
    """
    state = follow(program, arguments, size)
    if isinstance(state, Along) and state != Along(0):
        state = Lost(True, f"the outputs' first axis is not the batch, which runs along axis {state.axis}")
    if isinstance(state, Free) and 0 in state.varies:
        state = Lost(True, "the outputs depend on the place in the batch")
    if isinstance(state, Lost) and state.coupled:
        raise ValueError(f"the examples of a batch influence one another: {state.reason}. {_WAY_OUT}")
    return state.reason if isinstance(state, Lost) else ""


def require(apply_fn: ApplyFn, params: Any, x: Any, memory: int = 2**31) -> Verdict:
    """Makes sure that each example's outputs are a function of that example alone; once for each function and shapes.

    Args:
      apply_fn: the network.
      params: its parameters, arrays.
      x: inputs, `(N, ...)`.
      memory: bytes that a trial with many examples may take.

    Raises:
      ValueError: if they are not, with the operation that brings them together or the outputs that show it.
    """
    size = len(x)
    if size < 2:
        return Verdict("", size, size)
    shapes = jax.tree.map(_shape, (params, x))
    leaves, tree = jax.tree.flatten(shapes)
    key = (apply_fn, tree, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves))
    if key not in _verdicts:
        alone = _one_example(apply_fn, shapes[0], shapes[1], evaluable(apply_fn, *shapes))
        program = jax.make_jaxpr(apply_fn)(*shapes)
        reason = prove(program, len(leaves) - 1, size) or _derivative_of_size(program, alone)
        numbers = sum(v.aval.size * v.aval.dtype.itemsize for e in operations(program) for v in e.outvars)
        compared = min(size, max(2, memory * size // max(numbers, 1)))
        eps = coarsest(program)
        not_finite = _alone(apply_fn, params, x[:compared], eps)
        if not_finite is not None:
            return Verdict(reason, compared, size, not_finite)
        if reason:
            _others_changed(apply_fn, params, x[:compared], eps)
        _verdicts[key] = Verdict(reason, compared, size)
        while len(_verdicts) > _KNOWN:
            _verdicts.popitem(last=False)
    return _verdicts[key]


def _one_example(apply_fn: ApplyFn, params: Any, x: Any, outputs: Any) -> Any:
    """The jaxpr for one example alone; raises ValueError if it has no row of the outputs, as where a size is fixed."""
    one, program = jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), None
    try:
        program, alone = jax.make_jaxpr(apply_fn, return_shape=True)(params, one)
        found = f"has outputs of shape {alone.shape}, not {(1, *outputs.shape[1:])}"
    except (TypeError, ValueError) as error:
        alone, found = one, f"cannot be evaluated: {error}"
    if program is None or alone.shape != (1, *outputs.shape[1:]):
        raise ValueError(
            f"apply_fn takes {x.shape[0]} examples, but one alone {found}. If it squeezes axes, name them; if it holds "
            "the size of the batch, take it from x; or ask for the whole batch with batch_coupled=True, and "
            "derivatives are of all of it"
        )
    return program


def tolerance(eps: float) -> float:
    """How far two evaluations may be apart, relative to the largest: the spacing of the coarsest type, amplified.

    By 1000, what the rounding of a deep network comes to; by 16 where that would be larger than what is to be seen.
    """
    return 1e3 * eps if eps < 1e-5 else 16 * eps


AMPLIFIED = 8
"""How many times the effect of one rounding of all parameters two evaluations may be apart: a chaotic network's layers
each add to it, and the first ones most."""


def nudged(params: Any, eps: float) -> Any:
    """Parameters changed at random by one rounding of relative size `eps`."""
    rng = np.random.default_rng(0)

    def nudge(leaf: Any) -> Any:
        if not is_differentiated(leaf):
            return leaf
        return (leaf * (1 + eps * rng.choice((-1.0, 1.0), leaf.shape))).astype(leaf.dtype)

    return jax.tree.map(nudge, params)


def _alone(apply_fn: ApplyFn, params: Any, x: jax.Array, eps: float) -> int | None:
    """Compares the outputs of a batch with those of each example alone: they must not know their place or its size.

    Returns:
      The first example whose outputs are not finite, or None.
    """

    reason = ""

    @jax.jit
    def both(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return apply_fn(params, x), jax.vmap(lambda one: apply_fn(params, one[None])[0])(x)

    with jax.default_matmul_precision("highest"):
        together, alone = (np.asarray(outputs, np.float64) for outputs in both(params, x))
        wrong = nonfinite_rows(together)
        finite = np.delete(np.arange(len(together)), wrong)
        difference, scale = _difference(together[finite], alone[finite])
        limit = tolerance(eps) * scale
        # By rounding alone, in a chaotic network? Only if nothing else can tell a batch from an example.
        if difference > limit and not (reason := sizes.difference(*_traced(apply_fn, params, x))):
            other = np.asarray(both(nudged(params, eps), x)[0], np.float64)
            limit = max(limit, AMPLIFIED * _difference(other[finite], together[finite])[0])
    _within(difference, limit, scale, f"in the batch and alone{reason and f' (which differ at {reason})'}")
    return int(wrong[0]) if wrong.size else None


def _traced(apply_fn: ApplyFn, params: Any, x: jax.Array) -> tuple[Any, Any]:
    """The network's jaxprs for the batch and for one example."""
    shapes = jax.tree.map(_shape, (params, x[:1]))
    return jax.make_jaxpr(apply_fn)(*jax.tree.map(_shape, (params, x))), jax.make_jaxpr(apply_fn)(*shapes)


def _derivative_of_size(batch: Any, alone: Any) -> str:
    """Where a derivative that is not of its value may tell the size of the batch, by jaxprs for it and for one example.

    Elsewhere it tells no more than the value, which is tried in numbers; what has a backward rule only is so anyway.
    """
    names = {operation.primitive.name for operation in operations(batch)}
    if without_jvp(batch) or not {"custom_jvp_call", "stop_gradient"} & names:
        return ""
    found = sizes.difference(batch, alone)
    if not found:  # then both have the same operations
        pairs = zip(operations(batch), operations(alone), strict=True)
        rules = (map(derivative, pair) for pair in pairs if pair[0].primitive.name == "custom_jvp_call")
        found = next(filter(None, (sizes.difference(*pair) for pair in rules)), "")
    return found and f"derivatives for a batch and for one example differ at {found}"


def _others_changed(apply_fn: ApplyFn, params: Any, x: jax.Array, eps: float) -> None:
    """Changes all inputs but one, for up to 16 of them in turn: that one's outputs must stay.

    The same program on the same shapes rounds alike, so this sees as far as the network's precision does.
    """
    rng, size = np.random.default_rng(0), len(x)
    changed = jnp.stack([jnp.roll(x, 1 + i, 0) for i in range(min(3, size - 1))])
    if jnp.issubdtype(x.dtype, jnp.floating):
        noise = rng.standard_normal(changed.shape)
        changed = changed + (noise * np.std(np.asarray(x, np.float64))).astype(x.dtype)
    evaluate = jax.jit(apply_fn)
    before = np.asarray(evaluate(params, x), np.float64)
    for i in np.unique(np.linspace(0, size - 1, min(size, 16)).astype(int)):
        for others in changed:
            after = np.asarray(evaluate(params, others.at[i].set(x[i])), np.float64)
            difference, scale = _difference(after[i], before[i])
            _within(difference, 4 * eps * scale, scale, "with other examples beside it")


def _difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """The largest difference, and the largest value."""
    return float(np.abs(first - second).max(initial=0.0)), max(float(np.abs(second).max(initial=0.0)), 1e-30)


def _within(difference: float, limit: float, scale: float, when: str) -> None:
    if not difference <= limit:
        raise ValueError(
            f"an example's outputs differ by {difference:.2g} (largest output {scale:.2g}) {when}: they depend on the "
            f"other examples, on the place in the batch or on its size. {_WAY_OUT}"
        )


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf))
