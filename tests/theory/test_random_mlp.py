"""Random MLPs against NumPy, and the symmetries that their kind promises."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.theory import KINDS, random_mlp

pytestmark = pytest.mark.usefixtures("x64")


def _normalize(z):
    return (z - z.mean(0)) / z.std(0)


@pytest.mark.parametrize("last_norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_against_numpy(kind, last_norm):
    mlp = replace(KINDS[kind](inputs=5, width=16, depth=4, outputs=3), last_norm=last_norm)
    params = mlp.init(jax.random.key(0))
    z = np.random.default_rng(0).normal(size=(8, 5))
    measured = mlp.preactivations(params, jnp.asarray(z))
    for layer in range(1, 5):
        kernel = np.asarray(params[f"layer{layer}"])
        if layer > 1:
            z = np.maximum(z, 0)
            kernel = kernel - kernel.mean(0) if kind == "weight mean" else kernel
        z = z @ kernel
        if last_norm if layer == 4 else kind == "BatchNorm":
            z = _normalize(z)
        np.testing.assert_allclose(measured[layer - 1], z, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "variance"), [("plain", 2 / 400), ("weight mean", 2 / 399 / (1 - 1 / np.pi)), ("BatchNorm", 2 / 400)]
)
def test_kernels_are_independent_and_of_the_theory_s_variance(kind, variance):
    mlp = KINDS[kind](inputs=300, width=400, depth=3, outputs=400)
    first, second, third = (np.asarray(kernel) for kernel in mlp.init(jax.random.key(1)).values())
    # Relative standard error of a variance of k numbers: sqrt(2 / k).
    np.testing.assert_allclose(first.var() * 300, 1, atol=5 * (2 / first.size) ** 0.5)
    for kernel in (second, third):
        np.testing.assert_allclose(kernel.var() / variance, 1, atol=5 * (2 / kernel.size) ** 0.5)
        np.testing.assert_allclose(mlp.init_variance(("layer2",), jnp.asarray(kernel)), variance, rtol=1e-12)
    assert abs(np.corrcoef(second.ravel(), third.ravel())[0, 1]) < 5 / 400


def test_only_centered_kernels_ignore_a_constant_per_output():
    x = jax.random.normal(jax.random.key(1), (4, 5))
    for make, ignores in ((random_mlp.plain, False), (random_mlp.weight_mean, True)):
        mlp = make(inputs=5, width=16, depth=3, outputs=2)
        params = mlp.init(jax.random.key(0))
        shifted = {**params, "layer2": params["layer2"] + jnp.arange(16.0)[None, :]}
        assert np.allclose(mlp.apply(params, x), mlp.apply(shifted, x), atol=1e-11) == ignores
        moved_first = {**params, "layer1": params["layer1"] + 1}
        assert not np.allclose(mlp.apply(params, x), mlp.apply(moved_first, x), atol=1e-3)
