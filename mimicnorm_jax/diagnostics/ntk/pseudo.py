r"""The pseudo-kernel: the tangent kernel of the sum of the logits over the root of their number."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.tracing.outputs import check_outputs
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn


@dataclass(frozen=True)
class PseudoLogit:
    r"""A network's one pseudo-logit, $\sum_o f_o(x) / \sqrt{O}$, `(N, 1)`; equal ones compile once.

    Its tangent kernel is the pseudo-NTK (pNTK) of Mohamadi, Bae & Sutherland (2023), A Fast, Well-Founded Approximation
    to the Empirical Neural Tangent Kernel: one sweep instead of O, and $\frac1O \sum_{op} \Theta_{nmop}$ of the kernel
    of all pairs of outputs. At initialization the full kernel tends to it times the identity, with the width.

    Args:
      apply_fn: the network, `(params, x) -> (N, O)`.

    Example:
      >>> pseudo = PseudoLogit(lambda params, x: x @ params)
      >>> pseudo(jnp.ones((2, 4)), jnp.ones((1, 2))).tolist()
      [[4.0]]
    """

    apply_fn: ApplyFn

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        """The pseudo-logit in the outputs' precision, at least float32."""
        y = self.apply_fn(params, x)
        check_outputs(y, x.shape)
        wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
        return wide.sum(1, keepdims=True) / jnp.sqrt(jnp.asarray(y.shape[1], wide.dtype))
