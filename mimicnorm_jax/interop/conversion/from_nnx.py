"""NNX modules of other code with centered kernels, without their BatchNorms, and with a last one."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax
from flax import nnx

from mimicnorm_jax.functional.kernels import center
from mimicnorm_jax.functional.transform import KernelTransform
from mimicnorm_jax.interop.conversion.records import (
    OTHER_LAYER,
    OWN_CALL,
    OWN_STATISTICS,
    Choice,
    Layer,
    LayerRecord,
    Report,
    exact_gain,
    nothing_centered,
)
from mimicnorm_jax.linen.last_norm import LAST_BN, kind_of
from mimicnorm_jax.nnx import CenteredConv, CenteredLinear, IdentityNorm, LastBatchNorm
from mimicnorm_jax.nnx.conv import TransformedKernel
from mimicnorm_jax.utils.trees import Path

Model = TypeVar("Model", bound=nnx.Module)
LastNorm = Callable[..., nnx.Module]

_CENTER = KernelTransform(center)


class RemovedNorm(nnx.BatchNorm):
    """What is left of a BatchNorm: nothing, or its bias. An `nnx.BatchNorm` takes this class when it is converted."""

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, mask: jax.Array | None = None
    ) -> jax.Array:
        """`x` of any shape, plus the bias if that is kept; raises ValueError as `interop.mimic` says."""
        del mask
        if use_running_average is not None and use_running_average != self.use_running_average:
            raise ValueError(
                f"this network tells its BatchNorms use_running_average={use_running_average} in the call, which the "
                f"last BatchNorm does not hear: agree with it by {'eval' if use_running_average else 'train'}() before"
            )
        y = x if self.dtype is None else x.astype(self.dtype)
        if self.bias is None:
            return y
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return y + self.bias[...].reshape(shape).astype(y.dtype)


def mimic_nnx(
    module: Model, choice: Choice, *, keep_bias: bool, num_classes: int | None, norm: LastNorm | None
) -> Model:
    """See `interop.mimic`."""
    name = type(module).__name__
    if isinstance(module, _Converted):
        raise ValueError(f"{name} is converted already")
    if norm is not None and num_classes is None:
        raise ValueError(f"the last BatchNorm of {name} is made before there are logits: give num_classes")
    if norm is not None and hasattr(module, LAST_BN):
        raise ValueError(f"{name} has an attribute {LAST_BN!r} already")
    model = nnx.clone(module)
    layers = list(nnx.iter_modules(model))
    reasons = [_center(path, layer, choice) for path, layer in layers if _has_kernel(layer)]
    if None not in reasons:
        raise ValueError(nothing_centered(name, [why for why in reasons if why]))
    axes = {layer.axis_name for _, layer in layers if isinstance(layer, nnx.BatchNorm) and _is_norm(layer)}
    modes = {_remove(path, layer, keep_bias) for path, layer in layers if _is_norm(layer)} - {None}
    if norm is not None:
        kind, given = kind_of(norm)
        options: dict[str, Any] = {}
        if kind is LastBatchNorm:
            options = {} if "axis_name" in given else _axis(name, axes)
            if len(modes) == 1 and "use_running_average" not in given:
                options["use_running_average"] = modes.pop()
        last = norm(num_classes, **options)
        if not isinstance(last, nnx.Module):
            raise ValueError(f"norm gives a {type(last).__name__}: of {name} it has to make an nnx.Module")
        setattr(model, LAST_BN, last)
        model.__class__ = _with_last_norm(type(model))
    return model


def nnx_report(model: nnx.Module) -> Report:
    """See `interop.layer_report`."""
    layers = list(nnx.iter_modules(model))
    normalized = any(isinstance(layer, RemovedNorm) for _, layer in layers)
    owners: dict[int, str] = {}  # of kernels, which two layers may share, and the parameters hold once
    records: list[LayerRecord] = []
    for path, layer in layers:
        one = _record(tuple(map(str, path)), layer, normalized)
        kernel = getattr(layer, "kernel", None)
        if one is not None and kernel is not None:
            owner = owners.setdefault(id(kernel), "/".join(one.path))
            if owner != "/".join(one.path):
                one = replace(one, gain=None, reason=f"shares the kernel of {owner}")
        records += [] if one is None else [one]
    return Report(tuple(records))


class _Converted:
    """Marks the classes of `_with_last_norm`."""


@functools.cache
def _with_last_norm(kind: type) -> type:
    """A network's class with the last norm on its output; one for each, since JAX caches programs by it."""

    def call(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
        logits = kind.__call__(self, *args, **kwargs)
        if getattr(logits, "ndim", None) != 2:
            raise ValueError(
                f"a last BatchNorm stands on logits (B, C); {kind.__name__} gives "
                f"{getattr(logits, 'shape', type(logits).__name__)}: convert the part of it whose output are logits"
            )
        return getattr(self, LAST_BN)(logits)

    names = {"__call__": call, "__doc__": kind.__doc__, "__module__": kind.__module__}
    return type(f"Mimic{kind.__name__}", (kind, _Converted), names)


@functools.cache
def _centered_class(kind: type) -> type:
    """A layer's class with a kernel transform."""
    known: dict[type, type] = {nnx.Conv: CenteredConv, nnx.Linear: CenteredLinear}
    names = {"__doc__": kind.__doc__, "__module__": kind.__module__}
    return known.get(kind) or type(f"Centered{kind.__name__}", (TransformedKernel, kind), names)


def _has_kernel(layer: nnx.Module) -> bool:
    return isinstance(layer, nnx.Conv | nnx.Linear) and not isinstance(layer, TransformedKernel)


def _is_norm(layer: nnx.Module) -> bool:
    return isinstance(layer, nnx.BatchNorm) and not isinstance(layer, IdentityNorm)


def _known_call(layer: nnx.Module) -> bool:
    """Whether the layer computes what Flax's does."""
    return type(layer).__call__ in (nnx.Conv.__call__, nnx.Linear.__call__, nnx.BatchNorm.__call__)


def _layer(path: Path, layer: Any) -> Layer:
    shape = layer.kernel_shape if isinstance(layer, nnx.Conv) else (layer.in_features, layer.out_features)
    return Layer(path, type(layer).__name__, tuple(shape), getattr(layer, "feature_group_count", 1))


def _center(path: Any, layer: Any, choice: Choice) -> str | None:
    """Centers the layer's kernel, or says why not."""
    if not _known_call(layer):
        return OWN_CALL
    reason = choice.reason_to_leave(_layer(tuple(map(str, path)), layer), convolution=isinstance(layer, nnx.Conv))
    if reason is None:
        # In place, so that a layer in several places, or in a list, stays one.
        layer.__class__ = _centered_class(type(layer))
        layer.kernel_transform, layer.recompute_kernel, layer.scale = _CENTER, True, nnx.data(None)
    return reason


def _remove(path: Any, norm: Any, keep_bias: bool) -> bool | None:
    """Makes a BatchNorm the identity; returns whether it used running averages."""
    if not _known_call(norm):
        raise ValueError(
            f"{'/'.join(map(str, path))} is a {type(norm).__name__}, a BatchNorm with a __call__ of its own: what "
            "takes its place is not known; give the network another norm"
        )
    norm.__class__ = RemovedNorm
    norm.scale = nnx.data(None)
    norm.bias = norm.bias if keep_bias else nnx.data(None)
    del norm.mean, norm.var
    mode = norm.use_running_average
    norm.use_running_average = bool(mode)
    return mode


def _axis(name: str, axes: set[str | None]) -> dict[str, Any]:
    """The option of the last norm that is synchronized as the norms were."""
    if len(axes) > 1:
        raise ValueError(
            f"the BatchNorms of {name} are synchronized over different axes, {axes}: give "
            "norm=functools.partial(mimicnorm_jax.nnx.LastBatchNorm, axis_name=...)"
        )
    return {"axis_name": next(iter(axes))} if axes else {}


def _record(path: Path, layer: Any, normalized: bool) -> LayerRecord | None:
    kind = functools.partial(LayerRecord, path, type(layer).__name__)
    if isinstance(layer, LastBatchNorm):
        return kind(action="last norm")
    if isinstance(layer, IdentityNorm | RemovedNorm):
        return kind(action="identity")
    if isinstance(layer, nnx.Conv | nnx.Linear) and (_known_call(layer) or isinstance(layer, TransformedKernel)):
        one = _layer(path, layer)
        assert one.shape is not None
        transform = getattr(layer, "kernel_transform", None)
        if transform is not None and transform.centers(one.shape, one.groups):
            return kind(one.shape, one.groups, action="centered", gain=exact_gain(one.shape))
        gain = 1.0 if normalized and isinstance(layer, nnx.Conv) else None
        return kind(one.shape, one.groups, gain=gain, reason="not centered")
    variables = [value for value in vars(layer).values() if isinstance(value, nnx.Variable)]
    if isinstance(layer, nnx.BatchNorm):
        return kind(reason="not converted")
    if any(isinstance(value, nnx.BatchStat) for value in variables):
        return kind(reason=OWN_STATISTICS)
    return kind(reason=OWN_CALL if isinstance(layer, nnx.Conv | nnx.Linear) else OTHER_LAYER) if variables else None
