"""The ways to compute a block of the tangent kernel, each with its price in multiplications and bytes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mimicnorm_jax.diagnostics.ntk.features import Jacobian, Output, inner
from mimicnorm_jax.diagnostics.ntk.layerwise import Layerwise
from mimicnorm_jax.diagnostics.tracing.interpreter import TracedNetwork

Counts = tuple[int, int | None]
"""Groups of examples on each side; None where the second side is the first."""


@dataclass(frozen=True)
class Request:
    """What is to be computed.

    Attributes:
      network: traced for one group of examples that influence one another, mostly a group of one.
      params: parameters, those leaves that are arrays.
      x: one group of inputs.
      weights: by leaf of the parameters.
      output: pairs of outputs.
      selected: the only output, or None for all.
      per_parameter: whether contributions are kept apart.
    """

    network: TracedNetwork
    params: Sequence[Any]
    x: jax.Array
    weights: Sequence[float]
    output: Output
    selected: int | None
    per_parameter: bool

    @property
    def examples(self) -> int:
        """In a group."""
        return self.x.shape[0]

    @property
    def outputs(self) -> int:
        """That are differentiated."""
        return self.network.outputs.shape[1] if self.selected is None else 1

    @property
    def forward(self) -> int:
        """Multiplications of a group's products."""
        return sum(int(np.prod(site.product.sizes)) for site in self.network.sites)

    @property
    def itemsize(self) -> int:
        return self.network.dtype.itemsize

    @property
    def activations(self) -> int:
        """Numbers that a group's products and their inputs hold."""
        return sum(2 * int(np.prod(site.shape)) for site in self.network.sites) + self.x.size

    def block_numbers(self, left: int, right: int) -> int:
        """Numbers in the kernel of so many groups."""
        outputs = {"full": self.outputs**2, "diagonal": self.outputs, "trace": 1}[self.output]
        return left * right * self.examples**2 * outputs


class Method:
    """A way to compute blocks of the kernel.

    `features` of a block of groups `(n, q, ...)` are computed once a block, `inner` once a pair of blocks.

    Args:
      request: what is wanted.
      counts: groups in all.
    """

    detail = ""

    def __init__(self, request: Request, counts: Counts) -> None:
        self.request, self.counts = request, counts

    @property
    def multiplications(self) -> float:
        """Of the whole kernel."""
        raise NotImplementedError

    def bytes(self, left: int, right: int) -> int:
        """That a pair of blocks of so many groups takes at once."""
        raise NotImplementedError

    def features(self, params: Any, x: jax.Array, write: bool) -> Any:
        """Features of groups `(n, q, ...)`; `write` where they are used for more than one block."""
        raise NotImplementedError

    def inner(self, params: Any, left: Any, right: Any, symmetric: bool) -> dict[str, jax.Array]:
        """Blocks `(a, o, b, p)`, `(a, b, o)` or `(a, b)` by parameter path."""
        output, titles = self.request.output, self.request.network.titles
        return {titles[leaf]: inner(left[leaf], right[leaf], output, symmetric) for leaf in sorted(left)}

    @property
    def _sides(self) -> int:
        return self.counts[0] + (self.counts[1] or 0)

    @property
    def _pairs(self) -> float:
        return self.counts[0] * self.counts[1] if self.counts[1] else self.counts[0] ** 2 / 2

    def _sum_of_bytes(self, left: int, right: int, group: float) -> int:
        groups = left if self.counts[1] is None and left == self.counts[0] else left + right
        return int(self.request.itemsize * (groups * group + 2 * self.request.block_numbers(left, right)))


