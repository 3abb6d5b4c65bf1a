"""Lanczos' method against dense eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics.spectra import lanczos
from tests.diagnostics.networks import draw


def _matrix(eigenvalues, seed=0):
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))[0]
    return jnp.asarray(basis * np.asarray(eigenvalues) @ basis.T, jnp.result_type(float))


@jax.jit(static_argnames=("count", "num_matvecs", "tolerance"))
def _largest(matrix, count=1, num_matvecs=100, tolerance=1e-10):
    start = jax.random.normal(jax.random.key(0), (len(matrix),), matrix.dtype)
    return lanczos.largest(lambda v: matrix @ v, start, lanczos.Search(count, num_matvecs, tolerance))


def test_largest_eigenvalues_of_a_known_spectrum(x64):
    eigenvalues = np.concatenate([np.linspace(0, 1, 57), [1.5, 2.0, 7.0]])
    found = _largest(_matrix(eigenvalues), count=3)
    assert found.converged
    # An eigenvalue is off by the residual squared over the gap: (1e-10 * 7)^2 / 0.5, below rounding.
    np.testing.assert_allclose(found.values, [7.0, 2.0, 1.5], rtol=1e-13)
    assert found.num_matvecs < 60


def test_too_few_products_are_reported_and_the_residual_bounds_the_error(x64):
    eigenvalues = np.linspace(0, 1, 200)
    found = _largest(_matrix(eigenvalues), count=2, num_matvecs=8)
    assert not found.converged
    assert found.num_matvecs == 8
    for value, residual in zip(found.values, found.residuals, strict=True):
        assert abs(eigenvalues - value).min() <= residual
    assert found.values[0] < 1  # From below, always.


@pytest.mark.parametrize(("eigenvalues", "expected"), [([3.0] * 60, [3, 3, 3]), ([0] * 58 + [2, 5.0], [5, 2, 0])])
def test_an_exhausted_krylov_space_is_left(eigenvalues, expected, x64):
    """All equal, or of rank 2: the start vector spans one or three dimensions."""
    found = _largest(_matrix(eigenvalues), count=3)
    assert found.converged
    np.testing.assert_allclose(found.values, expected, atol=1e-13)


def test_zero_matrix_converges(x64):
    found = _largest(jnp.zeros((60, 60)), count=3)
    assert found.converged
    assert not found.values.any()


def test_no_ghosts_in_float32():
    """A large eigenvalue converges early; without reorthogonalization copies of it would follow."""
    eigenvalues = np.append(np.linspace(0.5, 1, 59), 1e4)
    found = _largest(_matrix(eigenvalues), count=60, tolerance=0.0)
    assert found.values.dtype == jnp.float32
    # The matrix itself is rounded: sqrt(60) entries of 1e4 * 2^-24, and Weyl's inequality.
    np.testing.assert_allclose(found.values, eigenvalues[::-1], atol=0.01)


def test_quadrature_has_the_moments_of_the_matrix(x64):
    matrix, start, num_matvecs = _matrix(np.linspace(0.1, 2, 20)), draw(1, 20), 5
    nodes, weights = jax.jit(lambda v: lanczos.quadrature(lambda u: matrix @ u, v, num_matvecs))(start)
    assert nodes.shape == weights.shape == (num_matvecs,)
    unit = np.asarray(start) / np.linalg.norm(start)
    for degree in range(2 * num_matvecs):
        expected = unit @ np.linalg.matrix_power(np.asarray(matrix), degree) @ unit
        np.testing.assert_allclose((weights * nodes**degree).sum(), expected, rtol=1e-11)
    # The next moment is not exact, or the test would not see a rule of too many nodes.
    beyond = unit @ np.linalg.matrix_power(np.asarray(matrix), 2 * num_matvecs) @ unit
    assert abs((weights * nodes ** (2 * num_matvecs)).sum() / beyond - 1) > 1e-6


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="count is 4: the matrix has 3"):
        _largest(jnp.eye(3), count=4)
    with pytest.raises(ValueError, match="count is 0"):
        _largest(jnp.eye(3), count=0)
    with pytest.raises(ValueError, match="num_matvecs is 1: 2 eigenvalues"):
        _largest(jnp.eye(3), count=2, num_matvecs=1)
