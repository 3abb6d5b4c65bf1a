"""What each operation does to the axis of a batch's examples: see `batch_axis`."""

import math
from collections.abc import Sequence
from typing import Any

from mimicnorm_jax.diagnostics.tracing.batch_axis import Along, CoupledError, Free, Rule, State, Step, UnfollowedError
from mimicnorm_jax.diagnostics.tracing.indexing_rules import (
    dynamic_slice,
    dynamic_update_slice,
    free_gather,
    gather,
    scatter,
)
from mimicnorm_jax.diagnostics.tracing.jaxprs import ELEMENTWISE, grouped_axes

_REDUCTIONS = (
    "argmax",
    "argmin",
    "reduce",
    *(f"reduce_{n}" for n in ("sum", "max", "min", "prod", "and", "or", "xor")),
)
_CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
_WINDOWS = (*(f"reduce_window{n}" for n in ("", "_sum", "_max", "_min")), "select_and_gather_add")
_MATRICES = ("cholesky", "eigh", "svd", "qr", "lu", "schur", "triangular_solve", "householder_product", "geqrf")
ACROSS = "brings different examples of the batch together"


def _axis(step: Step) -> Along:
    """The only operand's."""
    (state,) = [state for state in step.states if isinstance(state, Along)]
    return state


def same_axis(step: Step) -> Along:
    """The axis of operands that broadcast against one another.

    Raises:
      CoupledError: if they have different ones, or one without the inputs differs from place to place.
      UnfollowedError: if it may differ, on an axis that holds more than the examples.
    """
    along = [state for state in step.states if isinstance(state, Along)]
    if any(state != along[0] for state in along):
        raise CoupledError("combines different examples of the batch")
    for i, state in enumerate(step.states):
        shape = step.shape(i)
        if isinstance(state, Free) and shape and along[0].axis in state.varies and shape[along[0].axis] > 1:
            if shape[along[0].axis] != step.size:
                raise UnfollowedError("what it adds to the inputs may differ from place to place of the batch")
            raise CoupledError("combines the inputs with values that depend on the place in the batch")
    return along[0]


def _broadcast(step: Step) -> State:
    state = _axis(step)
    return Along(step.params["broadcast_dimensions"][state.axis], state.inner)


def _reshape(step: Step) -> State:
    state, old, new = _axis(step), step.shape(), step.out_shape()
    inner = state.inner * math.prod(old[state.axis + 1 :])
    for axis, side in enumerate(new):
        after = math.prod(new[axis + 1 :])
        if inner % after == 0 and (after * side) % (inner * step.size) == 0:
            return Along(axis, inner // after)
    raise CoupledError(f"from {old} to {new} parts the batch's axis")


def _transpose(step: Step) -> State:
    state = _axis(step)
    return Along(list(step.params["permutation"]).index(state.axis), state.inner)


def _bitcast(step: Step) -> State:
    """To a type of another width the last axis is taken in or added."""
    state, old, new = _axis(step), step.shape(), step.out_shape()
    if state.axis < min(len(old), len(new)) and state.axis < len(old) - (len(new) < len(old)):
        return state
    raise UnfollowedError("takes the batch's axis for the parts of a number")


def _without(state: Along, axes: Sequence[int]) -> Along:
    """The axis where others are left out."""
    if state.axis in axes:
        raise CoupledError(ACROSS)
    return Along(state.axis - sum(axis < state.axis for axis in axes), state.inner)


def _reduction(step: Step) -> State:
    return _without(same_axis(step), step.params["axes"] if "axes" in step.params else step.params["dimensions"])


def _squeeze(step: Step) -> State:
    return _without(_axis(step), step.params["dimensions"])


def _keeps_others(name: str) -> Rule:
    """Operations along one axis, named by a parameter."""

    def rule(step: Step) -> State:
        state = same_axis(step)
        axes = step.params.get(name, len(step.shape()) - 1)
        if state.axis in (axes if isinstance(axes, tuple | list) else (axes,)):
            raise CoupledError(ACROSS)
        return state

    return rule


def _window(step: Step) -> State:
    state = same_axis(step)
    a, params = state.axis, step.params
    sides = (params["window_dimensions"], params["window_strides"], params["base_dilation"], params["window_dilation"])
    if any(side[a] != 1 for side in sides) or any(params["padding"][a]):
        raise CoupledError(ACROSS)
    return state


def _dot_general(step: Step) -> State:
    contract, batch = step.params["dimension_numbers"]
    found = []
    for i, state in enumerate(step.states):
        if not isinstance(state, Along):
            continue
        if state.axis in batch[i]:
            found.append(Along(list(batch[i]).index(state.axis), state.inner))
        elif state.axis in contract[i]:
            raise CoupledError(ACROSS)
        else:
            free = [axis for axis in range(len(step.shape(i))) if axis not in (*contract[i], *batch[i])]
            others = len(step.shape(0)) - len(contract[0]) - len(batch[0]) if i else 0
            found.append(Along(len(batch[0]) + others + free.index(state.axis), state.inner))
    if any(state != found[0] for state in found):
        raise CoupledError("multiplies examples of the batch with one another")
    position = found[0].axis
    for i, state in enumerate(step.states):
        if position < len(batch[0]) and isinstance(state, Free) and batch[i][position] in state.varies:
            raise CoupledError("multiplies the inputs with values that depend on the place in the batch")
    return found[0]


def _conv(step: Step) -> State:
    dimensions, (x, kernel) = step.params["dimension_numbers"], step.states
    if not isinstance(kernel, Free) or not isinstance(x, Along):
        raise UnfollowedError("its kernel depends on the inputs")
    if step.params["batch_group_count"] != 1:
        raise UnfollowedError("it has groups of its batch")
    if x.axis != dimensions.lhs_spec[0]:
        raise CoupledError(ACROSS)
    return Along(dimensions.out_spec[0], x.inner)


def _concatenate(step: Step) -> State:
    along = next(state for state in step.states if isinstance(state, Along))
    if step.params["dimension"] != along.axis:
        integers = step.equation.outvars[0].aval.dtype.kind in "iu"
        if integers and any(isinstance(s, Free) and along.axis in s.varies for s in step.states):
            raise UnfollowedError("it may tell examples by their place in the batch")  # or only pick from each its own
        return same_axis(step)
    if any(state != along for state in step.states):
        raise CoupledError("puts values beside the examples of the batch")
    return along


def _pad(step: Step) -> State:
    state, filling = step.states
    if not isinstance(state, Along) or not isinstance(filling, Free):
        raise UnfollowedError("it is padded with a function of the inputs")
    if any(step.params["padding_config"][state.axis]):
        raise CoupledError("adds examples to the batch")
    return state


def _slice(step: Step) -> State:
    state, params = _axis(step), step.params
    start, stop = params["start_indices"][state.axis], params["limit_indices"][state.axis]
    stride = params["strides"][state.axis] if params["strides"] else 1
    whole = state.inner * step.size
    if start % whole or stop % whole or stride != 1:
        raise CoupledError("takes some examples out of the batch")
    return state


def _split(step: Step) -> State:
    state = _axis(step)
    if step.params["axis"] == state.axis and any(size % (state.inner * step.size) for size in step.params["sizes"]):
        raise CoupledError("takes some examples out of the batch")
    return state


def _matrices(step: Step) -> State:
    """Functions of matrices, which are the last two axes."""
    state = same_axis(step)
    if state.axis >= len(step.shape()) - 2:
        raise CoupledError(ACROSS)
    return state


def _fft(step: Step) -> State:
    state = _axis(step)
    if state.axis >= len(step.shape()) - len(step.params["fft_lengths"]):
        raise CoupledError(ACROSS)
    return state


def _each(step: Step) -> list[State]:
    return list(step.states)


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, same_axis),
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_CUMULATIVE, _keeps_others("axis")),
    **dict.fromkeys(_WINDOWS, _window),
    **dict.fromkeys(_MATRICES, _matrices),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "bitcast_convert_type": _bitcast,
    "squeeze": _squeeze,
    "sort": _keeps_others("dimension"),
    "top_k": _keeps_others("axis"),
    "rev": _keeps_others("dimensions"),
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "concatenate": _concatenate,
    "pad": _pad,
    "slice": _slice,
    "split": _split,
    "tile": _axis,  # repeated along the batch's axis, the examples' places repeat with it
    "fft": _fft,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    "gather": gather,
    **dict.fromkeys(("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub"), scatter),
    **dict.fromkeys(("optimization_barrier", "device_put", "name", "row_major"), _each),
}
"""By name, for operands of which one follows the inputs."""


