"""What a compiled program's kernels do: operations, bytes read and written by class, what convolutions carry."""

import re
from collections import Counter
from dataclasses import dataclass, field

from mimicnorm_jax.planning import flops as flops_lib
from mimicnorm_jax.planning import loops
from mimicnorm_jax.planning.hlo import FUSIONS, Computation, Instruction, Module

CLASSES = (
    "convolution and matmul",
    "elementwise",
    "reduction",
    "pooling",
    "copy and transpose",
    "on and off the chip",
    "collective",
)
"""Classes of kernels, by the heaviest operation that one contains; a TPU moves arrays on its chip ahead of kernels."""

_FREE = {
    "tuple", "get-tuple-element", "parameter", "bitcast", "constant", "after-all", "opt-barrier", "partition-id",
    "replica-id", "domain", "get-dimension-size", "add-dependency",
}  # fmt: skip
_COLLECTIVE = re.compile(r"all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast")
_POOLING = {"select-and-scatter", "reduce-window"}
_MOVING = {
    "copy", "transpose", "reshape", "slice", "pad", "concatenate", "reverse", "dynamic-slice", "dynamic-update-slice",
    "gather", "copy-start", "slice-start",
}  # fmt: skip
_NEUTRAL = {"convert", "broadcast", "iota", "bitcast-convert", "reduce-precision"} | _FREE
_FETCHES = {"copy-start", "slice-start"}
_PARTIAL = {"slice", "dynamic-slice", "gather"}
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
"""Operations that write a part of their first operand in place, and which operand is as large as the part."""


@dataclass(frozen=True)
class Convolution:
    """A convolution's kernel on a CUDA device.

    Attributes:
      name: path of its module and primitive, as JAX wrote it.
      kind: `forward`, `input gradient` or `kernel gradient`.
      bias, residual: whether the kernel adds them.
      activation: that it applies, such as `relu`; empty if none.
    """

    name: str
    kind: str
    bias: bool
    residual: bool
    activation: str


@dataclass
class Work:
    """Operations and bytes of a run of the program.

    Attributes:
      flops: of convolutions and matrix products.
      moved: bytes by class.
      unknown_loops: loops whose number of turns the compiler does not know; they count as one turn.
    """

    flops: int = 0
    moved: Counter[str] = field(default_factory=Counter)
    unknown_loops: int = 0

    def add(self, other: "Work", times: int = 1) -> None:
        self.flops += times * other.flops
        for name, nbytes in other.moved.items():
            self.moved[name] += times * nbytes
        self.unknown_loops += other.unknown_loops


def work(module: Module) -> Work:
    """Adds up the kernels of a run: loops by their turns, of a conditional's branches the one that moves most.

    A kernel reads its operands and writes its result, each once: what caches save or tiles read again is not known to
    the compiler's text. Of an operand from which only a slice or a gather is taken, what is taken counts; so does what
    is written of an array that a kernel updates in place.
    """
    return _of(module, module.computations[module.entry])


def _of(module: Module, computation: Computation) -> Work:
    total = Work()
    for instruction in computation.instructions:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")) or instruction.target == "AllocateBuffer":
            continue
        called = [module.computations[name] for name in instruction.called if name in module.computations]
        if opcode == "while":
            turns = loops.turns(module, computation, instruction)
            total.unknown_loops += turns is None
            turn = Work()
            for name in ("condition", "body"):
                turn.add(_of(module, module.computations[instruction.attribute(name)]))
            total.add(turn, 1 if turns is None else turns)
        elif opcode == "conditional":
            branches = [_of(module, module.computations[name]) for name in instruction.branches]
            total.add(max(branches, key=lambda branch: sum(branch.moved.values())))
        elif opcode in ("call", "async-start") and called:
            for each in called:
                total.add(_of(module, each))
        else:
            total.add(_kernel(module, computation, instruction))
    return total


def _kernel(module: Module, computation: Computation, instruction: Instruction) -> Work:
    return Work(
        _flops(module, computation, instruction),
        Counter({kind(module, instruction): _moved(module, computation, instruction)}),
    )


