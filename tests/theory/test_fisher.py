"""The bound on the Fisher information, held to networks and gradients written out in NumPy: no line of the library."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import curvature
from mimicnorm_jax.diagnostics.spectra import Search
from mimicnorm_jax.theory import PairMoments, Stack, fisher_bound

DENSE = Stack((32, 64, 64), bias_variance=0.5)
POOLED = Stack((4, 24, 24), side=5, window=3, pooled=True)
FLAT = Stack((4, 24, 24), side=7, window=3, strides=2)


def _draw(stack, rng):
    sizes = (*stack.channels, 1)
    kernels = [
        rng.standard_normal((fan_in, out)) * (stack.weight_variance / fan_in) ** 0.5
        for fan_in, out in zip(stack.fan_ins, sizes[1:], strict=True)
    ]
    return kernels, [rng.standard_normal(out) * stack.bias_variance**0.5 for out in sizes[1:-1]]


def _places(side, window, strides):
    starts = range(0, side - window + 1, strides)
    return [[(a + i) * side + b + j for i in range(window) for j in range(window)] for a in starts for b in starts]


def _gradients(stack, kernels, biases, x):
    """Each example's gradient by each kernel `(N, F, C)`, BatchNorm's statistics held fixed; x `(N, positions, C)`."""
    h, kept = x, []
    for side, kernel, bias in zip(stack.sides, kernels, biases, strict=False):
        places = _places(side, stack.window, stack.strides)
        patches = np.stack([h[:, place].reshape(len(x), -1) for place in places], 1)
        z = patches @ kernel + bias
        scale = 1.0 if stack.gamma is None else stack.gamma / z.std((0, 1))
        u = z if stack.gamma is None else scale * (z - z.mean((0, 1)))
        kept.append((places, patches, kernel, scale * (u > 0), h.shape))
        h = np.maximum(u, 0)
    count = h.shape[1]
    last = h.mean(1) if stack.pooled else h.reshape(len(x), -1)
    found = [last[:, :, None]]
    by_h = np.broadcast_to(kernels[-1][:, 0], last.shape)
    by_h = np.repeat(by_h[:, None] / count, count, 1) if stack.pooled else by_h.reshape(h.shape)
    for places, patches, kernel, slope, shape in reversed(kept):
        by_z = by_h * slope
        found.append(np.einsum("naf,nac->nfc", patches, by_z))
        by_patch, by_h = by_z @ kernel.T, np.zeros(shape)
        for a, place in enumerate(places):
            by_h[:, place] += by_patch[:, a].reshape(len(x), len(place), -1)
    return found[::-1]


def _mean_gradients(stack, draws, samples=48):
    """Squared mean gradient by layer, the mean over networks."""
    found = []
    for seed in range(draws):
        rng = np.random.default_rng(seed)
        kernels, biases = _draw(stack, rng)
        x = rng.standard_normal((samples, stack.side**2, stack.channels[0]))
        gradients = _gradients(stack, kernels, biases, x)
        found.append([(gradient.mean(0) ** 2).sum() for gradient in gradients])
    return np.mean(found, 0), np.std(found, 0, ddof=1) / draws**0.5


@pytest.mark.parametrize("gamma", [None, 2.0])
@pytest.mark.parametrize("stack", [DENSE, POOLED, FLAT], ids=["dense", "pooled", "flat"])
def test_each_layer_s_part_is_the_squared_mean_gradient_of_networks_written_out(stack, gamma):
    """Within three standard errors, the 10 % by which these widths are off their limit, and terms of order one.

    Such a term is in the first layer, where the limit has only what is proportional to the number of inputs: pairs of
    examples that happen to be alike also have slopes that are.
    """
    stack = replace(stack, gamma=gamma)
    measured, error = _mean_gradients(stack, draws=60)
    expected = fisher_bound(stack, samples=48)
    assert (abs(measured - expected) < 3 * error + 0.1 * expected + 0.01 * expected.sum()).all()


def test_inputs_that_differ_by_position_need_the_sum_of_products():
    """A pattern that all images share: what two have in common is at the same position; the printed form forgets it."""
    stack, draws, rng = Stack((4, 24), side=5, window=3), 60, np.random.default_rng(0)
    measured, moments = [], []
    for _ in range(draws):
        kernels, biases = _draw(stack, rng)
        x = (rng.standard_normal((1, 25, 4)) + rng.standard_normal((48, 25, 4))) / 2**0.5
        measured.append((_gradients(stack, kernels, biases, x)[0].mean(0) ** 2).sum())
        moments.append(PairMoments.of(x))
    inputs = PairMoments(*np.mean(moments, 0))
    np.testing.assert_allclose(inputs, (1, 0, 0.5, 0), atol=0.05)
    expected = fisher_bound(stack, inputs)[0]
    error = np.std(measured, ddof=1) / draws**0.5
    assert abs(np.mean(measured) - expected) < 3 * error + 0.1 * expected
    # Derivatives at different positions have nothing in common: each has weights of its own in the last layer.
    derivatives = 2 / 9 * (np.pi / 2 + np.arcsin(0.5)) / (2 * np.pi)
    printed = 36 * (8 * 0 + derivatives) * (8 * 0 + 0.5)
    np.testing.assert_allclose(expected / printed, 9, rtol=0.1)


def test_moments_of_inputs_are_those_of_loops():
    x = np.random.default_rng(0).standard_normal((3, 2, 2, 5)) + 1
    flat, products = x.reshape(3, 4, 5), {}
    for i in range(3):
        for j in range(3):
            for a in range(4):
                for b in range(4):
                    products.setdefault((i == j, a == b), []).append(flat[i, a] @ flat[j, b] / 5)
    order = [(True, True), (True, False), (False, True), (False, False)]
    np.testing.assert_allclose(PairMoments.of(x), [np.mean(products[kind]) for kind in order], rtol=1e-12)


@pytest.mark.parametrize("gamma", [None, 2.0])
def test_measured_eigenvalue_is_that_of_the_exact_matrix_and_above_its_bound(gamma):
    """Of all entries of F, from gradients written out, for one network; F and its kernels' block."""
    stack = Stack((8, 16, 16), gamma=gamma, differentiated=False)
    rng = np.random.default_rng(0)
    kernels, biases = _draw(stack, rng)
    x = rng.standard_normal((32, 1, 8))
    gradients = np.concatenate([g.reshape(32, -1) for g in _gradients(stack, kernels, biases, x)], 1)
    exact = np.linalg.eigvalsh(gradients.T @ gradients / 32)[-1]
    with jax.enable_x64(True):
        params = {f"layer{i + 1}": kernel[None, None] for i, kernel in enumerate(kernels)}
        search = Search(tolerance=1e-6)
        found = curvature.gauss_newton_eigenvalues(
            stack.apply, params, x[:, 0], key=jax.random.key(0), loss="squared", search=search
        )
    np.testing.assert_allclose(found.values[0], exact, rtol=1e-9)
    assert exact >= (gradients.mean(0) ** 2).sum()


