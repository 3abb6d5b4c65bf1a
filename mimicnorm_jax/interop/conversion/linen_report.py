"""Which kernels of a linen network are centered, read from one abstract call of it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from flax import linen as nn
from flax.linen.module import InterceptorContext

from mimicnorm_jax.functional.kernels import center, fan_in
from mimicnorm_jax.functional.transform import IDENTITY, KernelTransform
from mimicnorm_jax.interop.conversion.from_linen import BATCH_NORM_CALL, CONV_CALL, DENSE_CALL, Mimic, original
from mimicnorm_jax.interop.conversion.records import (
    OTHER_LAYER,
    OWN_CALL,
    OWN_STATISTICS,
    LayerRecord,
    Report,
    exact_gain,
)
from mimicnorm_jax.linen.conv import TransformedKernel, kernel_shape
from mimicnorm_jax.linen.interception import observe
from mimicnorm_jax.linen.last_norm import WithLastBatchNorm
from mimicnorm_jax.linen.norm import IdentityNorm, LastBatchNorm
from mimicnorm_jax.linen.wrapper import Transformed
from mimicnorm_jax.utils.trees import Path, abstract_call


def linen_report(model: nn.Module, *inputs: Any, **options: Any) -> Report:
    """See `interop.layer_report`."""
    noted = _Noted()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with observe(noted.intercept):
        abstract_call(model.init, keys, *inputs, **options)
    return Report(tuple(noted.records.values()))


class _Noted:
    """What an interceptor saw.

    Attributes:
      records: by path, in the order of the calls.
    """

    def __init__(self) -> None:
        self.records: dict[Path, LayerRecord] = {}
        self._inside: list[WithLastBatchNorm] = []
        self._outputs: list[tuple[Any, Path]] = []  # of layers with a kernel
        self._blocks = 0

    def intercept(self, call: Callable[..., Any], args: Any, kwargs: Any, context: InterceptorContext) -> Any:
        layer: Any = context.module
        path = self._inside[-1].path_of(layer) if self._inside else layer.path
        wrapper = isinstance(layer, WithLastBatchNorm) and context.method_name == "__call__"
        if wrapper:
            self._inside.append(layer)
        # Before the call: layers stand in the order in which they are called, and a layer inside finds its input.
        x = next(iter((*args, *kwargs.values())), None)
        if isinstance(layer, Transformed):
            raise ValueError(
                f"{'/'.join(path) or 'the model'} is a Transformed: linen.find_kernels says what its layers read how"
            )
        note = self._layer(path, layer, original(context), x) if path not in self.records else None
        seen = len(self._outputs)
        result = call(*args, **kwargs)
        if wrapper:
            self._inside.pop()
        if note is not None:
            self.records[path] = note
        if _multiplies(layer, original(context)):
            self._outputs.append((result, path))
        elif isinstance(layer, nn.Conv | nn.Dense) and len(self._outputs) > seen:  # a subclass around Flax's call
            self._outputs.append((result, self._outputs[-1][1]))
        elif context.method_name not in ("setup", "<lambda>") and path not in self.records:
            self._unknown(path, layer)
        return result

    def _layer(self, path: Path, layer: Any, function: Any, x: Any) -> LayerRecord | None:
        """The record of a layer that is known; x is its input."""
        mimic = next((one for one in self._inside if isinstance(one, Mimic)), None)
        if isinstance(layer, TransformedKernel):
            return _kernel(path, layer, x, layer.kernel_transform, "")
        if _multiplies(layer, function):
            reason = "not converted" if mimic is None else mimic.reason_to_leave(layer, x)
            return _kernel(path, layer, x, None if reason else KernelTransform(center), reason or "")
        kind = partial(LayerRecord, path, type(layer).__name__)
        if isinstance(layer, LastBatchNorm):
            return kind(action="last norm")
        if isinstance(layer, IdentityNorm):
            return kind(action="identity")
        if isinstance(layer, nn.BatchNorm) and function is BATCH_NORM_CALL:
            return kind(reason="not converted") if mimic is None else self._norm(layer, x, kind)
        return None

    def _norm(self, norm: Any, x: Any, kind: Callable[..., LayerRecord]) -> LayerRecord:
        """Of a BatchNorm that became the identity: what it normalized needs a scale of its own from now on."""
        path = next((path for output, path in self._outputs if output is x), None)
        if path is None:
            return kind(action="identity", reason="behind no single kernel")
        before = self.records[path]
        if before.gain is None:
            before = replace(before, gain=1.0)
        ends_branch = norm.use_scale and _starts_at_zero(norm)
        if ends_branch:
            self._blocks += 1
            before = replace(before, block=self._blocks)
        self.records[path] = before
        reason = f"behind {'/'.join(path)}" + (", where its scale started at 0" if ends_branch else "")
        return kind(action="identity", reason=reason)

    def _unknown(self, path: Path, layer: nn.Module) -> None:
        variables = {name: _own(layer, name) for name in ("params", "batch_stats")}
        if not any(variables.values()):
            return
        kernel = nn.meta.unbox(variables["params"].get("kernel"))
        reason = OWN_CALL if isinstance(layer, nn.Conv | nn.Dense) else OTHER_LAYER
        if variables["batch_stats"]:
            reason = OWN_STATISTICS
        shape = None if kernel is None else kernel.shape
        self.records[path] = LayerRecord(path, type(layer).__name__, shape, reason=reason)


def _kernel(path: Path, layer: Any, x: jax.Array, transform: KernelTransform | None, reason: str) -> LayerRecord:
    groups = getattr(layer, "feature_group_count", 1)
    one = LayerRecord(path, type(layer).__name__, kernel_shape(layer, x), groups, reason=reason)
    assert one.shape is not None
    if transform is None or not transform.takes(one.shape, groups):
        rule = f"by its rule: fan-in {fan_in(one.shape)}, groups {groups}"
        return replace(one, reason=reason or ("no transform" if transform == IDENTITY else rule))
    if not transform.centers(one.shape, groups):
        return replace(one, reason=f"its transform is {', '.join(transform.names(one.shape, groups))}")
    return replace(one, action="centered", gain=exact_gain(one.shape))


def _multiplies(layer: Any, function: Any) -> bool:
    """Whether a call is that of a layer with a kernel, ours or Flax's."""
    return isinstance(layer, TransformedKernel) or (
        isinstance(layer, nn.Conv | nn.Dense) and function in (CONV_CALL, DENSE_CALL)
    )


def _own(layer: nn.Module, collection: str) -> dict[str, Any]:
    """Variables of the layer itself, and of no layer inside."""
    every = layer.variables.get(collection, {})
    return {name: leaf for name, leaf in every.items() if not isinstance(leaf, Mapping)}


def _starts_at_zero(norm: Any) -> bool:
    with jax.ensure_compile_time_eval():
        scale = nn.meta.unbox(norm.scale_init(jax.random.key(0), (1,), norm.param_dtype))
        return bool((scale == 0).all())
