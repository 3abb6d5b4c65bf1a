"""A network's Jacobian by its parameters as two products with vectors, batch by batch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.ntk import validation as requests
from mimicnorm_jax.diagnostics.ntk.weighting import Weights, all_parameters
from mimicnorm_jax.diagnostics.tracing import independence, jaxprs, validation
from mimicnorm_jax.diagnostics.tracing.outputs import check_finite, evaluable
from mimicnorm_jax.diagnostics.tracing.parameters import (
    ApplyFn,
    Split,
    bind,
    is_differentiated,
    off_mesh,
    titles,
)
from mimicnorm_jax.utils.trees import path_names

Tangent = list[jax.Array]
"""One array for each parameter that is differentiated by."""


@dataclass(frozen=True, eq=False)
class BoundNetwork:
    """A network at certain parameters, with both products of its Jacobian by them.

    Attributes:
      apply_fn: the network.
      split: its parameters.
      weights: factor on each differentiated parameter's contribution to the kernel.
      batch: examples that are evaluated together; None for all.
    """

    apply_fn: ApplyFn
    split: Split
    weights: tuple[float, ...]
    batch: int | None

    @staticmethod
    def of(
        apply_fn: ApplyFn, params: Any, x: Any, weights: Weights = all_parameters, batch: int | None = None
    ) -> "BoundNetwork":
        """Binds a network, after checks on some of its inputs.

        Raises:
          ValueError: if these cannot be a network's, if its derivative has no forward mode, if outputs are not finite,
            or if examples that are to be split influence one another.
        """
        validation.arguments(apply_fn, params, x)
        if batch is not None and batch < 1:
            raise ValueError(f"batch is {batch}: a number of examples of at least 1, or None for all at once")
        params, x = off_mesh((params, jnp.asarray(x)))
        requests.inputs(x, None, False)
        apply_fn, params = bind(apply_fn, params)
        if batch is not None and batch < len(x):
            independence.require(apply_fn, params, x[: max(2, batch)])
        some = x[: batch or len(x)]
        evaluable(apply_fn, params, some)
        check_finite(jax.jit(apply_fn)(params, some))
        if hand_written := jaxprs.without_jvp(jax.make_jaxpr(apply_fn)(params, some)):
            raise ValueError(
                f"this needs forward-mode derivatives, which {hand_written} does not have: use EmpiricalNTK, or write "
                "the derivative with jax.custom_jvp"
            )
        leaves = [(p, leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(params) if is_differentiated(leaf)]
        factors = tuple(float(weights(path_names(path), leaf)) for path, leaf in leaves)
        requests.weights(titles([path_names(path) for path, _ in leaves]), factors)
        return BoundNetwork(apply_fn, Split.of(params), factors, batch)

    def same_inputs(self, x1: Any, x2: Any) -> jax.Array:
        """Other inputs as an array.

        Raises:
          ValueError: unless they are inputs of the same network, or if they are to be split and influence one another.
        """
        x2 = off_mesh(jnp.asarray(x2))
        requests.inputs(jnp.asarray(x1), x2, False)
        if self.batch is not None and self.batch < len(x2):
            independence.require(self.apply_fn, self.split.join(self.split.arrays), x2[: max(2, self.batch)])
        return x2

    def batches(self, x: jax.Array) -> list[slice]:
        """The batches of examples; the last may be short."""
        step = self.batch or len(x)
        return [slice(start, min(start + step, len(x))) for start in range(0, len(x), step)]

    def outputs(self, arrays: Tangent, x: jax.Array) -> jax.Array:
        """Outputs for these values of the parameters that are differentiated by."""
        return self.apply_fn(self.split.join(arrays), x)

    @cached_property
    def _push(self) -> Callable[..., jax.Array]:
        def push(arrays: Tangent, x: jax.Array, tangent: Tangent) -> jax.Array:
            return jax.jvp(lambda p: self.outputs(p, x), (arrays,), (tangent,))[1]

        return jax.jit(push)

    @cached_property
    def _pull(self) -> Callable[..., Tangent]:
        def pull(arrays: Tangent, x: jax.Array, v: jax.Array) -> Tangent:
            y, back = jax.vjp(lambda p: self.outputs(p, x), arrays)
            return back(v.astype(y.dtype))[0]

        return jax.jit(pull)

    def push(self, x: jax.Array, tangent: Tangent) -> jax.Array:
        """J times a tangent of the parameters, `(N, O)`."""
        with jax.default_matmul_precision("highest"):
            return jnp.concatenate([self._push(self.split.arrays, x[part], tangent) for part in self.batches(x)])

    def pull(self, x: jax.Array, v: jax.Array) -> Tangent:
        """J's transpose times `(N, O)`, added up over the batches."""
        with jax.default_matmul_precision("highest"):
            parts = self.batches(x)
            total = self._pull(self.split.arrays, x[parts[0]], v[parts[0]])
            for part in parts[1:]:
                total = jax.tree.map(jnp.add, total, self._pull(self.split.arrays, x[part], v[part]))
            return total

    def weighted(self, gradient: Tangent) -> Tangent:
        """A gradient times the weights, in the parameters' types."""
        return [(w * g).astype(g.dtype) for w, g in zip(self.weights, gradient, strict=True)]
