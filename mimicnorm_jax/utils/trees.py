"""Trees of arrays: names of their leaves, and whether all of them are finite."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Path = tuple[str, ...]


def path_names(path: Sequence[Any]) -> Path:
    """The names along a key path of a parameter tree."""
    return tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path)


def leaf_names(path: Sequence[Any]) -> Path:
    """`path_names` without the field in which a box (`nn.Partitioned`) or a variable (`nnx.Param`) holds its leaf."""
    boxed = len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value")
    return path_names(path[:-1] if boxed else path)


def abstract_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Shapes of `function(*args, **kwargs)`, nothing being computed.

    Args:
      function: traced once.
      args, kwargs: arrays or `jax.ShapeDtypeStruct`s in any trees; what has no shape, such as `train=True`, stays as it
        is.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    is_array = [hasattr(leaf, "shape") for leaf in leaves]

    def call(arrays: list[Any]) -> Any:
        given = iter(arrays)
        args, kwargs = tree.unflatten(next(given) if one else leaf for one, leaf in zip(is_array, leaves, strict=True))
        return function(*args, **kwargs)

    return jax.eval_shape(call, [leaf for one, leaf in zip(is_array, leaves, strict=True) if one])


def all_finite(tree: Any) -> jax.Array:
    """Whether every number of every leaf is finite, as one boolean of the device."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
