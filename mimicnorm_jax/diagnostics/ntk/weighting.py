"""How much each parameter counts in a tangent kernel."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.tracing.parameters import is_differentiated
from mimicnorm_jax.utils.trees import Path, path_names

Weights = Callable[[Path, Any], float]
"""The factor on a parameter's contribution, from its path and value (or shape); 0 leaves the parameter out."""


def all_parameters(path: Path, leaf: Any) -> float:
    """Every parameter counts alike: the kernel of gradient descent.

    Args:
      path: of a parameter.
      leaf: the parameter.
    """
    del path, leaf
    return 1.0


def initial_variance(params: Any) -> Weights:
    """The theory's parametrization: every kernel weighted by its entries' mean square, biases and scalars left out.

    With weights `W = sigma w` and standard normal `w`, the derivative by `w` is sigma times that by `W`. A bias is what
    has fewer than two axes, is called bias (or something_bias, or b), or has only one axis of more than one entry out
    of three or more, such as (C, 1, 1), unless it is called kernel, weight or w.

    Args:
      params: at initialization.
    """
    squares = {
        path_names(path): float(jnp.mean(jnp.square(leaf))) if _is_kernel(path_names(path), leaf) else 0.0
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if is_differentiated(leaf)
    }
    return lambda path, leaf: squares[path]


def _is_kernel(path: Path, leaf: Any) -> bool:
    shape, names = np.shape(leaf), [name.lower() for name in path if not name.isdigit() and name != "value"]
    name = names[-1] if names else ""
    if len(shape) < 2 or name.endswith("bias") or name == "b":
        return False
    return len(shape) == 2 or sum(side > 1 for side in shape) > 1 or name in ("kernel", "weight", "w")
