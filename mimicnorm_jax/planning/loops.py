"""How often the loops of a compiled program turn."""

import re

from mimicnorm_jax.planning.hlo import Computation, Instruction, Module

_SAME = {"copy", "copy-start", "copy-done", "bitcast"}


def turns(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop's body runs; None if the program does not say.

    A TPU's compiler does not write the number down. Then it is that of a loop which counts from a constant in constant
    steps while it is below a constant, as `jax.lax.scan` and `fori_loop` make them.

    Args:
      module: the program.
      computation: in which the loop stands.
      loop: a `while`.
    """
    if loop.trips is not None:
        return loop.trips
    condition, body = (module.computations[name] for name in (loop.attribute("condition"), loop.attribute("body")))
    before, after, test = _origin(computation, loop.operands[0]), body.root, condition.root
    if before.opcode != "tuple" or after.opcode != "tuple" or test.opcode != "compare":
        return None

    def value(inside: Computation, name: str) -> int | None:
        """Of a constant, or of what every turn hands on as it was before the first."""
        found = _origin(inside, name)
        if (index := _place(inside, found)) is not None and _place(body, _origin(body, after.operands[index])) == index:
            found = _origin(computation, before.operands[index])
        return _number(found)

    place = _place(condition, _origin(condition, test.operands[0]))
    if place is None or test.attribute("direction") != "LT":
        return None
    counted = _origin(body, after.operands[place])
    if counted.opcode != "add":
        return None
    steps = [value(body, name) for name in counted.operands if _place(body, _origin(body, name)) != place]
    first, limit = _number(_origin(computation, before.operands[place])), value(condition, test.operands[1])
    if first is None or limit is None or len(steps) != 1 or steps[0] is None or steps[0] < 1:
        return None
    return max(0, -((first - limit) // steps[0]))


def _origin(computation: Computation, name: str) -> Instruction:
    found = computation.by_name[name]
    while found.opcode in _SAME:
        found = computation.operand(found, 0)
    return found


def _place(inside: Computation, instruction: Instruction) -> int | None:
    """Which element of a loop's state it is; None for anything else, as an element of what the loop computes."""
    if instruction.opcode != "get-tuple-element" or inside.operand(instruction, 0).opcode != "parameter":
        return None
    return int(instruction.attribute("index"))


def _number(instruction: Instruction) -> int | None:
    found = re.match(r"-?\d+(?=\))", instruction.attributes) if instruction.opcode == "constant" else None
    return int(found[0]) if found else None
