r"""The empirical neural tangent kernel of any network: $\Theta(x_1, x_2) = J(x_1)\, W\, J(x_2)^T$."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics import checks
from mimicnorm_jax.diagnostics.assembly import assemble
from mimicnorm_jax.diagnostics.features import Output
from mimicnorm_jax.diagnostics.methods import METHODS, Method, Request
from mimicnorm_jax.diagnostics.tracing import ApplyFn, Path, TracedNetwork, path_names

Weights = Callable[[Path, Any], float]
"""The factor on a parameter's contribution, from its path and value (or shape); 0 leaves the parameter out."""


def all_parameters(path: Path, leaf: Any) -> float:
    """Every parameter counts alike: the kernel of gradient descent."""
    del path, leaf
    return 1.0


def initial_variance(params: Any) -> Weights:
    """The theory's parametrisation: every kernel weighted by its entries' mean square, biases and scalars left out.

    With weights `W = sigma w` and standard normal `w`, the derivative by `w` is sigma times that by `W`.

    Args:
      params: at initialisation.
    """
    squares = {
        path_names(path): float(jnp.mean(jnp.square(leaf))) if jnp.ndim(leaf) >= 2 else 0.0
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return lambda path, leaf: squares[path]


@dataclass(frozen=True)
class Plan:
    """How a kernel will be computed.

    Attributes:
      method: the one chosen or asked for.
      multiplications: estimates for every method.
      block: examples computed at a time, on each side.
      bytes: estimate of the memory that a pair of blocks takes.
      detail: of the method.
    """

    method: str
    multiplications: dict[str, float]
    block: tuple[int, int]
    bytes: int
    detail: str

    def __str__(self) -> str:
        others = ", ".join(f"{name} {count:.2g}" for name, count in self.multiplications.items())
        return (
            f"method {self.method}{self.detail}, {self.block[0]} x {self.block[1]} examples at a time in about "
            f"{self.bytes / 2**20:.0f} MiB (estimated multiplications: {others})"
        )


class EmpiricalNTK:
    r"""The tangent kernel of a network, as a function of parameters and inputs that compiles once.

    $\Theta_{nmop} = \sum_k w_k\, \partial_k f_o(x_n)\, \partial_k f_p(x_m)$

    Args:
      apply_fn: the network, `(params, x) -> (N, O)`; for Flax modules see `network.as_function`.
      output: `full` for every pair of outputs, `diagonal` for each output with itself, `trace` for the sum of
        these, or the number of one output.
      weights: factor on each parameter's contribution, 0 to leave it out: `all_parameters`,
        `initial_variance(params)`, or any function of path and value.
      method: `layerwise`, from layer inputs and cotangents, without any kernel's per-example derivative where its
        factors are cheaper; `jacobian`, the explicit product; `products`, one kernel-vector product a column, in the
        least memory; or `auto`, the one of fewest multiplications that fits the memory.
      coupled: True for a network whose examples influence one another, as with a BatchNorm in training mode. The
        kernel is then that of the whole batch, J holding the derivatives of outputs through everyone's statistics;
        `x1` and `x2` are two batches, each normalised by itself, and cannot be split.
      per_parameter: return a dict of kernels by parameter path instead of their sum.
      memory: bytes that the computation of a pair of blocks may take on a device; more examples are done in blocks.

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
    ) -> None:
        checks.choices(output, method, memory)
        self.apply_fn, self.weights, self.method = apply_fn, weights, method
        self.output: Output = "trace" if isinstance(output, int) else output
        self.selected = output if isinstance(output, int) else None
        self.coupled, self.per_parameter, self.memory = coupled, per_parameter, memory
        self._prepared: dict[Any, tuple[Method, Plan]] = {}

    def plan(self, params: Any, x1: jax.Array, x2: jax.Array | None = None) -> Plan:
        """What `__call__` would do with these arguments."""
        return self._prepare(params, x1, x2)[1]

    def __call__(self, params: Any, x1: jax.Array, x2: jax.Array | None = None, *, out: File | None = None) -> Any:
        """Computes the kernel.

        Args:
          params: the network's parameters.
          x1: inputs `(N, ...)`.
          x2: inputs `(M, ...)`, by default `x1`.
          out: a .npy file that the kernel is written to as it is computed; for kernels larger than memory.

        Returns:
          `(N, M, O, P)` for `full`, `(N, M, O)` for `diagonal`, `(N, M)` for `trace` and for one output, in the
          outputs' precision; a dict of these with `per_parameter`; with `out`, the file's memory map.

        Raises:
          ValueError: if outputs are not `(N, O)` or not finite, if the inputs' shapes differ, if examples influence
            one another without `coupled`, or if nothing fits the memory.
        """
        x1 = jnp.asarray(x1)
        x2 = None if x2 is None else jnp.asarray(x2)
        method, plan = self._prepare(params, x1, x2)
        if out is not None and self.per_parameter:
            raise ValueError("out takes one kernel: leave out per_parameter, or out")
        return assemble(method, plan.block, params, x1, x2, per_parameter=self.per_parameter, out=out)

    def _prepare(self, params: Any, x1: jax.Array, x2: jax.Array | None) -> tuple[Method, Plan]:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        weights = tuple(float(self.weights(path_names(path), leaf)) for path, leaf in leaves)
        described = [(np.shape(leaf), jnp.result_type(leaf)) for _, leaf in leaves]
        inputs = [None if x is None else (x.shape, x.dtype) for x in (x1, x2)]
        key = repr((jax.tree.structure(params), described, inputs, weights))
        if key not in self._prepared:
            checks.inputs(x1, x2)
            checks.weights([path_names(path) for path, _ in leaves], weights)
            checks.network(self.apply_fn, params, x1, self.coupled)
            self._prepared[key] = self._choose(params, x1, x2, weights)
        return self._prepared[key]

    def _choose(
        self, params: Any, x1: jax.Array, x2: jax.Array | None, weights: Sequence[float]
    ) -> tuple[Method, Plan]:
        examples = len(x1) if self.coupled else 1
        if self.coupled and x2 is not None and len(x2) != examples:
            raise ValueError(
                f"x1 has {len(x1)} and x2 {len(x2)} examples; with coupled=True both are batches of one size"
            )
        network = TracedNetwork(self.apply_fn, params, x1[:examples])
        checks.selected(self.selected, network.outputs.shape[1])
        request = Request(
            network,
            jax.tree.map(jnp.asarray, params),
            x1[:examples],
            weights,
            self.output,
            self.selected,
            self.per_parameter,
        )
        counts = (len(x1) // examples, None if x2 is None else len(x2) // examples)
        names = list(METHODS) if self.method == "auto" else [self.method]
        methods = {
            name: METHODS[name](request, counts) for name in names if not (name == "products" and self.per_parameter)
        }
        chosen, block = checks.affordable(methods, counts, self.memory, examples)
        method = methods[chosen]
        costs = {name: candidate.multiplications for name, candidate in methods.items()}
        size = (block[0] * examples, block[1] * examples)
        return method, Plan(chosen, costs, size, method.bytes(*block), method.detail)


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
) -> jax.Array:
    """`EmpiricalNTK` once; make an `EmpiricalNTK` to call it again without compiling."""
    kernel = EmpiricalNTK(apply_fn, output=output, weights=weights or all_parameters, method=method, coupled=coupled)
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
    factors = jax.tree_util.tree_map_with_path(lambda path, leaf: weights(path_names(path), leaf), params)
    pull = jax.vjp(lambda p: apply_fn(p, x1 if x2 is None else x2), params)[1]

    def apply(v: jax.Array) -> jax.Array:
        tangent = jax.tree.map(lambda w, g: w * g, factors, pull(v)[0])
        return jax.jvp(lambda p: apply_fn(p, x1), (params,), (tangent,))[1]

    return apply
