"""What every kernel transform keeps, and how transforms compose."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.functional import (
    KernelTransform,
    center,
    compose,
    never,
    scaled_standardize,
    standardize,
    standardize_by_deviation,
    ungrouped,
)
from mimicnorm_jax.functional.layout import over_fan_in
from mimicnorm_jax.functional.transform import IDENTITY


def _centered_channel(w):
    return w - w.sum() / w.size


def _standardized_channel(w, gain=1.0):
    centered = _centered_channel(w)
    return gain * centered / math.sqrt((centered**2).sum())


# Function, the same written for one output channel, and the power of a positive factor on its input in its output.
MEMBERS = {
    "center": (center, _centered_channel, 1),
    "standardize": (standardize, _standardized_channel, 0),
    "scaled_standardize": (partial(scaled_standardize, gain=1.7), partial(_standardized_channel, gain=1.7), 0),
    "standardize_by_deviation": (partial(standardize_by_deviation, epsilon=1e-8), _standardized_channel, 0),
}
SHAPES = [(7, 5), (3, 3, 8, 4), (3, 3, 1, 6)]
ROUNDING = 1e-12
EPSILON = 1e-5  # of `standardize`, beside n times a variance of at least 1


def _kernel(shape, seed=0):
    return 3 * jax.random.normal(jax.random.key(seed), shape, float) + 1


@pytest.fixture(autouse=True)
def double(x64):
    """Facts to rounding."""


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_one_output_channel_at_a_time(name, shape):
    function, channel, _ = MEMBERS[name]
    kernel = np.asarray(_kernel(shape))
    expected = np.stack([channel(kernel[..., i]) for i in range(shape[-1])], -1)
    np.testing.assert_allclose(function(jnp.asarray(kernel)), expected, rtol=EPSILON, atol=1e-13)


@pytest.mark.parametrize("name", MEMBERS)
def test_constants_do_nothing_and_positive_factors_as_much_as_to_the_power(name):
    function, _, power = MEMBERS[name]
    kernel = _kernel((3, 3, 8, 4))
    once = function(kernel)
    np.testing.assert_allclose(function(kernel + jnp.arange(4.0).reshape(1, 1, 1, 4)), once, atol=ROUNDING)
    factors = jnp.array([1.0, 2.0, 5.0, 10.0]).reshape(1, 1, 1, 4)
    np.testing.assert_allclose(function(factors * kernel), factors**power * once, rtol=EPSILON)
    np.testing.assert_allclose(function(once), once, rtol=EPSILON)  # all are idempotent


@pytest.mark.parametrize("name", MEMBERS)
def test_gradients_leave_constants_alone_and_factors_where_those_do_nothing(name):
    function, _, power = MEMBERS[name]
    kernel, weights = (_kernel((3, 3, 8, 4), seed) for seed in range(2))
    grad = jax.grad(lambda kernel: jnp.vdot(weights, function(kernel)))(kernel)
    size = float(abs(grad).sum())
    assert size > 1e-3
    assert abs(grad.sum((0, 1, 2))).max() < ROUNDING * size
    along = abs((grad * center(kernel)).sum((0, 1, 2))).max()
    assert along < EPSILON * size if power == 0 else along > 0.1


@pytest.mark.parametrize("name", MEMBERS)
def test_bfloat16_kernels_are_transformed_in_float32(name):
    function, _, _ = MEMBERS[name]
    kernel = _kernel((3, 3, 64, 8)).astype(jnp.bfloat16)
    found, wide = function(kernel), function(kernel.astype(jnp.float32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, wide.astype(jnp.bfloat16))


def test_a_channel_almost_without_variance_is_not_blown_up():
    kernel = 1e-4 * _kernel((3, 3, 8, 4))
    found = scaled_standardize(kernel, epsilon=1e-4)
    np.testing.assert_allclose(found, 100 * center(kernel), rtol=1e-9)


def test_composition_is_in_order_and_each_by_its_own_rule():
    kernel = _kernel((3, 3, 8, 4))
    halve = KernelTransform(lambda kernel: kernel / 2)
    standardized = KernelTransform(standardize, ungrouped)
    np.testing.assert_array_equal(compose(standardized, halve)(kernel), standardize(kernel) / 2)
    np.testing.assert_array_equal(compose(halve, standardized)(kernel), standardize(kernel / 2))
    np.testing.assert_array_equal(compose(halve, standardized)(kernel, 2), kernel / 2)
    nested = compose(compose(halve, standardized), compose(halve, halve))
    np.testing.assert_array_equal(nested(kernel), standardize(kernel / 2) / 4)
    assert compose(standardized, KernelTransform(center, never)).takes(kernel.shape, 1)
    assert not compose(KernelTransform(center, never), standardized).takes(kernel.shape, 2)
    assert compose() is IDENTITY
    np.testing.assert_array_equal(IDENTITY(kernel), kernel)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize(
    ("shape", "fan_in"), [((3, 6, 8), (0, 2)), ((5, 4, 7, 2, 3), (2,)), ((8, 2, 3), (0,)), ((7, 5), (-2,))]
)
def test_over_any_fan_in_each_output_is_transformed_alone(name, shape, fan_in):
    function, channel, _ = MEMBERS[name]
    kernel = np.asarray(_kernel(shape))
    front = np.moveaxis(kernel, fan_in, range(len(fan_in)))
    flat = front.reshape(math.prod(front.shape[: len(fan_in)]), -1)
    expected = np.stack([channel(flat[:, i]) for i in range(flat.shape[1])], -1).reshape(front.shape)
    found = over_fan_in(function, fan_in)(jnp.asarray(kernel))
    np.testing.assert_allclose(found, np.moveaxis(expected, range(len(fan_in)), fan_in), rtol=EPSILON, atol=1e-13)


@pytest.mark.parametrize("fan_in", [(), (0, 0), (0, 1), (2,), (0, -2)])
def test_a_fan_in_that_is_none_is_refused(fan_in):
    with pytest.raises(ValueError, match=r"of a kernel of shape \(3, 4\): name each axis"):
        over_fan_in(center, fan_in)(jnp.ones((3, 4)))


@pytest.mark.parametrize("name", MEMBERS)
def test_a_kernel_without_a_mean_over_its_fan_in_is_refused(name):
    with pytest.raises(ValueError, match=r"fan-in 1 leaves only zeros.*\(1, 1, 1, 8\).*fan_in_above\(1\)"):
        MEMBERS[name][0](jnp.ones((1, 1, 1, 8)))
