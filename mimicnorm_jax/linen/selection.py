"""Which leaves of a parameter tree are kernels, and of which layers, read from the Flax module that makes them."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn

from mimicnorm_jax.functional.layout import KernelLayout, over_fan_in
from mimicnorm_jax.functional.transform import CENTER, CENTER_PUBLISHED, IDENTITY, KernelFunction, KernelTransform
from mimicnorm_jax.linen.conv import TransformedKernel
from mimicnorm_jax.linen.interception import observe
from mimicnorm_jax.linen.layouts import KERNEL_LAYERS, equation_of, layout_of
from mimicnorm_jax.linen.wrapper import Transformed
from mimicnorm_jax.optim.projection import Select
from mimicnorm_jax.utils.trees import abstract_call, path_names

_Path = tuple[str, ...]


@dataclass(frozen=True)
class LayerKernel:
    """The kernel of a layer that a module calls.

    Attributes:
      layer: its class.
      layout: its shape, unstacked, with its fan-in and groups.
      transform: what the layer reads it through; `IDENTITY` for none.
    """

    layer: type[nn.Module]
    layout: KernelLayout
    transform: KernelTransform

    @property
    def transformed(self) -> bool:
        """Whether the transform takes it."""
        return self.layout.takes(self.transform)


def find_kernels(module: nn.Module, *args: Any, **kwargs: Any) -> dict[tuple[str, ...], LayerKernel]:
    """The kernels of the layers that a module calls, and through which transform it reads each.

    The module is traced once, without computing. Layers are known by class: those of `Transformed` and ours.

    Args:
      module: any Flax module.
      args: what `module.init` takes after the key; arrays, `jax.ShapeDtypeStruct`, or what is no array, as it is.
      kwargs: further arguments of `module.init`.

    Returns:
      By the path of the kernel in the parameters, in the order of the calls.

    Raises:
      ValueError: for what `interop.mimic` made, of which `interop.layer_report` says it.

    Example:
      >>> import jax.numpy as jnp
      >>> from mimicnorm_jax.linen import CenteredConv
      >>> net = nn.Sequential([CenteredConv(64, (3, 3)), CenteredConv(64, (3, 3))])
      >>> for path, kernel in find_kernels(net, jnp.ones((1, 8, 8, 3))).items():
      ...     print("/".join(path), kernel.layout.shape, kernel.transformed)
      layers_0/kernel (3, 3, 3, 64) False
      layers_1/kernel (3, 3, 64, 64) True
    """
    found: dict[_Path, LayerKernel] = {}

    def record(layer: nn.Module, kernel: LayerKernel) -> None:
        found[*layer.path, "kernel"] = kernel

    with observe(noting(record)):
        variables = abstract_call(module.init, jax.random.key(0), *args, **kwargs)
    made = {path_names(path) for path, _ in jax.tree.leaves_with_path(nn.meta.unbox(variables.get("params", {})))}
    return {_real_path(path, made): kernel for path, kernel in found.items()}


def noting(record: Callable[[nn.Module, LayerKernel], None]) -> Callable[..., Any]:
    """An interceptor of calls that records every layer with a kernel once it has been called.

    It raises ValueError as `find_kernels` does.
    """
    around: list[Transformed] = []

    def note(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer, is_call = context.module, context.method_name == "__call__"
        if is_call and isinstance(layer, Transformed):
            around.append(layer)
            try:
                return call(*args, **kwargs)
            finally:
                around.pop()
        if getattr(layer, "converts_kernels", False) and not isinstance(layer, Transformed):
            raise ValueError(f"{type(layer).__name__} at {'/'.join(layer.path)!r}: ask interop.layer_report instead")
        result = call(*args, **kwargs)
        if is_call and isinstance(layer, KERNEL_LAYERS) and layer.has_variable("params", "kernel"):
            kernel = nn.meta.unbox(layer.get_variable("params", "kernel"))
            reads = layer if isinstance(layer, TransformedKernel) else (around or [None])[-1]
            layout = layout_of(layer, kernel.shape, equation_of(args, kwargs))
            record(layer, LayerKernel(type(layer), layout, reads.kernel_transform if reads else IDENTITY))
        return result

    return note


def _real_path(path: _Path, made: set[_Path]) -> _Path:
    """The path without the fields of wrappers that share their scope, under which Flax has bound what is in them."""
    fields = [name in ("module", "wrapped") for name in path]
    choices = itertools.product(*((True, False) if field else (True,) for field in fields))
    real = {tuple(itertools.compress(path, kept)) for kept in choices} & made
    if not real:  # a wrapper of the user's own: all but the names of its fields
        within = [one for one in made if one[-1] == path[-1] and _is_within(one, path)]
        real = {one for one in within if len(one) == max(map(len, within))}
    if len(real) != 1:
        raise ValueError(
            f"the layer that Flax calls {'/'.join(path[:-1])} could have any of the parameters "
            f"{sorted(map('/'.join, real or made))}: give the fields of modules that share their scope with one in a "
            "field (nn.share_scope) names that no submodule has"
        )
    return real.pop()


def _is_within(part: _Path, path: _Path) -> bool:
    """Whether the names of a path all stand in another, in this order."""
    names = iter(path)
    return all(name in names for name in part)


def select_convolutions(
    module: nn.Module,
    *args: Any,
    transform: KernelTransform = CENTER_PUBLISHED,
    **kwargs: Any,
) -> Select:
    """Selects the kernels of the convolutions that a module calls, whatever else its tree holds.

    For `optim.center_params` and `optim.keep_kernels_centered`. Convolutions are `nn.Conv` and what derives from it,
    so `CenteredConv`. The kernels of scanned or vmapped layers, stacked along one or more axes, are transformed one by
    one.

    Args:
      module, args, kwargs: as in `find_kernels`.
      transform: what to do with which kernels, asked with the kernel's shape, unstacked, and the layer's groups.

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
    found = find_kernels(module, *args, **kwargs)
    return _select({path: one.layout for path, one in found.items() if issubclass(one.layer, nn.Conv)}, transform)


def select_kernels(module: nn.Module, *args: Any, transform: KernelTransform = CENTER, **kwargs: Any) -> Select:
    """Selects the kernels of all layers that a module calls: of `select_convolutions`, dense layers, attention.

    Each over its own fan-in, see `KernelLayout`. For some of them, ask the path first:
    `lambda path, leaf: "attention" in path and select(path, leaf)`.

    Args:
      module, args, kwargs: as in `find_kernels`.
      transform: what to do with which kernels, asked with `KernelLayout.flat_shape` and groups.

    Returns:
      As `select_convolutions`.
    """
    found = find_kernels(module, *args, **kwargs)
    return _select({path: one.layout for path, one in found.items()}, transform)


def _select(layouts: dict[_Path, KernelLayout], transform: KernelTransform) -> Select:
    def select(path: _Path, leaf: jax.Array) -> bool | KernelFunction:
        if path not in layouts and path[:1] == ("params",):  # of all variables instead of the parameters
            path = path[1:]
        layout = layouts.get(path)
        if layout is None or not layout.takes(transform):
            return False
        axes = _stacked_axes(path, leaf.shape, layout.shape)
        return over_fan_in(transform.at(layout.flat_shape, layout.groups), layout.stacked(axes))

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
        f"{'/'.join(path)} of shape {stacked}, a kernel of shape {shape} in the module, {what}: "
        "give a select of your own that returns what to do with it, jax.vmap(center) if the first axis is the stack"
    )
