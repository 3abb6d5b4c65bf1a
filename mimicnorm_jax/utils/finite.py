"""Whether numbers are finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def all_finite(tree: Any) -> jax.Array:
    """Whether no number of a tree of arrays is infinite or NaN, `()`; may be traced.

    Example:
      >>> bool(all_finite({"a": jnp.ones(2), "b": jnp.array([1.0, jnp.inf])}))
      False
    """
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def nonfinite_rows(values: Any) -> np.ndarray:
    """Which of N rows `(N, ...)` hold a number that is infinite or NaN: their indices, ascending.

    Example:
      >>> nonfinite_rows(np.array([[0.0, 1.0], [np.nan, 2.0]])).tolist()
      [1]
    """
    values = np.asarray(values, np.float64)
    return np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1))
