"""Which implementation computes a kernel, in which blocks, at what price."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from mimicnorm_jax.diagnostics.ntk.implementation import Counts, Implementation, Request, sides
from mimicnorm_jax.diagnostics.ntk.jacobian_contraction import JacobianContraction
from mimicnorm_jax.diagnostics.ntk.ntk_vector_products import NTKVectorProducts
from mimicnorm_jax.diagnostics.ntk.structured_derivatives import StructuredDerivatives
from mimicnorm_jax.diagnostics.tracing import jaxprs
from mimicnorm_jax.diagnostics.tracing.independence import Verdict

Name = Literal["auto", "structured_derivatives", "jacobian_contraction", "ntk_vector_products"]
IMPLEMENTATIONS: dict[str, Callable[[Request, Counts], Implementation]] = {
    "structured_derivatives": StructuredDerivatives,
    "jacobian_contraction": JacobianContraction,
    "ntk_vector_products": NTKVectorProducts,
}
"""Every implementation by name, in the order in which `auto` prefers them at equal price."""


@dataclass(frozen=True)
class Plan:
    """How a kernel will be computed.

    Attributes:
      implementation: the one chosen or asked for.
      macs: estimates of multiply-accumulates for every implementation.
      block: examples computed at a time, on each side.
      bytes: estimate of the memory that a pair of blocks takes.
      detail: of the implementation.
      independence: what is known of the examples'; None where it is not asked for.
      left_out: parameters that no derivative is taken by, because of what they are.
      checked: whether a guard compares one pair of examples with a direct product of gradients.
    """

    implementation: str
    macs: dict[str, float]
    block: tuple[int, int]
    bytes: int
    detail: str
    independence: Verdict | None = None
    left_out: tuple[str, ...] = ()
    checked: bool = False

    def __str__(self) -> str:
        others = ", ".join(f"{name} {count:.2g}" for name, count in self.macs.items())
        notes = [] if self.independence is None else [str(self.independence)]
        notes += [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        notes += ["one pair checked by its gradients"] if self.checked else []
        return (
            f"{self.implementation}{self.detail}, {self.block[0]} x {self.block[1]} examples at a time in about "
            f"{self.bytes / 2**20:.0f} MiB (estimated MACs: {others}){''.join(f'; {n}' for n in notes)}"
        )


def choose(request: Request, counts: Counts, name: Name, memory: int) -> tuple[Implementation, Plan]:
    """The implementation of that name, or the cheapest, and its plan.

    Args:
      request: what is to be computed.
      counts: groups of examples in all.
      name: of an implementation, or `auto`.
      memory: bytes for a pair of blocks.

    Raises:
      ValueError: if an implementation cannot give what is asked, or nothing fits the memory.
    """
    names = list(IMPLEMENTATIONS) if name == "auto" else [name]
    reason = _no_vector_products(request)
    if name == "ntk_vector_products" and reason:
        raise ValueError(
            f"implementation 'ntk_vector_products' {reason}: use structured_derivatives, jacobian_contraction or auto"
        )
    candidates = {
        each: IMPLEMENTATIONS[each](request, counts) for each in names if each != "ntk_vector_products" or not reason
    }
    chosen, groups = _affordable(candidates, counts, memory, request.examples)
    macs = {each: candidate.macs for each, candidate in candidates.items()}
    block = (groups[0] * request.examples, groups[1] * request.examples)
    implementation = candidates[chosen]
    return implementation, Plan(chosen, macs, block, implementation.bytes(*groups), implementation.detail)


def _no_vector_products(request: Request) -> str:
    """Why NTK-vector products cannot be had; empty if they can."""
    if request.per_parameter:
        return "does not keep the parameters' contributions apart"
    hand_written = jaxprs.without_jvp(request.network.program)
    return f"needs forward-mode derivatives, which {hand_written} does not have" if hand_written else ""


def _affordable(
    candidates: Mapping[str, Implementation], counts: Counts, memory: int, examples: int
) -> tuple[str, tuple[int, int]]:
    """The candidate of fewest MACs that fits the memory, and how many groups it takes on each side."""
    first, second = sides(counts)
    for name in sorted(candidates, key=lambda name: candidates[name].macs):
        bytes_of = candidates[name].bytes
        if bytes_of(first, second) <= memory:
            return name, (first, second)
        size = max(first, second)
        while size > 1 and bytes_of(size, size) > memory:
            size = (size + 1) // 2
        if bytes_of(size, size) <= memory:
            return name, (min(size, first), min(size, second))
    least = min(candidate.bytes(1, 1) for candidate in candidates.values())
    batch = "a smaller batch (coupled examples cannot be split), " if examples > 1 else ""
    raise ValueError(
        f"memory is {memory:,} bytes, but even one pair of {'batches' if examples > 1 else 'examples'} takes about "
        f"{least:,}: raise memory, or ask for less: {batch}output='trace' or one output, fewer parameters through "
        f"weights, or implementation='ntk_vector_products'"
    )
