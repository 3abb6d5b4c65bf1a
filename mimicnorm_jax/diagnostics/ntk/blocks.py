"""The tangent kernel in blocks: on all devices, in memory or on disk, with a progress bar."""

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

from mimicnorm_jax.diagnostics.ntk.features import Output
from mimicnorm_jax.diagnostics.ntk.guard import Guard
from mimicnorm_jax.diagnostics.ntk.implementation import Implementation
from mimicnorm_jax.diagnostics.ntk.targets import ArrayTarget, FileTarget, digest_of
from mimicnorm_jax.utils.trees import all_finite


class BlockedKernel:
    """The kernel of two sets of examples from blocks of so many on each side; compiles once.

    Rows of blocks are dealt out to the local devices; a symmetric kernel's lower half is mirrored.

    Args:
      implementation: computes a block.
      block: examples on each side of one.
      guard: checks the first block.
    """

    def __init__(self, implementation: Implementation, block: tuple[int, int], guard: Guard | None = None) -> None:
        self.implementation, self.block, self.guard = implementation, block, guard
        self._request = implementation.request

    def __call__(self, params: Any, x1: jax.Array, x2: jax.Array | None = None, out: Path | None = None) -> Any:
        """The kernel in its documented order of axes, one or a dict by parameter; in `out`, if it is given."""
        right = x1 if x2 is None else x2
        if out is not None or self.block[0] < len(x1) or self.block[1] < len(right):
            return self._streamed(params, x1, x2, out)
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
    def _features(self) -> Any:
        return jax.jit(_precise(lambda params, x: self.implementation.features(params, self._grouped(x), True)))

    @cached_property
    def _contracted(self) -> Any:
        return jax.jit(_precise(self._contract), static_argnums=3)

    def _contract(self, params: Any, left: Any, right: Any, symmetric: bool) -> Any:
        parts = self.implementation.contract(params, left, right, symmetric)
        return parts if self._request.per_parameter else sum(parts.values())

    def _grouped(self, x: jax.Array) -> jax.Array:
        return x.reshape(-1, self._request.examples, *x.shape[1:])

    def _streamed(self, params: Any, x1: Any, x2: Any, out: Path | None) -> Any:
        grid = _Grid.of(np.asarray(x1), None if x2 is None else np.asarray(x2), self.block)
        examples = len(grid.x1), len(grid.x2)
        if out is None:
            target = ArrayTarget(examples)
            for place, blocks in self._checked(params, grid, set()):
                for name, value in blocks.items():
                    target.put(name, place, value)
                    if grid.symmetric:
                        target.put(name, (place[1], place[0]), _mirrored(value))
            kernels = target.finish()
            return kernels if self._request.per_parameter else kernels[""]
        file = FileTarget(examples, out, self._job(params, grid))
        try:
            for place, blocks in self._checked(params, grid, file.finished):
                file.put(place, blocks[""], _mirrored(blocks[""]) if grid.symmetric else None)
        except ValueError:
            file.discard()
            raise
        return file.finish()

    def _job(self, params: Any, grid: "_Grid") -> str:
        """What tells this kernel from any other: the programs that compute its blocks, and what they are given."""
        sides = [jnp.asarray(_padded(grid.x1[:1], size)) for size in self.block]
        features = [jax.make_jaxpr(self._features, return_shape=True)(params, side) for side in sides]
        shapes = [shape for _, shape in features]
        programs = [program for program, _ in features]
        for symmetric in {grid.symmetric, False}:
            contract = jax.make_jaxpr(self._contracted, static_argnums=3)
            programs.append(contract(params, shapes[0], shapes[1], symmetric))
        return digest_of(programs, (params, grid.x1, grid.x2), grid.symmetric, grid.block)

    def _checked(
        self, params: Any, grid: "_Grid", finished: set[tuple[int, int]]
    ) -> Iterator[tuple[tuple[slice, slice], dict[str, np.ndarray]]]:
        """Blocks that are not finished yet, cropped and checked, by name."""
        with tqdm(
            total=grid.num_blocks,
            initial=len(finished),
            desc="tangent kernel",
            unit="block",
            disable=not sys.stderr.isatty(),
            leave=False,
        ) as bar:
            for row, column, values in self._blocks(params, grid, finished):
                named = values if self._request.per_parameter else {"": values}
                public = {name: documented(value, self._request.output) for name, value in named.items()}
                shown = {name: grid.cropped(value, row, column) for name, value in public.items()}
                if self.guard is not None and row.start == column.start == 0:
                    each = shown if self._request.per_parameter else shown[""]
                    self.guard(params, grid.x1, grid.x2, (row, column), each)
                for value in shown.values():
                    _check_finite(value, (row, column))
                yield (row, column), shown
                bar.update()

    def _blocks(self, params: Any, grid: "_Grid", finished: set[tuple[int, int]]) -> Iterator[tuple[slice, slice, Any]]:
        """Blocks as they become ready: every device is one block ahead of the host, and holds one column's features."""
        rows, columns, block = grid.rows, grid.columns, grid.block

        def wanted(i: int, j: int) -> bool:
            return not (grid.symmetric and j < i) and (rows[i].start, columns[j].start) not in finished

        open_rows = [i for i in range(len(rows)) if any(wanted(i, j) for j in range(len(columns)))]
        devices = jax.local_devices()[: len(open_rows)]
        copies = [jax.device_put(params, device) for device in devices]

        def put(x: np.ndarray, piece: slice, size: int, d: int) -> Any:
            return self._features(copies[d], jax.device_put(jnp.asarray(_padded(x[piece], size)), devices[d]))

        for first in range(0, len(open_rows), max(len(devices), 1)):
            mine = list(enumerate(open_rows[first : first + len(devices)]))
            left = {i: put(grid.x1, rows[i], block[0], d) for d, i in mine}
            waiting: list[tuple[slice, slice, Any]] = []
            for j, column in enumerate(columns):
                ahead = []
                # The features of the column before make room for this one's.
                jax.block_until_ready([value for *_, value in waiting])
                for d, i in mine:
                    if not wanted(i, j):
                        continue
                    same = grid.symmetric and i == j
                    right = left[i] if same else put(grid.x2, column, block[1], d)
                    ahead.append((rows[i], column, self._contracted(copies[d], left[i], right, same)))
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
    def num_blocks(self) -> int:
        rows = len(self.rows)
        return rows * (rows + 1) // 2 if self.symmetric else rows * len(self.columns)

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


def _mirrored(value: np.ndarray) -> np.ndarray:
    """A block in its documented order of axes, with its sides swapped."""
    return value.transpose(1, 0, *range(value.ndim - 1, 1, -1))


def _check_finite(value: Any, block: tuple[slice, slice]) -> None:
    if not all_finite(value):
        row, column = block
        raise ValueError(
            f"the kernel of examples {row.start} to {row.stop - 1} with {column.start} to {column.stop - 1} is not "
            f"finite: look for NaN or overflow in these inputs and in the outputs"
        )


def _pieces(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _padded(x: Any, size: int) -> Any:
    """A block of `size` examples: short ones repeat their last, so that one shape is compiled."""
    return x if len(x) == size else np.concatenate([x, np.repeat(x[-1:], size - len(x), 0)])