def test_images_too_small_and_rates_of_no_quadratic_are_refused():
    with pytest.raises(ValueError, match="side is 3: 2 convolutions of window 3 and strides 1 leave nothing"):
        fisher_bound(Stack((1, 2, 2), side=3, window=3))
    with pytest.raises(ValueError, match="samples is 0"):
        fisher_bound(DENSE, samples=0)
    normed = replace(DENSE, gamma=1.0)
    for nothing_varies in ({"samples": 1}, {"inputs": PairMoments(1, 1, 1, 1)}, {"inputs": PairMoments(0, 0, 0, 0)}):
        with pytest.raises(ValueError, match="BatchNorm divides by a variance of 0"):
            fisher_bound(normed, **nothing_varies)
    # One image of several positions varies.
    assert np.isfinite(fisher_bound(replace(POOLED, side=7, gamma=1.0), samples=1)).all()
    with pytest.raises(ValueError, match=r"x has shape \(1, 3\)"):
        PairMoments.of(np.ones((1, 3)))
    assert curvature.largest_stable_rate(4.0, 0.5) == 0.75
    for wrong in ((0.0, 0.0), (float("nan"), 0.0), (1.0, 1.0)):
        with pytest.raises(ValueError, match=r"eigenvalue|momentum"):
            curvature.largest_stable_rate(*wrong)
