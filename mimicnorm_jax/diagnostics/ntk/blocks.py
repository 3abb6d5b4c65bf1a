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
        kernel = _public(self.whole(params, x1, x2), self._request.output)
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
        output, target = self._request.output, _Target((len(grid.x1), len(grid.x2)), out)
        bar = tqdm(
            total=grid.num_blocks, desc="tangent kernel", unit="block", disable=not sys.stderr.isatty(), leave=False
        )
        try:
            for row, column, values in self._blocks(params, grid):
                named = values if self._request.per_parameter else {"": values}
                shown = {name: grid.cropped(_public(value, output), row, column) for name, value in named.items()}
                if self.guard is not None and row.start == column.start == 0:
                    each = shown if self._request.per_parameter else shown[""]
                    self.guard(params, grid.x1, grid.x2, (row, column), each)
                for name, value in shown.items():
                    _check_finite(value, (row, column))
                    target.put(name, row, column, value)
                    if grid.symmetric:
                        target.put(name, column, row, _mirrored(value))
                bar.update()
        except BaseException:
            target.discard()
            raise
        finally:
            bar.close()
        kernels = target.finish()
        return kernels if self._request.per_parameter else kernels[""]

    def _blocks(self, params: Any, grid: "_Grid") -> Iterator[tuple[slice, slice, Any]]:
        """Blocks as they become ready: every device is one block ahead of the host."""
        rows, columns, block = grid.rows, grid.columns, grid.block
        devices = jax.local_devices()[: len(rows)]
        copies = [jax.device_put(params, device) for device in devices]

        def put(x: np.ndarray, piece: slice, size: int, d: int) -> Any:
            return self._features(copies[d], jax.device_put(jnp.asarray(_padded(x[piece], size)), devices[d]))

        for first in range(0, len(rows), len(devices)):
            mine = list(enumerate(range(first, min(first + len(devices), len(rows)))))
            left = {i: put(grid.x1, rows[i], block[0], d) for d, i in mine}
            waiting: list[tuple[slice, slice, Any]] = []
            for j, column in enumerate(columns):
                ahead = []
                for d, i in mine:
                    if grid.symmetric and j < i:
                        continue
                    same = grid.symmetric and i == j
                    right = left[i] if same else put(grid.x2, column, block[1], d)
                    ahead.append((rows[i], column, self._contracted(copies[d], left[i], right, same)))
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


class _Target:
    """The kernels that blocks are put into: arrays, or one file that is there when it is whole."""

    def __init__(self, examples: tuple[int, int], out: Path | None) -> None:
        self.examples, self.out = examples, out
        self.partial = None if out is None else out.with_name(f"{out.name}.partial")
        self.kernels: dict[str, Any] = {}

    def put(self, name: str, row: slice, column: slice, value: np.ndarray) -> None:
        if name not in self.kernels:
            shape = (*self.examples, *value.shape[2:])
            self.kernels[name] = (
                np.empty(shape, value.dtype)
                if self.partial is None
                else np.lib.format.open_memmap(self.partial, "w+", value.dtype, shape)
            )
        self.kernels[name][row, column] = value

    def discard(self) -> None:
        if self.partial is not None:
            self.partial.unlink(missing_ok=True)

    def finish(self) -> dict[str, Any]:
        if self.partial is None or self.out is None:
            return self.kernels
        self.kernels[""].flush()
        self.partial.replace(self.out)
        return {"": np.load(self.out, mmap_mode="r")}


def _precise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Products in full precision, which accelerators' default is not: small eigenvalues depend on it."""

    def precise(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    return precise


def _public(blocks: Any, output: Output) -> Any:
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
