r"""The tangent kernel as a pure function: prepared once, then usable under `jit`, `vmap` and `grad`."""

from collections.abc import Callable
from typing import Any, Unpack

import jax

from mimicnorm_jax.diagnostics.ntk.blocks import BlockedKernel, documented
from mimicnorm_jax.diagnostics.ntk.empirical import EmpiricalNTK, NTKOptions
from mimicnorm_jax.diagnostics.ntk.jacobian_contraction import JacobianContraction
from mimicnorm_jax.diagnostics.tracing.network import TracedNetwork
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn

NTKFn = Callable[..., Any]
"""`(params, x1, x2=None)` to the kernel in the form that `EmpiricalNTK` documents."""


def empirical_ntk_fn(
    apply_fn: ApplyFn, params: Any, x1: jax.Array, x2: jax.Array | None = None, **options: Unpack[NTKOptions]
) -> NTKFn:
    """Prepares the kernel for arguments like these and returns it as a function of JAX arrays.

    What `EmpiricalNTK` does for each call is done here once: the checks, the proof that examples are independent, the
    plan. The function itself does nothing but compute, so it can be compiled, mapped over ensembles of parameters, and
    differentiated by parameters and inputs. Its derivatives are those of the explicit product of Jacobians, whatever
    computes the kernel. It does not look for values that are not finite.

    Args:
      apply_fn: the network, `(params, x) -> (N, O)`.
      params: of the shapes that the function will be called with; weights are read from them here.
      x1: inputs `(N, ...)`, likewise.
      x2: inputs `(M, ...)`, likewise, or None.
      **options: of `EmpiricalNTK`.

    Returns:
      A function `(params, x1, x2=None)`, which raises ValueError for arguments of other shapes.

    Raises:
      ValueError: as `EmpiricalNTK`; if the kernel does not fit `memory` in one block; or if something could not be
        proved that `EmpiricalNTK` checks in numbers at every call, unless `check=False` says that it holds.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> kernel = empirical_ntk_fn(lambda params, x: x @ params, jnp.ones((2, 1)), x, output="trace")
      >>> jax.jit(jax.vmap(kernel, (0, None)))(jnp.ones((3, 2, 1)), x).shape
      (3, 2, 2)
    """
    prepared = EmpiricalNTK(apply_fn, **options)
    plan, kernel = prepared.prepare(params, x1, x2)
    request = kernel.implementation.request
    if plan.checked:
        raise ValueError(
            f"the kernel can be checked in numbers only ({plan.independence or 'a derivative written by hand'}), which "
            "a pure function cannot do: use EmpiricalNTK, or say check=False if you know that no example influences "
            "another"
        )
    if plan.block[0] < len(x1) or plan.block[1] < len(x1 if x2 is None else x2):
        raise ValueError(f"a pure function has one block, and this kernel takes several ({plan}): raise memory")
    slow = BlockedKernel(JacobianContraction(request, kernel.implementation.counts), plan.block)
    expected = _shapes(params, x1, x2)

    @jax.custom_jvp
    def whole(arrays: Any, x1: jax.Array, x2: jax.Array | None) -> Any:
        return kernel.whole(arrays, x1, x2)

    # The fast ways stop derivatives at the layers' kernels, so a derivative of theirs would leave terms out.
    @whole.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return whole(*primals), jax.jvp(slow.whole, primals, tangents)[1]

    def ntk_fn(params: Any, x1: jax.Array, x2: jax.Array | None = None) -> Any:
        if _shapes(params, x1, x2) != expected:
            raise ValueError(
                f"the kernel was prepared for params, x1 and x2 of shapes {expected[1]}, and is called with others of "
                f"{_shapes(params, x1, x2)[1]}: prepare one for each"
            )
        found = whole(TracedNetwork.arrays(params), x1, x2)
        return documented(found, request.output)

    return ntk_fn


def _shapes(*arguments: Any) -> Any:
    leaves, tree = jax.tree.flatten(arguments)
    arrays = TracedNetwork.arrays(leaves)
    return str(tree), [(leaf.shape, str(leaf.dtype)) for leaf in arrays]
