"""Names of the leaves of a tree."""

from collections.abc import Sequence
from typing import Any

import jax

Path = tuple[str, ...]


def path_names(path: Sequence[Any]) -> Path:
    """The names along a key path of a parameter tree."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)
