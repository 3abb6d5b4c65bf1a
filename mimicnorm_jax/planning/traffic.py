"""What a compiled program's kernels do: operations, bytes read and written by class, what convolutions carry."""

import re
from collections import Counter
from dataclasses import dataclass, field

from mimicnorm_jax.planning import flops as flops_lib
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
      loops: whether some loop runs more than once.
    """

    flops: int = 0
    moved: Counter[str] = field(default_factory=Counter)
    unknown_loops: int = 0
    loops: bool = False

    def add(self, other: "Work", times: int = 1) -> None:
        self.flops += times * other.flops
        for name, nbytes in other.moved.items():
            self.moved[name] += times * nbytes
        self.unknown_loops += other.unknown_loops
        self.loops |= other.loops or times > 1


def work(module: Module) -> Work:
    """Adds up the kernels of a run: loops by their turns, of a conditional's branches the one that moves most.

    A kernel reads its operands and writes its result, each once: what caches save or tiles read again is not known to
    the compiler's text. Of an operand from which only a slice or a gather is taken, what is taken counts.
    """
    return _of(module, module.computations[module.entry])


def _of(module: Module, computation: Computation) -> Work:
    total = Work()
    for instruction in computation.instructions:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            continue
        called = [module.computations[name] for name in instruction.called if name in module.computations]
        if opcode == "while":
            turns = instruction.trips
            total.unknown_loops += turns is None
            body = module.computations[instruction.attribute("body").lstrip("%")]
            total.add(_of(module, body), 1 if turns is None else turns)
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
    if instruction.opcode == "dynamic-update-slice":
        return 2 * computation.operand(instruction, 1).nbytes
    operands = {name for name in instruction.operands if name in computation.by_name}
    return instruction.nbytes + sum(computation.by_name[name].nbytes for name in operands)


def _moved_by_fusion(module: Module, computation: Computation, instruction: Instruction) -> int:
    inner = module.computations[instruction.called[0]]
    updates = _updates(inner)
    read: dict[str, int] = {}
    for i, name in enumerate(instruction.operands):
        parameter = inner.parameters.get(i)
        whole = computation.by_name[name].nbytes
        taken = whole if parameter is None else _taken(inner, parameter, whole, updates)
        read[name] = max(read.get(name, 0), taken)
    written = instruction.nbytes if instruction.opcode == "fusion" else inner.root.nbytes
    return sum(read.values()) + written - sum(update.nbytes - part for update, part in updates)


def _updates(inner: Computation) -> list[tuple[Instruction, int]]:
    """What a fusion writes in place: the updates of a slice that it returns, and the slice's bytes."""
    root = inner.root
    results = [inner.by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    results = [_behind_bitcasts(inner, result) for result in results]
    return [(r, inner.operand(r, 1).nbytes) for r in results if r.opcode == "dynamic-update-slice"]


def _behind_bitcasts(inner: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode == "bitcast":
        instruction = inner.operand(instruction, 0)
    return instruction


def _taken(inner: Computation, parameter: Instruction, whole: int, updates: list[tuple[Instruction, int]]) -> int:
    """Bytes that a fusion reads of one operand."""
    users = inner.users(parameter.name)
    if len(users) == 1 and users[0].opcode == "bitcast":
        return _taken(inner, users[0], whole, updates)
    taken = 0
    for user in users:
        if user.opcode in _PARTIAL and user.operands[0] == parameter.name:
            taken += user.nbytes
        elif not any(user is update and user.operands[0] == parameter.name for update, _ in updates):
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


def narrow(module: Module) -> bool:
    """Whether some convolution or matrix product multiplies elements of 16 bits or fewer."""
    for computation in module.computations.values():
        for instruction in computation.instructions:
            if flops_lib.multiplies(instruction) and instruction.operands:
                dtype = computation.operand(instruction, 0).arrays[0].dtype
                if dtype not in ("f32", "f64", "c64", "c128"):
                    return True
    return False
