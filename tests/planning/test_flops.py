"""Operations that are counted in compiled programs, against a count by multiplication."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.planning import plan
from tests.planning.programs import conv, cpu_and_h100, everywhere, needs_cuda, needs_tpu, shape

pytestmark = pytest.mark.optimized


def _pairs(x, kernel, **options):
    """How many numbers a convolution multiplies: where all are 1, each adds 1 to a result."""
    ones = conv(np.ones(x.shape, np.float32), np.ones(kernel.shape, np.float32), **options)
    return int(np.asarray(ones, np.float64).sum())


def _with_gradients(x, kernel, g, **options):
    y, pull_back = jax.vjp(lambda x, kernel: conv(x, kernel, **options), x, kernel)
    return y, pull_back(g)


@cpu_and_h100
@pytest.mark.parametrize(
    ("channels", "features", "options"),
    [
        (16, 32, {}),
        (16, 32, {"strides": 2}),
        (16, 32, {"groups": 4}),
        (16, 32, {"dilation": 2, "padding": 2}),
        (16, 32, {"padding": 0}),
    ],
    ids=["plain", "strided", "grouped", "dilated", "unpadded"],
)
def test_a_convolution_and_its_gradients_each_multiply_every_pair_once(target, channels, features, options):
    x = shape(4, 11, 11, channels)
    kernel = shape(3, 3, channels // options.get("groups", 1), features)
    g = jax.eval_shape(lambda x, kernel: conv(x, kernel, **options), x, kernel)
    found = plan(lambda *arrays: _with_gradients(*arrays, **options), x, kernel, shape(*g.shape), target=target)
    assert found.flops == 3 * 2 * _pairs(x, kernel, **options)


@needs_cuda
def test_a_depthwise_convolution_and_its_gradients():
    x, kernel = shape(4, 11, 11, 32), shape(3, 3, 1, 32)
    found = plan(lambda *a: _with_gradients(*a, groups=32), x, kernel, x, target="h100")
    assert found.flops == 3 * 2 * _pairs(x, kernel, groups=32)


def test_work_that_a_compiler_adds_is_counted():
    """A CPU's compiler makes one dense convolution of a depthwise kernel's gradient, as many times the work."""
    x, kernel = shape(4, 11, 11, 32), shape(3, 3, 1, 32)
    found = plan(lambda *a: _with_gradients(*a, groups=32), x, kernel, x, target="cpu")
    assert found.flops == (2 + 32) * 2 * _pairs(x, kernel, groups=32)


@cpu_and_h100
def test_matrix_products(target):
    def products(a, b, c):
        return a @ b, jnp.einsum("nij,nkj->nik", c, c)

    found = plan(products, shape(64, 128), shape(128, 256), shape(8, 64, 32), target=target)
    assert found.flops == 2 * (64 * 128 * 256) + 2 * (8 * 64 * 64 * 32)


@needs_cuda
def test_what_is_done_again_counts_again():
    """Not on a CPU, whose compiler takes what `jax.checkpoint` asks to do again from the first time."""
    x, kernel = shape(4, 16, 16, 16), shape(3, 3, 16, 16)

    def gradient(x, first, second, checkpointed):
        def network(first, second):
            return jnp.sin(conv(jnp.sin(conv(x, first)), second)).sum()

        loss = jax.checkpoint(network) if checkpointed else network
        return jax.value_and_grad(loss, (0, 1))(first, second)

    once, again = (
        plan(lambda *a, c=checkpointed: gradient(*a, c), x, kernel, kernel, target="h100")
        for checkpointed in (False, True)
    )
    one = 2 * _pairs(x, kernel)
    # Two forward, two by kernels, one by the input of the second.
    assert once.flops == 5 * one
    assert again.flops == 7 * one


@cpu_and_h100
def test_a_loop_counts_its_turns(target):
    def loop(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]

    found = plan(loop, shape(64, 64), shape(7, 64, 64), target=target)
    assert found.flops == 7 * 2 * 64**3
    assert found.unknown_loops == 0
    # What a turn reads of the kernels is one of them, not all seven: x, tanh and product, and the slice.
    assert found.total_moved < 7 * 12 * 4 * 64**2


@everywhere
def test_loops_in_loops_count_their_turns(target):
    """A TPU's compiler does not say how many there are: they are read off the counters."""

    def loop(x):
        def inner(_, x):
            return jnp.tanh(x @ x)

        return jax.lax.fori_loop(3, 8, lambda _, x: jax.lax.fori_loop(0, 3, inner, x) + 1, x)

    found = plan(loop, shape(256, 256), target=target)
    assert (found.flops, found.unknown_loops) == (5 * 3 * 2 * 256**3, 0)


@everywhere
def test_a_loop_counts_what_its_condition_does(target):
    def loop(x):
        return jax.lax.while_loop(lambda x: (x @ x).sum() < 1, lambda x: 2 * x, x)

    found = plan(loop, shape(256, 256), target=target)
    assert (found.flops, found.unknown_loops) == (2 * 256**3, 1)


@needs_cuda
def test_a_triangular_solve_is_no_matrix_product():
    """Its operations are unknown, as on a CPU: two for each number in its result would be far too few."""
    found = plan(jax.scipy.linalg.solve_triangular, shape(64, 64), shape(64, 64), target="h100")
    assert (found.flops, found.bytes_moved["convolution and matmul"]) == (0, 0)


@needs_cuda
def test_products_of_8_bits_are_bound_by_their_bytes():
    """An H100 multiplies them at twice the rate of bfloat16, by its data sheet."""
    product = lambda x: jax.lax.dot(x, x, preferred_element_type=jnp.float32)  # noqa: E731
    wide, narrow = (
        plan(product, shape(8192, 8192, dtype=dtype), target="h100") for dtype in (jnp.bfloat16, jnp.float8_e4m3fn)
    )
    assert wide.flops == narrow.flops == 2 * 8192**3
    assert wide.bound_by == "flops"
    assert narrow.bound_seconds <= narrow.flops / 1979e12


@needs_tpu
def test_a_tpu_counts_as_a_cpu_does():
    x, kernel, g = shape(8, 16, 16, 128), shape(3, 3, 128, 128), shape(8, 8, 8, 128)
    arrays = x, kernel, g
    found = plan(lambda *a: _with_gradients(*a, strides=2), *arrays, target="v5e")
    assert found.flops == 3 * 2 * _pairs(x, kernel, strides=2)
    assert found.bytes_accessed is not None
