"""The derivative of a network between two places, example by example, as a linear operator."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics.tracing.layers import (
    check_floating,
    coupled_groups,
    find,
    forward_mode,
    prepared,
    trace,
)
from mimicnorm_jax.diagnostics.tracing.network import ApplyFn, LayerCall, TracedNetwork
from mimicnorm_jax.diagnostics.tracing.outputs import check_finite


@dataclass(frozen=True)
class LinearOperator:
    """A matrix J, `(outputs, inputs)`, by its products with flat vectors of `dtype`.

    Attributes:
      matvec: the product with J.
      rmatvec: the product with its transpose.
      inputs: number of columns.
      outputs: number of rows.
      dtype: of the vectors, at least float32.
    """

    matvec: Callable[[jax.Array], jax.Array]
    rmatvec: Callable[[jax.Array], jax.Array]
    inputs: int
    outputs: int
    dtype: Any

    @staticmethod
    def of(function: Callable[[jax.Array], tuple[jax.Array, Any]], at: jax.Array) -> tuple["LinearOperator", Any]:
        """The derivative at a point of a function that returns a value and something else, which is returned too."""
        value, linear, other = jax.linearize(function, at, has_aux=True)
        transposed = jax.linear_transpose(linear, at)
        dtype = jnp.promote_types(jnp.promote_types(at.dtype, value.dtype), jnp.float32)
        derivative = LinearOperator(
            lambda v: linear(v.reshape(at.shape).astype(at.dtype)).ravel().astype(dtype),
            lambda v: transposed(v.reshape(value.shape).astype(value.dtype))[0].ravel().astype(dtype),
            at.size,
            value.size,
            dtype,
        )
        return derivative, other

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns; with it `scipy.sparse.linalg` takes the operator as it is."""
        return self.outputs, self.inputs

    @property
    def side(self) -> int:
        """Number of singular values."""
        return min(self.inputs, self.outputs)

    def gram_matvec(self, v: jax.Array) -> jax.Array:
        """`(min(outputs, inputs),)` times J J^T or J^T J, whose eigenvalues are the squared singular values."""
        return self.matvec(self.rmatvec(v)) if self.outputs < self.inputs else self.rmatvec(self.matvec(v))


class Work(Protocol):
    """What is to be found of an example's derivative; to be compared by value, so as to compile once."""

    @property
    def one_by_one(self) -> bool:
        """Whether examples follow one another, for the sake of memory."""
        ...

    def __call__(self, derivative: LinearOperator, key: jax.Array, /) -> Any: ...


@dataclass(frozen=True)
class Ends:
    """What is differentiated, and by what.

    Attributes:
      source: name of the layer whose product it is differentiated by; None for the inputs.
      target: name of the layer whose product is differentiated; None for the outputs.
    """

    source: str | None = None
    target: str | None = None

    def find(self, network: TracedNetwork) -> tuple[LayerCall | None, LayerCall | None]:
        """The two layers.

        Raises:
          ValueError: for an unknown layer, or if the source is not before the target.
        """
        start = None if self.source is None else find(network, self.source)
        stop = None if self.target is None else find(network, self.target)
        if start is not None and stop is not None and start.index >= stop.index:
            raise ValueError(
                f"source is layer {self.source!r}, target is layer {self.target!r}: a Jacobian is from a layer to a "
                f"later one; the order is {', '.join(layer.name for layer in network.layers)}"
            )
        return start, stop


WHOLE = Ends()
"""The whole network: its outputs by its inputs."""


@partial(jax.jit, static_argnames=("work", "apply_fn", "ends"))
def _per_example(
    work: Work, apply_fn: ApplyFn, params: Any, x: jax.Array, key: jax.Array, ends: Ends
) -> tuple[Any, jax.Array]:
    network = trace(apply_fn, params, x)
    start, stop = ends.find(network)
    if start is None:
        check_floating(x)

    def one(example: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        group, key = example

        def function(at: jax.Array) -> tuple[jax.Array, jax.Array]:
            inputs, perturbations = (at, {}) if start is None else (group, {start.index: at})
            outputs, evaluation = network.run(params, inputs, perturbations=perturbations)
            return outputs if stop is None else evaluation.products[stop.index], outputs[0]

        at = group if start is None else jnp.zeros(start.shape, start.dtype)
        derivative, outputs = LinearOperator.of(function, at)
        return work(derivative, key), outputs

    examples = coupled_groups(x), jax.random.split(key, len(x))
    return jax.lax.map(one, examples) if work.one_by_one else jax.vmap(one)(examples)


def per_example(work: Work, apply_fn: ApplyFn, params: Any, x: jax.Array, key: jax.Array, ends: Ends) -> Any:
    """What `work` finds of each example's derivative.

    Args:
      work: what is to be found.
      apply_fn: the network; its examples are independent.
      params: its parameters.
      x: inputs, `(N, ...)`.
      key: split over the examples.
      ends: what is differentiated, and by what.

    Returns:
      The results, with a leading axis of N.

    Raises:
      ValueError: for an unknown layer, a source that is not before the target, outputs that are not finite, or examples
        that influence one another.
    """
    apply_fn, params, x = prepared(apply_fn, params, x, batch_coupled=False)
    with forward_mode("a Jacobian"):
        found, outputs = _per_example(work, apply_fn, params, x, key, ends)
    check_finite(outputs)
    return found
