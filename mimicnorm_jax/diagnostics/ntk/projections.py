r"""Random projections of gradients: features of few numbers whose inner products estimate the tangent kernel."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.ntk.derivatives import BoundNetwork, Tangent
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn


@dataclass(frozen=True)
class ProjectedGradients:
    r"""Gradients of outputs by the parameters, projected onto k random directions of signs.

    Attributes:
      features: $\phi = R^\top \nabla f / \sqrt{k}$, `(N, O, k)`.
    """

    features: jax.Array

    def kernel(self, others: "ProjectedGradients | None" = None) -> jax.Array:
        """The estimate of the kernel of all pairs of outputs, `(N, M, O, P)`; unbiased.

        Args:
          others: projected with the same key and number of directions; by default these.

        Raises:
          ValueError: for others of another number of directions.
        """
        right = self.features if others is None else others.features
        if right.shape[-1] != self.features.shape[-1]:
            raise ValueError(
                f"projections onto {self.features.shape[-1]} and onto {right.shape[-1]} directions: project both with "
                "one key and num_directions"
            )
        return jnp.einsum("nok,mpk->nmop", self.features, right, precision="highest")

    def standard_error(self, others: "ProjectedGradients | None" = None) -> jax.Array:
        r"""Standard error of each of its entries, `(N, M, O, P)`: at most $\sqrt{(\Theta_{nn}\Theta_{mm} +
        \Theta_{nm}^2) / k}$ (which it is for Gaussian directions), of the estimates themselves."""
        right = self if others is None else others
        squares = [jnp.sum(side.features**2, -1) for side in (self, right)]
        lengths = squares[0][:, None, :, None] * squares[1][None, :, None, :]
        return jnp.sqrt((lengths + self.kernel(others) ** 2) / self.features.shape[-1])


def project_gradients(
    apply_fn: ApplyFn,
    params: Any,
    x: jax.Array,
    *,
    key: jax.Array,
    num_directions: int,
    batch: int | None = None,
) -> ProjectedGradients:
    """Projects the gradients of all outputs; one forward sweep with a tangent a direction, and no gradient is formed.

    What data attribution keeps of each example (TRAK: Park et al. 2023, who project by the same random signs).

    Args:
      apply_fn: the network, `(params, x) -> (N, O)`.
      params: its parameters; leaves that are not floating-point arrays are held fixed.
      x: inputs `(N, ...)`.
      key: draws the directions: the same ones for every call with this key and these parameters' shapes.
      num_directions: k.
      batch: examples that are evaluated together; they must be independent if it is given.

    Raises:
      ValueError: for no direction, or as `ntk_operator`.
    """
    if num_directions < 1:
        raise ValueError(f"num_directions is {num_directions}: it is at least 1, and the error falls with its root")
    network = BoundNetwork.of(apply_fn, params, x, batch=batch)

    @jax.jit
    def direction(place: jax.Array) -> Tangent:
        keys = jax.random.split(jax.random.fold_in(key, place), len(network.split.arrays))
        return [jax.random.rademacher(k, a.shape, a.dtype) for k, a in zip(keys, network.split.arrays, strict=True)]

    pushed = [network.push(jnp.asarray(x), direction(jnp.asarray(i))) for i in range(num_directions)]
    found = jnp.stack(pushed, -1)
    return ProjectedGradients(found.astype(jnp.promote_types(found.dtype, jnp.float32)) / num_directions**0.5)
