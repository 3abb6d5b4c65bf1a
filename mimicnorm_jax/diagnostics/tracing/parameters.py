"""Trees of parameters: which leaves are differentiated, what they are called, and what stays out of a trace."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.utils.trees import Path, path_names

ApplyFn = Callable[[Any, jax.Array], jax.Array]
"""A network `apply_fn(params, x) -> outputs`, `x` of shape `(N, ...)`, outputs `(N, O)`."""


def titles(paths: Sequence[Path]) -> list[str]:
    """A name for each path, its parts joined by slashes; where two would agree, slashes within parts are escaped.

    Example:
      >>> titles([("dense", "kernel"), ("a", "b"), ("a/b",)])
      ['dense/kernel', 'a/b', 'a\\\\/b']
    """
    plain = ["/".join(path) for path in paths]
    escaped = ["/".join(part.replace("\\", "\\\\").replace("/", "\\/") for part in path) for path in paths]
    return [name if plain.count(name) == 1 else other for name, other in zip(plain, escaped, strict=True)]


def unique(names: Sequence[str]) -> list[str]:
    """Names with a number after all but the first of equal ones."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array (or the shape of one) that JAX can take as an argument."""
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        return False
    return isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool


def is_differentiated(leaf: Any) -> bool:
    """Whether a leaf is a floating-point array that is not empty."""
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating) and int(np.prod(leaf.shape)) > 0


def kind(leaf: Any) -> str:
    """What a leaf is, for a message."""
    if not is_array(leaf):
        return type(leaf).__name__
    return f"{leaf.dtype}" if int(np.prod(leaf.shape)) else f"empty, {leaf.shape}"


def left_out(params: Any) -> tuple[str, ...]:
    """The leaves that no derivative is taken by, each with what it is instead.

    Example:
      >>> left_out({"kernel": jnp.ones(2), "steps": jnp.arange(3), "activation": "relu"})
      ('activation (str)', 'steps (int32)')
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = titles([path_names(path) for path, _ in leaves])
    return tuple(
        f"{name} ({kind(leaf)})" for name, (_, leaf) in zip(names, leaves, strict=True) if not is_differentiated(leaf)
    )


def check_leaves(params: Any) -> None:
    """Raises ValueError for complex parameters, leaves that cannot be held fixed, and none to differentiate by."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        name = "/".join(path_names(path))
        if is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(f"parameter {name} is complex: keep its real and imaginary part as two parameters")
        if not is_array(leaf) and not isinstance(leaf, Hashable):
            raise ValueError(
                f"params hold a {type(leaf).__name__} at {name}, which is neither an array nor hashable: keep it out"
            )
    if not any(is_differentiated(leaf) for _, leaf in leaves):
        found = ", ".join(left_out(params)) or "nothing"
        raise ValueError(f"params hold no floating-point array to differentiate by, but {found}")


@dataclass(frozen=True)
class _Bound:
    """A network with leaves that are not arrays put back; equal ones compile once."""

    apply_fn: ApplyFn
    tree: Any
    fixed: tuple[Any, ...]

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        arrays = jax.tree.leaves(params, is_leaf=_is_none)
        leaves = [a if fixed is None else fixed[0] for a, fixed in zip(arrays, self.fixed, strict=True)]
        return self.apply_fn(jax.tree.unflatten(self.tree, leaves), x)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def bind(apply_fn: ApplyFn, params: Any) -> tuple[ApplyFn, Any]:
    """Closes a network over the leaves that are not arrays (Python numbers, functions, names).

    Returns:
      The network and a tree of arrays for it, None in place of the other leaves; both as they are, if all are arrays.
    """
    leaves, tree = jax.tree.flatten(params, is_leaf=_is_none)
    if all(leaf is None or is_array(leaf) for leaf in leaves):
        return apply_fn, params
    check_leaves(params)
    fixed = tuple(None if leaf is None or is_array(leaf) else (leaf,) for leaf in leaves)
    arrays = jax.tree.unflatten(tree, [leaf if out is None else None for leaf, out in zip(leaves, fixed, strict=True)])
    return _Bound(apply_fn, tree, fixed), arrays


def off_mesh(tree: Any) -> Any:
    """Arrays of an explicit mesh (the default of `jax.make_mesh`) as ones of an automatic mesh, shardings left to XLA.

    Nothing moves, unless a mesh is the context (`jax.set_mesh`), which admits no other: then every device gets a copy.
    The types of explicit shardings would be asked of every operation in between.
    """

    def move(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(leaf, jax.Array) or not isinstance(sharding, jax.sharding.NamedSharding):
            return leaf
        mesh = sharding.mesh
        if all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types):
            return leaf
        if not jax.sharding.get_abstract_mesh().empty:
            return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P()))
        automatic = jax.sharding.Mesh(np.asarray(mesh.devices), mesh.axis_names)
        return jax.device_put(leaf, jax.sharding.NamedSharding(automatic, sharding.spec))

    return jax.tree.map(move, tree)


@dataclass(frozen=True)
class Split:
    """A tree of arrays in two: the leaves that are differentiated by, and the others.

    Attributes:
      arrays: leaves that are differentiated by.
      others: all leaves, None in their place.
      tree: the structure.
    """

    arrays: list[Any]
    others: list[Any]
    tree: Any

    @staticmethod
    def of(params: Any) -> "Split":
        leaves, tree = jax.tree.flatten(params)
        wanted = [is_differentiated(leaf) for leaf in leaves]
        return Split(
            [leaf for leaf, want in zip(leaves, wanted, strict=True) if want],
            [None if want else leaf for leaf, want in zip(leaves, wanted, strict=True)],
            tree,
        )

    def join(self, arrays: Sequence[Any]) -> Any:
        """The whole tree, with other values of `arrays`."""
        values = iter(arrays)
        return jax.tree.unflatten(self.tree, [next(values) if leaf is None else leaf for leaf in self.others])
