r"""Layers whose channels reach the outputs through one number each: mostly the last convolutions before a mean.

Let h be what the first product without positions multiplies after all that have some, or the outputs, if there is no
such product. If a layer's product y reaches the outputs through h alone, and no other channel of y than c moves the
number $h_c$, then the cotangent of y for output o is
$\partial f_o / \partial h_c \cdot \partial h_c / \partial y_{sc}$: a column an output times one map for all outputs.

It is the derivative that is followed, where values are whatever they are: a mask that packs channels into bytes, or a
factor without gradient, brings no derivatives together.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
from jax.extend import core

from mimicnorm_jax.diagnostics.tracing.batch_axis import Along, BatchAxisInterpreter, Free, Rule, State, Step
from mimicnorm_jax.diagnostics.tracing.batch_rules import RULES, free
from mimicnorm_jax.diagnostics.tracing.jaxprs import ELEMENTWISE, pruned, without_jvp
from mimicnorm_jax.diagnostics.tracing.network import LayerCall, TracedNetwork

Perturbations = Mapping[int, Any]
"""By layer, what is added to its product."""


def pooled_at(network: TracedNetwork) -> int | None:
    """The layer whose operand h is; None where h are the outputs."""
    after = max((layer.index for layer in network.layers if layer.product.sizes[0] > 1), default=-1) + 1
    return after if after < len(network.layers) else None


def pooled_size(network: TracedNetwork) -> int:
    """How many numbers h has."""
    after = pooled_at(network)
    return network.outputs.size if after is None else math.prod(network.layers[after].product.x_shape)


def pooled(network: TracedNetwork, leaves: Sequence[Any], x: Any, perturbations: Perturbations) -> jax.Array:
    """h, in one axis, with these perturbations of the layers' products."""
    after = pooled_at(network)
    outputs, evaluation = network.run(leaves, x, perturbations=perturbations, frozen_kernels=True)
    return (outputs if after is None else evaluation.operands[after]).reshape(-1)


def pooled_layers(network: TracedNetwork, x: Any, candidates: Sequence[LayerCall]) -> set[int]:
    """Those of some layers that are proved to be such.

    Args:
      network: traced for one example.
      x: its inputs, an array or a shape.
      candidates: layers to look at.
    """
    size = pooled_size(network)
    fitting = [layer for layer in candidates if _channels(layer) == size]
    if not fitting:
        return set()
    moved = {layer.index: jax.ShapeDtypeStruct(layer.shape, layer.dtype) for layer in fitting}
    shapes = (list(network.shapes), jax.ShapeDtypeStruct(x.shape, x.dtype), moved)
    values = pruned(jax.make_jaxpr(lambda *arguments: pooled(network, *arguments))(*shapes))
    if without_jvp(values):
        return set()  # a hand-written backward pass need not be linear

    def tangents(leaves: Sequence[Any], x: Any, moved: Perturbations, by: Perturbations) -> jax.Array:
        return jax.jvp(lambda moved: pooled(network, leaves, x, moved), (moved,), (by,))[1]

    program = pruned(jax.make_jaxpr(tangents)(*shapes, moved))
    (h,) = values.out_avals
    around = _around(network, (*shapes, jax.ShapeDtypeStruct(h.shape, h.dtype)))
    return {layer.index for layer in fitting if layer.index not in around and _is_separate(program, shapes, layer)}


def _channels(layer: LayerCall) -> int:
    """Channels of a layer with positions that has all its channels on one axis, else 0."""
    positions, groups, _, channels = layer.product.sizes
    wide = [axis for axis in layer.product.channel_axes if layer.shape[axis] > 1]
    return channels if positions > 1 and groups == len(wide) == 1 else 0


def _around(network: TracedNetwork, shapes: tuple[Any, Any, dict[int, Any], Any]) -> set[int]:
    """The layers whose products reach the outputs in another way than through h, the last of what has these shapes."""
    after = pooled_at(network)
    if after is None:
        return set()

    def outputs(leaves: Sequence[Any], x: Any, moved: Perturbations, h: jax.Array) -> jax.Array:
        given = {after: lambda before: h.reshape(before.shape).astype(before.dtype)}
        return network.run(leaves, x, perturbations=moved, operands=given)[0]

    jaxpr = pruned(jax.make_jaxpr(outputs)(*shapes)).jaxpr
    used = {id(atom) for equation in jaxpr.eqns for atom in equation.invars} | set(map(id, jaxpr.outvars))
    arguments = jax.tree.unflatten(jax.tree.structure(shapes), jaxpr.invars)
    return {i for i, variable in arguments[2].items() if id(variable) in used}


def _is_separate(program: core.ClosedJaxpr, shapes: tuple[Any, Any, dict[int, Any]], layer: LayerCall) -> bool:
    """Whether each channel of a layer's product moves its own place of h alone, whatever else there is.

    With the channels in the place of a batch's examples; only that values from elsewhere may differ between them.
    """
    (channels,) = (axis for axis in layer.product.channel_axes if layer.shape[axis] > 1)
    leaves, x, moved = jax.tree.map(lambda value: _any(value.shape), shapes)
    values = [moved[i] for i in sorted(moved)]
    by = [Along(channels) if i == layer.index else moved[i] for i in sorted(moved)]
    states: list[State] = [*leaves, x, *values, *by]
    rules = RULES | {name: partial(_at_each_place, RULES[name]) for name in (*ELEMENTWISE, "select_and_gather_add")}
    return BatchAxisInterpreter(rules, free, layer.shape[channels]).run(program, states) == [Along(0)]


def _any(shape: Sequence[int]) -> Free:
    return Free(frozenset(axis for axis, side in enumerate(shape) if side > 1))


def _at_each_place(rule: Rule, step: Step) -> State | list[State]:
    """Of operands that broadcast against one another: what differs from place to place is taken at each place."""
    along = next(state for state in step.states if isinstance(state, Along))
    fits = [along.inner == 1 and len(step.shape(i)) > along.axis for i in range(len(step.states))]
    own = [
        along if isinstance(state, Free) and fit and step.shape(i)[along.axis] == step.size else state
        for i, (state, fit) in enumerate(zip(step.states, fits, strict=True))
    ]
    return rule(replace(step, states=own))
