"""The kernel transform: a pure function of a kernel, with the rule which kernels it takes, and how a layer reads it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax

from mimicnorm_jax.functional.kernels import Shape, center
from mimicnorm_jax.functional.rules import PUBLISHED_CIFAR_RULE, Rule, always, never

KernelFunction = Callable[[jax.Array], jax.Array]
"""A pure function of a kernel `(..., n_out)` that keeps its shape and dtype, such as `center`."""


@dataclass(frozen=True)
class KernelTransform:
    """What a layer does to its kernel where it reads it: `function` where `rule` takes the kernel, nothing elsewhere.

    Attributes:
      function: such as `kernels.center`.
      rule: which kernels it takes, asked with their shape and the layer's groups.
      then: transforms that follow, each by its own rule; see `compose`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mimicnorm_jax.functional import kernels, rules
      >>> transform = KernelTransform(kernels.center, rules.ungrouped)
      >>> transform(jnp.array([[1.0], [3.0]])).tolist(), transform(jnp.array([[1.0], [3.0]]), groups=2).tolist()
      ([[-1.0], [1.0]], [[1.0], [3.0]])
    """

    function: KernelFunction
    rule: Rule = always
    then: tuple["KernelTransform", ...] = ()

    def takes(self, shape: Shape, groups: int = 1) -> bool:
        """Whether it, or one that follows, takes the kernel of this shape in a layer with this many groups."""
        return bool(self.functions(shape, groups))

    def functions(self, shape: Shape, groups: int = 1) -> tuple[KernelFunction, ...]:
        """The functions that a kernel of this shape goes through, from the first to the last.

        Args:
          shape: of the kernel.
          groups: of its layer's channels.
        """
        own = (self.function,) if self.rule(shape, groups) else ()
        return sum((one.functions(shape, groups) for one in self.then), own)

    def centers(self, shape: Shape, groups: int = 1) -> bool:
        """Whether `kernels.center` is one of the `functions` of a kernel of this shape, in a layer with so many groups.

        Args:
          shape: of the kernel.
          groups: of its layer's channels.
        """
        return any(function is center for function in self.functions(shape, groups))

    def names(self, shape: Shape, groups: int = 1) -> tuple[str, ...]:
        """Names of the `functions`.

        Args:
          shape: of the kernel.
          groups: of its layer's channels.

        Example:
          >>> CENTER_PUBLISHED.names((3, 3, 64, 64)), CENTER_PUBLISHED.names((3, 3, 3, 64))
          (('center',), ())
        """
        return tuple(getattr(one, "__name__", repr(one)) for one in self.functions(shape, groups))

    def __call__(self, kernel: jax.Array, groups: int = 1) -> jax.Array:
        """The transformed kernel.

        Args:
          kernel: `(*window, n_in / groups, n_out)` or `(n_in, n_out)`.
          groups: of the layer.
        """
        return self.at(kernel.shape, groups)(kernel)

    def at(self, shape: Shape, groups: int = 1) -> KernelFunction:
        """What it does to kernels of this shape in a layer with this many groups, without asking any rule again."""
        functions = self.functions(shape, groups)

        def function(kernel: jax.Array) -> jax.Array:
            for one in functions:
                kernel = one(kernel)
            return kernel

        return function


def _identity(kernel: jax.Array) -> jax.Array:
    return kernel


IDENTITY = KernelTransform(_identity, never)
"""Takes no kernel."""
CENTER = KernelTransform(center)
"""Centers every kernel."""
CENTER_PUBLISHED = KernelTransform(center, PUBLISHED_CIFAR_RULE)
"""Centers where the published CIFAR code does, from a fan-in above 50."""


def compose(*transforms: KernelTransform) -> KernelTransform:
    """The transforms from the first to the last, each by its own rule; `IDENTITY` if there are none.

    Example:
      >>> import jax.numpy as jnp
      >>> from mimicnorm_jax.functional import kernels
      >>> halve = KernelTransform(lambda kernel: kernel / 2)
      >>> compose(KernelTransform(kernels.center), halve)(jnp.array([[1.0], [3.0]])).tolist()
      [[-0.5], [0.5]]
    """
    if not transforms:
        return IDENTITY
    first, *rest = transforms
    return replace(first, then=(*first.then, *rest))


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
