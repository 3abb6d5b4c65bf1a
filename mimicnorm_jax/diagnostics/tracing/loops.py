"""Loops of a fixed number of turns (`lax.scan`, `nn.scan`, `nn.RNN`), read as the layers of their turns."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from mimicnorm_jax.diagnostics.tracing.jaxprs import called, closed, operations, scan_counts, where

MOST_OPERATIONS = 4096
"""Operations of all turns of a loop that is unrolled."""


def unrolled_operations(program: core.ClosedJaxpr) -> int:
    """Operations of a program with those of its loops that are short enough counted once a turn."""
    total = 0
    for equation in program.jaxpr.eqns:
        inner = called(equation)
        if equation.primitive.name == "scan" and (turns := _turns(equation)) <= MOST_OPERATIONS:
            total += turns
        else:
            total += 1 if inner is None else unrolled_operations(inner)
    return total


def _turns(equation: Any) -> int:
    return equation.params["length"] * unrolled_operations(closed(equation.params["jaxpr"]))


def has_layers(equation: Any, depends_on_input: Sequence[bool], moved: Sequence[bool]) -> bool:
    """Whether an operation is a loop whose turns may multiply activations with kernels.

    Args:
      equation: any operation.
      depends_on_input: by operand, whether the inputs reach it.
      moved: by operand, whether it is a function of parameters only.
    """
    if equation.primitive.name != "scan" or not equation.params["length"] or not any(depends_on_input):
        return False
    names = {operation.primitive.name for operation in operations(closed(equation.params["jaxpr"]))}
    return any(moved) and bool(names & {"dot_general", "conv_general_dilated"})


def too_long(equation: Any) -> str:
    """Why a loop is not unrolled; empty if it is."""
    if (count := _turns(equation)) <= MOST_OPERATIONS:
        return ""
    return (
        f"{where(equation)}: {equation.params['length']} turns of {count:,} operations in all, over {MOST_OPERATIONS:,}"
    )


def reached_carry(equation: Any, depends_on_input: Sequence[bool]) -> list[bool]:
    """Which of the values that a scan hands on from turn to turn the inputs reach at any turn."""
    consts, carries = scan_counts(equation)
    program, flags = closed(equation.params["jaxpr"]), list(depends_on_input)
    while True:
        results = _reached(program, flags)[:carries]
        carry = [a or b for a, b in zip(flags[consts : consts + carries], results, strict=True)]
        if carry == flags[consts : consts + carries]:
            return carry
        flags[consts : consts + carries] = carry


def _reached(program: core.ClosedJaxpr, flags: Sequence[bool]) -> list[bool]:
    known = dict(zip(program.jaxpr.invars, flags, strict=True))

    def read(atom: Any) -> bool:
        return not isinstance(atom, core.Literal) and known.get(atom, False)

    for equation in program.jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        inner = called(equation)
        results = [any(inputs)] * len(equation.outvars) if inner is None else _reached(inner, inputs)
        known |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in program.jaxpr.outvars]
