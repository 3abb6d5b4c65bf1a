r"""The empirical neural tangent kernel of any network: $\Theta(x_1, x_2) = J(x_1)\, W\, J(x_2)^T$."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as File
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.ntk.blocks import assemble
from mimicnorm_jax.diagnostics.ntk.features import Output
from mimicnorm_jax.diagnostics.ntk.guard import Guard
from mimicnorm_jax.diagnostics.ntk.implementations import METHODS, Method, Request
from mimicnorm_jax.diagnostics.ntk.weighting import Weights, all_parameters, initial_variance
from mimicnorm_jax.diagnostics.tracing import jaxprs, validation
from mimicnorm_jax.diagnostics.tracing.independence import Verdict
from mimicnorm_jax.diagnostics.tracing.interpreter import TracedNetwork
from mimicnorm_jax.diagnostics.tracing.parameters import (
    ApplyFn,
    Split,
    bind,
    is_differentiated,
    left_out,
    off_mesh,
    titles,
)
from mimicnorm_jax.utils.trees import path_names

__all__ = [
    "EmpiricalNTK",
    "Plan",
    "Weights",
    "all_parameters",
    "empirical_ntk",
    "initial_variance",
    "kernel_vector_product",
]


@dataclass(frozen=True)
class Plan:
    """How a kernel will be computed.

    Attributes:
      method: the one chosen or asked for.
      multiplications: estimates for every method.
      block: examples computed at a time, on each side.
      bytes: estimate of the memory that a pair of blocks takes.
      detail: of the method.
      examples: what is known of their independence; None where it is not asked for.
      left_out: parameters that no derivative is taken by, because of what they are.
      checked: whether a guard compares one pair of examples with a direct product of gradients.
    """

    method: str
    multiplications: dict[str, float]
    block: tuple[int, int]
    bytes: int
    detail: str
    examples: Verdict | None = None
    left_out: tuple[str, ...] = ()
    checked: bool = False

    def __str__(self) -> str:
        others = ", ".join(f"{name} {count:.2g}" for name, count in self.multiplications.items())
        notes = [] if self.examples is None else [str(self.examples)]
        notes += [f"left out: {', '.join(self.left_out)}"] if self.left_out else []
        notes += ["one pair checked by its gradients"] if self.checked else []
        return (
            f"method {self.method}{self.detail}, {self.block[0]} x {self.block[1]} examples at a time in about "
            f"{self.bytes / 2**20:.0f} MiB (estimated multiplications: {others}){''.join(f'; {n}' for n in notes)}"
        )


class EmpiricalNTK:
    r"""The tangent kernel of a network, as a function of parameters and inputs that compiles once.

    $\Theta_{nmop} = \sum_k w_k\, \partial_k f_o(x_n)\, \partial_k f_p(x_m)$

    Args:
      apply_fn: the network, `(params, x) -> (N, O)`; for Flax modules see `network.from_linen`.
      output: `full` for every pair of outputs, `diagonal` for each output with itself, `trace` for the sum of
        these, or the number of one output.
      weights: factor on each parameter's contribution, 0 to leave it out: `all_parameters`,
        `initial_variance(params)`, or any function of path and value.
      method: `layerwise`, from layer inputs and cotangents, without any kernel's per-example derivative where its
        factors are cheaper; `jacobian`, the explicit product; `products`, one kernel-vector product a column, in the
        least memory; or `auto`, the one of fewest multiplications that fits the memory.
      coupled: True for a network whose examples influence one another, as with a BatchNorm in training mode. The
        kernel is then that of the whole batch, J holding the derivatives of outputs through everyone's statistics;
        `x1` and `x2` are two batches, each normalized by itself, and cannot be split.
      per_parameter: return a dict of kernels by parameter path (see `parameters.titles`) instead of their sum.
      memory: bytes that the computation of a pair of blocks may take on a device; more examples are done in blocks.
      check: whether every kernel's entry of one random pair of examples is compared with a direct product of gradients
        of `apply_fn`. It compiles the network's gradients once more; so the default is only where something could
        not be proved from the jaxpr: independence of examples, or what a hand-written derivative (`jax.custom_vjp`)
        does with them.

    Raises:
      ValueError: for an unknown method or output.

    Example:
      >>> kernel = EmpiricalNTK(lambda params, x: x @ params)
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> kernel(jnp.ones((2, 1)), x)[:, :, 0, 0].tolist()  # a linear network's is the inputs' Gram matrix
      [[1.0, 1.0], [1.0, 5.0]]
    """

    def __init__(
        self,
        apply_fn: ApplyFn,
        *,
        output: Output | int = "full",
        weights: Weights = all_parameters,
        method: Literal["auto", "layerwise", "jacobian", "products"] = "auto",
        coupled: bool = False,
        per_parameter: bool = False,
        memory: int = 2**31,
        check: bool | None = None,
    ) -> None:
        output = int(output) if isinstance(output, np.integer) else output
        validation.choices(output, method, memory)
        self.apply_fn, self.weights, self.method = apply_fn, weights, method
        self.output: Output = "trace" if isinstance(output, int) else output
        self.selected = output if isinstance(output, int) else None
        self.coupled, self.per_parameter, self.memory, self.check = coupled, per_parameter, memory, check
        self._prepared: dict[Any, tuple[Method, Plan, Guard | None]] = {}

    def plan(self, params: Any, x1: jax.Array, x2: jax.Array | None = None) -> Plan:
        """What `__call__` would do with these arguments."""
        return self._prepare(*self._arrays(params, x1, x2))[1]

    def __call__(
        self, params: Any, x1: jax.Array, x2: jax.Array | None = None, *, out: File | str | None = None
    ) -> Any:
        """Computes the kernel.

        Args:
          params: the network's parameters; leaves that are not floating-point arrays are held fixed.
          x1: inputs `(N, ...)`.
          x2: inputs `(M, ...)`, by default `x1`.
          out: a .npy file that the kernel is written to as it is computed; for kernels larger than memory.

        Returns:
          `(N, M, O, P)` for `full`, `(N, M, O)` for `diagonal`, `(N, M)` for `trace` and for one output, in the
          outputs' precision, at least float32; a dict of these with `per_parameter`; with `out`, the file's memory map.

        Raises:
          ValueError: if outputs are not `(N, O)` or not finite, if the inputs' shapes differ, if examples influence
            one another without `coupled`, if nothing fits the memory, or if a checked pair is wrong.
        """
        if out is not None and self.per_parameter:
            raise ValueError("out takes one kernel: leave out per_parameter, or out")
        params, x1, x2 = self._arrays(params, x1, x2)
        method, plan, guard = self._prepare(params, x1, x2)
        file = None if out is None else File(out)
        arrays = TracedNetwork.arrays(params)
        return assemble(method, plan.block, arrays, x1, x2, per_parameter=self.per_parameter, out=file, guard=guard)

    def _arrays(self, params: Any, x1: Any, x2: Any) -> tuple[Any, jax.Array, jax.Array | None]:
        validation.arguments(self.apply_fn, params, x1)
        x1, x2 = jnp.asarray(x1), None if x2 is None else jnp.asarray(x2)
        return off_mesh((params, x1, x2))

    def _prepare(self, params: Any, x1: jax.Array, x2: jax.Array | None) -> tuple[Method, Plan, Guard | None]:
        apply_fn, arrays = bind(self.apply_fn, params)
        leaves = jax.tree_util.tree_leaves_with_path(arrays)
        weights = tuple(
            float(self.weights(path_names(path), leaf)) if is_differentiated(leaf) else 0.0 for path, leaf in leaves
        )
        described = tuple((np.shape(leaf), str(leaf.dtype)) for _, leaf in leaves)
        inputs = tuple(None if x is None else (x.shape, str(x.dtype)) for x in (x1, x2))
        key = (apply_fn, jax.tree.structure(arrays), described, inputs, weights)
        if key not in self._prepared:
            validation.inputs(x1, x2)
            validation.weights(titles([path_names(path) for path, _ in leaves]), weights)
            if x2 is not None:
                validation.network(apply_fn, arrays, x2, self.coupled, self.memory)
            verdict = validation.network(apply_fn, arrays, x1, self.coupled, self.memory)
            method, plan = self._choose(apply_fn, arrays, x1, x2, weights)
            plan = replace(plan, examples=verdict, left_out=left_out(params))
            self._prepared[key] = (method, *self._guarded(apply_fn, jax.tree.structure(arrays), method, plan))
        return self._prepared[key]

    def _guarded(self, apply_fn: ApplyFn, tree: Any, method: Method, plan: Plan) -> tuple[Plan, Guard | None]:
        request = method.request
        open_question = bool(jaxprs.without_jvp(request.network.program))
        open_question |= plan.examples is not None and not plan.examples.proven
        if not (open_question if self.check is None else self.check):
            return plan, None
        return replace(plan, checked=True), Guard(apply_fn, tree, request, self.coupled, plan.method)

    def _choose(
        self, apply_fn: ApplyFn, params: Any, x1: jax.Array, x2: jax.Array | None, weights: Sequence[float]
    ) -> tuple[Method, Plan]:
        examples = len(x1) if self.coupled else 1
        if self.coupled and x2 is not None and len(x2) != examples:
            raise ValueError(
                f"x1 has {len(x1)} and x2 {len(x2)} examples; with coupled=True both are batches of one size"
            )
        network = TracedNetwork(apply_fn, params, x1[:examples])
        validation.selected(self.selected, network.outputs.shape[1])
        request = Request(
            network,
            network.arrays(params),
            x1[:examples],
            weights,
            self.output,
            self.selected,
            self.per_parameter,
        )
        counts = (len(x1) // examples, None if x2 is None else len(x2) // examples)
        names = list(METHODS) if self.method == "auto" else [self.method]
        reasons = self._without_products(network)
        if self.method == "products" and reasons:
            raise ValueError(f"method 'products' {reasons}: use layerwise, jacobian or auto")
        methods = {name: METHODS[name](request, counts) for name in names if not (name == "products" and reasons)}
        chosen, block = validation.affordable(methods, counts, self.memory, examples)
        method = methods[chosen]
        costs = {name: candidate.multiplications for name, candidate in methods.items()}
        size = (block[0] * examples, block[1] * examples)
        return method, Plan(chosen, costs, size, method.bytes(*block), method.detail)

    def _without_products(self, network: TracedNetwork) -> str:
        """Why kernel-vector products cannot be had; empty if they can."""
        if self.per_parameter:
            return "does not keep the parameters' contributions apart"
        hand_written = jaxprs.without_jvp(network.program)
        return f"needs forward-mode derivatives, which {hand_written} does not have" if hand_written else ""


def empirical_ntk(
    apply_fn: ApplyFn,
    params: Any,
    x1: jax.Array,
    x2: jax.Array | None = None,
    *,
    output: Output | int = "full",
    weights: Weights | None = None,
    method: Literal["auto", "layerwise", "jacobian", "products"] = "auto",
    coupled: bool = False,
    check: bool | None = None,
) -> jax.Array:
    """`EmpiricalNTK` once; make an `EmpiricalNTK` to call it again without compiling."""
    weights = weights or all_parameters
    kernel = EmpiricalNTK(apply_fn, output=output, weights=weights, method=method, coupled=coupled, check=check)
    return kernel(params, x1, x2)


def kernel_vector_product(
    apply_fn: ApplyFn, params: Any, x1: jax.Array, x2: jax.Array | None = None, weights: Weights = all_parameters
) -> Callable[[jax.Array], jax.Array]:
    r"""The kernel as a linear operator, $v \mapsto J(x_1) W J(x_2)^T v$, from `(M, P)` to `(N, O)`.

    Costs a backward and a forward sweep a product, and no memory beyond a gradient. Also for networks whose examples
    influence one another: `x1` and `x2` are whole batches.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> kernel_vector_product(lambda params, x: x @ params, jnp.ones((2, 1)), x)(jnp.ones((2, 1))).tolist()
      [[2.0], [6.0]]
    """
    validation.arguments(apply_fn, params, x1)
    apply_fn, params = bind(apply_fn, params)
    params, x1, x2 = off_mesh((params, jnp.asarray(x1), None if x2 is None else jnp.asarray(x2)))
    validation.evaluable(apply_fn, params, x1)
    if hand_written := jaxprs.without_jvp(jax.make_jaxpr(apply_fn)(params, x1)):
        raise ValueError(
            f"a kernel-vector product needs forward-mode derivatives, which {hand_written} does not have: use "
            "EmpiricalNTK"
        )
    split = Split.of(params)
    factors = [
        weights(path_names(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if is_differentiated(leaf)
    ]
    pull = jax.vjp(lambda p: apply_fn(split.join(p), x1 if x2 is None else x2), split.arrays)[1]

    def apply(v: jax.Array) -> jax.Array:
        tangent = [(w * g).astype(g.dtype) for w, g in zip(factors, pull(v)[0], strict=True)]
        return jax.jvp(lambda p: apply_fn(split.join(p), x1), (split.arrays,), (tangent,))[1]

    return apply
