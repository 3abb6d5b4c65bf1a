"""Compares one entry of a tangent kernel with a direct product of gradients, and refuses the kernel if they differ."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mimicnorm_jax.diagnostics.ntk.implementation import Request
from mimicnorm_jax.diagnostics.tracing.independence import AMPLIFIED, nudged, tolerance
from mimicnorm_jax.diagnostics.tracing.jaxprs import coarsest
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn


class Guard:
    """A check on blocks of a kernel, which compiles once.

    It differentiates the network itself and not its trace, on two examples at once where they are independent: what
    couples them, or their gradients, shows.

    Args:
      apply_fn: the network.
      tree: structure of its parameters.
      request: what is computed.
      batch_coupled: see `diagnostics`.
      name: of the implementation that computes it.
    """

    def __init__(self, apply_fn: ApplyFn, tree: Any, request: Request, batch_coupled: bool, name: str) -> None:
        self.request, self.batch_coupled, self.name = request, batch_coupled, name
        self.chosen = [i for i, weight in enumerate(request.weights) if weight]
        self.rng = np.random.default_rng(0)
        self._contributions = jax.jit(self._of(apply_fn, tree))

    def _of(self, apply_fn: ApplyFn, tree: Any) -> Callable[..., Any]:
        def gradient(leaves: Any, x: jax.Array, place: jax.Array, output: jax.Array) -> list[jax.Array]:
            def outputs(chosen: list[jax.Array]) -> jax.Array:
                values = list(leaves)
                for i, value in zip(self.chosen, chosen, strict=True):
                    values[i] = value
                return apply_fn(jax.tree.unflatten(tree, values), x)

            y, pull = jax.vjp(outputs, [leaves[i] for i in self.chosen])
            return pull(jnp.zeros_like(y).at[place, output].set(1))[0]

        def one(leaves: Any, left: Any, right: Any, outputs: Any) -> Any:
            rows = [gradient(leaves, left[0], left[1], outputs[0]), gradient(leaves, right[0], right[1], outputs[1])]
            first, second = (
                [
                    row.astype(self.request.network.dtype).ravel() * jnp.sqrt(self.request.weights[i])
                    for i, row in zipped
                ]
                for zipped in (zip(self.chosen, side, strict=True) for side in rows)
            )
            norms = [jnp.sqrt(sum(jnp.vdot(row, row) for row in side)) for side in (first, second)]
            return [jnp.vdot(a, b) for a, b in zip(first, second, strict=True)], norms[0] * norms[1]

        def contributions(leaves: Any, left: Any, right: Any, outputs: Any) -> Any:
            """By parameter, and the product of the two gradients' lengths; summed over pairs of outputs."""
            found = lax.map(lambda pair: one(leaves, left, right, pair), outputs)
            return jax.tree.map(lambda values: values.sum(0), found)

        return contributions

    def _side(self, x: Any, place: int) -> tuple[jax.Array, int]:
        """Examples that are evaluated together, and the place of the one that is meant."""
        if self.batch_coupled:
            return jnp.asarray(x), place
        beside = (place + 1) % len(x)
        return (jnp.asarray(x[place : place + 1]), 0) if beside == place else (jnp.stack([x[place], x[beside]]), 0)

    def _evaluate(self, *arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return self._contributions(*arguments)

    def __call__(self, leaves: Any, x1: Any, x2: Any, block: tuple[slice, slice], values: Any) -> None:
        """Checks a block.

        Args:
          leaves: arrays of the parameters.
          x1: all examples of the first side.
          x2: of the second.
          block: its examples on each side.
          values: of the block, in its documented form, or one by parameter.

        Raises:
          ValueError: if the two numbers differ by more than rounding explains.
        """
        (row, column), request, count = block, self.request, self.request.network.outputs.shape[1]
        n, m = int(self.rng.integers(row.start, row.stop)), int(self.rng.integers(column.start, column.stop))
        first, second = (int(i) for i in self.rng.integers(0, count, 2))
        where: tuple[int, ...] = (n - row.start, m - column.start)
        if request.selected is not None:
            first = second = request.selected
        elif request.output == "full":
            where = (*where, first, second)
        elif request.output == "diagonal":
            where, second = (*where, first), first
        outputs = (np.array([first]), np.array([second]))
        if request.selected is None and request.output == "trace":
            outputs = (np.arange(count), np.arange(count))
        sides = self._side(x1, n), self._side(x2, m)
        direct, scale = self._evaluate(leaves, *sides, outputs)
        titles = [request.network.titles[i] for i in self.chosen]
        by_leaf = values if isinstance(values, dict) else {"": values}
        expected = dict(zip(titles, direct, strict=True)) if isinstance(values, dict) else {"": sum(direct)}
        eps = max(coarsest(request.network.program), float(jnp.finfo(request.network.dtype).eps))
        limit = tolerance(eps) * float(scale)
        differences = {title: abs(float(value[where]) - float(expected[title])) for title, value in by_leaf.items()}
        if any(difference > limit for difference in differences.values()):  # by rounding alone, in a chaotic network?
            other = self._evaluate(nudged(leaves, eps), *sides, outputs)[0]
            noise = [abs(float(a) - float(b)) for a, b in zip(other, direct, strict=True)]
            limit = max(limit, AMPLIFIED * max(noise))
        for title, value in by_leaf.items():
            found, wanted = float(value[where]), float(expected[title])
            if not differences[title] <= limit:
                of = f" of {title}" if title else ""
                raise ValueError(
                    f"the tangent kernel{of} of examples {n} and {m} is {found:.9g} by {self.name}, but "
                    f"{wanted:.9g} by a direct product of gradients, further apart than rounding explains "
                    f"({limit:.2g}). Use implementation='jacobian_contraction', and report this network: it is an "
                    "error of this library, unless the network's outputs depend on something else than params and x"
                )
