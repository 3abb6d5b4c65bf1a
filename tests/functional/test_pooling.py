"""Max-pooling against Flax's: values, derivatives, edges, and what it keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax.diagnostics import nbytes, saved_for_backward
from mimicnorm_jax.functional import max_pool


@pytest.mark.parametrize(
    ("window", "strides", "padding"), [((2, 2), (2, 2), 0), ((3, 3), (2, 2), 1), ((2, 3), (1, 2), 0)]
)
def test_agrees_with_flax_in_value_and_derivatives_also_where_values_tie(window, strides, padding):
    # Integers of a small range, so that windows hold equal values; 7 x 9 leaves an edge over.
    rng = np.random.default_rng(0)
    x = rng.integers(-2, 3, (2, 7, 9, 3)).astype(np.float32)
    tangent = rng.normal(size=x.shape).astype(np.float32)

    def flax_pool(x):
        return nn.max_pool(x, window, strides, [(padding, padding)] * 2)

    def ours(x):
        return max_pool(x, window, strides, padding)

    cotangent = rng.normal(size=jax.eval_shape(flax_pool, x).shape).astype(np.float32)

    @jax.jit
    def found(x):
        y, pull = jax.vjp(ours, x)
        rows = jax.vmap(jax.grad(lambda x: (ours(x[None]) ** 2).sum()))(x)
        whole = jax.grad(lambda x: (ours(x) ** 2).sum())(x)
        return y, pull(cotangent)[0], jax.jvp(ours, (x,), (tangent,))[1], rows, whole

    y, pulled, pushed, rows, whole = map(np.asarray, found(x))
    expected, pull = jax.vjp(jax.jit(flax_pool), x)
    np.testing.assert_array_equal(y, expected)
    # Overlapping windows add up to nine gradients, in another order.
    np.testing.assert_allclose(pulled, pull(cotangent)[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose((pushed * cotangent).sum(), (tangent * pulled).sum(), rtol=1e-5)
    np.testing.assert_allclose(rows, whole, rtol=1e-6)


def test_keeps_a_few_bits_an_output_and_nothing_of_its_input():
    def kept(pool):
        return saved_for_backward(lambda w, x: pool(x * w).sum(), jnp.ones(()), jnp.ones((4, 8, 8, 8)))

    ours = kept(lambda x: max_pool(x, (2, 2), (2, 2)))
    assert [(a.shape, a.dtype) for a in ours] == [((4, 4, 4, 2), jnp.uint8)]
    assert nbytes(kept(lambda x: nn.max_pool(x, (2, 2), (2, 2)))) == 4 * 16 * nbytes(ours)
    assert nbytes(kept(lambda x: max_pool(x, (3, 3), (2, 2), 1))) == 2 * nbytes(ours)


def test_a_nan_is_not_pooled_away():
    x = jnp.zeros((1, 4, 4, 1)).at[0, 1, 2, 0].set(jnp.nan)
    assert np.isnan(max_pool(x, (2, 2), (2, 2))).sum() == 1


@pytest.mark.parametrize(
    ("x", "window", "message"),
    [
        (jnp.ones((2, 4, 4)), (2, 2), r"images \(B, H, W, C\); got float32 of shape \(2, 4, 4\)"),
        (jnp.ones((1, 4, 4, 1), jnp.int32), (2, 2), "got int32"),
        (jnp.ones((1, 40, 40, 1)), (17, 17), "17 x 17 is too large"),
        (jnp.ones((1, 4, 4, 1)), (5, 2), "5 x 2 does not fit into images of 4 x 4"),
    ],
)
def test_refuses_what_it_cannot_pool(x, window, message):
    with pytest.raises(ValueError, match=message):
        max_pool(x, window, (2, 2))


@pytest.mark.parametrize(("window", "strides"), [((2, 2), (0, 2)), ((2, 2), (2,)), ((0, 2), (2, 2))])
def test_refuses_windows_and_strides_that_are_none(window, strides):
    with pytest.raises(ValueError, match="two positive numbers each"):
        max_pool(jnp.ones((1, 4, 4, 1)), window, strides)