def _flops(module: Module, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode not in FUSIONS:
        return flops_lib.flops(computation, instruction)
    parts = [module.computations[name] for name in instruction.called]
    return sum(_flops(module, part, inner) for part in parts for inner in part.instructions)


def kind(module: Module, instruction: Instruction) -> str:
    """The one of `CLASSES` that a kernel belongs to."""
    if instruction.opcode in _FETCHES and any(array.on_chip and array.dims for array in instruction.arrays):
        return "on and off the chip"
    inside = module.inside(instruction)
    opcodes = {i.opcode for i in inside}
    if any(_COLLECTIVE.match(opcode) for opcode in opcodes):
        return "collective"
    if any(flops_lib.multiplies(i) for i in inside):
        return "convolution and matmul"
    if opcodes & _POOLING:
        return "pooling"
    if "reduce" in opcodes:
        return "reduction"
    if opcodes & _MOVING and not opcodes - _MOVING - _NEUTRAL:
        return "copy and transpose"
    return "elementwise"


def _moved(module: Module, computation: Computation, instruction: Instruction) -> int:
    if instruction.opcode in FUSIONS:
        return _moved_by_fusion(module, computation, instruction)
    if instruction.opcode in _FETCHES:
        ends = instruction.arrays[:2]  # its result is a tuple of both ends, of a slice the source whole
        part = min(array.nbytes for array in ends)
        return sum(part for array in ends if not array.on_chip)
    if instruction.opcode in _PARTIAL:
        return 2 * instruction.nbytes
    part = _part(computation, instruction)
    operands = {name for name in instruction.operands[part is not None :] if name in computation.by_name}
    read = sum(computation.by_name[name].nbytes for name in operands)
    if part is not None:
        return read + part + _read_before(instruction, part)
    if instruction.opcode.endswith("-start"):  # whose result holds the operands as well
        ends = [user for user in computation.users(instruction.name) if user.opcode.endswith("-done")]
        return read + sum(end.nbytes for end in ends)
    return read + instruction.nbytes


def _part(computation: Computation, instruction: Instruction) -> int | None:
    """Bytes that an operation writes into its first operand; None if it is not one that does."""
    if instruction.opcode not in _IN_PLACE or len(instruction.arrays) != 1:
        return None
    update = computation.operand(instruction, _IN_PLACE[instruction.opcode])
    return 0 if instruction.arrays[0].on_chip else sum(array.nbytes for array in update.arrays)


def _read_before(instruction: Instruction, part: int) -> int:
    """What it reads of its first operand: a scatter adds to what is there."""
    return part if instruction.opcode == "scatter" else 0


def _moved_by_fusion(module: Module, computation: Computation, instruction: Instruction) -> int:
    inner = module.computations[instruction.called[0]]
    updates = _updates(inner)
    read: dict[str, int] = {}
    for i, name in enumerate(instruction.operands):
        parameter = inner.parameters.get(i)
        whole = computation.by_name[name].nbytes
        taken = whole if parameter is None else _taken(module, inner, parameter, whole, updates)
        read[name] = max(read.get(name, 0), taken)
    written = instruction.nbytes if instruction.opcode == "fusion" else inner.root.nbytes
    return sum(read.values()) + written - sum(update.nbytes - part for update, part in updates)


def _updates(inner: Computation) -> list[tuple[Instruction, int]]:
    """What a fusion returns of its operands after an update in place, and the bytes that this writes."""
    root = inner.root
    results = [inner.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    found = ((r, _part(inner, r)) for r in (_original(inner, result) for result in results))
    # What is computed before the update is no operand, and is written whole.
    return [
        (result, part)
        for result, part in found
        if part is not None and _original(inner, inner.operand(result, 0)).opcode == "parameter"
    ]


def _is_same(instruction: Instruction) -> bool:
    """Whether its result is its operand's memory; a TPU's compiler makes fusions of such within others."""
    return instruction.opcode == "bitcast" or (
        instruction.opcode == "fusion" and "output_to_operand_aliasing={{}: (0, {})}" in instruction.attributes
    )


def _original(inner: Computation, instruction: Instruction) -> Instruction:
    while _is_same(instruction):
        instruction = inner.operand(instruction, 0)
    return instruction


def _taken(
    module: Module, inner: Computation, parameter: Instruction, whole: int, updates: list[tuple[Instruction, int]]
) -> int:
    """Bytes that a fusion reads of one operand."""
    users = inner.users(parameter.name)
    if len(users) == 1 and _is_same(users[0]):
        return _taken(module, inner, users[0], whole, updates)
    taken = 0
    for user in users:
        is_first = user.operands[0] == parameter.name
        part = next((part for update, part in updates if user is update), None)
        if is_first and user.opcode in _PARTIAL:
            taken += user.nbytes
        elif is_first and part is not None:
            taken += _read_before(user, part)
        elif user.opcode == "fusion":
            within = module.computations[user.called[0]]
            places = (i for i, name in enumerate(user.operands) if name == parameter.name)
            taken += sum(_taken(module, within, within.parameters[i], whole, []) for i in places)
        else:
            return whole
    return min(taken, whole)


def convolutions(module: Module) -> tuple[Convolution, ...]:
    """Every cuDNN convolution of a program for a CUDA device; none where convolutions are fused otherwise."""
    found = []
    for instruction in module.everywhere():
        direction = flops_lib.convolution_kind(instruction)
        if not direction:
            continue
        name = instruction.op_name
        if "transpose(" in name and "rematted_computation" not in name and direction == "forward":
            direction = "input gradient"  # of a pointwise convolution, which cuDNN is given as one more of them
        mode = re.search(r'"activation_mode":"k(\w+)"', instruction.attributes)
        activation = mode[1].lower() if mode and mode[1] != "None" else ""
        fused = instruction.target.endswith("BiasActivationForward")
        found.append(Convolution(name, direction, fused, fused and len(instruction.operands) > 3, activation))
    return tuple(found)


def narrowest(module: Module) -> int:
    """Bits of the narrowest elements that a convolution or matrix product multiplies; 0 if there is none."""
    found = (
        computation.operand(instruction, 0).arrays[0].bits
        for computation in module.computations.values()
        for instruction in computation.instructions
        if flops_lib.multiplies(instruction) and instruction.operands
    )
    return min(found, default=0)