def free(step: Step) -> list[State]:
    """Along which axes the results of an operation without the inputs may vary."""
    return [Free(frozenset(_free(step, step.out_shape(i)))) for i in range(len(step.equation.outvars))]


def _free(step: Step, shape: Sequence[int]) -> set[int]:
    """Of a result of this shape; only operations that have several results give several shapes."""
    name = step.name
    varies = [state.varies if isinstance(state, Free) else frozenset() for state in step.states]
    wide = {axis for axis, side in enumerate(shape) if side > 1}
    if name in ELEMENTWISE:
        found: set[int] = set().union(*varies)
    elif name in ("iota", "broadcast_in_dim", "transpose", "squeeze", "dot_general", "concatenate", *_REDUCTIONS):
        found = _free_axes(step, varies)
    elif name == "reshape":
        found = _reshaped(step.shape(), shape, varies[0])
    elif name in ("slice", "dynamic_slice", "rev"):
        found = set(varies[0])
    elif name == "gather":
        found = free_gather(step, *varies)
    else:
        found = wide
    return found & wide


def _free_axes(step: Step, varies: Sequence[frozenset[int]]) -> set[int]:
    params, name = step.params, step.name
    if name == "iota":
        return {params["dimension"]}
    if name == "broadcast_in_dim":
        return {params["broadcast_dimensions"][axis] for axis in varies[0]}
    if name == "transpose":
        return {list(params["permutation"]).index(axis) for axis in varies[0]}
    if name == "concatenate":
        return set().union({params["dimension"]}, *varies)
    if name == "dot_general":
        contract, batch = params["dimension_numbers"]
        found = {
            i
            for i, axes in enumerate(zip(*batch, strict=True))
            if any(a in v for a, v in zip(axes, varies, strict=True))
        }
        position = len(batch[0])
        for i in (0, 1):
            for axis in range(len(step.shape(i))):
                if axis not in (*contract[i], *batch[i]):
                    found |= {position} if axis in varies[i] else set()
                    position += 1
        return found
    gone: Any = params.get("axes", params.get("dimensions", ()))
    return {axis - sum(g < axis for g in gone) for axis in set().union(*varies) if axis not in gone}


def _reshaped(old: Sequence[int], new: Sequence[int], varies: frozenset[int]) -> set[int]:
    """New axes that share places with an old one that varies."""
    found: set[int] = set()
    for before, after in grouped_axes(old, new):
        if varies & set(before):
            found |= set(after)
    return found
