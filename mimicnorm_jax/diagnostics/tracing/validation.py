"""Refuses, before any long work, what is no network with its parameters and inputs, and says what to do instead."""

from collections.abc import Callable
from typing import Any

import jax

from mimicnorm_jax.diagnostics.tracing import independence
from mimicnorm_jax.diagnostics.tracing.outputs import evaluable, nonfinite_rows
from mimicnorm_jax.diagnostics.tracing.parameters import check_leaves, is_array


def arguments(apply_fn: Any, params: Any, x: Any) -> None:
    """Raises ValueError unless these can be a function, its parameters and its inputs."""
    if hasattr(apply_fn, "apply") and hasattr(apply_fn, "init"):
        raise ValueError(
            f"apply_fn is a {type(apply_fn).__name__}, a module: from_linen(module, variables) of "
            "mimicnorm_jax.diagnostics makes a function of params and x of it"
        )
    if not callable(apply_fn):
        raise ValueError(f"apply_fn is a {type(apply_fn).__name__}: give a function (params, x) -> outputs (N, O)")
    try:
        hash(apply_fn)
    except TypeError as error:
        raise ValueError(
            f"apply_fn is a {type(apply_fn).__name__} that cannot be hashed, as a dataclass that compares by value: "
            "make it frozen (or eq=False), or pass lambda params, x: network(params, x)"
        ) from error
    if not is_array(x) and not isinstance(x, list | tuple | int | float):
        swapped = ": are params and x swapped?" if is_array(params) else ""
        raise ValueError(
            f"x is a {type(x).__name__}, not one array (N, ...){swapped or ': close apply_fn over inputs beside it'}"
        )
    check_leaves(params)


def network(
    apply_fn: Callable[..., Any], params: Any, x: jax.Array, batch_coupled: bool, memory: int = 2**31
) -> independence.Verdict | None:
    """Tries the network, and makes sure that its examples are independent unless `batch_coupled`.

    Raises:
      ValueError: if it does not return finite `(N, O)`, or if examples influence one another although `batch_coupled`
        is False.
    """
    if not batch_coupled and len(x) > 1:
        verdict = independence.require(apply_fn, params, x, memory)
        first = verdict.not_finite
    else:
        verdict = None
        evaluable(apply_fn, params, x)
        first = next(iter(nonfinite_rows(jax.jit(apply_fn)(params, x))), None)
    if first is not None and first < 4:  # others are found when their kernel is there
        raise ValueError(
            f"the outputs of example {first} are not finite: look for NaN in the inputs or parameters, or overflow"
        )
    return verdict
