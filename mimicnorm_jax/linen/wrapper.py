"""Any module with its layers' kernels transformed: transposed, local and attention layers, or a whole block."""

from collections.abc import Callable
from typing import Any

import jax
from flax import errors
from flax import linen as nn

from mimicnorm_jax.functional.transform import KernelTransform, with_transformed_kernel
from mimicnorm_jax.linen.conv import TransformedKernel, refuse_product_module
from mimicnorm_jax.linen.interception import intercept
from mimicnorm_jax.linen.layouts import KERNEL_LAYERS, equation_of, layout_of


class Transformed(nn.Module):
    """A module whose layers read their kernels through a transform; parameters are the module's, under its names.

    Layers are `nn.Conv`, `nn.ConvLocal`, `nn.ConvTranspose`, `nn.Dense`, `nn.DenseGeneral` (so attention) and
    `nn.Einsum`, the module itself or anywhere inside; the transform is asked with their `KernelLayout.flat_shape` and
    groups. Our own layers in it keep the transform that they have. The transformed kernel is not kept for the backward
    pass.

    Attributes:
      module: any Flax module.
      kernel_transform: such as `KernelTransform(center)`; a layer's `mask` comes after it.

    Example:
      >>> import jax.numpy as jnp
      >>> from mimicnorm_jax.functional import center
      >>> layer = Transformed(nn.ConvTranspose(8, (3, 3)), KernelTransform(center))
      >>> y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((1, 5, 5, 16)))
      >>> y.shape, bool(abs(y[0, 2, 2]).max() < 1e-5)  # a constant patch gives nothing
      ((1, 5, 5, 8), True)
    """

    module: nn.Module
    kernel_transform: KernelTransform

    converts_kernels = True  # as `interop.mimic` does: one in another would not know which of them reads a kernel

    def setup(self) -> None:
        nn.share_scope(self, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives.

        Raises:
          ValueError: for a layer in it that is a subclass of one of Flax's with a `__call__` or `param` of its own,
            or whose product is a module (`dot_general_cls=`), for a `Transformed` in it, and in initialization for a
            module that calls none of these layers.
        """
        module: Any = self.module
        met: set[type[nn.Module]] = set()
        # Of its own in initialization: layers in what `nn.jit` kept of another call would not be met.
        key = object() if self.is_initializing() else self.kernel_transform
        with intercept(_reading_through(self.kernel_transform, met), key):
            result = module(*args, **kwargs)
        if self.is_initializing() and not met:
            raise ValueError(
                f"nothing in {'/'.join(self.path) or type(module).__name__} would be transformed: it calls none of "
                f"{', '.join(f'nn.{known.__name__}' for known in KERNEL_LAYERS)}"
            )
        return result


def _reading_through(transform: KernelTransform, met: set[type[nn.Module]]) -> Callable[..., Any]:
    """An interceptor of calls, which adds the classes of the layers with a kernel that it meets."""

    def read(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if getattr(layer, "converts_kernels", False):
            raise ValueError(
                f"{'/'.join(layer.path) or 'a module'}: a {type(layer).__name__} in a Transformed, which of them "
                "transforms a kernel is open; say both transforms in one, compose(first, second)"
            )
        if not isinstance(layer, KERNEL_LAYERS) or context.method_name != "__call__":
            return call(*args, **kwargs)
        met.add(type(layer))
        if isinstance(layer, TransformedKernel):
            return call(*args, **kwargs)
        return _call_transformed(layer, transform, call, args, kwargs)

    return read


def _call_transformed(layer: Any, transform: KernelTransform, call: Any, args: Any, kwargs: Any) -> Any:
    y = None if layer.has_variable("params", "kernel") else call(*args, **kwargs)  # which initializes
    arrays = {name: nn.unbox(value) for name, value in layer.variables.get("params", {}).items()}
    if "kernel" not in arrays:  # a subclass that keeps none
        return y
    layout = layout_of(layer, arrays["kernel"].shape, equation_of(args, kwargs))
    if not layout.takes(transform):
        return call(*args, **kwargs) if y is None else y
    known = next(known for known in KERNEL_LAYERS if isinstance(layer, known))
    if type(layer).__call__ is not known.__call__ or type(layer).param is not nn.Module.param:
        raise ValueError(
            f"{'/'.join(layer.path)}: {type(layer).__name__} is a nn.{known.__name__} with a __call__ or param of its "
            "own, which may not read its kernel as that does; leave its kernel out by a rule of the transform, or take "
            "one of Flax's own layers"
        )
    refuse_product_module(layer)
    plain: Any = known.__call__
    inputs = kwargs.pop("inputs") if "inputs" in kwargs else args[0]

    def product(inputs: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, None]:
        reader = _Reader(layer, {"kernel": kernel, "bias": bias})
        return plain(reader, inputs, *args[1:], **kwargs), None

    whole = KernelTransform(layout.function(transform))
    return with_transformed_kernel(product, whole, layout.groups, recompute=True)(
        inputs, arrays["kernel"], arrays.get("bias")
    )


class _Reader:
    """A layer's options beside given arrays as its parameters: not a module, so that Flax sees one call."""

    def __init__(self, layer: Any, arrays: dict[str, jax.Array | None]) -> None:
        self._layer, self._arrays = layer, arrays

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def param(self, name: str, _: Any, shape: tuple[int, ...], *__: Any) -> jax.Array | None:
        value = self._arrays[name]
        if value is not None and value.shape != tuple(shape):
            raise errors.ScopeParamShapeError(name, self._layer.scope.path_text, value.shape, tuple(shape))
        return value
