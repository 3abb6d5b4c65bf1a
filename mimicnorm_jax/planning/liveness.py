"""What is in memory when most is, from the buffer assignment that the compiler wrote down."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mimicnorm_jax.planning.hlo import Instruction, Module

_ALLOCATION = re.compile(r"allocation \d+: size (\d+), (?:color (\d+), )?(?:page \d+, )?(.*)$")
_CONSTANT = re.compile(r"^allocation \d+: size (\d+), (?:color 0, )?constant", re.MULTILINE)
_VALUE = re.compile(r" value: <\d+ (\S+) @\d+> \(size=(\d+),offset=(\d+)\): (.*)$")
_RANGE = re.compile(r"\s+(\S+\{[\d,]*\}):(\d+)-(\d+)$")
_TRANSFORM = re.compile(r"^[\w\-]+\((.*)\)$")
_STRUCTURE = {
    "while",
    "body",
    "cond",
    "closed_call",
    "checkpoint",
    "rematted_computation",
    "remat2",
    "shard_map",
    "main",
}
_PASSED = {"copy", "copy-start", "copy-done", "slice-start", "slice-done", "bitcast", "get-tuple-element", "transpose"}


@dataclass(frozen=True)
class Buffer:
    """An array that is alive at the peak.

    Attributes:
      nbytes: what it takes.
      shape: as XLA writes it, `bf16[256,56,56,64]`.
      role: `argument`, `copy` of an argument, `forward` for what the forward pass made, `recomputed` for what
        `jax.checkpoint` made again, `backward` for what the transpose made, `unnamed` for what the compiler made.
      layer: path of the module that made it; of an argument and its copy its name.
      operation: the primitive; empty for an argument.
    """

    nbytes: int
    shape: str
    role: str
    layer: str
    operation: str = ""


def layer_of(op_name: str) -> tuple[str, str]:
    """A layer's path and the primitive, from the name that JAX gave an instruction.

    Example:
      >>> layer_of("jit(step)/transpose(jvp(ResNet))/stage1_block1/conv1/conv/conv_general_dilated")
      ('stage1_block1/conv1/conv', 'conv_general_dilated')
    """
    parts, depth = [""], 0
    for character in op_name:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "/" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    path: list[str] = []
    for part in parts[:-1]:
        # Flax writes a method other than __call__ as `name.method`, followed by the name once more.
        if not _TRANSFORM.match(part) and part not in _STRUCTURE and "." not in part and part not in path[-1:]:
            path.append(part)
    if path:  # JAX writes the whole path again where a rule of a custom derivative was traced
        path = path[len(path) - 1 - path[::-1].index(path[0]) :]
    return "/".join(path), parts[-1]


@dataclass(frozen=True)
class _Value:
    name: str
    size: int
    offset: int
    shape: str
    start: int
    end: int


def _ranges(text: str) -> dict[str, tuple[int, int]]:
    found = (_RANGE.match(line) for line in text.splitlines())
    return {match[1]: (int(match[2]), int(match[3])) for match in found if match}


def _temporaries(assignment: str, ranges: dict[str, tuple[int, int]]) -> list[list[_Value]]:
    """The values of every allocation for temporaries in the device's main memory."""
    found: list[list[_Value]] = []
    wanted = False
    for line in assignment.splitlines():
        if allocation := _ALLOCATION.match(line):
            wanted = allocation[2] in (None, "0") and allocation[3].startswith("preallocated-temp")
            if wanted:
                found.append([])
        elif wanted and (value := _VALUE.match(line)):
            name = value[1] if value[1].endswith("}") else value[1] + "{}"
            if name in ranges:
                found[-1].append(_Value(name, int(value[2]), int(value[3]), value[4], *ranges[name]))
    return found


def _alive(values: Iterable[_Value], time: int) -> list[_Value]:
    """Values that fill memory at a time, without those that another one took the place of at that very time."""
    now = sorted((v for v in values if v.start <= time <= v.end), key=lambda v: (-v.start, -v.size))
    kept: list[_Value] = []
    for value in now:
        if not any(k.offset <= value.offset and value.offset + value.size <= k.offset + k.size for k in kept):
            kept.append(value)
    return kept


def _peak(values: list[_Value]) -> list[_Value]:
    change: dict[int, int] = {}
    for value in values:
        change[value.start] = change.get(value.start, 0) + value.size
        change[value.end + 1] = change.get(value.end + 1, 0) - value.size
    total, bound = 0, {}
    for time in sorted(change):
        total += change[time]
        bound[time] = total
    best: list[_Value] = []
    most = 0
    for time in sorted(bound, key=lambda t: -bound[t]):
        if bound[time] <= most:
            break
        alive = _alive(values, time)
        size = sum(value.size for value in alive)
        if size > most:
            best, most = alive, size
    return best


def _made_by(module: Module, name: str) -> str:
    """The name JAX gave to what made a value: of the instruction, or of what it fuses."""
    maker = name.partition("{")[0]
    for computation in module.computations.values():
        if maker in computation.by_name:
            instruction = computation.by_name[maker]
            while not (found := instruction.op_name or _inner_name(module, instruction)):
                if instruction.opcode not in _PASSED or not instruction.operands:
                    return ""
                instruction = computation.operand(instruction, 0)
            return found
    return ""


def _inner_name(module: Module, instruction: Instruction) -> str:
    names = [inner.op_name for inner in reversed(module.inside(instruction)) if "/" in inner.op_name]
    return names[0] if names else ""


def _plain(shape: str) -> str:
    return re.sub(r"\{[^}]*\}", "", shape)


def read_dump(folder: Path) -> tuple[str, str] | None:
    """The texts of buffer assignment and live ranges that a compiler left in a folder; None if it left none."""
    found = []
    for kind in ("buffer-assignment", "live-range"):
        files = sorted(folder.rglob(f"*{kind}.txt"), key=lambda path: path.stat().st_size)
        if not files:
            return None
        found.append(files[-1].read_text())
    return found[0], found[1]


def constant_bytes(assignment: str) -> int:
    """What the constants of a program take of the device's main memory, by its buffer assignment."""
    return sum(int(size) for size in _CONSTANT.findall(assignment))


def live_at_peak(module: Module, assignment: str, live_ranges: str) -> tuple[Buffer, ...]:
    """The buffers that are alive when temporaries take most, and the arguments, largest first.

    Arguments count in whole, as their caller holds them. In-place operations hold one buffer, not two.
    """
    buffers = [
        Buffer(parameter.nbytes, _shape(parameter), "argument", parameter.op_name or parameter.name)
        for parameter in module.computations[module.entry].parameters.values()
    ]
    for values in _temporaries(assignment, _ranges(live_ranges)):
        for value in _peak(values):
            buffers.append(_buffer(value, _made_by(module, value.name)))
    return tuple(sorted(buffers, key=lambda buffer: -buffer.nbytes))


def _buffer(value: _Value, op_name: str) -> Buffer:
    shape = _plain(value.shape)
    if not op_name:
        return Buffer(value.size, shape, "unnamed", "")
    if "/" not in op_name:
        return Buffer(value.size, shape, "copy", op_name)
    transposed = "backward" if "transpose(" in op_name else "forward"
    role = "recomputed" if "rematted_computation" in op_name else transposed
    return Buffer(value.size, shape, role, *layer_of(op_name))


def _shape(parameter: Instruction) -> str:
    array = parameter.arrays[0]
    return f"{array.dtype}[{','.join(map(str, array.dims))}]"
