"""Closed forms against autodiff, quadrature, sampling and the numbers known for them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import condition_number
from mimicnorm_jax.theory import PLAIN, WEIGHT_MEAN, InfiniteMLP, S, batch_norm_chi, padded, quadrature_dual, relu_dual

pytestmark = pytest.mark.usefixtures("x64")


def _slope(mlp, rho, step=1e-6):
    """From one side at the ends of [-1, 1], where arccos has no derivative."""
    up, down = min(rho + step, 1.0), max(rho - step, -1.0)
    return float(mlp.correlation_map(up) - mlp.correlation_map(down)) / (up - down)


def test_transition_map_of_weight_mean():
    values = WEIGHT_MEAN.correlation_map(jnp.array([0.0, 1.0, -1.0]))
    np.testing.assert_allclose(values, [0, 1, -1 / math.pi / S], atol=1e-12)
    assert abs(jax.grad(WEIGHT_MEAN.correlation_map)(0.0) - 0.733471) < 1e-6
    assert abs(WEIGHT_MEAN.chi() - 1.466942) < 1e-6
    # The map meets 1 like (1 - rho)^(3/2): the one-sided slope is off by sqrt(step).
    assert abs(_slope(WEIGHT_MEAN, 1.0) - WEIGHT_MEAN.chi()) < 2e-3


def test_plain_stack_is_marginal_and_creeps_to_one():
    assert abs(PLAIN.chi() - 1) < 1e-12
    rho, depth = jnp.asarray(0.5), 20_000
    rho = jax.lax.fori_loop(0, depth, lambda _, r: PLAIN.correlation_map(r), rho)
    # The next order is log(l) / l relative.
    np.testing.assert_allclose(float(1 - rho) * 2 * depth**2 / (9 * math.pi**2), 1, rtol=0.01)
    assert PLAIN.depth_scale() == math.inf


def test_fixed_points_and_depth_scales():
    assert abs(WEIGHT_MEAN.fixed_correlation()) < 1e-11
    assert abs(WEIGHT_MEAN.depth_scale() + 1 / math.log(0.733471)) < 1e-4
    edge = padded(4 / 9)
    assert abs(edge.chi() - 1 / (1 - 4 / 9 / math.pi)) < 1e-12
    assert abs(edge.chi() - 1.165) < 1e-3
    assert abs(edge.fixed_correlation() - 0.78) < 5e-3
    # A bias keeps inputs correlated: at the energy that 1.5 q (1 - 1/pi) / 2 + 0.1 = q keeps, rho* = T(rho*).
    biased = InfiniteMLP(weight_variance=1.5, bias_variance=0.1, centering=1.0)
    energy = 0.1 / (1 - 0.75 * S)
    fixed = biased.fixed_correlation(energy)
    assert 0 < fixed < 1
    assert abs(biased.correlation_map(fixed, energy) - fixed) < 1e-11


@pytest.mark.parametrize("valid", [0.005, 6 / 9])
def test_a_distance_to_the_fixed_point_falls_by_e_in_as_many_layers(valid):
    """However close to marginal an MLP is: of 0.5 % of a patch chi is 1.0016, and the fixed point 3e-5 below 1."""
    mlp, distance = padded(valid), 1e-9
    fixed, scale = mlp.fixed_correlation(tolerance=1e-16), mlp.depth_scale()
    layers = round(2 * scale)
    last = jax.lax.fori_loop(0, layers, lambda _, rho: mlp.correlation_map(rho), jnp.asarray(fixed - distance))
    # Rounding of rho is 1e-16 of 1e-9 a layer, and the fixed point is as far from exact.
    np.testing.assert_allclose((fixed - last) / distance, math.exp(-layers / scale), rtol=0.01)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_moments_are_proportional_to_the_variance_as_far_as_numbers_reach(scale):
    """In single precision, whose numbers end at 1e38 and 1e-38: beyond the root of it products of two leave them."""
    k11, k12, k22 = (jnp.asarray(k, jnp.float32) for k in (2.0, -0.7, 0.5))
    expected = relu_dual(k11, k12, k22)
    found = relu_dual(*(jnp.float32(scale) * k for k in (k11, k12, k22)))
    np.testing.assert_allclose([found[0] / scale, found[1], found[2] / scale], expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_input_has_correlation_1_with_itself_at_any_variance(dtype):
    """To the last bit: arccos makes the root of an error of it."""
    ends = np.log([np.finfo(dtype).tiny, np.finfo(dtype).max])
    variance = jnp.asarray(np.exp(np.random.default_rng(0).uniform(*(0.99 * ends), 1000)), dtype)
    second, slope, _ = relu_dual(variance, variance, variance)
    np.testing.assert_array_equal(slope, 0.5)
    np.testing.assert_allclose(second, variance / 2, rtol=4 * np.finfo(dtype).eps)
    assert PLAIN.depth_scale(2.0) == math.inf


def test_moments_of_numbers_and_where_a_variance_is_zero():
    np.testing.assert_array_equal(relu_dual(1, 0, 1), relu_dual(1.0, 0.0, 1.0))
    by_other = jax.grad(lambda k22: relu_dual(jnp.zeros(()), jnp.zeros(()), k22)[0])(1.0)
    assert by_other == 0


def test_kernels_of_whole_numbers():
    whole, real = (PLAIN.kernels(jnp.eye(2, dtype=dtype), 4) for dtype in (int, float))
    np.testing.assert_array_equal(whole, real)
    images = np.random.default_rng(0).integers(0, 256, (3, 5), np.uint8)
    whole, real = (PLAIN.kernels_between(x[:1], x[1:], 4) for x in (images, images.astype(float)))
    np.testing.assert_array_equal(whole, real)
    assert PLAIN.correlation_map(0, 0.5) == PLAIN.correlation_map(0.0, 0.5) > 0


@pytest.mark.parametrize("mlp", [PLAIN, WEIGHT_MEAN, InfiniteMLP(1.7, 0.3, 0.5)])
def test_layer_map_against_sampling(mlp):
    """A wide layer, in plain NumPy."""
    rng = np.random.default_rng(0)
    covariance = np.array([[1.0, 0.4], [0.4, 2.0]])
    u = rng.multivariate_normal([0, 0], covariance, size=2_000_000)
    x = np.maximum(u, 0)
    second = x.T @ x / len(x) - mlp.centering * np.outer(x.mean(0), x.mean(0))
    slope = ((u > 0).T.astype(float) @ (u > 0)) / len(x)
    nngp, derivative = mlp.layer(jnp.asarray(covariance))
    # Standard errors are about 2 / sqrt(2e6) = 0.0014 times the weight variance.
    np.testing.assert_allclose(nngp, mlp.weight_variance * second + mlp.bias_variance, atol=0.015)
    np.testing.assert_allclose(derivative, mlp.weight_variance * slope, atol=0.006)


def _erf_dual(k11, k12, k22):
    """Williams 1997."""
    scale = (1 + 2 * k11) * (1 + 2 * k22)
    return 2 / jnp.pi * jnp.arcsin(2 * k12 / jnp.sqrt(scale)), 4 / jnp.pi / jnp.sqrt(scale - 4 * k12**2), 0 * k12


@pytest.mark.parametrize("nodes", [129, 513])
def test_quadrature_is_exact_for_polynomials(nodes):
    k11, k12, k22 = jnp.asarray(1.5), jnp.asarray(0.4), jnp.asarray(0.8)
    second, slope, means = quadrature_dual(lambda x: x + x**2, nodes=nodes)(k11, k12, k22)
    # What is left out at the ends of the panels is 1e-11 of them.
    np.testing.assert_allclose(second, k12 + k11 * k22 + 2 * k12**2, rtol=1e-9)  # Isserlis
    np.testing.assert_allclose(slope, 1 + 4 * k12, rtol=1e-9)
    np.testing.assert_allclose(means, k11 * k22, rtol=1e-9)


@pytest.mark.parametrize(("phi", "dual"), [(jax.nn.relu, relu_dual), (jax.scipy.special.erf, _erf_dual)])
@pytest.mark.parametrize("variances", [(1e-8, 1e-8), (1.0, 1.0), (2.0, 300.0), (1e4, 1e4)])
def test_quadrature_meets_the_closed_forms_however_steep(phi, dual, variances):
    k11, k22 = (jnp.full(7, variance) for variance in variances)
    k12 = jnp.sqrt(k11 * k22) * jnp.array([0, 0.3, 0.9, 0.9999, 1, -0.7, -1])
    found, exact, first, last = (
        jnp.stack(f(*k))
        for f, k in (
            (quadrature_dual(phi), (k11, k12, k22)),
            (dual, (k11, k12, k22)),
            (dual, (k11, k11, k11)),
            (dual, (k22, k22, k22)),
        )
    )
    scale = jnp.sqrt(first * last)[jnp.array([0, 1, 0])]
    assert (abs(found - exact) / scale).max() < 1e-6


@pytest.mark.parametrize("dual", [relu_dual, quadrature_dual(jax.nn.relu)])
def test_moments_of_an_input_that_is_zero_are_their_limit(dual):
    zero, one = jnp.zeros(()), jnp.ones(())
    for k22 in (zero, one):
        # A step is 1/2 in the mean, and independent of what is uncorrelated.
        np.testing.assert_allclose(dual(zero, zero, k22), [0, 0.25, 0], atol=1e-9)
    kernels = InfiniteMLP(dual=dual).kernels(jnp.array([[0.0, 0.0], [0.0, 1.0]]), 3)
    assert all(jnp.isfinite(kernel).all() for kernel in kernels)


def test_quadrature_refuses_what_has_not_converged():
    k = jnp.asarray(1.0)
    clipped = quadrature_dual(jax.nn.hard_tanh)
    with pytest.raises(ValueError, match=r"apart, more than 0.001: name its kinks"):
        clipped(k, 0.5 * k, k)
    assert all(jnp.isnan(moment) for moment in jax.jit(clipped)(k, 0.5 * k, k))
    second, slope, _ = quadrature_dual(jax.nn.hard_tanh, kinks=(-1.0, 1.0))(k, k, k)
    inside = math.erf(math.sqrt(0.5))  # of a standard normal variable in [-1, 1]
    np.testing.assert_allclose(slope, inside, rtol=1e-8)
    np.testing.assert_allclose(second, 1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi), rtol=1e-8)
    with pytest.raises(ValueError, match="apart"):  # its mass lies ten standard deviations out
        quadrature_dual(jnp.exp)(100 * k, 50 * k, 100 * k)
    with pytest.raises(ValueError, match="nodes is 64"):
        quadrature_dual(jnp.tanh, nodes=64)


@pytest.mark.parametrize(
    ("mlp", "expected"),
    [
        (WEIGHT_MEAN, [7.9603, 1.8581, 1.0447, 1.0005, 1.0000]),
        (PLAIN, [25.583, 21.711, 19.274, 17.417, 14.576]),
    ],
)
def test_condition_number_of_the_ntk_by_depth(mlp, expected):
    """Equicorrelated inputs, rho = 0.5, N = 32, at depths 4, 8, 13, 20, 50."""
    gram = 0.5 * jnp.eye(32) + 0.5
    measured = [condition_number(mlp.kernels(gram, depth)[1]) for depth in (4, 8, 13, 20, 50)]
    np.testing.assert_allclose(measured, expected, rtol=1e-4)


def test_ntk_recursion_is_the_sum_over_layers_of_kernel_times_later_derivatives():
    gram, depth = jnp.array([[1.0, 0.3], [0.3, 0.7]]), 5
    nngps, slopes = [gram], []
    for _ in range(depth - 1):
        nngp, slope = WEIGHT_MEAN.layer(nngps[-1])
        nngps.append(nngp)
        slopes.append(slope)
    expected = sum(nngp * math.prod(slopes[l:]) for l, nngp in enumerate(nngps))
    nngp, ntk = WEIGHT_MEAN.kernels(gram, depth)
    np.testing.assert_allclose(ntk, expected, rtol=1e-12)
    np.testing.assert_allclose(nngp, nngps[-1], rtol=1e-12)


def test_batch_norm_chi_at_the_known_batch_sizes():
    measured = [batch_norm_chi(batch) for batch in (8, 16, 32, 64)]
    np.testing.assert_allclose(measured, [1.788, 1.590, 1.522, 1.493], atol=5e-4)
    # An infinite batch subtracts the exact mean, as weight mean does.
    assert abs(batch_norm_chi(10**6) - WEIGHT_MEAN.chi()) < 1e-4


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="depth is 0"):
        PLAIN.kernels(jnp.eye(2), 0)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        PLAIN.kernels(jnp.ones((2, 3)), 1)
    with pytest.raises(ValueError, match=r"valid is 1\.5"):
        padded(1.5)
    with pytest.raises(ValueError, match="batch is 3"):
        batch_norm_chi(3)


@pytest.mark.parametrize("mlp", [PLAIN, WEIGHT_MEAN, InfiniteMLP(1.5, 0.3)])
def test_kernels_between_two_sets_are_blocks_of_the_kernels_of_all(mlp):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 4)))
    whole = mlp.kernels(x @ x.T / 4, 5)
    between = mlp.kernels_between(x[:3], x[2:], 5)
    for expected, found in zip(whole, between, strict=True):
        np.testing.assert_allclose(found, expected[:3, 2:], rtol=1e-10)
    with pytest.raises(ValueError, match=r"\(M, n_0\)"):
        mlp.kernels_between(x, x[:, :2], 5)


@pytest.mark.parametrize("mlp", [PLAIN, WEIGHT_MEAN, InfiniteMLP(1.5, 0.3)])
def test_kernels_of_inputs_with_themselves_have_derivatives(mlp):
    """What distilling a data set descends; the NTK's kink at equal inputs has slopes of +a and -a, which cancel."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, 3)))
    weights = jnp.asarray(rng.standard_normal((2, 4, 4)))

    def of_one_set(x: jax.Array) -> jax.Array:
        return sum((weight * kernel).sum() for weight, kernel in zip(weights, mlp.kernels(x @ x.T / 3, 4), strict=True))

    def of_two_sets(first: jax.Array) -> jax.Array:
        return sum(
            (weight * kernel).sum() for weight, kernel in zip(weights, mlp.kernels_between(first, x, 4), strict=True)
        )

    direction = jnp.asarray(rng.standard_normal(x.shape))
    for function in (of_one_set, of_two_sets):
        found = (jax.grad(function)(x) * direction).sum()
        step = 1e-4  # the truncation, of step^2, and rounding, 1e-16 / step, are both below the tolerance
        expected = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("mlp", [PLAIN, WEIGHT_MEAN])
