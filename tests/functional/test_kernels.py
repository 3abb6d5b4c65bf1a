"""The identities of weight centering."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.functional import kernels, rules

SHAPES = [(7, 5), (3, 6, 4), (3, 3, 8, 16), (3, 3, 2, 16), (2, 3, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_center_agrees_with_a_loop_over_output_channels(shape, x64):
    kernel = np.random.default_rng(0).normal(size=shape) + 3
    expected = np.stack([kernel[..., o] - kernel[..., o].sum() / math.prod(shape[:-1]) for o in range(shape[-1])], -1)
    np.testing.assert_allclose(kernels.center(jnp.asarray(kernel)), expected, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_center_is_an_orthogonal_projection(shape, x64):
    v, w = (jnp.asarray(np.random.default_rng(i).normal(size=shape)) for i in range(2))
    once = kernels.center(v)
    np.testing.assert_allclose(kernels.center(once), once, atol=1e-14)
    assert abs(jnp.vdot(w, once) - jnp.vdot(kernels.center(w), v)) < 1e-12


def test_bfloat16_kernels_are_centered_in_float32():
    kernel = (jax.random.normal(jax.random.key(0), (3, 3, 64, 8)) + 1).astype(jnp.bfloat16)
    centered = kernels.center(kernel)
    assert centered.dtype == jnp.bfloat16
    # Rounding the result moves each weight by at most 2^-9 of itself; a mean in bfloat16 is off by more.
    wide = centered.astype(jnp.float32)
    assert (abs(wide.mean((0, 1, 2))) <= 2**-9 * abs(wide).mean((0, 1, 2))).all()


def test_nothing_to_center_is_an_error():
    with pytest.raises(ValueError, match="fan-in 1"):
        kernels.center(jnp.ones((1, 1, 1, 8)))
    with pytest.raises(ValueError, match="shape \\(8,\\)"):
        kernels.center(jnp.ones(8))
    with pytest.raises(ValueError, match="at least 2"):
        kernels.gain(1)


def test_gain_keeps_the_energy_of_a_centered_relu_layer(x64):
    """E q_1 / q_0 = 1 for q = E[x^2] after a ReLU on Gaussian input; forgetting n/(n-1) gives 0.9 at n = 10."""
    n, draws = 10, 400_000
    pre, kernel = jax.random.split(jax.random.key(0))
    x = jax.nn.relu(jax.random.normal(pre, (draws, n)))  # E[x^2] = 1/2, not centered
    w = kernels.center(jax.random.normal(kernel, (draws, n)).T).T * kernels.gain(n) * math.sqrt(2 / n)
    ratio = (jax.nn.relu((w * x).sum(1)) ** 2).mean() / (x**2).mean()
    # Standard deviation of the ratio is below 4 / sqrt(draws) = 0.006.
    assert abs(ratio - 1) < 0.02


def test_rules():
    stem, depthwise, wide = (3, 3, 3, 64), (3, 3, 1, 64), (1, 1, 64, 64)
    published = [rules.PUBLISHED_CIFAR_RULE(shape, 1) for shape in (stem, depthwise, wide)]
    assert published == [False, False, True]
    assert [rules.ungrouped(depthwise, 64), rules.ungrouped(stem, 1)] == [False, True]
    assert [rules.always(depthwise, 64), rules.never(wide, 1)] == [True, False]


@pytest.mark.parametrize("function", [kernels.standardize, kernels.scaled_standardize])
def test_complex_kernels_are_standardized_by_their_modulus(function, x64):
    real = np.random.default_rng(0).normal(size=(3, 3, 4, 5))
    np.testing.assert_allclose(function(jnp.asarray(1j * real)), 1j * function(jnp.asarray(real)), atol=1e-14)
