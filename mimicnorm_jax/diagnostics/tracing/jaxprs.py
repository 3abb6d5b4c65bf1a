"""What the analyses of a jaxpr share: the programs inside an operation, and where it was written."""

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
}
"""Operations that do nothing but run a program, and the parameter that holds it."""
CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
"""Operations that run a program whose derivative is another's."""

_NAMES = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex "
    "conj convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt "
    "igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min mul "
    "mulhi name ne neg nextafter not or polygamma population_count pow real reduce_precision "
    "regularized_incomplete_beta rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign "
    "sin sinh sqrt square stop_gradient sub tan tanh xor zeros_like zeta sharding_constraint layout_constraint "
    "reshard mesh_cast pvary row_major"
)
ELEMENTWISE = frozenset(_NAMES.split())
"""Operations whose every result is a function of the operands at its own place (numbers beside are one for all)."""


def closed(program: Any) -> core.ClosedJaxpr:
    """A program with its constants, where it may be without."""
    return program if isinstance(program, core.ClosedJaxpr) else core.ClosedJaxpr(program, ())


def called(equation: Any) -> core.ClosedJaxpr | None:
    """The program that an operation of `CALLS` runs; None for any other operation."""
    name = CALLS.get(equation.primitive.name)
    return None if name is None else closed(equation.params[name])


def replaced(equation: Any) -> core.ClosedJaxpr | None:
    """The program that an operation with a derivative of its own runs; None for any other operation."""
    if equation.primitive.name not in CUSTOM:
        return None
    name = "call_jaxpr" if "call_jaxpr" in equation.params else "fun_jaxpr"
    return closed(equation.params[name])


def moving(atoms: Sequence[Any]) -> list[int]:
    """Which of an operation's operands or results have derivatives."""
    return [i for i, atom in enumerate(atoms) if jnp.issubdtype(atom.aval.dtype, jnp.inexact)]


def derivative(equation: Any) -> core.ClosedJaxpr:
    """What an operation of `CUSTOM` does to derivatives.

    Returns:
      A program of its operands and of the tangents of those of them that move, to the tangents of its results; of
      cotangents of its results, to those of its operands, where it has a backward derivative only.
    """
    shapes = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in equation.invars]
    operands, results = moving(equation.invars), moving(equation.outvars)

    def push_or_pull(values: list[Any], carried: list[Any]) -> list[Any]:
        def of(moved: list[Any]) -> list[Any]:
            every = list(values)
            for i, value in zip(operands, moved, strict=True):
                every[i] = value
            outputs = evaluate(equation, every)
            return [outputs[i] for i in results]

        moved = [values[i] for i in operands]
        if "custom_vjp" in equation.primitive.name:
            return jax.vjp(of, moved)[1](carried)[0]
        return jax.jvp(of, (moved,), (carried,))[1]

    backward = "custom_vjp" in equation.primitive.name
    atoms = [equation.outvars[i] for i in results] if backward else [equation.invars[i] for i in operands]
    return jax.make_jaxpr(push_or_pull)(shapes, [jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in atoms])


def programs(value: Any) -> list[core.ClosedJaxpr]:
    """The programs that a parameter of an operation is, or holds."""
    parts = value if isinstance(value, tuple | list) else (value,)
    return [closed(part) for part in parts if isinstance(part, core.ClosedJaxpr | core.Jaxpr)]


def operations(program: core.ClosedJaxpr) -> Iterator[Any]:
    """Every operation of a program and of the programs within."""
    for equation in program.jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in programs(value):
                yield from operations(inner)


def pruned(program: core.ClosedJaxpr, outputs: Sequence[int] | None = None) -> core.ClosedJaxpr:
    """A program with those of its results (or all), without what they do not need, in the programs within too."""
    used = [outputs is None or i in outputs for i in range(len(program.jaxpr.outvars))]
    jaxpr, _ = partial_eval.dce_jaxpr(program.jaxpr, used, instantiate=True)
    return core.ClosedJaxpr(jaxpr, program.consts)


def without_jvp(program: core.ClosedJaxpr) -> str:
    """The first operation that has no forward-mode derivative, and where it stands; empty if there is none."""
    return next((where(equation) for equation in operations(program) if "custom_vjp" in equation.primitive.name), "")


def coarsest(program: core.ClosedJaxpr) -> float:
    """The largest spacing above 1 of any floating-point type that a program computes in."""
    types = {aval.dtype for aval in program.in_avals}
    types |= {variable.aval.dtype for equation in operations(program) for variable in equation.outvars}
    return max((float(jnp.finfo(kind).eps) for kind in types if jnp.issubdtype(kind, jnp.inexact)), default=0.0)


def where(equation: Any) -> str:
    """An operation's name and the line of the network that asks for it."""
    name = equation.params["name"] if equation.primitive.name in CUSTOM and "name" in equation.params else ""
    text = f"{equation.primitive.name} {name}".strip()
    traceback = equation.source_info.traceback
    for frame in () if traceback is None else traceback.frames:
        path = PurePath(frame.file_name)
        parts = path.parts
        if "jax" not in parts and "flax" not in parts and path.parent != PurePath(__file__).parent:
            line = getattr(frame, "start_line", None) or getattr(frame, "line_num", 0)
            return f"{text} at {parts[-1]}:{line} ({frame.function_name.rsplit('.', 1)[-1]})"
    return text


def grouped_axes(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Smallest runs of axes of two shapes that hold the same numbers, in their order."""
    groups: list[tuple[list[int], list[int]]] = []
    before: list[int] = []
    after: list[int] = []
    i = j = 0
    left = right = 1
    while i < len(old) or j < len(new):
        if i < len(old) and (left <= right or j == len(new)):
            before, left, i = [*before, i], left * old[i], i + 1
        else:
            after, right, j = [*after, j], right * new[j], j + 1
        if left == right:
            groups.append((before, after))
            before, after, left, right = [], [], 1, 1
    if before or after:
        groups.append((before, after))
    return groups


def evaluate(equation: Any, operands: Sequence[Any]) -> Any:
    """An operation's result, or results, on other operands."""
    with equation.ctx.manager:
        return equation.primitive.bind(*operands, **equation.primitive.get_bind_params(equation.params))


def scan_counts(equation: Any) -> tuple[int, int]:
    """Of a scan's operands: how many are constants, and, behind them, how many are handed on from turn to turn."""
    if "num_carry" in equation.params:
        return equation.params["num_consts"], equation.params["num_carry"]
    consts, carry, _ = equation.params["ft_in"].unpack()  # from jax 0.12 on: trees
    return len(consts), len(carry)
