"""Binary networks: signs of activations and of kernels, whose own derivative is 0, with surrogate gradients.

After "BNN - BN = ?" (Chen et al. 2021) and ReActNet (Liu et al. 2020). A sign is 1 or -1, never 0: of 0 it is 1.
"""

import jax
import jax.numpy as jnp

from mimicnorm_jax.functional.kernels import center, fan_in


def _signs(x: jax.Array) -> jax.Array:
    """1 or -1; NaN stays, so that a network that has broken down does not look sound."""
    return jnp.where(jnp.isnan(x), x, jnp.where(x >= 0, 1, -1).astype(x.dtype))


@jax.custom_jvp
def binary_sign(x: jax.Array) -> jax.Array:
    """The sign of each element, 1 or -1; its derivative is that of a piecewise quadratic, max(0, 2 - 2 |x|).

    Args:
      x: of any shape.

    Example:
      >>> y, dy = jax.jvp(binary_sign, (jnp.array([-0.5, 0.0, 2.0]),), (jnp.ones(3),))
      >>> y.tolist(), dy.tolist()
      ([-1.0, 1.0, 1.0], [1.0, 2.0, 0.0])
    """
    return _signs(x)


@binary_sign.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return binary_sign(x), jnp.maximum(2 - 2 * abs(x), 0) * dx


@jax.custom_jvp
def binarize(kernel: jax.Array) -> jax.Array:
    r"""Replaces each output channel w by $a\,\mathrm{sign}(w)$ with a the mean of |w|, computed in at least float32.

    Its derivative is that of clip(w, -1, 1) elementwise; a counts as a constant. A network that reads kernels through
    it can store one bit a weight and one number a channel.

    Args:
      kernel: `(..., n_out)`.

    Returns:
      In the shape and dtype of `kernel`. Binarizing again changes nothing but by rounding.

    Example:
      >>> binarize(jnp.array([[1.0, 0.0], [-3.0, 0.0]])).tolist()
      [[2.0, 0.0], [-2.0, 0.0]]
    """
    fan_in(kernel.shape)  # refuses what is no kernel
    wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    size = abs(wide).mean(axis=tuple(range(kernel.ndim - 1)), keepdims=True)
    return (size * _signs(wide)).astype(kernel.dtype)


@binarize.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (kernel,), (tangent,) = primals, tangents
    return binarize(kernel), jnp.where(abs(kernel) <= 1, tangent, jnp.zeros_like(tangent))


def standardize_by_deviation(kernel: jax.Array, *, epsilon: float = 1e-5) -> jax.Array:
    r"""Scaled weight standardization as binary networks have it (Chen et al. 2021).

    $\hat W = n^{-1/2} (W - \mu) / (\sigma + \epsilon)$, computed in at least float32, n being the fan-in and $\sigma$
    the deviation over it, with n in its denominator. Unlike `scaled_standardize` it standardizes small kernels too.

    Args:
      kernel: as in `center`.
      epsilon: added to the deviation.

    Returns:
      As `scaled_standardize`.

    Raises:
      ValueError: as `center`.

    Example:
      >>> standardize_by_deviation(jnp.array([[1.0], [3.0], [1.0], [3.0]])).round(4).tolist()
      [[-0.5], [0.5], [-0.5], [0.5]]
    """
    centered = center(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32)))
    variance = (centered**2).mean(axis=tuple(range(kernel.ndim - 1)), keepdims=True)
    # The root has no derivative where a channel is constant: its centered kernel is 0 then, and so is the gradient.
    deviation = jnp.sqrt(jnp.where(variance > 0, variance, 1)) * (variance > 0)
    return (centered / (deviation + epsilon) * fan_in(kernel.shape) ** -0.5).astype(kernel.dtype)
