"""Growth per layer against exact cases, an explicit tangent and the theory's chi."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import from_linen, perturbation_growth
from mimicnorm_jax.diagnostics.propagation import Growth
from mimicnorm_jax.diagnostics.tracing import View
from mimicnorm_jax.theory import mean_field
from tests.diagnostics.networks import draw, filled, resnet

KEY = jax.random.key(0)


def _mlp(kind):
    """A ReLU MLP at its initialization: its parameters are the kernels before centering, `(L, n, n)`."""

    def apply_fn(params, x):
        for i in range(len(params)):
            w = params[f"layer{i}"]
            n = len(w)
            if i == 0:
                x = x @ (w * n**-0.5)
                continue
            if kind == "batch norm":
                x = (x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True))
            if kind == "weight mean":
                w = (w - w.mean(0, keepdims=True)) * math.sqrt(n / (n - 1) / mean_field.S)
            x = jax.nn.relu(x) @ (w * math.sqrt(2 / n))
        return x

    return apply_fn


def _kernels(seed, depth, width):
    rng = np.random.default_rng(seed)
    return {f"layer{i}": jnp.asarray(rng.standard_normal((width, width)), jnp.float32) for i in range(depth)}


@pytest.mark.parametrize(
    ("kind", "chi", "tolerance"),
    [
        # Over 40 networks the rate of one scattered by 0.048, 0.037 and 0.021: three standard errors of 16.
        ("weight mean", mean_field.WEIGHT_MEAN.chi() * (1 - 1.53 / 128), 0.036),
        ("plain", 1.0, 0.028),
        ("batch norm", mean_field.batch_norm_chi(32), 0.016),
    ],
)
def test_mlps_grow_by_the_theorys_chi(kind, chi, tolerance):
    """Mean of 16 networks of width 128."""
    apply_fn, coupled, rates = _mlp(kind), kind == "batch norm", []
    for seed in range(16):
        x = jnp.asarray(draw(seed, 32 if coupled else 4, 128), jnp.float32)
        found = perturbation_growth(
            apply_fn, _kernels(seed, 16, 128), x, View(batch_coupled=coupled), key=jax.random.key(seed), num_samples=2
        )
        rates.append(found.rate(first="layer1")[0])
    assert abs(np.mean(rates) - chi) < tolerance


def test_residual_network_against_tangents_of_what_flax_captures():
    """The same tangents pushed through the module with Flax's own capture; biases are zero."""
    x, module = draw(0, 3, 8, 8, 3), resnet()
    variables = filled(module, x, train=False)
    apply_fn, params = from_linen(module, variables, train=False)
    found = perturbation_growth(apply_fn, params, x, key=KEY, num_samples=2)

    def captured(x):
        return module.apply(variables, x, train=False, capture_intermediates=True, mutable=["intermediates"])[1]

    push, logs = jax.jit(lambda x, tangent: jax.jvp(captured, (x,), (tangent,))), []
    for tangent in jax.random.normal(KEY, (2, 3, 1, 8, 8, 3))[:, :, 0]:
        signals, tangents = push(x, tangent)
        squares = [
            {
                "/".join(entry.key for entry in path[1:-2]): np.mean(np.asarray(value).reshape(3, -1) ** 2, 1)
                for path, value in jax.tree_util.tree_leaves_with_path(tree)
            }
            for tree in (tangents, signals)
        ]
        logs.append([np.log(squares[0][name] / squares[1][name]) for name in found.names])
    expected = np.mean(logs, 0).T
    assert found.log_ratios.shape == (3, 10)
    np.testing.assert_allclose(found.log_ratios, expected, atol=1e-4)  # Both in float32.
    factors, errors = found.factors()
    np.testing.assert_allclose(np.log(factors), np.diff(expected, axis=1).mean(0), atol=2e-4)
    np.testing.assert_allclose(errors / factors, np.diff(expected, axis=1).std(0, ddof=1) / np.sqrt(3), atol=2e-4)


