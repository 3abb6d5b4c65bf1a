"""Dynamic tanh: bounded, elementwise, affine where its argument is small."""

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax.linen import DynamicTanh

PARAMS = {"alpha": np.array(0.7), "scale": np.array([1.5, -0.5, 2.0]), "bias": np.array([0.1, 0.2, -0.3])}


def _x(size=1.0):
    return size * jax.random.normal(jax.random.key(0), (4, 5, 3), float)


def test_values_and_every_gradient_written_out(x64):
    """The gradients by hand: gamma alpha (1 - t^2) of the input, gamma x (1 - t^2) of alpha, t of gamma, 1 of beta."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    x, ct = _x(), jax.random.normal(jax.random.key(1), (4, 5, 3), float)
    layer = DynamicTanh(dtype=float, param_dtype=float)
    y, pull = jax.vjp(lambda params, x: layer.apply({"params": params}, x), params, x)
    found, dx = pull(ct)
    t = np.tanh(0.7 * x)
    gamma, slope = params["scale"], 1 - t**2
    np.testing.assert_allclose(y, gamma[None, None] * t + params["bias"][None, None], rtol=1e-12)
    np.testing.assert_allclose(dx, ct * gamma[None, None] * params["alpha"] * slope, rtol=1e-10)
    np.testing.assert_allclose(found["alpha"], (ct * gamma[None, None] * x * slope).sum(), rtol=1e-10)
    np.testing.assert_allclose(found["scale"], (ct * t).sum((0, 1)), rtol=1e-10)
    np.testing.assert_allclose(found["bias"], ct.sum((0, 1)), rtol=1e-10)


def test_it_is_affine_for_small_and_bounded_for_large_inputs(x64):
    """tanh z = z - z^3 / 3 + ..., and |tanh| <= 1."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    layer, gamma, beta = DynamicTanh(dtype=float, param_dtype=float), params["scale"], params["bias"]
    small = _x(1e-4)
    linear = params["alpha"] * gamma[None, None] * small + beta[None, None]
    bound = (0.7 * abs(small)).max() ** 3 / 3 * abs(gamma).max()
    assert abs(layer.apply({"params": params}, small) - linear).max() < 1.01 * bound
    large = layer.apply({"params": params}, _x(1e8)) - beta[None, None]
    np.testing.assert_allclose(abs(large), jnp.broadcast_to(abs(gamma)[None, None], large.shape), rtol=1e-12)
