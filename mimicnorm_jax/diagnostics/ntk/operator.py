"""The tangent kernel of a whole data set as a linear operator: never formed, whatever the number of examples."""

from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.ntk.derivatives import BoundNetwork
from mimicnorm_jax.diagnostics.ntk.weighting import Weights, all_parameters
from mimicnorm_jax.diagnostics.spectra.operators import LinearOperator
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn


def ntk_operator(
    apply_fn: ApplyFn,
    params: Any,
    x1: jax.Array,
    x2: jax.Array | None = None,
    *,
    batch: int | None = None,
    weights: Weights = all_parameters,
) -> LinearOperator:
    r"""The kernel $J(x_1) W J(x_2)^\top$ of all outputs as an `(N O, M O)` matrix by its products with flat vectors.

    A product takes a backward sweep through `x2` and two forward sweeps through `x1`, and holds one gradient and the
    activations of one batch. Row `n O + o` is output o of example n. scipy's solvers take the operator as it is, and
    matfree its `matvec`. For one output of many wrap the network, as `PseudoLogit` does.

    Args:
      apply_fn: the network, `(params, x) -> (N, O)`.
      params: its parameters; leaves that are not floating-point arrays are held fixed.
      x1: inputs `(N, ...)`.
      x2: inputs `(M, ...)`, by default `x1`.
      batch: examples that are evaluated together, which must be independent then. None: all, which may influence one
        another.
      weights: factor on each parameter's contribution.

    Raises:
      ValueError: if these cannot be a network's, if its derivative has no forward mode, if outputs are not finite, or
        if examples that are to be split influence one another.

    Example:
      >>> operator = ntk_operator(lambda params, x: x @ params, jnp.ones((2, 1)), jnp.array([[1.0, 0.0], [1.0, 2.0]]))
      >>> operator.matvec(jnp.ones(2)).tolist(), operator.shape
      ([2.0, 6.0], (2, 2))
    """
    network = BoundNetwork.of(apply_fn, params, x1, weights, batch)
    left = jnp.asarray(x1)
    right = left if x2 is None else network.same_inputs(x1, x2)
    y = jax.eval_shape(network.outputs, network.split.arrays, left[:1] if batch else left)
    dtype, outputs = jnp.promote_types(y.dtype, jnp.float32), y.shape[1]

    def product(onto: jax.Array, of: jax.Array, v: jax.Array) -> jax.Array:
        gradient = network.pull(of, jnp.asarray(v, dtype).reshape(len(of), outputs))
        return network.push(onto, network.weighted(gradient)).ravel().astype(dtype)

    return LinearOperator(
        lambda v: product(left, right, v),
        lambda v: product(right, left, v),
        len(right) * outputs,
        len(left) * outputs,
        dtype,
    )
