r"""The empirical neural tangent kernel of any network: $\Theta(x_1, x_2) = J(x_1)\, W\, J(x_2)^T$."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path as File
from typing import Any, Literal, TypedDict, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.diagnostics.ntk import validation
from mimicnorm_jax.diagnostics.ntk.blocks import BlockedKernel
from mimicnorm_jax.diagnostics.ntk.guard import Guard
from mimicnorm_jax.diagnostics.ntk.implementation import Request
from mimicnorm_jax.diagnostics.ntk.jacobians import Output
from mimicnorm_jax.diagnostics.ntk.plan import Name, Plan, choose
from mimicnorm_jax.diagnostics.ntk.pseudo import PseudoLogit
from mimicnorm_jax.diagnostics.ntk.weighting import Weights, all_parameters
from mimicnorm_jax.diagnostics.tracing import jaxprs
from mimicnorm_jax.diagnostics.tracing.network import TracedNetwork
from mimicnorm_jax.diagnostics.tracing.parameters import (
    ApplyFn,
    bind,
    is_differentiated,
    left_out,
    off_mesh,
    titles,
)
from mimicnorm_jax.diagnostics.tracing.validation import arguments, network
from mimicnorm_jax.utils.trees import path_names


@dataclass(frozen=True, eq=False)
class EmpiricalNTK:
    r"""The tangent kernel of a network, as a function of parameters and inputs that compiles once.

    $\Theta_{nmop} = \sum_k w_k\, \partial_k f_o(x_n)\, \partial_k f_p(x_m)$

    Args:
      apply_fn: the network, `(params, x) -> (N, O)`; for Flax modules see `from_linen`.
      output: `full` for every pair of outputs, `diagonal` for each output with itself, `trace` for the sum of
        these (not the mean), `pseudo` for the pseudo-kernel (see `PseudoLogit`), or the number of one output.
      weights: factor on each parameter's contribution, 0 to leave it out: `all_parameters`,
        `initial_variance(params)`, or any function of path and value.
      implementation: `structured_derivatives`, from layer inputs and cotangents, without any kernel's per-example
        derivative where its factors are cheaper; `jacobian_contraction`, the explicit product;
        `ntk_vector_products`, one product a column, in the least memory; or `auto`, the one of fewest MACs that fits
        the memory. The names are those of Novak, Sohl-Dickstein & Schoenholz (2022), Fast Finite Width Neural Tangent
        Kernel.
      batch_coupled: see `diagnostics`. `x1` and `x2` are then two batches, each normalized by itself, and cannot be
        split into blocks.
      per_parameter: return a dict of kernels by parameter path instead of their sum.
      memory: bytes that the computation of a pair of blocks may take on a device; more examples are done in blocks.
      check: whether every kernel's entry of one random pair of examples is compared with a direct product of gradients
        of `apply_fn`. It compiles the network's gradients once more; so the default is only where something could
        not be proved from the jaxpr: independence of examples, or what a hand-written derivative (`jax.custom_vjp`)
        does with them.

    Raises:
      ValueError: for an unknown implementation or output.

    Example:
      >>> kernel = EmpiricalNTK(lambda params, x: x @ params)
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> kernel(jnp.ones((2, 1)), x)[:, :, 0, 0].tolist()  # a linear network's is the inputs' Gram matrix
      [[1.0, 1.0], [1.0, 5.0]]
    """

    apply_fn: ApplyFn
    _: KW_ONLY
    output: Output | Literal["pseudo"] | int = "full"
    weights: Weights = all_parameters
    implementation: Name = "auto"
    batch_coupled: bool = False
    per_parameter: bool = False
    memory: int = 2**31
    check: bool | None = None
    _prepared: dict[Any, tuple[Plan, BlockedKernel]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        output = int(self.output) if isinstance(self.output, np.integer) else self.output
        validation.options(output, self.implementation, self.memory)

    def plan(self, params: Any, x1: jax.Array, x2: jax.Array | None = None) -> Plan:
        """What `__call__` would do with these arguments.

        Args:
          params, x1, x2: as `__call__` takes them; arrays of any shape, or their shapes.
        """
        return self.prepare(params, x1, x2)[0]

    def prepare(self, params: Any, x1: jax.Array, x2: jax.Array | None = None) -> tuple[Plan, BlockedKernel]:
        """The plan, and what carries it out; both are made once for arguments of these shapes.

        Args:
          params, x1, x2: as in `plan`.
        """
        return self._prepare(*self._arrays(params, x1, x2))

    def __call__(
        self,
        params: Any,
        x1: jax.Array,
        x2: jax.Array | None = None,
        *,
        out: File | str | None = None,
        process: tuple[int, int] | None = None,
    ) -> Any:
        """Computes the kernel.

        Args:
          params: the network's parameters; leaves that are not floating-point arrays are held fixed.
          x1: inputs `(N, ...)`.
          x2: inputs `(M, ...)`, by default `x1`.
          out: a .npy file for the kernel, whose blocks are kept beside it until all are there; for kernels larger than
            memory. If the process is killed, the same call goes on with the blocks that are missing (a call for another
            network, with other parameters or inputs begins anew), and gives the same bits. A file that the same call
            has finished is read.
          process: which of how many processes this is, `(index, count)`, that make the same call on one file system and
            compute `out` together; by default as `jax.distributed` counts. Each has the whole kernel in the end, by
            doing what others leave. What is dealt out are rows of blocks: choose `memory` so that there are many.

        Returns:
          `(N, M, O, P)` for `full`, `(N, M, O)` for `diagonal`, `(N, M)` for any other, in the outputs' precision, at
          least float32; a dict of these with `per_parameter`; with `out`, the file's memory map.

        Raises:
          ValueError: if outputs are not `(N, O)` or not finite, if the inputs' shapes differ, if examples influence
            one another without `batch_coupled`, if nothing fits the memory, or if a checked pair is wrong.
        """
        if out is not None and self.per_parameter:
            raise ValueError("out takes one kernel: leave out per_parameter, or out")
        if out is None and process is not None:
            raise ValueError(f"process is {process}, but processes share their work in a file: give `out` too")
        mine = (jax.process_index(), jax.process_count()) if process is None else process
        validation.process(mine)
        params, x1, x2 = self._arrays(params, x1, x2)
        _, kernel = self._prepare(params, x1, x2)
        return kernel(TracedNetwork.arrays(params), x1, x2, None if out is None else File(out), mine)

    def _arrays(self, params: Any, x1: Any, x2: Any) -> tuple[Any, jax.Array, jax.Array | None]:
        arguments(self.apply_fn, params, x1)
        x1, x2 = jnp.asarray(x1), None if x2 is None else jnp.asarray(x2)
        return off_mesh((params, x1, x2))

    def _prepare(self, params: Any, x1: jax.Array, x2: jax.Array | None) -> tuple[Plan, BlockedKernel]:
        """The plan for arguments of these shapes, and what carries it out; made once."""
        apply_fn, arrays = bind(self.apply_fn, params)
        apply_fn = PseudoLogit(apply_fn) if self.output == "pseudo" else apply_fn
        leaves, tree = jax.tree_util.tree_leaves_with_path(arrays), jax.tree.structure(arrays)
        weights = tuple(
            float(self.weights(path_names(path), leaf)) if is_differentiated(leaf) else 0.0 for path, leaf in leaves
        )
        described = tuple((np.shape(leaf), str(leaf.dtype)) for _, leaf in leaves)
        inputs = tuple(None if x is None else (x.shape, str(x.dtype)) for x in (x1, x2))
        key = (apply_fn, tree, described, inputs, weights)
        if key not in self._prepared:
            validation.inputs(x1, x2, self.batch_coupled)
            validation.weights(titles([path_names(path) for path, _ in leaves]), weights)
            if x2 is not None:
                network(apply_fn, arrays, x2, self.batch_coupled, self.memory)
            verdict = network(apply_fn, arrays, x1, self.batch_coupled, self.memory)
            request = self._request(apply_fn, arrays, x1, weights)
            counts = (len(x1) // request.examples, None if x2 is None else len(x2) // request.examples)
            implementation, plan = choose(request, counts, self.implementation, self.memory)
            plan = replace(
                plan, independence=verdict, left_out=left_out(params), checked=self._checked(request, verdict)
            )
            guard = Guard(apply_fn, tree, request, self.batch_coupled, plan.implementation) if plan.checked else None
            self._prepared[key] = plan, BlockedKernel(implementation, plan.block, guard)
        return self._prepared[key]

    def _request(self, apply_fn: ApplyFn, params: Any, x: jax.Array, weights: Sequence[float]) -> Request:
        group = x if self.batch_coupled else x[:1]
        traced = TracedNetwork(apply_fn, params, group)
        one = None if isinstance(self.output, str) else int(self.output)
        validation.selected(one, traced.outputs.shape[1])
        one_number = one is not None or self.output == "pseudo"
        pairs = "trace" if one_number else cast(Output, self.output)
        return Request(traced, traced.arrays(params), group, weights, pairs, one, self.per_parameter)

    def _checked(self, request: Request, verdict: Any) -> bool:
        if self.check is not None:
            return self.check
        return bool(jaxprs.without_jvp(request.network.program)) or (verdict is not None and not verdict.proven)


class NTKOptions(TypedDict, total=False):
    """Options of `EmpiricalNTK`, where they are described."""

    output: Output | Literal["pseudo"] | int
    weights: Weights
    implementation: Name
    batch_coupled: bool
    per_parameter: bool
    memory: int
    check: bool | None


def empirical_ntk(
    apply_fn: ApplyFn, params: Any, x1: jax.Array, x2: jax.Array | None = None, **options: Unpack[NTKOptions]
) -> Any:
    """`EmpiricalNTK` once; make an `EmpiricalNTK` to call it again without compiling.

    Args:
      apply_fn: the network.
      params: its parameters.
      x1: inputs `(N, ...)`.
      x2: inputs `(M, ...)`, by default `x1`.
      **options: of `EmpiricalNTK`.

    Returns:
      What `EmpiricalNTK` returns.

    Raises:
      ValueError: as `EmpiricalNTK`.
    """
    return EmpiricalNTK(apply_fn, **options)(params, x1, x2)
