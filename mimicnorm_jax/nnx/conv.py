"""Flax NNX's convolution and linear layer with a kernel transform, and their centered forms."""

from typing import Any

import jax
from flax import nnx
from jax.nn import initializers

from mimicnorm_jax.functional.row_major import row_major
from mimicnorm_jax.functional.transform import (
    CENTER,
    CENTER_PUBLISHED,
    IDENTITY,
    KernelTransform,
    with_transformed_kernel,
)
from mimicnorm_jax.initializers import centered_he


class _Arrays:
    """A layer's options beside given arrays as its parameters: all that Flax's code of the layer reads.

    Not a module, so that nothing is written into the layer. The bias is only cast: it is added outside of the
    checkpoint, where XLA fuses its gradient with the mask of the ReLU behind.
    """

    use_bias = False
    bias = None

    def __init__(self, layer: Any, kernel: jax.Array, bias: jax.Array | None) -> None:
        self._layer, self.kernel, self.cast_bias = layer, kernel, bias

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def promote_dtype(self, arrays: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
        inputs, kernel, _ = arrays
        inputs, kernel, self.cast_bias = self._layer.promote_dtype((inputs, kernel, self.cast_bias), **options)
        return inputs, row_major(kernel) if self._layer.recompute_kernel else kernel, None


class TransformedKernel(nnx.Module):
    """Transforms kernel and bias where the layer reads them; the raw kernel is what is stored.

    Attributes:
      kernel_transform: what becomes of the kernel, the parameter `kernel`; a layer's `mask` comes after it.
      scale: a learnable scalar, of `scale_init`, which multiplies the transformed kernel and the bias (appendix C) and
        so costs no activation memory; None without one.
      recompute_kernel: whether the backward pass computes the transformed, cast kernel again instead of keeping it,
        in the memory layout that saves most (`row_major`). False is what Flax does.
    """

    def __init__(
        self,
        *args: Any,
        kernel_transform: KernelTransform = IDENTITY,
        scale_init: initializers.Initializer | None = None,
        recompute_kernel: bool = True,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        """Args of the Flax layer, and three more.

        Args:
          args: of the Flax layer.
          kernel_transform, recompute_kernel: see the class.
          scale_init: initializer of the scalar; None for none.
          rngs: of the Flax layer; the scalar's key comes last, so that the other numbers are those of the plain layer.
          options: of the Flax layer.
        """
        plain: Any = super().__init__  # of the Flax layer beside this class
        plain(*args, rngs=rngs, **options)
        layer: Any = self
        self.scale: nnx.Param[jax.Array] | None
        if scale_init is None:
            self.scale = nnx.data(None)
        else:
            self.scale = nnx.Param(scale_init(rngs.params(), (), layer.param_dtype))
        self.kernel_transform = kernel_transform
        self.recompute_kernel = recompute_kernel

    def __call__(self, inputs: jax.Array, out_sharding: Any = None, *, scale: jax.Array | None = None) -> jax.Array:
        """The layer's output.

        Args:
          inputs: of the Flax layer.
          out_sharding: of the Flax layer.
          scale: a scalar `()` that multiplies kernel and bias as the parameter does.
        """
        layer: Any = self  # the options are those of the Flax layer beside this class
        groups = getattr(layer, "feature_group_count", 1)
        bias = None if layer.bias is None else layer.bias[...]
        own = None if self.scale is None else self.scale[...]
        plain: Any = super().__call__

        def product(inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> tuple[Any, Any]:
            arrays = _Arrays(self, kernel, bias)
            return plain.__func__(arrays, inputs, out_sharding), arrays.cast_bias

        scales = (one for one in (own, scale) if one is not None)
        call = with_transformed_kernel(product, self.kernel_transform, groups, recompute=self.recompute_kernel)
        return call(inputs, layer.kernel[...], bias, *scales)


class TransformedConv(TransformedKernel, nnx.Conv):
    """`nnx.Conv` that convolves with `kernel_transform(kernel)`: every option of `nnx.Conv`, and three more.

    The raw kernel is the parameter; the transform is a pure function of it at every call, so gradients are those of
    the raw kernel. A `mask` applies to the transformed kernel.

    Attributes:
      kernel_transform: asked with the layer's groups; by default none.
      scale, recompute_kernel: see `TransformedKernel`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mimicnorm_jax.functional import standardize
      >>> layer = TransformedConv(16, 8, (3, 3), kernel_transform=KernelTransform(standardize), rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((1, 5, 5, 16)))
      >>> y.shape, bool(abs(y[0, 2, 2]).max() < 1e-5)  # a constant patch gives nothing
      ((1, 5, 5, 8), True)
    """


class TransformedLinear(TransformedKernel, nnx.Linear):
    """`nnx.Linear` that multiplies with `kernel_transform(kernel)`: every option of `nnx.Linear`, and three more.

    Attributes:
      kernel_transform: by default none.
      scale, recompute_kernel: see `TransformedKernel`.
    """


class CenteredConv(TransformedConv):
    """`nnx.Conv` that convolves with `center(kernel)` (section 3.1): `TransformedConv` with another default.

    Gradients of the raw kernel sum to zero over each output channel's fan-in.

    Attributes:
      kernel_transform: the default centers where the published CIFAR code does, from a fan-in above 50;
        `KernelTransform(center, rule)` does by any other rule.
      kernel_init: None for `initializers.centered_he`: the exact gain where the kernel is centered, He's elsewhere.
      scale, recompute_kernel: see `TransformedKernel`.

    Example:
      >>> import jax.numpy as jnp
      >>> layer = CenteredConv(16, 8, (3, 3), rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((1, 5, 5, 16)))
      >>> y.shape, bool(abs(y[0, 2, 2]).max() < 1e-5)  # a constant patch gives nothing
      ((1, 5, 5, 8), True)
    """

    def __init__(
        self,
        *args: Any,
        kernel_transform: KernelTransform = CENTER_PUBLISHED,
        kernel_init: initializers.Initializer | None = None,
        **options: Any,
    ) -> None:
        kernel_init = kernel_init or centered_he(kernel_transform.centers, options.get("feature_group_count", 1))
        super().__init__(*args, kernel_transform=kernel_transform, kernel_init=kernel_init, **options)


class CenteredLinear(TransformedLinear):
    """`nnx.Linear` that multiplies with `center(kernel)`: `TransformedLinear` with another default.

    The published conv nets leave their dense layers uncentered; the theory section centers them.

    Attributes:
      kernel_transform: the default centers always.
      kernel_init: None for `initializers.centered_he`, the exact gain.
      scale, recompute_kernel: see `TransformedKernel`.
    """

    def __init__(
        self,
        *args: Any,
        kernel_transform: KernelTransform = CENTER,
        kernel_init: initializers.Initializer | None = None,
        **options: Any,
    ) -> None:
        kernel_init = kernel_init or centered_he(kernel_transform.centers)
        super().__init__(*args, kernel_transform=kernel_transform, kernel_init=kernel_init, **options)
