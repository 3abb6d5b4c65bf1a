"""Tangent kernels of networks whose outputs have any number of axes: which are summed over, which are kept in pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.ntk import validation
from mimicnorm_jax.diagnostics.ntk.empirical import NTKOptions, empirical_ntk
from mimicnorm_jax.diagnostics.ntk.jacobians import Output
from mimicnorm_jax.diagnostics.tracing.outputs import evaluable
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn, bind
from mimicnorm_jax.diagnostics.tracing.validation import arguments


@dataclass(frozen=True)
class FlatOutputs:
    """A network with outputs `(N, ...)` as one with outputs `(N, O)`; equal ones compile once."""

    apply_fn: ApplyFn

    def __call__(self, params: Any, x: jax.Array) -> jax.Array:
        y = self.apply_fn(params, x)
        if not hasattr(y, "shape") or not y.shape or y.shape[0] != x.shape[0]:
            shape = getattr(y, "shape", type(y).__name__)
            raise ValueError(f"apply_fn returns {shape} for inputs of shape {x.shape}; it must be one array (N, ...)")
        return y.reshape(len(y), math.prod(y.shape[1:]))


def empirical_ntk_axes(
    apply_fn: ApplyFn,
    params: Any,
    x1: jax.Array,
    x2: jax.Array | None = None,
    axes: tuple[Sequence[int], Sequence[int]] = ((), ()),
    **options: Unpack[NTKOptions],
) -> jax.Array:
    r"""The kernel of a network with outputs of any shape.

    As in neural_tangents, but for one thing: its trace axes are a mean over the axis, here they are a sum. Divide by
    the sizes of the trace axes to have its numbers.

    Args:
      apply_fn: the network, `(params, x) -> (N, ...)`.
      params: its parameters.
      x1: inputs `(N, ...)`.
      x2: inputs `(M, ...)`, by default `x1`.
      axes: axes of the outputs: those to be traced (the two sides' entries are equal, and summed over), and those of
        which the diagonal is taken (equal, and kept). All others are kept for both sides. The batch's, 0, is neither.
      **options: of `EmpiricalNTK`, but for `output` and `per_parameter`. Kernels with axes of several kinds are
        reduced from that of all pairs of outputs, which must fit the memory of the host.

    Returns:
      `(N, M, ...)`: for each axis of the outputs in order nothing if it is traced, one axis for a diagonal, and two,
      the first side's and the second's, otherwise.

    Raises:
      ValueError: for axes that the outputs do not have, or that are named twice; else as `EmpiricalNTK`.

    Example:
      >>> def apply_fn(params, x):  # (N, 2, 1)
      ...     return (x @ params)[..., None]
      >>> empirical_ntk_axes(apply_fn, jnp.ones((3, 2)), jnp.ones((4, 3)), axes=((1,), (2,))).shape
      (4, 4, 1)
    """
    if "output" in options or options.get("per_parameter"):
        raise ValueError("axes say which outputs are compared: leave out output and per_parameter")
    arguments(apply_fn, params, x1)
    bound, arrays = bind(apply_fn, params)
    x1 = jnp.asarray(x1)
    validation.inputs(x1, None, False)
    evaluable(FlatOutputs(bound), arrays, x1)
    shape = jax.eval_shape(bound, arrays, x1).shape
    traced, diagonal = (_named(group, len(shape)) for group in axes)
    named = traced | diagonal
    if 0 in named or len(named) < len(axes[0]) + len(axes[1]):
        raise ValueError(f"axes are {axes}: the batch's axis, 0, is none of them, and each other one is named once")
    inner = set(range(1, len(shape)))
    output: Output = "trace" if traced == inner else "diagonal" if diagonal == inner else "full"
    merged: NTKOptions = {**options, "output": output}
    found = empirical_ntk(FlatOutputs(apply_fn), params, x1, x2, **merged)
    if output == "trace":
        return found
    if output == "diagonal":
        return found.reshape(*found.shape[:2], *shape[1:])
    whole = jnp.asarray(found).reshape(*found.shape[:2], *shape[1:], *shape[1:])
    left, right, out = [0, 1], [], [0, 1]
    for place, axis in enumerate(sorted(inner)):
        first = 2 + 2 * place
        second = first if axis in named else first + 1
        left, right = [*left, first], [*right, second]
        out += [] if axis in traced else [first] if axis in diagonal else [first, second]
    return jnp.einsum(whole, [*left, *right], out)


def _named(axes: Sequence[int], ndim: int) -> set[int]:
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(f"axes name {axis}, and the outputs have {ndim} axes")
    return {axis % ndim for axis in axes}
