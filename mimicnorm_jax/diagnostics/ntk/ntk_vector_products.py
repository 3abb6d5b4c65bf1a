"""The tangent kernel by products with vectors: one of them, or as many as it has columns.

NTK-vector products in the words of Novak, Sohl-Dickstein & Schoenholz (2022), Fast Finite Width Neural Tangent Kernel.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mimicnorm_jax.diagnostics.ntk import validation
from mimicnorm_jax.diagnostics.ntk.implementation import Implementation, sides
from mimicnorm_jax.diagnostics.ntk.weighting import Weights, all_parameters
from mimicnorm_jax.diagnostics.tracing import jaxprs
from mimicnorm_jax.diagnostics.tracing.outputs import evaluable
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn, Split, bind, is_differentiated, off_mesh, titles
from mimicnorm_jax.diagnostics.tracing.validation import arguments
from mimicnorm_jax.utils.trees import path_names


class NTKVectorProducts(Implementation):
    """One NTK-vector product a column: no derivative is kept, so it takes the least memory."""

    @property
    def macs(self) -> float:
        left, right = sides(self.counts)
        return right * self.request.rows * self.request.forward_macs * (3 + 3 * left)

    def bytes(self, left: int, right: int) -> int:
        parameters = sum(self.request.network.sizes)
        numbers = 4 * parameters + (left + right) * 3 * self.request.activations
        # Columns, the block in its order of axes, and the blocks before and after; all pairs of outputs are computed.
        block = self.request.examples**2 * self.request.outputs**2 * left * right
        return self.request.itemsize * (numbers + 4 * block)

    def features(self, params: Any, x: jax.Array, write: bool) -> Any:
        return x

    def contract(self, params: Any, left: Any, right: Any, symmetric: bool) -> dict[str, jax.Array]:
        request = self.request
        leaves = jax.tree.leaves(params)
        chosen = request.differentiated(leaves)

        def column(basis: jax.Array, group: jax.Array) -> jax.Array:
            gradient = jax.vjp(lambda p: request.evaluate(leaves, p, group), chosen)[1](basis)[0]
            tangent = {i: (g * request.weights[i]).astype(g.dtype) for i, g in gradient.items()}
            moved = jax.vmap(lambda x: jax.jvp(lambda p: request.evaluate(leaves, p, x), (chosen,), (tangent,))[1])(
                left
            )
            return moved.reshape(-1, moved.shape[-1]).astype(request.network.dtype)

        r, p = request.examples, request.outputs
        eye = jnp.eye(r * p, dtype=request.network.outputs.dtype).reshape(r * p, r, p)
        columns = lax.map(lambda group: lax.map(lambda basis: column(basis, group), eye), right)
        m, a, o = columns.shape[0], columns.shape[2], columns.shape[3]
        block = columns.reshape(m * r, p, a, o).transpose(2, 3, 0, 1)
        if request.output == "full":
            return {"": block}
        diagonal = jnp.diagonal(block, axis1=1, axis2=3)
        return {"": diagonal if request.output == "diagonal" else diagonal.sum(-1)}


def ntk_vector_product(
    apply_fn: ApplyFn, params: Any, x1: jax.Array, x2: jax.Array | None = None, weights: Weights = all_parameters
) -> Callable[[jax.Array], jax.Array]:
    r"""The kernel as a linear operator, $v \mapsto J(x_1) W J(x_2)^T v$, from `(M, P)` to `(N, O)`.

    Costs a backward and a forward sweep a product, and no memory beyond a gradient. Also for networks whose examples
    influence one another: `x1` and `x2` are whole batches.

    Args:
      apply_fn: the network, `(params, x) -> (N, O)`.
      params: its parameters; leaves that are not floating-point arrays are held fixed.
      x1: inputs `(N, ...)`.
      x2: inputs `(M, ...)`, by default `x1`.
      weights: factor on each parameter's contribution.

    Raises:
      ValueError: if these cannot be a network's, two sides of it and weights, or if its derivative has no forward mode.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> ntk_vector_product(lambda params, x: x @ params, jnp.ones((2, 1)), x)(jnp.ones((2, 1))).tolist()
      [[2.0], [6.0]]
    """
    arguments(apply_fn, params, x1)
    apply_fn, params = bind(apply_fn, params)
    params, x1, x2 = off_mesh((params, jnp.asarray(x1), None if x2 is None else jnp.asarray(x2)))
    validation.inputs(x1, x2, False)
    evaluable(apply_fn, params, x1)
    if hand_written := jaxprs.without_jvp(jax.make_jaxpr(apply_fn)(params, x1)):
        raise ValueError(
            f"an NTK-vector product needs forward-mode derivatives, which {hand_written} does not have: use "
            "EmpiricalNTK"
        )
    split = Split.of(params)
    leaves = [(path_names(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params)]
    differentiated = [(path, leaf) for path, leaf in leaves if is_differentiated(leaf)]
    factors = [weights(path, leaf) for path, leaf in differentiated]
    validation.weights(titles([path for path, _ in differentiated]), factors)
    pull = jax.vjp(lambda p: apply_fn(split.join(p), x1 if x2 is None else x2), split.arrays)[1]

    def apply(v: jax.Array) -> jax.Array:
        tangent = [(w * g).astype(g.dtype) for w, g in zip(factors, pull(v)[0], strict=True)]
        return jax.jvp(lambda p: apply_fn(split.join(p), x1), (split.arrays,), (tangent,))[1]

    return apply
