"""Kernels and moments against plain NumPy, Flax's own capture and the infinitely wide MLP."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import activation_kernel, from_linen, nngp
from mimicnorm_jax.diagnostics.tracing import View
from mimicnorm_jax.theory import WEIGHT_MEAN, S
from tests.diagnostics.networks import Convolutional, Normalized, draw, filled, resnet


def _convolved(x, kernel):
    """Stride 2, a border of 1, by loops."""
    x = np.pad(np.asarray(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    rows, columns = ((side - 3) // 2 + 1 for side in x.shape[1:3])
    patches = [[x[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] for j in range(columns)] for i in range(rows)]
    return np.stack([np.stack([np.einsum("nhwc,hwco->no", p, kernel) for p in row], 1) for row in patches], 1)


def test_kernels_of_a_convolution_against_plain_numpy(x64):
    x = draw(0, 5, 6, 5, 2)
    module = Convolutional()
    apply_fn, params = from_linen(module, filled(module, x))
    params["first"]["bias"] = params["first"]["bias"] + 0.7  # Added after the product, so seen by the next layer only.
    product = _convolved(x, np.asarray(params["first"]["kernel"]))
    pooled = np.maximum(product + 0.7, 0).mean((1, 2))
    expected = {"product": {"first": product, "head": pooled @ np.asarray(params["head"]["kernel"])}}
    expected["input"] = {"first": np.asarray(x), "head": pooled}
    for part, layers in expected.items():
        found = nngp.kernels(apply_fn, params, x, part=part)
        assert list(found) == ["first", "head"]
        for name, units in layers.items():
            units = units.reshape(5, -1)
            np.testing.assert_allclose(found[name], units @ units.T / units.shape[1], rtol=1e-12)


def _relu_net(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


def test_the_kernel_of_outputs_and_of_any_activation(x64):
    """Behind a bias and an activation too; the examples meet where a mean over them is taken."""
    x, params = draw(0, 5, 4), {"kernel": draw(1, 4, 6), "bias": draw(2, 6)}

    def activation(params, x):
        return jnp.tanh(x @ params["kernel"] + params["bias"][None]).reshape(len(x), 2, 3)

    h = np.asarray(activation(params, x)).reshape(5, 6)
    np.testing.assert_allclose(activation_kernel(activation, params, x), h @ h.T / 6, rtol=1e-13)
    np.testing.assert_allclose(activation_kernel(activation, params, x[:2], x2=x), h[:2] @ h.T / 6, rtol=1e-13)
    with pytest.raises(ValueError, match="influence one another"):
        activation_kernel(lambda params, x: x - x.mean(0, keepdims=True), params, x)
    with pytest.raises(ValueError, match="the examples are the first axis"):
        activation_kernel(lambda params, x: x.T, params, x)


def test_two_sets_of_inputs_give_the_corner_of_the_joint_kernel(x64):
    params, x = {"a": draw(0, 4, 9), "b": draw(1, 9, 2)}, draw(2, 7, 4)
    for compare in (nngp.kernels, nngp.correlations):
        joint = compare(_relu_net, params, x, View("b"), part="input")["b"]
        corner = compare(_relu_net, params, x[:3], View("b"), x2=x[3:], part="input")["b"]
        np.testing.assert_allclose(corner, joint[:3, 3:], rtol=1e-13)


def test_correlation_is_the_cosine_without_a_mean_subtracted(x64):
    """(1, 1), (2, 2) and (1, 0): cosines 1 and 1/sqrt 2; a centered cosine of (1, 1) would be 0/0."""
    x = jnp.array([[1.0, 1.0], [2.0, 2.0], [1.0, 0.0]])
    found = nngp.correlations(lambda params, x: x @ params["head"], {"head": jnp.eye(2)}, x)["head"]
    expected = np.ones((3, 3))
    expected[2, :2] = expected[:2, 2] = np.sqrt(0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-14)


@pytest.mark.parametrize("batch", [256, 3])
def test_moments_are_those_of_the_kernels(batch, x64):
    params, x = {"a": draw(0, 4, 9), "b": draw(1, 9, 2)}, draw(2, 7, 4)
    found = nngp.moments(_relu_net, params, x, batch=batch)
    kernels, correlations = nngp.kernels(_relu_net, params, x), nngp.correlations(_relu_net, params, x)
    pairs = [(i, j) for i in range(7) for j in range(i + 1, 7) if i // batch == j // batch]
    for name, moments in found.items():
        variance = np.diagonal(kernels[name])
        rho = np.array([correlations[name][i, j] for i, j in pairs])
        expected = [variance.mean(), variance.std(ddof=1), rho.mean(), np.sqrt((rho**2).mean())]
        got = [moments.mean_square, moments.spread, moments.correlation, moments.correlation_rms]
        np.testing.assert_allclose(got, expected, rtol=1e-12)
        assert (moments.units, moments.pairs) == (params[name].shape[1], len(pairs))


def test_residual_network_against_what_flax_captures():
    """Biases are zero, so a convolution's output is its product."""
    x, module = draw(0, 6, 8, 8, 3), resnet()
    variables = filled(module, x, train=False)
    apply_fn, params = from_linen(module, variables, train=False)
    capture = partial(module.apply, train=False, capture_intermediates=True, mutable=["intermediates"])
    state = jax.jit(capture)(variables, x)[1]
    captured = {
        "/".join(entry.key for entry in path[:-2]): value
        for path, value in jax.tree_util.tree_leaves_with_path(state["intermediates"])
    }
    found = nngp.moments(apply_fn, params, x)
    assert len(found) == 10
    for name, moments in found.items():
        squares = np.mean(np.asarray(captured[name], np.float64).reshape(6, -1) ** 2, 1)
        # Both are float32 and may sum in another order.
        np.testing.assert_allclose([moments.mean_square, moments.spread], [squares.mean(), squares.std(ddof=1)], 1e-4)


