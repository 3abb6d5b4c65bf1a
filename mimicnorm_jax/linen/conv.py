"""Flax linen's convolution and dense layer with a kernel transform, and their centered forms."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
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

    Not a module, so that Flax runs this code as a plain function and neither counts nor intercepts a second call. The
    bias is only cast: it is added outside of the checkpoint, where XLA fuses its gradient with the mask of the ReLU
    behind, instead of reading that map once more.
    """

    use_bias = False

    def __init__(self, layer: Any, kernel: jax.Array, bias: jax.Array | None, recompute: bool) -> None:
        self._layer, self._kernel, self.bias, self._recompute = layer, kernel, bias, recompute

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def param(self, name: str, *_: Any) -> jax.Array | None:
        return {"kernel": self._kernel}[name]

    def promote_dtype(self, inputs: jax.Array, kernel: jax.Array, bias: None, **options: Any) -> tuple[Any, ...]:
        inputs, kernel, self.bias = self._layer.promote_dtype(inputs, kernel, self.bias, **options)
        return inputs, row_major(kernel) if self._recompute else kernel, bias


def kernel_shape(layer: Any, inputs: jax.Array) -> tuple[int, ...]:
    """Shape of the kernel that an `nn.Conv` or `nn.Dense` makes for these inputs."""
    window, groups = getattr(layer, "kernel_size", ()), getattr(layer, "feature_group_count", 1)
    window = (window,) if isinstance(window, int) else tuple(window)
    return *window, jnp.shape(inputs)[-1] // groups, layer.features


def read_kernel(layer: Any, inputs: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Kernel and bias of an `nn.Conv` or `nn.Dense` in its compact method; only ours may have no `kernel_init`."""
    groups = getattr(layer, "feature_group_count", 1)
    kernel_init = layer.kernel_init or centered_he(layer.kernel_transform.centers, groups)
    # Flax's names and order: the random numbers are those of the plain layer.
    kernel = layer.param("kernel", kernel_init, kernel_shape(layer, inputs), layer.param_dtype)
    bias = layer.param("bias", layer.bias_init, (layer.features,), layer.param_dtype) if layer.use_bias else None
    return kernel, bias


def refuse_product_module(layer: Any) -> None:
    """Raises ValueError for a layer whose product is a module: it would keep values of the trace of a checkpoint."""
    for name in ("dot_general", "conv_general_dilated"):
        if getattr(layer, f"{name}_cls", None) is not None:
            raise ValueError(
                f"{'/'.join(layer.path) or type(layer).__name__}: a transformed kernel is multiplied inside of a "
                f"checkpoint, where {name}_cls= cannot make a module with variables; give {name}=, a function"
            )


def transformed_layer(
    layer: Any, plain: Callable[..., jax.Array], transform: KernelTransform, *, recompute: bool
) -> Callable[..., jax.Array]:
    """The layer `(inputs, kernel, bias or None, *scales) -> output`, with a transformed kernel.

    Args:
      layer: an `nn.Conv` or `nn.Dense`, of which only the options are read.
      plain: Flax's `__call__` of it, as a function.
      transform, recompute: see `with_transformed_kernel`.
    """
    refuse_product_module(layer)

    def product(inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> tuple[Any, Any]:
        arrays = _Arrays(layer, kernel, bias, recompute)
        return plain(arrays, inputs), arrays.bias

    return with_transformed_kernel(product, transform, getattr(layer, "feature_group_count", 1), recompute=recompute)


class TransformedKernel(nn.Module):
    """Transforms kernel and bias where the layer reads them; the raw kernel is what is stored.

    Attributes:
      kernel_transform: what becomes of the kernel, the parameter `kernel`; a layer's `mask` comes after it.
      scale_init: initializer of a learnable scalar, the parameter `scale`, which multiplies the transformed kernel
        and the bias (appendix C) and so costs no activation memory; None for no scalar.
      recompute_kernel: whether the backward pass computes the transformed, cast kernel again instead of keeping it,
        in the memory layout that saves most (`row_major`). False is what Flax does.
    """

    kernel_transform: KernelTransform = IDENTITY
    scale_init: initializers.Initializer | None = None
    recompute_kernel: bool = True

    @nn.compact
    def __call__(self, inputs: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        """The layer's output; `scale`, a scalar `()`, multiplies kernel and bias as the parameter does."""
        layer: Any = self  # the options are those of the Flax layer beside this class
        kernel, bias = read_kernel(layer, inputs)
        # After Flax's own, so that theirs are the random numbers of the plain layer.
        own = None if self.scale_init is None else self.param("scale", self.scale_init, (), layer.param_dtype)
        plain: Any = super().__call__
        call = transformed_layer(layer, plain.__func__, self.kernel_transform, recompute=self.recompute_kernel)
        return call(inputs, kernel, bias, *(one for one in (own, scale) if one is not None))


class TransformedConv(TransformedKernel, nn.Conv):
    """`nn.Conv` that convolves with `kernel_transform(kernel)`: every option of `nn.Conv`, and three more.

    The raw kernel is the parameter; the transform is a pure function of it at every call, so gradients are those of
    the raw kernel. A `mask` applies to the transformed kernel.

    Attributes:
      kernel_transform: asked with the layer's groups; by default none.
      scale_init, recompute_kernel: see `TransformedKernel`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mimicnorm_jax.functional import KernelTransform, standardize
      >>> layer = TransformedConv(8, (3, 3), kernel_transform=KernelTransform(standardize))
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 5, 5, 16)))
      >>> y.shape, bool(abs(y[0, 2, 2]).max() < 1e-5)  # a constant patch gives nothing
      ((1, 5, 5, 8), True)
    """


class TransformedDense(TransformedKernel, nn.Dense):
    """`nn.Dense` that multiplies with `kernel_transform(kernel)`: every option of `nn.Dense`, and three more.

    Attributes:
      kernel_transform: by default none.
      scale_init, recompute_kernel: see `TransformedKernel`.
    """


class CenteredConv(TransformedConv):
    """`nn.Conv` that convolves with `center(kernel)` (section 3.1): `TransformedConv` with another default.

    Gradients of the raw kernel sum to zero over each output channel's fan-in.

    Attributes:
      kernel_transform: the default centers where the published CIFAR code does, from a fan-in above 50;
        `KernelTransform(center, rule)` does by any other rule.
      kernel_init: None for `initializers.centered_he`: the exact gain where the kernel is centered, He's elsewhere.
      scale_init, recompute_kernel: see `TransformedKernel`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> layer = CenteredConv(8, (3, 3), scale_init=nn.initializers.constant(1.2))
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 5, 5, 16)))
      >>> y.shape, bool(abs(y[0, 2, 2]).max() < 1e-5)  # a constant patch gives nothing
      ((1, 5, 5, 8), True)
    """

    kernel_transform: KernelTransform = CENTER_PUBLISHED
    kernel_init: initializers.Initializer | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


class CenteredDense(TransformedDense):
    """`nn.Dense` that multiplies with `center(kernel)`: `TransformedDense` with another default.

    The published conv nets leave their dense layers uncentered; the theory section centers them.

    Attributes:
      kernel_transform: the default centers always.
      kernel_init: None for `initializers.centered_he`, the exact gain.
      scale_init, recompute_kernel: see `TransformedKernel`.
    """

    kernel_transform: KernelTransform = CENTER
    kernel_init: initializers.Initializer | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
