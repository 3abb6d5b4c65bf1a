"""Kernels taken apart into a parameter and a factor that is the same all along some axes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax.numpy as jnp

from mimicnorm_jax.diagnostics.tracing import forms, jaxprs
from mimicnorm_jax.diagnostics.tracing.forms import Entries, Form


@dataclass(frozen=True)
class Scaled:
    """A value as the product of two of its shape, of parameters only.

    Attributes:
      base: a parameter's entries, perhaps centered, plus what no parameter of more than one entry moves.
      factor: any other function of parameters.
      form: of `base`.
      leaves: that `base` depends on.
      factor_leaves: that `factor` depends on.
      shape: what `factor` is if taken for a parameter: its `repeated` axes are those along which it is the same.
    """

    base: Any
    factor: Any
    form: Entries
    leaves: frozenset[int]
    factor_leaves: frozenset[int]
    shape: Entries


class _Value(Protocol):
    """A value of parameters only, as an interpreter sees it."""

    @property
    def value(self) -> Any: ...
    @property
    def form(self) -> Form: ...
    @property
    def leaves(self) -> frozenset[int]: ...
    @property
    def scaled(self) -> Scaled | None: ...


def transfer(equation: Any, inputs: Sequence[_Value]) -> Scaled | None:
    """An operation's result taken apart; None where it is not known to be such a product."""
    name = equation.primitive.name
    if not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
        return None
    if name in ("mul", "div"):
        orders = [(0, 1), (1, 0)] if name == "mul" else [(0, 1)]
        found = (_times(equation, inputs[i], inputs[j], tuple(equation.invars[j].aval.shape)) for i, j in orders)
        return next((scaled for scaled in found if scaled is not None), None)
    if len(inputs) != 1 or (scaled := inputs[0].scaled) is None:
        return None
    if name in forms.KEEP:
        return scaled
    if name not in forms.SHAPES:
        return None
    form, shape = (forms.transfer(equation, [form], True)[0] for form in (scaled.form, scaled.shape))
    if not isinstance(form, Entries) or not isinstance(shape, Entries):
        return None
    base, factor = (jaxprs.evaluate(equation, [value]) for value in (scaled.base, scaled.factor))
    return replace(scaled, base=base, factor=factor, form=form, shape=shape)


def _times(equation: Any, value: _Value, by: _Value, by_shape: tuple[int, ...]) -> Scaled | None:
    """`value` times (or over) `by`, of which it keeps the shape."""
    shape = tuple(equation.outvars[0].aval.shape)
    if jnp.shape(value.value) != shape:
        return None
    divided = equation.primitive.name == "div"
    same = frozenset(axis for axis in range(len(shape)) if not by_shape or by_shape[axis] == 1)
    if (scaled := value.scaled) is not None:
        factor = scaled.factor / by.value if divided else scaled.factor * by.value
        kept = Entries(-1, False, repeated=scaled.shape.repeated & same)
        return replace(scaled, factor=factor, factor_leaves=scaled.factor_leaves | by.leaves, shape=kept)
    form = value.form
    if not isinstance(form, Entries) or form.single or form.repeated or form.scales or form.factor != 1:
        return None
    factor = jnp.broadcast_to(1 / by.value if divided else by.value, shape)
    return Scaled(value.value, factor, form, value.leaves, by.leaves, Entries(-1, False, repeated=same))
