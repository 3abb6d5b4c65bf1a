"""What automatic differentiation keeps in memory between the forward and the backward pass."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax


def saved_for_backward(
    function: Callable[..., jax.Array], params: Any, *inputs: Any
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arrays that the backward pass of `function` with respect to `params` needs from the forward pass.

    Nothing is computed. Each array counts once, however many operations need it; `params` and
    `inputs` themselves, which are in memory anyway, and constants do not count. The compiler may
    keep less (where it recomputes) or more (padding, copies in another layout).

    Args:
      function: `(params, *inputs)` to an array, or a tree of arrays, of any shape.
      params: what to differentiate with respect to: a tree of arrays or of `jax.ShapeDtypeStruct`.
      inputs: further arguments, likewise.

    Example:
      >>> import jax.numpy as jnp
      >>> image = jax.ShapeDtypeStruct((8, 4), jnp.float32)
      >>> [a.shape for a in saved_for_backward(lambda w, x: jnp.sin(x @ w), jnp.ones((4, 2)), image)]
      [(8, 2)]
    """

    def pullback(params: Any, *inputs: Any) -> Any:
        return jax.vjp(lambda p: function(p, *inputs), params)[1]

    program = jax.make_jaxpr(pullback)(params, *inputs).jaxpr
    counted = set(map(id, (*program.invars, *program.constvars)))
    kept = []
    for variable in program.outvars:
        aval: Any = variable.aval
        is_literal = hasattr(variable, "val")
        if not is_literal and id(variable) not in counted:
            counted.add(id(variable))
            kept.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return tuple(kept)


def nbytes(arrays: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Bytes of arrays of these shapes and dtypes.

    Example:
      >>> import jax.numpy as jnp
      >>> nbytes([jax.ShapeDtypeStruct((3, 2), jnp.bfloat16)])
      12
    """
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
