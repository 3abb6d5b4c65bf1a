"""Groups of `optax.masked` and `optax.partition`: trees that show a part of the parameters."""

import jax
import optax


def is_group(params: optax.Params) -> bool:
    """Whether some leaves of a tree are masked: what it lacks may stand in another group."""
    nodes = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    return any(isinstance(node, optax.MaskedNode) for node in nodes)
