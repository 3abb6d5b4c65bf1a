"""The empirical NNGP kernel of whatever a function returns: a network's outputs, or any of its activations."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.propagation.nngp import gram
from mimicnorm_jax.diagnostics.tracing.layers import prepared
from mimicnorm_jax.diagnostics.tracing.outputs import check_finite
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn


@dataclass(frozen=True)
class _Units:
    """A function's results as `(N, d)`; equal ones compile once."""

    function: ApplyFn

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        value = self.function(params, x)
        if jnp.ndim(value) == 0 or len(value) != len(x):
            raise ValueError(f"it returns {jnp.shape(value)} for inputs {x.shape}: the examples are the first axis")
        return value.reshape(len(x), -1)


def activation_kernel(
    function: ApplyFn, params: Any, x: jax.Array, *, x2: jax.Array | None = None, batch_coupled: bool = False
) -> jax.Array:
    r"""$K_{ij} = \langle h_i, h_j \rangle / d$ of what a function returns, $h(x)$ of d numbers an example.

    Args:
      function: `(params, x)` to the outputs or an activation, `(N, ...)`; of layers' products and inputs by name, see
        `nngp.kernels`.
      params: its parameters.
      x: inputs, `(N, ...)`.
      x2: other inputs, `(M, ...)`; None for `x` itself.
      batch_coupled: see `diagnostics`; `x` and `x2` are then two batches.

    Returns:
      `(N, M)` in the function's precision, at least float32.

    Raises:
      ValueError: if it does not return one floating-point array with the examples along its first axis, if examples
        influence one another without `batch_coupled`, or for values that are not finite.

    Example:
      >>> activation_kernel(lambda params, x: jax.nn.relu(x @ params), jnp.eye(2), jnp.array([[1.0, -1.0]])).tolist()
      [[0.5]]
    """
    units = []
    for inputs in (x,) if x2 is None else (x, x2):
        flat, arrays, examples = prepared(_Units(function), params, inputs, batch_coupled)
        values = jax.jit(flat)(arrays, examples)
        check_finite(values)
        units.append(values.astype(jnp.promote_types(values.dtype, jnp.float32)))
    return gram(units[0], units[-1])
