"""Fits blocks of the tangent kernel together: on all devices, in memory or on disk, with a progress bar."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mimicnorm_jax.diagnostics.ntk.features import Output
from mimicnorm_jax.diagnostics.ntk.implementations import Method

Check = Callable[[Any, Any, Any, slice, slice, Any], None]
"""What a guard asks for: parameters, both sides' examples, the examples of a block, and the block."""


def assemble(
    method: Method,
    block: tuple[int, int],
    params: Any,
    x1: jax.Array,
    x2: jax.Array | None,
    *,
    per_parameter: bool,
    out: Path | None,
    guard: Check | None = None,
) -> Any:
    """The kernel of `x1` and `x2` from blocks of so many examples on each side.

    Rows of blocks are dealt out to the local devices; a symmetric kernel's lower half is mirrored. The guard sees the
    first block.
    """
    if out is None and block[0] >= len(x1) and block[1] >= len(x1 if x2 is None else x2):
        whole = _public(_whole(method, per_parameter)(params, x1, x2), method.request.output)
        for value in jax.tree.leaves(whole):
            _check_finite(value, slice(0, len(x1)), slice(0, value.shape[1]))
        if guard is not None:
            right = x1 if x2 is None else x2
            guard(params, x1, right, slice(0, len(x1)), slice(0, len(right)), whole)
        return whole
    return _streamed(method, block, params, x1, x2, per_parameter, out, guard)


def _cached(method: Method, name: str, function: Callable[..., Any], **options: Any) -> Any:
    """A compiled function that lives as long as the method.

    Matrix products are in full precision, which accelerators' default is not: small eigenvalues depend on it.
    """

    def precise(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    cache = method.__dict__.setdefault("_compiled", {})
    if name not in cache:
        cache[name] = jax.jit(precise, **options)
    return cache[name]


def _grouped(x: jax.Array, examples: int) -> jax.Array:
    return x.reshape(-1, examples, *x.shape[1:])


def _sum(blocks: dict[str, Any], per_parameter: bool) -> Any:
    return blocks if per_parameter else sum(blocks.values())


def _whole(method: Method, per_parameter: bool) -> Any:
    examples = method.request.examples

    def kernel(params: Any, x1: jax.Array, x2: jax.Array | None) -> Any:
        left = method.features(params, _grouped(x1, examples), False)
        right = left if x2 is None else method.features(params, _grouped(x2, examples), False)
        return _sum(method.inner(params, left, right, x2 is None), per_parameter)

    return _cached(method, f"whole {per_parameter}", kernel)


def _public(blocks: Any, output: Output) -> Any:
    """The documented order of axes."""
    return jax.tree.map(lambda b: b.transpose(0, 2, 1, 3), blocks) if output == "full" else blocks


def _check_finite(value: Any, row: slice, column: slice) -> None:
    if not bool(jnp.isfinite(value).all()):
        raise ValueError(
            f"the kernel of examples {row.start} to {row.stop - 1} with {column.start} to {column.stop - 1} is not "
            f"finite: look for NaN or overflow in these inputs and in the outputs"
        )


def _pieces(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _padded(x: Any, size: int) -> Any:
    """A block of `size` examples: short ones repeat their last, so that one shape is compiled."""
    return x if len(x) == size else np.concatenate([x, np.repeat(x[-1:], size - len(x), 0)])


def _streamed(
    method: Method,
    block: tuple[int, int],
    params: Any,
    x1: Any,
    x2: Any,
    per_parameter: bool,
    out: Path | None,
    guard: Check | None,
) -> Any:
    symmetric, output = x2 is None, method.request.output
    x1 = np.asarray(x1)
    x2 = x1 if symmetric else np.asarray(x2)
    if symmetric:
        block = (min(block), min(block))
    rows, columns = _pieces(len(x1), block[0]), _pieces(len(x2), block[1])
    total = len(rows) * (len(rows) + 1) // 2 if symmetric else len(rows) * len(columns)
    bar = tqdm(total=total, desc="tangent kernel", unit="block", disable=not sys.stderr.isatty(), leave=False)
    result: dict[str, Any] = {}
    partial = None if out is None else out.with_name(f"{out.name}.partial")
    try:
        for row, column, values in _blocks(method, block, params, x1, x2, rows, columns, symmetric, per_parameter):
            shown = {
                name: np.asarray(_public(value, output))[: row.stop - row.start, : column.stop - column.start]
                for name, value in (values if per_parameter else {"": values}).items()
            }
            if guard is not None and row.start == column.start == 0:
                guard(params, x1, x2, row, column, shown if per_parameter else shown[""])
            for name, value in shown.items():
                _check_finite(value, row, column)
                if name not in result:
                    shape = (len(x1), len(x2), *value.shape[2:])
                    result[name] = (
                        np.empty(shape, value.dtype)
                        if partial is None
                        else np.lib.format.open_memmap(partial, "w+", value.dtype, shape)
                    )
                result[name][row, column] = value
                if symmetric:
                    result[name][column, row] = value.transpose(1, 0, *range(value.ndim - 1, 1, -1))
            bar.update()
    except BaseException:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise
    finally:
        bar.close()
    if partial is not None and out is not None:
        result[""].flush()
        partial.replace(out)
        return np.load(out, mmap_mode="r")
    return result if per_parameter else result[""]


def _blocks(
    method: Method,
    block: tuple[int, int],
    params: Any,
    x1: np.ndarray,
    x2: np.ndarray,
    rows: list[slice],
    columns: list[slice],
    symmetric: bool,
    per_parameter: bool,
) -> Iterator[tuple[slice, slice, Any]]:
    """Blocks as they become ready: every device is one block ahead of the host."""
    examples = method.request.examples
    features = _cached(method, "features", lambda params, x: method.features(params, _grouped(x, examples), True))

    def pair(params: Any, left: Any, right: Any, same: bool) -> Any:
        return _sum(method.inner(params, left, right, same), per_parameter)

    inner = _cached(method, f"inner {per_parameter}", pair, static_argnums=3)
    devices = jax.local_devices()[: len(rows)]
    copies = [jax.device_put(params, device) for device in devices]

    def put(x: np.ndarray, piece: slice, size: int, d: int) -> Any:
        return features(copies[d], jax.device_put(jnp.asarray(_padded(x[piece], size)), devices[d]))

    for first in range(0, len(rows), len(devices)):
        mine = list(enumerate(range(first, min(first + len(devices), len(rows)))))
        left = {i: put(x1, rows[i], block[0], d) for d, i in mine}
        waiting: list[tuple[slice, slice, Any]] = []
        for j, column in enumerate(columns):
            ahead = []
            for d, i in mine:
                if symmetric and j < i:
                    continue
                same = symmetric and i == j
                right = left[i] if same else put(x2, column, block[1], d)
                ahead.append((rows[i], column, inner(copies[d], left[i], right, same)))
            yield from waiting
            waiting = ahead
        yield from waiting
