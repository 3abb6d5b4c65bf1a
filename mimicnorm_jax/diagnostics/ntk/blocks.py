"""The tangent kernel in blocks: on all devices and processes, in memory or on disk, with a progress bar."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mimicnorm_jax.diagnostics.ntk.guard import Guard
from mimicnorm_jax.diagnostics.ntk.implementation import Implementation
from mimicnorm_jax.diagnostics.ntk.jacobians import Output
from mimicnorm_jax.diagnostics.ntk.job import digest_of
from mimicnorm_jax.diagnostics.ntk.targets import ArrayTarget, FileTarget, Place, Target
from mimicnorm_jax.utils.trees import all_finite


class BlockedKernel:
    """The kernel of two sets of examples from blocks of so many on each side; compiles once.

    Rows of blocks are dealt out to the processes, and of these to the local devices; a symmetric kernel's lower half is
    mirrored.

    Args:
      implementation: computes a block.
      block: examples on each side of one.
      guard: checks the first block.
    """

    def __init__(self, implementation: Implementation, block: tuple[int, int], guard: Guard | None = None) -> None:
        self.implementation, self.block, self.guard = implementation, block, guard
        self._request = implementation.request

    def __call__(
        self,
        params: Any,
        x1: jax.Array,
        x2: jax.Array | None = None,
        out: Path | None = None,
        process: tuple[int, int] = (0, 1),
    ) -> Any:
        """The kernel in its documented order of axes, one or a dict by parameter; in `out`, if it is given.

        There, several processes compute it: this is `process[0]` of `process[1]`.
        """
        right = x1 if x2 is None else x2
        if out is not None or self.block[0] < len(x1) or self.block[1] < len(right):
            grid = _Grid.of(np.asarray(x1), None if x2 is None else np.asarray(x2), self.block)
            kernels = self._streamed(params, grid, process, self._target(params, grid, out, process[1] == 1))
            return kernels if self._request.per_parameter else kernels[""]
        kernel = documented(self.whole(params, x1, x2), self._request.output)
        everything = slice(0, len(x1)), slice(0, len(right))
        for value in jax.tree.leaves(kernel):
            _check_finite(value, everything)
        if self.guard is not None:
            self.guard(params, x1, right, everything, kernel)
        return kernel

    @cached_property
    def whole(self) -> Any:
        """The compiled kernel of all examples at once, `(params, x1, x2 or None)`."""

        def kernel(params: Any, x1: jax.Array, x2: jax.Array | None) -> Any:
            left = self.implementation.features(params, self._grouped(x1), False)
            right = left if x2 is None else self.implementation.features(params, self._grouped(x2), False)
            return self._contract(params, left, right, x2 is None)

        return jax.jit(_precise(kernel))

    @cached_property
    def features(self) -> Any:
        """The compiled features of one block's examples, `(params, x)`; of a kernel that takes several blocks."""
        return jax.jit(_precise(lambda params, x: self.implementation.features(params, self._grouped(x), True)))

    @cached_property
    def contracted(self) -> Any:
        """The compiled kernel of two blocks, `(params, left, right, symmetric)` of their features."""
        return jax.jit(_precise(self._contract), static_argnums=3)

    def _contract(self, params: Any, left: Any, right: Any, symmetric: bool) -> Any:
        parts = self.implementation.contract(params, left, right, symmetric)
        return parts if self._request.per_parameter else sum(parts.values())

    def _grouped(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, self._request.examples, *x.shape[1:])

    def _target(self, params: Any, grid: "_Grid", out: Path | None, alone: bool) -> Target:
        examples, places = (len(grid.x1), len(grid.x2)), grid.places
        if out is None:
            return ArrayTarget(examples, places, grid.symmetric)
        return FileTarget(examples, places, grid.symmetric, out=out, job=self._job(params, grid), alone=alone)

    def _streamed(self, params: Any, grid: "_Grid", process: tuple[int, int], target: Target) -> Any:
        """The kernels by name. More than one pass where a block turns out to be damaged."""
        while (kernels := target.finish()) is None:
            try:
                for place, values in self._checked(params, grid, process, target):
                    target.put(place, values)
            except ValueError:
                target.discard()
                raise
        return kernels

    def _job(self, params: Any, grid: "_Grid") -> str:
        """What tells this kernel from any other: the programs that compute its blocks, and what they are given."""
        sides = [jnp.asarray(_padded(grid.x1[:1], size)) for size in self.block]
        features = [jax.make_jaxpr(self.features, return_shape=True)(params, side) for side in sides]
        shapes = [shape for _, shape in features]
        programs = [program for program, _ in features]
        for symmetric in {grid.symmetric, False}:
            contract = jax.make_jaxpr(self.contracted, static_argnums=3)
            programs.append(contract(params, shapes[0], shapes[1], symmetric))
        return digest_of(programs, (params, grid.x1, grid.x2), grid.symmetric, grid.block)

    def _checked(
        self, params: Any, grid: "_Grid", process: tuple[int, int], target: Target
    ) -> Iterator[tuple[Place, dict[str, np.ndarray]]]:
        """Blocks that are not there yet, cropped and checked, by name."""
        with tqdm(
            total=len(grid.places),
            initial=target.count(),
            desc="tangent kernel",
            unit="block",
            disable=not sys.stderr.isatty(),
            leave=False,
        ) as bar:
            for row, column, values in self._blocks(params, grid, process, target):
                named = values if self._request.per_parameter else {"": values}
                public = {name: documented(value, self._request.output) for name, value in named.items()}
                shown = {name: grid.cropped(value, row, column) for name, value in public.items()}
                if self.guard is not None and row.start == column.start == 0:
                    each = shown if self._request.per_parameter else shown[""]
                    self.guard(params, grid.x1, grid.x2, (row, column), each)
                for value in shown.values():
                    _check_finite(value, (row, column))
                yield (row, column), shown
                if not bar.disable:  # other processes' count too
                    bar.update(target.count() - bar.n)

    def _blocks(
        self, params: Any, grid: "_Grid", process: tuple[int, int], target: Target
    ) -> Iterator[tuple[slice, slice, Any]]:
        """Blocks as they become ready: every device is one block ahead of the host, and holds one column's features."""
        rows, columns, block = grid.rows, grid.columns, grid.block

        def wanted(i: int, j: int) -> bool:
            return not (grid.symmetric and j < i) and not target.has((rows[i], columns[j]))

        def is_open(i: int) -> bool:
            return any(wanted(i, j) for j in range(len(columns)))

        open_rows = [i for i in range(len(rows)) if is_open(i)]
        devices = jax.local_devices()[: len(open_rows)]
        copies = [jax.device_put(params, device) for device in devices]

        def put(x: np.ndarray, piece: slice, size: int, d: int) -> Any:
            return self.features(copies[d], jax.device_put(jnp.asarray(_padded(x[piece], size)), devices[d]))

        for turn, order in _turns(open_rows, process, len(devices)):
            mine = list(enumerate(i for i in turn if is_open(i)))
            left = {i: put(grid.x1, rows[i], block[0], d) for d, i in mine}
            waiting: list[tuple[slice, slice, Any]] = []
            for j in range(len(columns))[::order]:
                ahead = []
                # The features of the column before make room for this one's.
                jax.block_until_ready([value for *_, value in waiting])
                for d, i in mine:
                    if not wanted(i, j):
                        continue
                    same = grid.symmetric and i == j
                    right = left[i] if same else put(grid.x2, columns[j], block[1], d)
                    ahead.append((rows[i], columns[j], self.contracted(copies[d], left[i], right, same)))
                    del right
                yield from waiting
                waiting = ahead
            yield from waiting


