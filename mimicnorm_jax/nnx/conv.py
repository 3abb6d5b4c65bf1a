"""Flax NNX's convolution and linear layer with a kernel transform, and their centered forms."""

from typing import Any

from flax import nnx
from jax.nn.initializers import Initializer

from mimicnorm_jax.functional.transform import CENTER, CENTER_PUBLISHED, KernelTransform
from mimicnorm_jax.initializers import centered_he
from mimicnorm_jax.nnx.transformed import TransformedKernel


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
        kernel_init: Initializer | None = None,
        **options: Any,
    ) -> None:
        kernel_init = kernel_init or centered_he(kernel_transform.takes, options.get("feature_group_count", 1))
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
        kernel_init: Initializer | None = None,
        **options: Any,
    ) -> None:
        kernel_init = kernel_init or centered_he(kernel_transform.takes)
        super().__init__(*args, kernel_transform=kernel_transform, kernel_init=kernel_init, **options)
