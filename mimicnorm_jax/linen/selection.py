"""Which leaves of a parameter tree are kernels of convolutions, read from the Flax module that makes them."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from mimicnorm_jax.functional.kernels import center
from mimicnorm_jax.functional.rules import PUBLISHED_CIFAR_RULE, Rule
from mimicnorm_jax.functional.transform import KernelFunction
from mimicnorm_jax.optim.projection import Select

_Path = tuple[str, ...]
_Call = dict[_Path, tuple[tuple[int, ...], int]]


def select_convolutions(module: nn.Module, *args: Any, rule: Rule = PUBLISHED_CIFAR_RULE, **kwargs: Any) -> Select:
    """Selects the kernels of the convolutions that a module calls, whatever else its tree holds.

    For `optim.center_params` and `optim.keep_kernels_centered`. The module is traced once, without computing; its
    convolutions (`nn.Conv` and what derives from it, so `CenteredConv`) are known by class, with their groups. The
    kernels of scanned or vmapped layers, stacked along one or more axes, are centered one by one.

    Args:
      module: any Flax module.
      args: what `module.init` takes after the key; arrays or `jax.ShapeDtypeStruct`.
      rule: which kernels to center, asked with the kernel's shape, unstacked, and the layer's groups.
      kwargs: further arguments of `module.init`.

    Returns:
      The selection. It raises ValueError for a leaf that is not the module's, or whose shape leaves open which axis is
      the stack.

    Example:
      >>> import jax.numpy as jnp
      >>> from mimicnorm_jax import optim
      >>> layer = nn.Conv(4, (3,))
      >>> select = select_convolutions(layer, jnp.ones((1, 9, 32)))
      >>> params = layer.init(jax.random.key(0), jnp.ones((1, 9, 32)))["params"]
      >>> bool(abs(optim.center_params(params, select)["kernel"].sum((0, 1))).max() < 1e-5)
      True
    """
    found: _Call = {}

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*args, **kwargs)
        layer = context.module
        if isinstance(layer, nn.Conv) and context.method_name == "__call__":
            kernel = nn.meta.unbox(layer.get_variable("params", "kernel"))
            found[*layer.path, "kernel"] = kernel.shape, layer.feature_group_count
        return result

    with nn.intercept_methods(note):
        jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args, **kwargs), *args)

    def select(path: _Path, leaf: jax.Array) -> bool | KernelFunction:
        path = path if path in found else path[1:]  # of all variables instead of the parameters
        if path not in found or not rule(*found[path]):
            return False
        return _one_by_one(_stacked_axes(path, leaf.shape, found[path][0]))

    return select


def _stacked_axes(path: _Path, stacked: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    axes = range(len(stacked))
    extra = max(len(stacked) - len(shape), 0)
    fits = [
        chosen
        for chosen in itertools.combinations(axes, extra)
        if tuple(stacked[axis] for axis in axes if axis not in chosen) == shape
    ]
    if len(fits) == 1:
        return fits[0]
    what = "could be stacked along several axes" if fits else "is not one, nor a stack of them"
    raise ValueError(
        f"{'/'.join(path)} of shape {stacked}, a convolution's kernel of shape {shape} in the module, {what}: "
        "give a select of your own that returns what to do with it, jax.vmap(center) if the first axis is the stack"
    )


def _one_by_one(axes: tuple[int, ...]) -> KernelFunction:
    function: KernelFunction = center
    for axis in axes:  # the last, so outermost, first
        function = jax.vmap(function, in_axes=axis, out_axes=axis)
    return function
