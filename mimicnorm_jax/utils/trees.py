"""Trees of arrays: names of their leaves, and whether all of them are finite."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Path = tuple[str, ...]


def path_names(path: Sequence[Any]) -> Path:
    """The names along a key path of a parameter tree."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def all_finite(tree: Any) -> jax.Array:
    """Whether every number of every leaf is finite, as one boolean of the device."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
