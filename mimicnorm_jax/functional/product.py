"""A layer's product with a transformed kernel, whoever keeps the layer's parameters."""

from collections.abc import Callable

import jax

from mimicnorm_jax.functional.transform import KernelTransform

Product = Callable[[jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, jax.Array | None]]
"""A layer's own product of inputs and kernel, without the bias, which comes back cast."""


def with_transformed_kernel(
    product: Product, transform: KernelTransform, groups: int, *, recompute: bool
) -> Callable[..., jax.Array]:
    """The layer `(inputs, kernel, bias or None, *scales) -> output` whose product takes the transformed kernel.

    Args:
      product: of the layer.
      transform: of the raw kernel.
      groups: of the layer.
      recompute: whether the backward pass computes the transformed, cast kernel again instead of keeping it.

    Returns:
      A function; each scale, `()` or `(n_out,)`, multiplies transformed kernel and bias.
    """

    def transformed(inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None, *scales: jax.Array) -> tuple:
        kernel = transform(kernel, groups)
        for one in scales:
            wide = one.reshape((1,) * (kernel.ndim - one.ndim) + one.shape)
            kernel, bias = kernel * wide, None if bias is None else bias * one
        return product(inputs, kernel, bias)

    # The derivative of a product needs its factors, not the product: the backward pass recomputes the transformed, cast
    # kernel from the raw one, which is there anyway, and no convolution.
    kept = jax.checkpoint(transformed) if recompute else transformed

    def layer(inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None, *scales: jax.Array) -> jax.Array:
        y, bias = kept(inputs, kernel, bias, *scales)
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)

    return layer
