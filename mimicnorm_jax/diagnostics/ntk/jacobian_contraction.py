"""The tangent kernel as the explicit product of Jacobians: slow, simple, the reference.

Jacobian contraction in the words of Novak, Sohl-Dickstein & Schoenholz (2022), Fast Finite Width Neural Tangent Kernel.
"""

from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.ntk.features import Features, Jacobian, contract_by_parameter
from mimicnorm_jax.diagnostics.ntk.implementation import Implementation


class JacobianContraction(Implementation):
    """Forms every example's Jacobian by every parameter."""

    @cached_property
    def _sizes(self) -> dict[int, int]:
        return self.request.differentiated(self.request.network.sizes)

    @property
    def macs(self) -> float:
        request, rows = self.request, self.request.rows
        contraction = rows**2 if request.output == "full" else request.examples * rows
        sweeps = self._sides * request.forward_macs * (1 + 2 * rows)
        return sweeps + self._pairs * contraction * sum(self._sizes.values())

    def bytes(self, left: int, right: int) -> int:
        copies = 4 if self.request.output == "diagonal" else 2
        group = self.request.rows * (copies * sum(self._sizes.values()) + self.request.activations)
        return self._sum_of_bytes(left, right, group, len(self._sizes))

    def features(self, params: Any, x: jax.Array, write: bool) -> Features:
        leaves = jax.tree.leaves(params)
        chosen = self.request.differentiated(leaves)
        jacobians = jax.vmap(lambda group: jax.jacrev(lambda p: self.request.evaluate(leaves, p, group))(chosen))(x)
        dtype = self.request.network.dtype
        weights = {i: jnp.sqrt(jnp.asarray(self.request.weights[i], dtype)) for i in chosen}
        return {
            (i, 0, 1): Jacobian(weights[i] * rows.reshape(*rows.shape[:3], -1).astype(dtype))
            for i, rows in jacobians.items()
        }

    def contract(self, params: Any, left: Any, right: Any, symmetric: bool) -> dict[str, jax.Array]:
        return contract_by_parameter(left, right, self.request.network.titles, self.request.output, symmetric)