def test_correlations_of_a_wide_layer_follow_the_theory():
    """One draw at width 512 scatters by about 0.05, the mean of 16 by 0.013; a plain layer would give 0.61."""
    width, rho = 512, 0.5
    x = jnp.zeros((2, width), jnp.float32).at[0, 0].set(1).at[1, :2].set(jnp.array([rho, np.sqrt(1 - rho**2)]))

    def apply_fn(params, x):
        w = params["b"] - params["b"].mean(0, keepdims=True)
        return jax.nn.relu(x @ params["a"]) @ (w * jnp.sqrt(2 / ((width - 1) * S)).astype(x.dtype))

    seen = []
    for seed in range(16):
        keys = jax.random.split(jax.random.key(seed))
        params = {name: jax.random.normal(key, (width, width)) for name, key in zip("ab", keys, strict=True)}
        seen.append([float(rho[0, 1]) for rho in nngp.correlations(apply_fn, params, x).values()])
    expected = [rho, float(WEIGHT_MEAN.correlation_map(jnp.asarray(rho)))]
    np.testing.assert_allclose(np.mean(seen, 0), expected, atol=0.04)


def test_coupled_batch_is_normalized_as_one(x64):
    x = draw(0, 6, 3) + 1
    module = Normalized()
    apply_fn, params = from_linen(module, filled(module, x), mutable=["batch_stats"])
    first = np.asarray(x @ params["first"]["kernel"])
    normal = np.maximum((first - first.mean(0)) / np.sqrt(first.var(0) + 1e-5), 0)
    found = nngp.kernels(apply_fn, params, x, View("head", batch_coupled=True), part="input")["head"]
    np.testing.assert_allclose(found, normal @ normal.T / 7, rtol=1e-10)
    moments = nngp.moments(apply_fn, params, x, View("head", batch_coupled=True), part="input", batch=2)["head"]
    squares = (normal**2).mean(1)
    np.testing.assert_allclose([moments.mean_square, moments.spread], [squares.mean(), squares.std(ddof=1)], rtol=1e-10)
    assert moments.pairs == 15


