"""What is asked of a tangent kernel, and what an implementation of it has to tell and to compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from mimicnorm_jax.diagnostics.ntk.jacobians import Output
from mimicnorm_jax.diagnostics.tracing.network import TracedNetwork

Counts = tuple[int, int | None]
"""Groups of examples on each side; None where the second side is the first."""


def sides(counts: Counts) -> tuple[int, int]:
    """Groups of examples on each side, also where the second is the first."""
    return counts[0], counts[1] or counts[0]


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
    def rows(self) -> int:
        """Of a group's Jacobian."""
        return self.examples * self.outputs

    @property
    def forward_macs(self) -> int:
        """Multiply-accumulates of a group's products."""
        return sum(int(np.prod(layer.product.sizes)) for layer in self.network.layers)

    @property
    def itemsize(self) -> int:
        return self.network.dtype.itemsize

    @property
    def activations(self) -> int:
        """Numbers that a group's products and their inputs hold."""
        return sum(2 * int(np.prod(layer.shape)) for layer in self.network.layers) + self.x.size

    def block_numbers(self, left: int, right: int) -> int:
        """Numbers in the kernel of so many groups."""
        outputs = {"full": self.outputs**2, "diagonal": self.outputs, "trace": 1}[self.output]
        return left * right * self.examples**2 * outputs

    def differentiated(self, leaves: Sequence[Any]) -> dict[int, Any]:
        """The parameters with a weight, by leaf."""
        return {i: leaf for i, leaf in enumerate(leaves) if self.weights[i]}

    def evaluate(self, leaves: Sequence[Any], chosen: dict[int, jax.Array], x: jax.Array) -> jax.Array:
        """Differentiated outputs `(q, o)` of a group, with `chosen` in place of some parameters."""
        y = self.network.run([chosen.get(i, leaf) for i, leaf in enumerate(leaves)], x)[0]
        return y if self.selected is None else y[:, self.selected, None]


class Implementation:
    """A way to compute blocks of the kernel.

    `features` of a block of groups `(n, q, ...)` are computed once a block, `contract` once a pair of blocks.

    Args:
      request: what is wanted.
      counts: groups in all.
    """

    detail = ""

    def __init__(self, request: Request, counts: Counts) -> None:
        self.request, self.counts = request, counts

    @property
    def macs(self) -> float:
        """Multiply-accumulates of the whole kernel, an estimate."""
        raise NotImplementedError

    def bytes(self, left: int, right: int) -> int:
        """That a pair of blocks of so many groups takes at once, an estimate."""
        raise NotImplementedError

    def features(self, params: Any, x: jax.Array, write: bool) -> Any:
        """Features of groups `(n, q, ...)`; `write` where they are used for more than one block."""
        raise NotImplementedError

    def contract(self, params: Any, left: Any, right: Any, symmetric: bool) -> dict[str, jax.Array]:
        """Blocks `(a, o, b, p)`, `(a, b, o)` or `(a, b)` by parameter path."""
        raise NotImplementedError

    @property
    def _sides(self) -> int:
        return self.counts[0] + (self.counts[1] or 0)

    @property
    def _pairs(self) -> float:
        return self.counts[0] * self.counts[1] if self.counts[1] else self.counts[0] ** 2 / 2

    def _is_whole(self, left: int, right: int) -> bool:
        """Whether blocks of so many groups are the whole kernel, which one program computes."""
        return (left, right) == sides(self.counts)

    def _sum_of_bytes(self, left: int, right: int, group: float, terms: int) -> int:
        groups = left if self.counts[1] is None and left == self.counts[0] else left + right
        # A compiler may hold all terms of the sum at once, beside a product's copy in another order of axes; two more
        # blocks are the sum, and the one that the host takes meanwhile.
        kernels = (terms + 3) * self.request.block_numbers(left, right)
        return int(self.request.itemsize * (groups * group + kernels))
