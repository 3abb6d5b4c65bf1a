r"""The network that is linear in its parameters: $f(\theta_0) + J(\theta_0)(\theta - \theta_0)$."""

from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.tracing.layers import forward_mode
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn, Split, bind, check_leaves, is_differentiated


def linearize(apply_fn: ApplyFn, params: Any) -> ApplyFn:
    r"""The first-order Taylor expansion of a network around its parameters, as a network.

    Its tangent kernel is that of `apply_fn` at `params`, at all parameters: what gradient descent does with it is
    gradient descent with a constant kernel. It may be differentiated, compiled and trained like any network.

    Args:
      apply_fn: the network, `(params, x) -> outputs` of any shape.
      params: $\theta_0$; leaves that are not floating-point arrays are held fixed at these values.

    Returns:
      A function of `(params, x)`, whose params have the structure of these.

    Raises:
      ValueError: for parameters that cannot be differentiated by. The function raises it for parameters of another
        structure or shape, and where a derivative has no forward mode.

    Example:
      >>> linear = linearize(lambda params, x: x @ params**2, jnp.ones((1, 1)))
      >>> linear(jnp.full((1, 1), 3.0), jnp.ones((1, 1))).tolist()  # 1 + 2 (3 - 1)
      [[5.0]]
    """
    check_leaves(params)
    apply_fn, arrays = bind(apply_fn, params)
    split, tree = Split.of(arrays), jax.tree.structure(params)

    def linear(params: Any, x: jax.Array) -> jax.Array:
        if jax.tree.structure(params) != tree:
            raise ValueError(
                f"params have the structure {jax.tree.structure(params)}, the network is linearized at {tree}"
            )
        moved = [leaf for leaf in jax.tree.leaves(params) if is_differentiated(leaf)]
        shapes = [jnp.shape(leaf) for leaf in moved]
        if shapes != [jnp.shape(leaf) for leaf in split.arrays]:
            raise ValueError(
                f"params have floating-point leaves of shapes {shapes}, the network is linearized at others of "
                f"{[jnp.shape(leaf) for leaf in split.arrays]}"
            )
        step = [(new - old).astype(old.dtype) for new, old in zip(moved, split.arrays, strict=True)]
        with forward_mode("a linearized network"):
            value, change = jax.jvp(lambda p: apply_fn(split.join(p), x), (split.arrays,), (step,))
        return value + change

    return linear
