"""What a network must return: one array `(N, O)` of finite floating-point numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.tracing.parameters import kind


def nonfinite_rows(outputs: Any) -> np.ndarray:
    """Which rows of `(N, O)` hold a number that is infinite or NaN: their indices, ascending.

    Example:
      >>> nonfinite_rows(np.array([[0.0, 1.0], [np.nan, 2.0]])).tolist()
      [1]
    """
    return np.flatnonzero(~np.isfinite(np.asarray(outputs, np.float64)).all(-1))


def check_finite(outputs: jax.Array) -> None:
    """Raises ValueError if any of the outputs `(N, O)` is infinite or not a number."""
    wrong = nonfinite_rows(outputs)
    if wrong.size:
        raise ValueError(
            f"apply_fn returns infinite outputs or NaN for {wrong.size} of {len(outputs)} examples (x[{wrong[0]}] is "
            "the first): look for such values in params and x; a deep network may need float64 (jax.enable_x64)"
        )


def check_outputs(outputs: Any, x_shape: Sequence[int]) -> None:
    """Raises ValueError unless `outputs` is one array (or its shape) of `(N, O)` for inputs `(N, ...)`."""
    if not hasattr(outputs, "shape"):
        raise ValueError(
            f"apply_fn returns {jax.tree.structure(outputs)}, not one array: return the outputs only (of a Flax "
            f"module applied with mutable=[...], the first of the pair)"
        )
    if len(outputs.shape) != 2 or outputs.shape[0] != x_shape[0]:
        raise ValueError(
            f"apply_fn returns outputs of shape {outputs.shape} for inputs of shape {tuple(x_shape)}; it must be "
            f"(N, O) = ({x_shape[0]}, number of outputs): reshape, or pick one quantity, inside apply_fn"
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        raise ValueError(f"apply_fn returns {outputs.dtype} outputs; a tangent kernel needs floating-point ones")


def evaluable(apply_fn: Callable[..., Any], params: Any, x: Any) -> Any:
    """The outputs' shape.

    Raises:
      ValueError: if the network cannot be evaluated on parameters and inputs of these shapes.
    """
    try:
        outputs = jax.eval_shape(apply_fn, params, x)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"apply_fn(params, x) fails for x of shape {jnp.shape(x)} and type {kind(x)}: {error}. Are these the "
            "inputs that the network is made for, and is it apply_fn(params, x) and not apply_fn(x, params)?"
        ) from error
    check_outputs(outputs, jnp.shape(x))
    return outputs
