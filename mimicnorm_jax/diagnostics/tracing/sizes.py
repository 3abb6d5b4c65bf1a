"""Whether a network computes the same for every size of its batch: proved by comparing its jaxprs at two sizes."""

from typing import Any

import numpy as np
from jax.extend import core

from mimicnorm_jax.diagnostics.tracing.jaxprs import programs, scan_counts, where

_SHAPES = {
    "broadcast_in_dim": {"shape", "sharding"},
    "reshape": {"new_sizes", "sharding"},
    "slice": {"limit_indices"},
    "dynamic_slice": {"slice_sizes"},
    "gather": {"slice_sizes"},
    "iota": {"shape", "sharding"},
    "split": {"sizes"},
    "random_bits": {"shape"},
    "custom_jvp_call": {"jvp_jaxpr_fun"},
}
"""Parameters of operations that say how large arrays are, or hold a rule, and no number that is computed with."""


def difference(first: core.ClosedJaxpr, second: core.ClosedJaxpr) -> str:
    """The first operation by which a network's jaxprs for two sizes of the batch differ in more than sizes.

    A size can become a number as a constant, as a parameter of an operation, as the number of turns of a loop, or when
    an axis of that size is reduced to what has none. None of these found, outputs depend on it at most through the
    place in the batch, which `independence` follows.

    Returns:
      Where it stands; empty if there is none.
    """
    if len(first.jaxpr.eqns) != len(second.jaxpr.eqns) or not _equal(first.consts, second.consts):
        return "the constants or the number of operations"
    for one, other in zip(first.jaxpr.eqns, second.jaxpr.eqns, strict=True):
        same = one.primitive is other.primitive and _same_numbers(one, other) and _same_parameters(one, other)
        if not same or _vanishes(one, other):
            return where(one)
        for mine, its in zip(_programs(one), _programs(other), strict=True):
            if inner := difference(mine, its):
                return inner
    return ""


def _programs(equation: Any) -> list[core.ClosedJaxpr]:
    return [inner for value in equation.params.values() for inner in programs(value)]


def _only_programs(value: Any) -> bool:
    found = programs(value)
    return bool(found) and len(found) == (len(value) if isinstance(value, tuple | list) else 1)


def _same_numbers(one: Any, other: Any) -> bool:
    if len(one.invars) != len(other.invars):
        return False
    for mine, its in zip(one.invars, other.invars, strict=True):
        if isinstance(mine, core.Literal) != isinstance(its, core.Literal):
            return False
        if isinstance(mine, core.Literal) and not _equal([mine.val], [its.val]):
            return False
    return True


def _same_parameters(one: Any, other: Any) -> bool:
    if one.params.keys() != other.params.keys() or len(_programs(one)) != len(_programs(other)):
        return False
    sizes = _SHAPES.get(one.primitive.name, set())
    if one.primitive.name == "scan" and not scan_counts(one)[1]:
        sizes = {"length"}  # each turn by itself
    numbers = [
        name for name, v in one.params.items() if name not in sizes and not _only_programs(v) and not callable(v)
    ]
    return _equal([one.params[name] for name in numbers], [other.params[name] for name in numbers])


def _vanishes(one: Any, other: Any) -> bool:
    """Whether an operand has an axis whose size differs, and no result has."""
    return _resized(one.invars, other.invars) and not _resized(one.outvars, other.outvars)


def _resized(first: Any, second: Any) -> bool:
    return any(np.shape(mine.aval) != np.shape(its.aval) for mine, its in zip(first, second, strict=True))


def _equal(first: Any, second: Any) -> bool:
    if len(first) != len(second):
        return False
    for mine, its in zip(first, second, strict=True):
        if hasattr(mine, "shape") or hasattr(its, "shape"):
            same = np.shape(mine) == np.shape(its) and bool(np.array_equal(np.asarray(mine), np.asarray(its)))
        else:
            same = bool(mine == its)
        if not same:
            return False
    return True
