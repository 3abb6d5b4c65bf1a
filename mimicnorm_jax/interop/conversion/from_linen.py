"""Linen modules of other code with centered kernels, without their BatchNorms, and with a last one."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax.linen.module import InterceptorContext

from mimicnorm_jax.functional.kernels import center
from mimicnorm_jax.functional.transform import KernelTransform
from mimicnorm_jax.interop.conversion.records import Choice, Layer, nothing_centered
from mimicnorm_jax.linen.conv import kernel_shape, read_kernel, transformed_layer
from mimicnorm_jax.linen.interception import intercept, observe
from mimicnorm_jax.linen.last_norm import WithLastBatchNorm
from mimicnorm_jax.linen.norm import IdentityNorm
from mimicnorm_jax.utils.trees import Path, path_names

# What Flax's layers compute, as functions. A subclass that overrides `__call__` is known where it calls Flax's, and a
# lifted layer (`nn.remat(nn.Conv)`) where the layer inside is called.
CONV_CALL, DENSE_CALL = inspect.unwrap(nn.Conv.__call__), inspect.unwrap(nn.Dense.__call__)
BATCH_NORM_CALL = inspect.unwrap(nn.BatchNorm.__call__)


class Mimic(WithLastBatchNorm):
    """A module of other code under MimicNorm; see `interop.mimic`, which makes it.

    Attributes:
      wrapped, norm: see `WithLastBatchNorm`; `norm` is None for no last norm.
      choice: which kernels are centered.
      keep_bias: whether a BatchNorm leaves its bias, instead of nothing.
    """

    choice: Choice = Choice()
    keep_bias: bool = False

    converts_kernels = True  # see `linen.Transformed`

    @nn.nowrap
    def _call_module(self, *args: Any, **kwargs: Any) -> Any:
        convolutions: list[str | None] = []  # why each was left
        norms: list[nn.Module] = []
        called: set[Path] = set()

        def convert(call: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
            layer: Any = context.module
            if getattr(layer, "converts_kernels", False):
                raise ValueError(f"{'/'.join(layer.path) or type(layer).__name__} is converted twice")
            called.add(self.path_of(layer))
            function = original(context)
            if function is BATCH_NORM_CALL:
                norms.append(layer)
                return _without_norm(layer, self.keep_bias, *args, **kwargs)
            if function in (CONV_CALL, DENSE_CALL) and isinstance(layer, nn.Conv | nn.Dense):
                reason = self.reason_to_leave(layer, *args, **kwargs)
                convolutions.append(reason)
                return call(*args, **kwargs) if reason else _centered(layer, *args, **kwargs)
            before = len(norms)
            result = call(*args, **kwargs)
            if isinstance(layer, nn.BatchNorm) and not isinstance(layer, IdentityNorm) and len(norms) == before:
                raise ValueError(
                    f"{'/'.join(self.path_of(layer))} is a {type(layer).__name__}, a BatchNorm with a __call__ of its "
                    "own: what takes its place is not known; give the network another norm"
                )
            return result

        # What `nn.jit` traced of one part, it takes for others that are alike; a rule does so too.
        by_path = self.choice.select is not None
        with observe(convert) if by_path else intercept(convert, (self.choice, self.keep_bias)):
            output = self.wrapped(*args, **kwargs)
        if self.is_initializing() and None not in convolutions and self._kernels() <= called:
            # A kernel that is not seen called is inside of an `nn.jit` that JAX had traced before, converted.
            raise ValueError(nothing_centered(type(self.wrapped).__name__, [why for why in convolutions if why]))
        return output

    @nn.nowrap
    def _kernels(self) -> set[Path]:
        """Paths of the layers that have one."""
        leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(self.variables.get("params", {})))
        paths = (path_names(path) for path, _ in leaves)
        return {(*self.path, *path[:-1]) for path in paths if path[-1] == "kernel"}

    @nn.nowrap
    def reason_to_leave(self, layer: Any, inputs: jax.Array) -> str | None:
        """Why the kernel of a layer inside, which is being called, is not centered; None if it is.

        Args:
          layer: that is being called.
          inputs: that it gets, of any shape.
        """
        if any(getattr(layer, f"{name}_cls", None) is not None for name in ("dot_general", "conv_general_dilated")):
            return "its product is a module, which cannot be traced inside of a checkpoint"
        own, path = self.path, self.path_of(layer)
        path = path[len(own) :] if path[: len(own)] == own else path
        one = Layer(path, type(layer).__name__, kernel_shape(layer, inputs), getattr(layer, "feature_group_count", 1))
        return self.choice.reason_to_leave(one, convolution=isinstance(layer, nn.Conv))


def original(context: InterceptorContext) -> Callable[..., Any] | None:
    """The function behind an intercepted method."""
    return getattr(context.orig_method, "func", None)


def _centered(layer: nn.Conv | nn.Dense, inputs: jax.Array) -> jax.Array:
    plain = CONV_CALL if isinstance(layer, nn.Conv) else DENSE_CALL
    call = transformed_layer(layer, plain, KernelTransform(center), recompute=True)
    return call(inputs, *read_kernel(layer, inputs))


def _without_norm(
    norm: Any, keep_bias: bool, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
) -> jax.Array:
    del use_running_average, mask
    y = x if norm.dtype is None else x.astype(norm.dtype)
    if not (keep_bias and norm.use_bias):
        return y
    axes = (norm.axis,) if isinstance(norm.axis, int) else norm.axis
    features = sorted(axis % x.ndim for axis in axes)
    bias = norm.param("bias", norm.bias_init, tuple(x.shape[axis] for axis in features), norm.param_dtype)
    return y + bias.reshape([x.shape[axis] if axis in features else 1 for axis in range(x.ndim)]).astype(y.dtype)
