"""Dynamic tanh, a bounded elementwise function in the place of a normalization."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from jax.nn import initializers


class DynamicTanh(nn.Module):
    r"""$\gamma \tanh(\alpha x) + \beta$ with a learnable scalar $\alpha$, and $\gamma$, $\beta$ by channel (DyT).

    No statistics: each element by itself, in training as in evaluation. For $|\alpha x| \ll 1$ it is the affine map
    $\gamma \alpha x + \beta$. The derivatives need $x$ and $\tanh(\alpha x)$.

    Attributes:
      alpha: where $\alpha$ starts.
      dtype: of the output; None for that of the inputs and parameters.
      param_dtype: of the parameters `alpha`, `()`, `scale` and `bias`, `(C,)`.

    Example:
      >>> layer = DynamicTanh()
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.array([[0.0, 1e6]]))
      >>> y.tolist(), sorted(variables["params"])
      ([[0.0, 1.0]], ['alpha', 'bias', 'scale'])
    """

    alpha: float = 0.5
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(..., C)` to the same shape."""
        alpha = self.param("alpha", initializers.constant(self.alpha), (), self.param_dtype)
        scale = self.param("scale", initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", initializers.zeros, (x.shape[-1],), self.param_dtype)
        x, alpha, scale, bias = promote_dtype(x, alpha, scale, bias, dtype=self.dtype)
        wide = (1,) * (x.ndim - 1) + (x.shape[-1],)
        return scale.reshape(wide) * jnp.tanh(alpha * x) + bias.reshape(wide)
