"""Signs of activations and kernels: their values, and that their gradients are those of the surrogates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.functional import binarize, binary_sign, center, standardize_by_deviation


def _quadratic(x):
    """The surrogate of the sign of an activation (Chen et al. 2021), written as a function to be differentiated."""
    inner = jnp.where(x < 0, 2 * x + x**2, 2 * x - x**2)
    return jnp.where(x < -1, -1.0, jnp.where(x < 1, inner, 1.0))


def _normal(shape, seed=0, size=1.0):
    return size * jax.random.normal(jax.random.key(seed), shape, float)


def test_signs_are_one_or_minus_one_and_their_gradient_is_the_quadratics(x64):
    x, weights = _normal((1000,)), _normal((1000,), 1)
    assert set(np.unique(binary_sign(x))) == {-1.0, 1.0}
    np.testing.assert_array_equal(binary_sign(x) > 0, x > 0)
    assert float(binary_sign(jnp.zeros(()))) == 1.0
    found, expected = (jax.grad(lambda x, f=f: weights @ f(x))(x) for f in (binary_sign, _quadratic))
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)
    assert (found == 0).sum() > 100  # beyond 1
    # Where its two halves meet it has a slope of 2, and of 0 where it ends.
    np.testing.assert_array_equal(jax.vmap(jax.grad(binary_sign))(jnp.array([0.0, -1.0, 1.0])), [2.0, 0.0, 0.0])


@pytest.mark.parametrize("dtype", [float, jnp.bfloat16])
def test_binary_kernels_have_one_size_a_channel_and_the_gradient_of_clipping(dtype, x64):
    kernel, weights = _normal((3, 3, 8, 4), size=1.2).astype(dtype), _normal((3, 3, 8, 4), 1).astype(dtype)
    kernel = jnp.where(abs(kernel) == 1, 0.5, kernel)  # where clipping has no derivative
    found = binarize(kernel)
    assert found.dtype == dtype
    for channel in range(4):
        size = abs(np.asarray(kernel[..., channel], np.float64)).mean()
        values = np.unique(np.asarray(found[..., channel], np.float64))
        # Two values, rounded to the kernel's own precision.
        np.testing.assert_allclose(values, [-size, size], rtol=1e-13 + float(jnp.finfo(dtype).eps))
    np.testing.assert_array_equal(found > 0, kernel > 0)
    gradient, expected = (
        jax.grad(lambda w, f=f: (weights * f(w)).sum())(kernel) for f in (binarize, lambda w: jnp.clip(w, -1, 1))
    )
    np.testing.assert_array_equal(gradient, expected)
    assert 0 < (gradient == 0).sum() < gradient.size / 2


def test_binarizing_twice_is_binarizing_once_and_a_zero_kernel_stays(x64):
    once = binarize(_normal((3, 3, 8, 4)))
    np.testing.assert_allclose(binarize(once), once, rtol=1e-14)
    np.testing.assert_array_equal(binarize(jnp.zeros((5, 2))), jnp.zeros((5, 2)))


def test_a_network_that_has_broken_down_is_not_mended_by_signs():
    assert bool(jnp.isnan(binary_sign(jnp.array([1.0, jnp.nan]))).any())
    assert bool(jnp.isnan(binarize(jnp.array([[1.0, 2.0], [jnp.nan, 3.0]]))[:, 0]).all())


def test_standardized_then_binarized_ignores_constants_and_factors_of_a_channel(x64):
    """Up to epsilon; and what is read has the mean square of the centered signs, 2/pi of variance 1/n for normal w."""
    kernel = 1e-2 * _normal((3, 3, 400, 4))
    once = binarize(standardize_by_deviation(kernel, epsilon=0.0))
    moved = binarize(standardize_by_deviation(7 * kernel + 0.3, epsilon=0.0))
    np.testing.assert_allclose(moved, once, rtol=1e-9)
    # n times a squared: the mean of |z| over 3,600 draws is sqrt(2/pi) to 1/100, so its square to 2/100.
    np.testing.assert_allclose(3600 * once[0, 0, 0] ** 2, 2 / np.pi, rtol=0.05)


def test_a_constant_channel_is_standardized_to_zero_with_a_finite_gradient(x64):
    kernel = jnp.ones((3, 3, 8, 2)).at[..., 1].set(_normal((3, 3, 8)))
    value, gradient = jax.value_and_grad(lambda w: (standardize_by_deviation(w) ** 3).sum())(kernel)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(standardize_by_deviation(kernel)[..., 0], 0)


def test_centering_before_the_sign_balances_the_signs_of_a_kernel(x64):
    """Not exactly, as a sign is of each weight: the shares differ by what the median differs from the mean."""
    kernel = 0.5 + _normal((3, 3, 400, 1))
    raw, balanced = (float(jnp.sign(binarize(w)).mean()) for w in (kernel, center(kernel)))
    assert raw > 0.3
    assert abs(balanced) < 4 / np.sqrt(3600)  # four deviations of a mean of as many signs
