"""What the compiler plans for a pair of blocks stays below `memory`, wherever the memory goes."""

import jax
import jax.numpy as jnp
import pytest

from mimicnorm_jax.diagnostics import EmpiricalNTK

pytestmark = pytest.mark.optimized  # temporaries as for users


def _dense(params, x):
    for kernel, bias in params:
        x = jnp.tanh(x @ kernel + bias[None])
    return x


def _conv(params, x):
    for kernel in params[:-1]:
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jnp.tanh(jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers))
    return x.mean((1, 2)) @ params[-1]


def _shaped(tree):
    return jax.tree.map(jnp.ones, tree, is_leaf=lambda leaf: isinstance(leaf[0], int))


CASES = {
    # The kernel is larger than what it is made of.
    "outputs": (_dense, _shaped([((8, 16), (16,)), ((16, 10), (10,))]), jnp.ones((192, 8))),
    # Derivatives written out are larger than all else.
    "parameters": (_conv, _shaped([(3, 3, 3, 24), (3, 3, 24, 24), (3, 3, 24, 24), (24, 8)]), jnp.ones((24, 4, 4, 3))),
    # Of a pooled layer, one map for all outputs is.
    "maps": (_conv, _shaped([(3, 3, 3, 48), (48, 8)]), jnp.ones((96, 4, 4, 3))),
    # Derivatives stay factors, whose Gram matrices are multiplied entry by entry.
    "few positions": (_conv, _shaped([(3, 3, 3, 24), (3, 3, 24, 24), (24, 8)]), jnp.ones((96, 2, 2, 3))),
    # Patches and cotangents are.
    "positions": (_conv, _shaped([(3, 3, 3, 8), (3, 3, 8, 8), (8, 2)]), jnp.ones((24, 24, 24, 3))),
}


def planned(kernel, params, x):
    """Bytes that the compiled programs of a kernel's blocks hold at once, at the worst point of `BlockedKernel`."""
    plan, blocked = kernel.prepare(params, x)
    if plan.block[0] == len(x):
        found = blocked.whole.lower(params, x, None).compile().memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes
    shape = jax.eval_shape(blocked.features, params, x[: plan.block[0]])
    features = blocked.features.lower(params, x[: plan.block[0]]).compile().memory_analysis()
    size = features.output_size_in_bytes
    peak = 2 * size + features.temp_size_in_bytes  # the left side is there, the right one is made
    for symmetric in (False, True):
        found = blocked.contracted.lower(params, shape, shape, symmetric).compile().memory_analysis()
        held = found.temp_size_in_bytes + 2 * found.output_size_in_bytes  # one block is on its way to the host
        peak = max(peak, (1 if symmetric else 2) * size + held)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["structured_derivatives", "jacobian_contraction"])
@pytest.mark.parametrize("output", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("name", CASES)
def test_what_the_compiler_plans_stays_below_the_bound(name, output, implementation):
    apply_fn, params, x = CASES[name]
    options = {"output": output, "implementation": implementation}
    estimate = EmpiricalNTK(apply_fn, **options).prepare(params, x)[1].implementation.bytes
    for size in (len(x), len(x) // 4, len(x) // 8):  # all at once, middle and small blocks
        kernel = EmpiricalNTK(apply_fn, memory=estimate(size, size), **options)
        plan = kernel.plan(params, x)
        assert plan.block == (size, size)
        assert planned(kernel, params, x) <= plan.bytes <= kernel.memory
