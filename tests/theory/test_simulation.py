"""Measurements on random MLPs against slower ways to the same numbers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import unit_diagonal
from mimicnorm_jax.theory import KINDS, random_mlp, simulation

pytestmark = pytest.mark.usefixtures("x64")


def test_inputs_have_the_gram_matrix_asked_for():
    gram = np.asarray(simulation.equicorrelated(4, 0.3))
    np.testing.assert_allclose(gram, [[1 if i == j else 0.3 for j in range(4)] for i in range(4)])
    x = np.asarray(simulation.inputs_of(jnp.asarray(gram)))
    np.testing.assert_allclose(x @ x.T / 4, gram, atol=1e-12)
    sphere = np.asarray(simulation.on_the_sphere(jax.random.key(0), 5, 7))
    np.testing.assert_allclose((sphere**2).mean(1), 1, rtol=1e-12)


@pytest.mark.parametrize("kind", ["weight mean", "BatchNorm"])
def test_tangent_growth_against_finite_differences(kind):
    mlp = replace(KINDS[kind](inputs=8, width=16, depth=3, outputs=16), last_norm=kind == "BatchNorm")
    params, step = mlp.init(jax.random.key(0)), 1e-6
    x, tangent = 8**0.5 * np.eye(8)[:4], 8**0.5 * np.eye(8)[4:]
    ahead, behind = (mlp.preactivations(params, jnp.asarray(x + sign * step * tangent)) for sign in (1, -1))
    energy = np.array([((np.asarray(a) - np.asarray(b)) ** 2).sum() for a, b in zip(ahead, behind, strict=True)])
    np.testing.assert_allclose(simulation.tangent_growth(mlp, params), energy[1:] / energy[:-1], rtol=1e-6)


def test_jacobian_of_a_layer_is_its_centered_kernel_at_active_units():
    mlp = random_mlp.weight_mean(inputs=1, width=16, depth=2, outputs=16)
    params = mlp.init(jax.random.key(0))
    kernel = np.asarray(params["layer2"])
    active = np.asarray(params["layer1"])[0] > 0
    expected = (kernel - kernel.mean(0)).T * active
    np.testing.assert_allclose(simulation.jacobian(mlp, params), expected, atol=1e-14)


@pytest.mark.parametrize("kind", ["weight mean", "BatchNorm"])
def test_tangent_kernel_and_shares_against_explicit_jacobians(kind):
    mlp, key = KINDS[kind](inputs=4, width=8, depth=3, outputs=2), jax.random.key(0)
    x = jax.random.normal(key, (5, 4))
    params = mlp.init(jax.random.fold_in(key, 0))
    variances = {"layer1": 1 / 4, "layer2": mlp.weight_variance / 8, "layer3": mlp.weight_variance / 8}
    jacobian = jax.jacrev(mlp.apply)(params, x)
    by_layer = np.array([v * np.einsum("noij,moij->nm", jacobian[k], jacobian[k]) / 2 for k, v in variances.items()])
    measured = simulation.tangent_kernels(mlp, x, key, 1)[0]
    np.testing.assert_allclose(measured, by_layer.sum(0), rtol=1e-9, atol=1e-12)
    traces = np.trace(by_layer, axis1=1, axis2=2)
    np.testing.assert_allclose(simulation.layer_shares(mlp, x, key, 1)[0], traces / traces.sum(), rtol=1e-9)


def test_unit_diagonal_leaves_no_scale():
    root = np.random.default_rng(0).normal(size=(2, 3, 3))
    kernels = root @ root.transpose(0, 2, 1)
    scale = np.array([1.0, 5.0, 0.1])
    scaled = unit_diagonal(kernels * scale[:, None] * scale[None, :])
    np.testing.assert_allclose(scaled, unit_diagonal(kernels), rtol=1e-12)
    np.testing.assert_allclose(np.diagonal(scaled, axis1=1, axis2=2), 1, rtol=1e-12)
