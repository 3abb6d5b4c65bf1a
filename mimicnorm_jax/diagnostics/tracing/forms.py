"""What a value is as a function of the parameters, as far as every operation on the way is known.

The derivative of a kernel by its parameter is a multiple of the identity, or of centering, only if the jaxpr between
the two consists of casts, changes of shape, factors that are one number, and a mean that is taken away. Anything else,
and all that is linear only piece by piece (max, abs, a selection), is `OTHER`: it is differentiated where it is.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mimicnorm_jax.diagnostics.tracing.jaxprs import CUSTOM, ELEMENTWISE, grouped_axes


@dataclass(frozen=True)
class Constant:
    """A value that no parameter of more than one entry moves."""


@dataclass(frozen=True)
class Uniform:
    """Such a value, one number at all places; `root` is the number where known, else says which number it is."""

    root: Hashable


@dataclass(frozen=True)
class Other:
    """Any other value."""


@dataclass(frozen=True)
class Entries:
    """A parameter's entries, perhaps centered, times one number, plus what the parameter does not move.

    Attributes:
      leaf: the parameter.
      single: whether it has only one entry.
      layout: the changes of shape from the parameter to this value.
      factor: the known part of the number.
      scales: the rest of it, as powers of roots.
      centered: axes over which a mean was taken away.
      repeated: axes along which entries repeat.
    """

    leaf: int
    single: bool
    layout: tuple[Any, ...] = ()
    factor: float = 1.0
    scales: frozenset[tuple[Hashable, int]] = frozenset()
    centered: frozenset[int] = frozenset()
    repeated: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Sums:
    """Sums of `of`, a value of `shape`, over its `axes`; by each axis of this value, the one of `of` that it counts."""

    of: Entries
    shape: tuple[int, ...]
    axes: frozenset[int]
    counts: tuple[int | None, ...]


Form = Constant | Uniform | Other | Entries | Sums
CONSTANT, OTHER = Constant(), Other()
CASTS = ("convert_element_type", "reduce_precision")
KEEP = frozenset((*CASTS, "copy", "copy_p", "sharding_constraint", "reshard", "name", "row_major"))
SHAPES = ("broadcast_in_dim", "reshape", "transpose", "squeeze", "rev")


def of_parameter(leaf: int, size: int) -> Entries:
    """The form of a parameter itself."""
    return Entries(leaf, size == 1)


def of_constant(value: Any) -> Form:
    """The form of a value that depends on no parameter."""
    if np.size(value) != 1:
        return CONSTANT
    kind = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    if isinstance(value, Tracer) or not jnp.issubdtype(kind, np.number) or kind.kind == "c":
        return Uniform(object())
    return Uniform(float(np.asarray(value).reshape(())))


def transfer(equation: Any, forms: Sequence[Form], depends_on_params: bool) -> list[Form]:
    """Forms of an operation's results.

    Args:
      equation: of a jaxpr, without the inputs of the network.
      forms: of its operands.
      depends_on_params: whether any of them depends on a parameter.
    """
    name, outputs = equation.primitive.name, equation.outvars
    if name == "optimization_barrier":
        return list(forms)
    moved = [form for form in forms if isinstance(form, Entries | Sums | Other)]
    real = jnp.issubdtype(outputs[0].aval.dtype, jnp.floating)
    if "custom_vjp" in name and depends_on_params:
        return [OTHER] * len(outputs)  # its derivative is any function
    if name in (*KEEP, *SHAPES, "neg", "mul", "div", "add", "add_any", "sub", "reduce_sum") and real:
        found = _linear(equation, forms) if moved else None
        if found is not None:
            return [found]
    large = any(not (isinstance(form, Entries) and form.single) for form in moved)
    constants = [_constant(equation, forms, v.aval) for v in outputs]
    if not large or name == "stop_gradient":
        return constants
    return [OTHER if jnp.issubdtype(v.aval.dtype, jnp.inexact) else c for v, c in zip(outputs, constants, strict=True)]


def _constant(equation: Any, forms: Sequence[Form], aval: Any) -> Form:
    """Of a result of an operation on values that no large parameter moves."""
    name = equation.primitive.name
    if len(forms) == 1 and (name in KEEP or name in SHAPES) and isinstance(forms[0], Uniform):
        root = forms[0].root
        if isinstance(root, float) and name == "convert_element_type":
            return of_constant(np.asarray(root).astype(aval.dtype))
        return forms[0] if isinstance(root, float) or name in SHAPES else Uniform(object())
    known = name in ELEMENTWISE and name not in CUSTOM
    if math.prod(aval.shape) == 1 or (known and all(_uniform(form) is not None for form in forms)):
        return Uniform(object())
    return CONSTANT


def _uniform(form: Form) -> Uniform | None:
    if isinstance(form, Entries) and form.single:
        return Uniform(form)
    return form if isinstance(form, Uniform) else None


def _linear(equation: Any, forms: Sequence[Form]) -> Form | None:
    """Of an operation that is linear in a parameter; None if it may not be."""
    name = equation.primitive.name
    if name in KEEP:
        if isinstance(form := forms[0], Entries) and form.single and name in CASTS:
            return replace(form, layout=(*form.layout, (name, str(equation.params))))  # as a factor another number
        return form
    if name in SHAPES:
        return _reshaped(equation, forms[0])
    if name == "reduce_sum":
        return _summed(equation, forms[0])
    if name == "neg":
        return _scaled(forms[0], Uniform(-1.0), 1)
    return _product(equation, forms) if name in ("mul", "div") else _sum(equation, forms)


def _product(equation: Any, forms: Sequence[Form]) -> Form | None:
    name, (first, second) = equation.primitive.name, forms
    shapes = [atom.aval.shape for atom in equation.invars]
    large = [isinstance(form, Entries | Sums) and not (isinstance(form, Entries) and form.single) for form in forms]
    if large[1] and name == "mul":
        first, second, shapes = second, first, shapes[::-1]
    factor = _uniform(second)
    if factor is None:
        return None
    return _scaled(_widened(first, shapes[0], equation.outvars[0].aval.shape), factor, 1 if name == "mul" else -1)


def _scaled(form: Form, factor: Uniform, power: int) -> Form | None:
    if isinstance(form, Sums):
        of = _scaled(form.of, factor, power)
        return replace(form, of=of) if isinstance(of, Entries) else None
    if not isinstance(form, Entries):
        return None
    if isinstance(factor.root, float):
        return replace(form, factor=form.factor * factor.root**power) if factor.root or power > 0 else None
    powers = Counter(dict(form.scales))
    powers[factor.root] += power
    return replace(form, scales=frozenset((root, p) for root, p in powers.items() if p))


def _widened(form: Form, old: Sequence[int], new: Sequence[int]) -> Form:
    """An operand that broadcasts along axes of size 1."""
    if not isinstance(form, Entries) or len(old) != len(new):
        return form if len(old) == len(new) else OTHER
    more = {axis for axis, (a, b) in enumerate(zip(old, new, strict=True)) if a != b}
    return replace(form, repeated=form.repeated | more) if more else form


def _sum(equation: Any, forms: Sequence[Form]) -> Form | None:
    first, second = forms
    shapes, out = [atom.aval.shape for atom in equation.invars], equation.outvars[0].aval.shape
    sign = -1.0 if equation.primitive.name == "sub" else 1.0
    if isinstance(first, Entries) and isinstance(second, Sums):
        return _centered(first, second, sign, shapes[0], out, equation.outvars[0].aval.dtype)
    if isinstance(first, Sums) and isinstance(second, Entries) and sign > 0:
        return _centered(second, first, sign, shapes[1], out, equation.outvars[0].aval.dtype)
    for form, other, shape, factor in ((first, second, shapes[0], 1.0), (second, first, shapes[1], sign)):
        if isinstance(form, Entries) and not form.single and _is_constant(other):
            return _scaled(_widened(form, shape, out), Uniform(factor), 1)
    return None


def _is_constant(form: Form) -> bool:
    return isinstance(form, Constant) or _uniform(form) is not None


def _summed(equation: Any, form: Form) -> Form | None:
    shape = equation.invars[0].aval.shape
    axes = frozenset(axis for axis in equation.params["axes"] if shape[axis] > 1)
    if not isinstance(form, Entries) or form.single or form.repeated or not axes:
        return None
    if form.centered and form.centered != axes:
        return None
    of = replace(form, factor=0.0) if form.centered else form  # what is centered sums to zero
    kept = tuple(axis for axis in range(len(shape)) if axis not in equation.params["axes"])
    return Sums(of, tuple(shape), axes, kept)


def _centered(
    form: Entries, sums: Sums, sign: float, shape: Sequence[int], out: Sequence[int], dtype: Any
) -> Form | None:
    """`form` and its mean taken away, if `sums` is its mean."""
    if tuple(shape) != tuple(out) or tuple(shape) != sums.shape or form.repeated:
        return None
    if (form.leaf, form.layout) != (sums.of.leaf, sums.of.layout):
        return None
    for axis, side in enumerate(shape):
        counted = sums.counts[axis] if len(sums.counts) == len(shape) else -1
        if side > 1 and counted != (None if axis in sums.axes else axis):
            return None
    if sums.of.factor == 0:
        return form
    count = math.prod(shape[axis] for axis in sums.axes)
    eps = min(float(jnp.finfo(dtype).eps), float(jnp.finfo(jnp.float32).eps))
    share = -sign * sums.of.factor * count / form.factor if form.factor else math.nan
    if form.centered or form.scales != sums.of.scales or not abs(share - 1) <= 4 * eps:
        return None
    return replace(form, centered=sums.axes)


def _reshaped(equation: Any, form: Form) -> Form | None:
    name, params = equation.primitive.name, equation.params
    old, new = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if isinstance(form, Sums):
        return replace(form, counts=counts) if (counts := _counts(name, params, form, old, new)) is not None else None
    if not isinstance(form, Entries):
        return None
    if name == "broadcast_in_dim":
        to = dict(enumerate(params["broadcast_dimensions"]))
        more = {axis for axis in range(len(new)) if axis not in to.values()}
        more |= {after for before, after in to.items() if old[before] != new[after]}
        moved = _renamed(form, to)
        return replace(moved, layout=(*form.layout, (name, tuple(to.values()))), repeated=moved.repeated | more)
    if name == "transpose":
        moved = _renamed(form, {axis: i for i, axis in enumerate(params["permutation"])})
        return replace(moved, layout=(*form.layout, (name, tuple(params["permutation"]))))
    if name == "rev":
        return replace(form, layout=(*form.layout, (name, tuple(params["dimensions"]))))
    if name == "reshape" and params.get("dimensions") is not None:
        return None
    sets = [_regrouped(axes, old, new) for axes in (form.centered, form.repeated)]
    if sets[0] is None or sets[1] is None:
        return None
    layout = form.layout if tuple(old) == tuple(new) else (*form.layout, ("reshape", tuple(new)))
    return replace(form, layout=layout, centered=sets[0], repeated=sets[1])


def _renamed(form: Entries, to: dict[int, int]) -> Entries:
    centered, repeated = (frozenset(to[axis] for axis in axes) for axes in (form.centered, form.repeated))
    return replace(form, centered=centered, repeated=repeated)


def _regrouped(axes: frozenset[int], old: Sequence[int], new: Sequence[int]) -> frozenset[int] | None:
    """Axes after a change of shape, if they are whole groups of axes that stay together."""
    found: set[int] = set()
    for before, after in grouped_axes(old, new):
        wide = {axis for axis in before if old[axis] > 1}
        if not wide & axes:
            continue
        if not wide <= axes:
            return None
        found |= {axis for axis in after if new[axis] > 1}
    return frozenset(found)


def _counts(
    name: str, params: Any, form: Sums, old: Sequence[int], new: Sequence[int]
) -> tuple[int | None, ...] | None:
    """Which axis of the summed value each axis counts, after a change of shape."""
    if name == "broadcast_in_dim":
        counts: list[int | None] = [None] * len(new)
        for before, after in enumerate(params["broadcast_dimensions"]):
            counts[after] = form.counts[before] if old[before] > 1 else None
        return tuple(counts)
    if name == "transpose":
        return tuple(form.counts[axis] for axis in params["permutation"])
    wide = [axis for axis, side in enumerate(old) if side > 1]
    if name not in ("reshape", "squeeze") or [old[axis] for axis in wide] != [side for side in new if side > 1]:
        return None
    counted = iter(wide)
    return tuple(form.counts[next(counted)] if side > 1 else None for side in new)
