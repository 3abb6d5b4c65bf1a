"""Flax linen's convolution and dense layer with a kernel transform, and their centered forms."""

from flax import linen as nn
from jax.nn.initializers import Initializer

from mimicnorm_jax.functional.transform import CENTER, CENTER_PUBLISHED, KernelTransform
from mimicnorm_jax.linen.transformed import TransformedKernel


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
    kernel_init: Initializer | None = None  # pyright: ignore[reportIncompatibleVariableOverride]


class CenteredDense(TransformedDense):
    """`nn.Dense` that multiplies with `center(kernel)`: `TransformedDense` with another default.

    The published conv nets leave their dense layers uncentered; the theory section centers them.

    Attributes:
      kernel_transform: the default centers always.
      kernel_init: None for `initializers.centered_he`, the exact gain.
      scale_init, recompute_kernel: see `TransformedKernel`.
    """

    kernel_transform: KernelTransform = CENTER
    kernel_init: Initializer | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
