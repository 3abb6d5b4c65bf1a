"""Reads the text of a compiled program: computations, their instructions in the order they run, shapes in bytes."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128, "bf16": 16}
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(
    r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*)(?::(?:T\(([\d,]+)\))?((?:[^}S]|S(?!\())*S\(\d\))?[^}]*)?\})?"
)
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|called_computations)=\{?%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|true_computation=%([\w.\-]+), false_computation=%([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:"?(\d+)')


FUSIONS = ("fusion", "fusion-start")
"""Operations that run a computation as one kernel. The second, of jax 0.12's compiler, goes on beside other kernels:
its result is a tuple of the operands, the kernel's result and a context."""


@dataclass(frozen=True)
class Array:
    """Element type and dimensions of one array.

    Attributes:
      dtype: as XLA writes it.
      dims: its shape.
      order: its dimensions from the one that changes fastest.
      tile: to whose multiples a TPU pads the fastest ones, slowest of them first; empty if it does not.
      on_chip: whether it lives in a TPU's memory on the chip, which no traffic reaches.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    on_chip: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bits(self) -> int:
        """Of an element."""
        known = _BITS.get(self.dtype)
        found = re.match(r"[a-z]+(\d+)", self.dtype) if known is None else None  # f32, s8, u4, f8e4m3fn
        return int(found[1]) if found else known or 0

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in memory, a TPU's padding to whole tiles included."""
        dims = [self.dims[i] for i in self.order] if len(self.order) == len(self.dims) else list(self.dims[::-1])
        for i, multiple in enumerate(reversed(self.tile)):
            if i < len(dims):
                dims[i] = -(-dims[i] // multiple) * multiple
            else:
                dims.append(multiple)
        return (math.prod(dims) * self.bits + 7) // 8


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: without the per cent sign.
      opcode: such as `fusion`.
      arrays: of its result, several for a tuple.
      operands: names of its operands.
      attributes: the text after the operands; of a parameter and a constant from its number or value on.
      root: whether it is its computation's result.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def nbytes(self) -> int:
        """Bytes of its result in the device's main memory."""
        return sum(array.nbytes for array in self.arrays if not array.on_chip)

    @cached_property
    def op_name(self) -> str:
        """The path of transformations, modules and primitive that JAX gave it; empty for one that XLA made."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Computations that run once for each run of the instruction; a loop's body among them."""
        return tuple(_CALLED.findall(self.attributes))

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional, one of which runs."""
        found = _BRANCHES.search(self.attributes)
        if not found:
            return ()
        return tuple(_NAME.findall(found[1])) if found[1] else (found[2], found[3])

    @property
    def trips(self) -> int | None:
        """How often a loop's body runs; None if the compiler does not say, see `loops.turns`."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None

    def attribute(self, name: str) -> str:
        """The text of a braced or plain attribute such as `window`; empty if it has none."""
        found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|%?([^,\s]+))", self.attributes)
        return (found[1] if found[1] is not None else found[2]) if found else ""

    @property
    def target(self) -> str:
        """A custom call's target, such as `__cudnn$convForward`."""
        return self.attribute("custom_call_target").strip('"')


@dataclass(frozen=True)
class Computation:
    """Instructions in the order they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions) if i.root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        found = (i for i in self.instructions if i.opcode == "parameter")
        return {int(i.attributes.split(")", 1)[0]): i for i in found}

    def users(self, name: str) -> list[Instruction]:
        return [i for i in self.instructions if name in i.operands]

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.by_name[instruction.operands[index]]


@dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: the name of the one that runs first.
    """

    computations: dict[str, Computation]
    entry: str

    def everywhere(self) -> Iterator[Instruction]:
        """Every instruction of every computation."""
        for computation in self.computations.values():
            yield from computation.instructions

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """What a fusion fuses, fusions within it opened as well; the instruction itself otherwise."""
        if instruction.opcode not in (*FUSIONS, "async-start"):
            return [instruction]
        return [
            inner
            for name in instruction.called
            for part in self.computations[name].instructions
            for inner in self.inside(part)
        ]


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    return len(text)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a shape as XLA writes it, `(f32[2,3]{1,0}, u8[0]{0})`."""
    return tuple(
        Array(dtype, _numbers(dims), _numbers(order), _numbers(tile), bool(space and (tile or not dims)))
        for dtype, dims, order, tile, space in _ARRAY.findall(text)
    )


def _instruction(line: str) -> Instruction | None:
    text = line.strip()
    root = text.startswith("ROOT ")
    name, equals, rest = text.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.find("(")
    closing = _closing(rest, opening)
    operands = () if rest.startswith("constant") else tuple(_NAME.findall(rest[opening:closing]))
    tail = rest[opening + 1 :] if rest.startswith(("parameter", "constant")) else rest[closing + 1 :]
    return Instruction(name.lstrip("%"), rest[:opening], arrays(shape), operands, tail, root)


def parse(text: str) -> Module:
    """Reads a program's text, `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, name, body = "", "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name, body = header[2], []
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(name, tuple(body))
            name = ""
        elif name and (instruction := _instruction(line)):
            body.append(instruction)
    return Module(computations, entry)