def test_single_precision_knows_an_input_again(mlp):
    """Rounding next to a correlation of 1 would count by its root, 3e-4, in each layer."""
    x = np.random.default_rng(0).standard_normal((7, 40)).astype(np.float32)
    between = mlp.kernels_between(jnp.asarray(x), jnp.asarray(x[2:]), 20)
    exact = mlp.kernels(jnp.asarray(x.astype(float) @ x.T.astype(float) / 40), 20)
    for found, expected in zip(between, exact, strict=True):
        assert found.dtype == jnp.float32
        # Of 20 layers' rounding, with chi_1 of 1.47; centering leaves covariances near 0 of variances of 1.
        np.testing.assert_allclose(found, expected[:, 2:], rtol=3e-5, atol=1e-6)


TANH = quadrature_dual(jnp.tanh)


@pytest.mark.parametrize(
    "mlp", [InfiniteMLP(2.25, 0.05, dual=TANH), InfiniteMLP(0.8, 0.05, dual=TANH), InfiniteMLP(1.5, 0.1)]
)
def test_deep_layers_have_the_variance_and_the_correlation_of_the_fixed_points(mlp):
    """Poole et al. 2016: of chi and the correlation map at the variance that a layer keeps; the slow path iterates."""
    start = jnp.asarray([[1.0, 0.3], [0.3, 1.0]])
    nngp = jax.lax.fori_loop(0, 300, lambda _, nngp: mlp.layer(nngp)[0], start)
    assert abs(mlp.fixed_variance() - nngp[0, 0]) < 1e-6
    assert abs(mlp.fixed_correlation() - nngp[0, 1] / nngp[0, 0]) < 1e-6
    assert (mlp.chi() > 1) == (mlp.fixed_correlation() < 1 - 1e-3)


def test_where_no_variance_is_kept_one_is_asked_for():
    for mlp, limit in ((InfiniteMLP(2.5, 0.1), "inf"), (InfiniteMLP(0.5, 0.0, dual=TANH), "0")):
        with pytest.raises(ValueError, match=f"goes to {limit} with depth, .* give the variance"):
            mlp.chi()
        assert 0 < mlp.chi(1.0) < 2
    assert InfiniteMLP(1.5).chi() == InfiniteMLP(1.5).chi(3.0)  # of a ReLU without bias at any