class LayerwiseMethod(Method):
    """See `layerwise.Layerwise`."""

    def __init__(self, request: Request, counts: Counts) -> None:
        super().__init__(request, counts)
        self.layers = Layerwise(
            request.network, request.params, request.weights, request.selected, not request.per_parameter
        )
        groups = (counts[0], counts[1] or counts[0])
        self.as_pair, self.contributions = self.layers.choose(
            groups, request.examples, request.output, counts[1] is None
        )

    @property
    def detail(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        pairs, known = sum(self.as_pair.values()), len(self.layers.kernels)
        return (
            f" ({pairs} layers from inputs and cotangents, {known - pairs} from their products, "
            f"{len(self.layers.general)} through their kernel's derivative, {len(self.layers.dense)} other parameters)"
        )

    @property
    def multiplications(self) -> float:
        sweeps = self.request.examples * self.request.outputs + 1
        return self._sides * self.request.forward * sweeps + self.contributions

    def bytes(self, left: int, right: int) -> int:
        rows = self.request.examples * self.request.outputs
        group = rows * sum(self.layers.sizes.values()) + self.request.activations
        for site in (*(kernel.site for kernel in self.layers.kernels), *self.layers.general):
            s, g, f, c = site.product.sizes
            group += s * g * f + rows * s * g * c
            if not self.as_pair.get(site.index, False):
                group += rows * g * f * c
        return self._sum_of_bytes(left, right, group)

    def features(self, params: Any, x: jax.Array, write: bool) -> Any:
        return self.layers.features(params, x, self.as_pair, write)


class JacobianMethod(Method):
    """The explicit product of Jacobians: slow, simple, the reference."""

    @cached_property
    def _sizes(self) -> dict[int, int]:
        return {i: size for i, size in enumerate(self.request.network.sizes) if self.request.weights[i]}

    @property
    def multiplications(self) -> float:
        rows = self.request.examples * self.request.outputs
        contraction = rows**2 if self.request.output == "full" else self.request.examples * rows
        sweeps = self._sides * self.request.forward * (1 + 2 * rows)
        return sweeps + self._pairs * contraction * sum(self._sizes.values())

    def bytes(self, left: int, right: int) -> int:
        rows = self.request.examples * self.request.outputs
        group = rows * (2 * sum(self._sizes.values()) + self.request.activations)
        return self._sum_of_bytes(left, right, group)

    def features(self, params: Any, x: jax.Array, write: bool) -> Any:
        leaves = jax.tree.leaves(params)
        chosen = {i: leaves[i] for i in self._sizes}
        selected = self.request.selected

        def outputs(chosen: dict[int, jax.Array], group: jax.Array) -> jax.Array:
            values = [chosen.get(i, leaf) for i, leaf in enumerate(leaves)]
            y = self.request.network.run(values, group)[0]
            return y if selected is None else y[:, selected, None]

        jacobians = jax.vmap(lambda group: jax.jacrev(outputs)(chosen, group))(x)
        dtype = self.request.network.dtype
        weights = {i: jnp.sqrt(jnp.asarray(self.request.weights[i], dtype)) for i in chosen}
        return {
            i: Jacobian(weights[i] * rows.reshape(*rows.shape[:3], -1).astype(dtype)) for i, rows in jacobians.items()
        }


class ProductsMethod(Method):
    """One kernel-vector product a column: no derivative is kept, so it takes the least memory."""

    @property
    def multiplications(self) -> float:
        second = self.counts[1] or self.counts[0]
        columns = second * self.request.examples * self.request.outputs
        return columns * self.request.forward * (3 + 3 * self.counts[0])

    def bytes(self, left: int, right: int) -> int:
        parameters = sum(self.request.network.sizes)
        numbers = 4 * parameters + (left + right) * 3 * self.request.activations
        return self.request.itemsize * (numbers + 2 * self.request.block_numbers(left, right))

    def features(self, params: Any, x: jax.Array, write: bool) -> Any:
        return x

    def inner(self, params: Any, left: Any, right: Any, symmetric: bool) -> dict[str, jax.Array]:
        request, selected = self.request, self.request.selected
        leaves = jax.tree.leaves(params)
        chosen = {i: leaf for i, leaf in enumerate(leaves) if request.weights[i]}

        def outputs(chosen: dict[int, jax.Array], group: jax.Array) -> jax.Array:
            values = [chosen.get(i, leaf) for i, leaf in enumerate(leaves)]
            y = request.network.run(values, group)[0]
            return y if selected is None else y[:, selected, None]

        def column(basis: jax.Array, group: jax.Array) -> jax.Array:
            gradient = jax.vjp(lambda p: outputs(p, group), chosen)[1](basis)[0]
            tangent = {i: (g * request.weights[i]).astype(g.dtype) for i, g in gradient.items()}
            moved = jax.vmap(lambda x: jax.jvp(lambda p: outputs(p, x), (chosen,), (tangent,))[1])(left)
            return moved.reshape(-1, moved.shape[-1]).astype(request.network.dtype)

        r, p = request.examples, request.outputs
        eye = jnp.eye(r * p, dtype=request.network.outputs.dtype).reshape(r * p, r, p)
        columns = lax.map(lambda group: lax.map(lambda basis: column(basis, group), eye), right)
        m, a, o = columns.shape[0], columns.shape[2], columns.shape[3]
        block = columns.reshape(m * r, p, a, o).transpose(2, 3, 0, 1)
        if request.output == "full":
            return {"": block}
        diagonal = jnp.diagonal(block, axis1=1, axis2=3)
        return {"": diagonal if request.output == "diagonal" else diagonal.sum(-1)}


METHODS: dict[str, Callable[[Request, Counts], Method]] = {
    "layerwise": LayerwiseMethod,
    "jacobian": JacobianMethod,
    "products": ProductsMethod,
}
"""Every method by name, in the order in which `auto` prefers them at equal price."""