@dataclass(frozen=True)
class _Grid:
    """The examples of both sides, cut into blocks of one size; of a symmetric kernel only the upper half counts."""

    x1: np.ndarray
    x2: np.ndarray
    block: tuple[int, int]
    symmetric: bool

    @staticmethod
    def of(x1: np.ndarray, x2: np.ndarray | None, block: tuple[int, int]) -> "_Grid":
        return _Grid(x1, x1, (min(block), min(block)), True) if x2 is None else _Grid(x1, x2, block, False)

    @property
    def rows(self) -> list[slice]:
        return _pieces(len(self.x1), self.block[0])

    @property
    def columns(self) -> list[slice]:
        return _pieces(len(self.x2), self.block[1])

    @property
    def places(self) -> list[Place]:
        """Of all blocks that are computed."""
        return [
            (row, column)
            for i, row in enumerate(self.rows)
            for j, column in enumerate(self.columns)
            if not (self.symmetric and j < i)
        ]

    @staticmethod
    def cropped(value: Any, row: slice, column: slice) -> np.ndarray:
        """Without what a short block was padded by."""
        return np.asarray(value)[: row.stop - row.start, : column.stop - column.start]


def _precise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Products in full precision, which accelerators' default is not: small eigenvalues depend on it."""

    def precise(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    return precise


def documented(blocks: Any, output: Output) -> Any:
    """The documented order of axes."""
    return jax.tree.map(lambda b: b.transpose(0, 2, 1, 3), blocks) if output == "full" else blocks


def _check_finite(value: Any, block: tuple[slice, slice]) -> None:
    if not all_finite(value):
        row, column = block
        raise ValueError(
            f"the kernel of examples {row.start} to {row.stop - 1} with {column.start} to {column.stop - 1} is not "
            f"finite: look for NaN or overflow in these inputs and in the outputs"
        )


def _turns(rows: list[int], process: tuple[int, int], devices: int) -> Iterator[tuple[list[int], int]]:
    """Rows that are computed together, and the order of their columns: a process's own ones, then others' from the end.

    So whoever is done first meets those who are at work, and does all that a killed one left.
    """
    index, count = process
    for shift in range(count):
        order = 1 if shift == 0 else -1
        share = [i for i in rows if i % count == (index + shift) % count][::order]
        yield from ((share[first : first + devices], order) for first in range(0, len(share), max(devices, 1)))


def _pieces(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _padded(x: Any, size: int) -> Any:
    """A block of `size` examples: short ones repeat their last, so that one shape is compiled."""
    return x if len(x) == size else np.concatenate([x, np.repeat(x[-1:], size - len(x), 0)])
