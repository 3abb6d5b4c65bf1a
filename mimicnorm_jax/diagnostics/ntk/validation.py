"""Refuses what a tangent kernel cannot be asked for, and says what to ask instead."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import Tracer

from mimicnorm_jax.diagnostics.ntk.plan import IMPLEMENTATIONS
from mimicnorm_jax.errors import unknown


def options(output: Any, implementation: str, memory: int) -> None:
    """Raises ValueError for an unknown output or implementation, or no memory."""
    names = ("full", "diagonal", "trace", "pseudo")
    if not isinstance(output, int) and output not in names:
        raise ValueError(f"{unknown('output', output, names)}, or the number of one output")
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(unknown("implementation", implementation, ("auto", *IMPLEMENTATIONS)))
    if memory <= 0:
        raise ValueError(f"memory is {memory}: it is a number of bytes above 0")


def selected(output: int | None, outputs: int) -> None:
    """Raises ValueError if the network has no output of that number."""
    if output is not None and not 0 <= output < outputs:
        raise ValueError(f"output is {output}, but the network has {outputs} outputs, numbered from 0")


def inputs(x1: jax.Array, x2: jax.Array | None, batch_coupled: bool) -> None:
    """Raises ValueError if there are no inputs, or the two sides are not of one kind."""
    if x1.ndim < 2 or len(x1) == 0:
        raise ValueError(f"x1 has shape {x1.shape}: it must be (N, ...), N inputs of at least one axis, N at least 1")
    if x2 is None:
        return
    if x2.shape[1:] != x1.shape[1:] or x2.dtype != x1.dtype or len(x2) == 0:
        raise ValueError(
            f"x1 holds {x1.dtype} inputs of shape {x1.shape[1:]} and x2 {len(x2)} {x2.dtype} ones of shape "
            f"{x2.shape[1:]}: both must be inputs of the same network"
        )
    if batch_coupled and len(x2) != len(x1):
        raise ValueError(
            f"x1 has {len(x1)} and x2 {len(x2)} examples; with batch_coupled=True both are batches of one size"
        )


def process(process: tuple[int, int]) -> None:
    """Raises ValueError unless it is one of so many."""
    index, count = process
    if not 0 <= index < count:
        raise ValueError(f"process is {process}: it is (index, count), with an index from 0 to count - 1")


def weights(names: Sequence[str], values: Sequence[float]) -> None:
    """Raises ValueError for a negative, traced or non-finite weight, or if no parameter is left."""
    for name, value in zip(names, values, strict=True):
        if isinstance(value, Tracer):
            raise ValueError(
                f"weights give a traced value for {name}: compute them of concrete parameters, outside of jax.jit"
            )
        if not 0 <= value < float("inf"):
            raise ValueError(f"weights give {value} for {name}: a weight is finite and at least 0")
    if not any(values):
        raise ValueError("weights leave out every parameter: give at least one a weight above 0")
