"""Dropout whose masks do not depend on how a batch is spread over devices."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


class Dropout(nn.Module):
    """Sets each value to zero with probability `rate` and scales the others up; draws from the `dropout` key.

    Attributes:
      rate: the probability, in [0, 1).
      axis_name: mapped axis over which a batch is spread, with the same key on every device; or None.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(B, ...)` to the same shape: one mask for each place in the whole batch."""
        key = self.make_rng("dropout")
        first = x.shape[0] * lax.axis_index(self.axis_name) if self.axis_name is not None else 0
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(x.shape[0]))
        keep = jax.vmap(lambda one: jax.random.bernoulli(one, 1 - self.rate, x.shape[1:]))(keys)
        sharding = jax.typeof(x).sharding
        if sharding.mesh.explicit_axes:  # then masks, which know nothing of x, have to say how they are spread
            keep = jax.sharding.reshard(keep, sharding)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))