def _explosive(depth):
    """Signals stay 1 or -1 while tangents grow by 1e6 a layer."""

    def apply_fn(params, x):
        for i in range(depth):
            x = jnp.sign(x) + 1e6 * (x - jax.lax.stop_gradient(x))
            x = x @ params[f"layer{i}"]
        return x

    return apply_fn, {f"layer{i}": jnp.eye(2, dtype=jnp.float32) for i in range(depth)}


def test_squares_beyond_float32_are_counted_in_logarithms():
    """10^72 in mean square after 6 layers; after 7 the tangent itself overflows, and that is an error."""
    x = jnp.asarray(draw(0, 3, 2), jnp.float32)
    found = perturbation_growth(*_explosive(6), x, key=KEY)
    assert (found.log_ratios[:, -1] > math.log(1e70)).all()
    np.testing.assert_allclose(found.rate(), [1e12, 0], rtol=1e-4, atol=1e7)
    np.testing.assert_allclose(found.factors()[0], np.full(5, 1e12), rtol=1e-4)
    with pytest.raises(ValueError, match="overflows float32 at layer 'layer6', the signal does not"):
        perturbation_growth(*_explosive(7), x, key=KEY)


def test_vanishing_layer_has_no_growth_and_hides_no_other():
    """A branch that ends in zeros, beside a path that doubles the tangent against the signal."""
    params = {"first": jnp.eye(2), "zero": jnp.zeros((2, 2)), "last": jnp.eye(2)}

    def apply_fn(params, x):
        z = x @ params["first"]
        z = z + z @ params["zero"]
        return (z + (z - jax.lax.stop_gradient(z))) @ params["last"]

    found = perturbation_growth(apply_fn, params, draw(0, 3, 2), key=KEY)
    assert np.isnan(found.factors()[0]).all()
    factor, error = perturbation_growth(apply_fn, params, draw(0, 3, 2), View(["last", "first"]), key=KEY).rate()
    np.testing.assert_allclose([factor, error], [4, 0], atol=1e-5)
    np.testing.assert_allclose(found.rate()[0], 2, rtol=1e-6)  # Per step, over two.


def test_standard_error_of_one_example_is_over_tangents():
    found = perturbation_growth(_mlp("plain"), _kernels(0, 4, 16), draw(0, 1, 16), key=KEY, num_samples=5)
    assert found.log_ratios.shape == (5, 4)
    logs = (found.log_ratios[:, -1] - found.log_ratios[:, 1]) / 2
    factor = np.exp(logs.mean())
    expected = [factor, factor * logs.std(ddof=1) / np.sqrt(5)]
    np.testing.assert_allclose(found.rate("layer1", "layer3"), expected, rtol=1e-12)


def test_bad_input_is_named():
    apply_fn, params, x = _mlp("plain"), _kernels(0, 3, 4), draw(0, 2, 4)
    with pytest.raises(ValueError, match="unknown layer 'layer7'"):
        perturbation_growth(apply_fn, params, x, View(["layer7"]), key=KEY)
    with pytest.raises(ValueError, match="the layers are layer1: growth"):
        perturbation_growth(apply_fn, params, x, View(["layer1"]), key=KEY)
    with pytest.raises(ValueError, match="num_samples is 1: a standard error"):
        perturbation_growth(apply_fn, params, x[:1], key=KEY, num_samples=1)
    with pytest.raises(ValueError, match="num_samples is 1: a standard error"):
        perturbation_growth(apply_fn, params, x, View(batch_coupled=True), key=KEY, num_samples=1)
    with pytest.raises(ValueError, match="num_samples is 0"):
        perturbation_growth(apply_fn, params, x, key=KEY, num_samples=0)
    with pytest.raises(ValueError, match="x is int32"):
        perturbation_growth(apply_fn, params, jnp.ones((2, 4), jnp.int32), key=KEY)
    with pytest.raises(ValueError, match="infinite outputs or NaN for 1 of 2"):
        perturbation_growth(apply_fn, params, x.at[0, 0].set(jnp.nan), key=KEY)
    found = Growth(("a", "b"), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="first is layer 'b', last is layer 'a'"):
        found.rate("b", "a")
    with pytest.raises(ValueError, match="unknown layer 'c'"):
        found.rate("c")