def test_bad_input_is_named():
    params, x = {"first": jnp.ones((2, 3)), "last": jnp.ones((3, 1))}, jnp.ones((4, 2))

    def apply_fn(params, x):
        return x @ params["first"] @ params["last"]

    with pytest.raises(ValueError, match=r"unknown layer 'frist': did you mean first\?"):
        nngp.kernels(apply_fn, params, x, View(["last", "frist"]))
    with pytest.raises(ValueError, match=r"view is 'first': for layers by name say View\('first'\)"):
        nngp.kernels(apply_fn, params, x, "first")  # pyright: ignore
    with pytest.raises(ValueError, match="unknown part 'output'"):
        nngp.moments(apply_fn, params, x, part="output")
    with pytest.raises(ValueError, match=r"x2 has shape \(4, 3\), x \(4, 2\)"):
        nngp.correlations(apply_fn, params, x, x2=jnp.ones((4, 3)))
    with pytest.raises(ValueError, match=r"x2 has shape \(4, 3\), x \(4, 2\)"):
        nngp.correlations(apply_fn, params, x.tolist(), x2=jnp.ones((4, 3)).tolist())
    with pytest.raises(ValueError, match=r"2 of 4 examples \(x\[1\] is the first\)"):
        nngp.kernels(apply_fn, params, x.at[1, 0].set(jnp.nan).at[3, 1].set(jnp.inf))
    with pytest.raises(ValueError, match=r"1 of 2 examples"):
        nngp.kernels(apply_fn, params, x, x2=x[:2].at[1, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="1 examples, batch 256"):
        nngp.moments(apply_fn, params, x[:1])
    with pytest.raises(ValueError, match=r"shape \(0, 2\): give at least one"):
        nngp.kernels(apply_fn, params, x[:0])
    with pytest.raises(ValueError, match="has no layers to name"):
        nngp.names(lambda params, x: x * params["first"].sum(), params, x)


@pytest.mark.parametrize("part", ["product", "input"])
def test_examples_of_a_coupled_batch_are_found_where_the_kernel_comes_first(part, x64):
    """Also where there are as many of them as channels; where tokens are as many as they, nothing tells them apart."""
    x, w, view = draw(0, 4, 4), {"w": draw(1, 4, 4)}, View(batch_coupled=True)
    found = nngp.kernels(lambda params, x: (params["w"].T @ x.T).T, w, x, view, part=part)["w"]
    np.testing.assert_allclose(found, nngp.kernels(lambda params, x: x @ params["w"], w, x, part=part)["w"], rtol=1e-12)
    with pytest.raises(ValueError, match="which axis counts the 4 examples is not clear, of axes"):
        nngp.kernels(lambda params, x: (x @ params["w"]).sum(1), w, draw(2, 4, 4, 4), view, part=part)


def test_vanishing_layer_has_no_correlation():
    """A branch that ends in zeros has a kernel, of zeros, but no angle."""
    params, x = {"a": jnp.ones((2, 3)), "b": jnp.zeros((3, 1))}, jnp.ones((4, 2))
    assert not nngp.kernels(_relu_net, params, x)["b"].any()
    moments = nngp.moments(_relu_net, params, x)
    assert moments["b"].mean_square == 0
    assert np.isnan(moments["b"].correlation)
    np.testing.assert_allclose(moments["a"].correlation, 1, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-24, 1e20])
def test_moments_of_any_scale_that_numbers_have(scale):
    """Squares of float32 end at 1e-38 and 3e38."""
    params, x = {"w": draw(0, 5, 6), "v": draw(1, 6, 2)}, draw(2, 7, 5)
    small, plain = (
        nngp.moments(lambda p, x, s=s: (x @ (p["w"] * s) / s) @ p["v"], params, x)["w"] for s in (scale, 1.0)
    )
    np.testing.assert_allclose(small.mean_square, plain.mean_square * scale**2, rtol=1e-5)
    np.testing.assert_allclose(small.spread, plain.spread * scale**2, rtol=1e-5)
    np.testing.assert_allclose(small.correlation, plain.correlation, rtol=1e-4)
