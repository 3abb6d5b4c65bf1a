"""Refuses, before any long work, what a tangent kernel cannot be computed of, and says what to do instead."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from mimicnorm_jax.diagnostics.tracing import independence
from mimicnorm_jax.diagnostics.tracing.parameters import check_leaves, evaluable, is_array
from mimicnorm_jax.errors import unknown


class Priced(Protocol):
    """What `affordable` asks of a method."""

    @property
    def multiplications(self) -> float: ...
    def bytes(self, left: int, right: int) -> int: ...


def choices(output: Any, method: str, memory: int) -> None:
    """Raises ValueError for an unknown output or method, or no memory."""
    if not isinstance(output, int) and output not in ("full", "diagonal", "trace"):
        raise ValueError(f"{unknown('output', output, ('full', 'diagonal', 'trace'))}, or the number of one output")
    if method not in ("auto", "layerwise", "jacobian", "products"):
        raise ValueError(unknown("method", method, ("auto", "layerwise", "jacobian", "products")))
    if memory <= 0:
        raise ValueError(f"memory is {memory}: it is a number of bytes above 0")


def selected(output: int | None, outputs: int) -> None:
    """Raises ValueError if the network has no output of that number."""
    if output is not None and not 0 <= output < outputs:
        raise ValueError(f"output is {output}, but the network has {outputs} outputs, numbered from 0")


def inputs(x1: jax.Array, x2: jax.Array | None) -> None:
    """Raises ValueError if there are no inputs, or the two sides are not of one kind."""
    if x1.ndim < 2 or len(x1) == 0:
        raise ValueError(f"x1 has shape {x1.shape}: it must be (N, ...), N inputs of at least one axis, N at least 1")
    if x2 is not None and (x2.shape[1:] != x1.shape[1:] or x2.dtype != x1.dtype or len(x2) == 0):
        raise ValueError(
            f"x1 holds {x1.dtype} inputs of shape {x1.shape[1:]} and x2 {len(x2)} {x2.dtype} ones of shape "
            f"{x2.shape[1:]}: both must be inputs of the same network"
        )


def weights(names: Sequence[str], values: Sequence[float]) -> None:
    """Raises ValueError for a negative or non-finite weight, or if no parameter is left."""
    for name, value in zip(names, values, strict=True):
        if not 0 <= value < float("inf"):
            raise ValueError(f"weights give {value} for {name}: a weight is finite and at least 0")
    if not any(values):
        raise ValueError("weights leave out every parameter: give at least one a weight above 0")


def arguments(apply_fn: Any, params: Any, x: Any) -> None:
    """Raises ValueError unless these can be a function, its parameters and its inputs."""
    if hasattr(apply_fn, "apply") and hasattr(apply_fn, "init"):
        raise ValueError(
            f"apply_fn is a {type(apply_fn).__name__}, a module: network.from_linen(module, variables) makes a "
            "function of params and x of it"
        )
    if not callable(apply_fn):
        raise ValueError(f"apply_fn is a {type(apply_fn).__name__}: give a function (params, x) -> outputs (N, O)")
    if not is_array(x) and not isinstance(x, list | tuple | int | float):
        swapped = ": are params and x swapped?" if is_array(params) else ""
        raise ValueError(
            f"x is a {type(x).__name__}, not one array (N, ...){swapped or ': close apply_fn over inputs beside it'}"
        )
    check_leaves(params)


def network(
    apply_fn: Callable[..., Any], params: Any, x: jax.Array, coupled: bool, memory: int = 2**31
) -> independence.Verdict | None:
    """Tries the network, and makes sure that its examples are independent unless `coupled`.

    Raises:
      ValueError: if it does not return finite `(N, O)`, or if examples influence one another although `coupled` is
        False.
    """
    if not coupled and len(x) > 1:
        verdict = independence.require(apply_fn, params, x, memory)
        first = verdict.not_finite
    else:
        verdict = None
        evaluable(apply_fn, params, x)
        outputs = np.asarray(jax.jit(apply_fn)(params, x), np.float64)
        first = next(iter(np.flatnonzero(~np.isfinite(outputs).all(1))), None)
    if first is not None and first < 4:  # others are found when their kernel is there
        raise ValueError(
            f"the outputs of example {first} are not finite: look for NaN in the inputs or parameters, or overflow"
        )
    return verdict


def affordable(
    methods: Mapping[str, Priced], counts: tuple[int, int | None], memory: int, examples: int
) -> tuple[str, tuple[int, int]]:
    """The method of fewest multiplications that fits the memory, and how many groups it takes on each side.

    Raises:
      ValueError: if none fits even for one group a side.
    """
    second = counts[1] or counts[0]
    for name in sorted(methods, key=lambda name: methods[name].multiplications):
        if methods[name].bytes(counts[0], second) <= memory:
            return name, (counts[0], second)
        size = max(counts[0], second)
        while size > 1 and methods[name].bytes(size, size) > memory:
            size = (size + 1) // 2
        if methods[name].bytes(size, size) <= memory:
            return name, (min(size, counts[0]), min(size, second))
    least = min(method.bytes(1, 1) for method in methods.values())
    batch = "a smaller batch (coupled examples cannot be split), " if examples > 1 else ""
    raise ValueError(
        f"memory is {memory:,} bytes, but even one pair of {'batches' if examples > 1 else 'examples'} takes about "
        f"{least:,}: raise memory, or ask for less: {batch}output='trace' or one output, fewer parameters through "
        f"weights, or method='products'"
    )
