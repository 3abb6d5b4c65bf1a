"""Regression with kernels against other people's solvers and against the networks that it is about."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF
from sklearn.kernel_ridge import KernelRidge

from mimicnorm_jax.diagnostics import empirical_ntk
from mimicnorm_jax.diagnostics.ntk import PseudoLogit, linearize, ntk_operator
from mimicnorm_jax.diagnostics.regression import (
    Nystrom,
    class_targets,
    conjugate_gradients,
    gaussian_process,
    generalized_cross_validation,
    gradient_flow,
    ridge_regression,
)
from mimicnorm_jax.diagnostics.spectra import LinearOperator
from tests.diagnostics.regression.kernels import NEW, RNG, X, Y, rbf


def _network(params, x):
    return jnp.tanh(x @ params["first"]) @ params["last"]


def _params():
    rng = np.random.default_rng(1)
    return {"first": jnp.asarray(rng.standard_normal((3, 6))), "last": jnp.asarray(rng.standard_normal((6, 2)))}


def test_ridge_regression_is_that_of_scikit_learn():
    fit = ridge_regression(rbf(X, X), Y, ridge=0.1)
    theirs = KernelRidge(alpha=0.1, kernel="precomputed").fit(rbf(X, X), Y)
    np.testing.assert_allclose(fit.predict(rbf(NEW, X)), theirs.predict(rbf(NEW, X)), rtol=1e-10)
    assert fit.residual < 1e-13


def test_cross_validation_against_its_definition():
    kernel, ridges = rbf(X, X), np.array([1e-3, 1e-2, 0.1, 1.0])
    found = generalized_cross_validation(kernel, Y, ridges)
    for ridge, score in zip(ridges, found.scores, strict=True):
        rest = np.eye(12) - kernel @ np.linalg.inv(kernel + ridge * np.eye(12))
        by_hand = np.mean([np.mean((rest @ y) ** 2) / np.mean(np.diag(rest)) ** 2 for y in Y.T])
        np.testing.assert_allclose(score, by_hand, rtol=1e-8)
    assert found.ridge == ridges[np.argmin(found.scores)]
    # Noise without signal is best predicted by nothing: the largest ridge, which is said to be the end.
    assert generalized_cross_validation(np.eye(12) + 0 * kernel, Y, ridges).at_end


def test_cross_validation_finds_the_noise_and_the_fit_says_how():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((80, 1))
    y = np.sin(2 * x) + 0.1 * rng.standard_normal((80, 1))
    fit = ridge_regression(rbf(x, x), y)
    assert fit.gcv is not None
    assert not fit.gcv.at_end
    new = np.linspace(-1, 1, 40)[:, None]
    error = np.sqrt(np.mean((fit.predict(rbf(new, x)) - np.sin(2 * new)) ** 2))
    interpolated = ridge_regression(rbf(x, x), y, ridge=1e-10)
    assert error < 0.1 < np.sqrt(np.mean((interpolated.predict(rbf(new, x)) - np.sin(2 * new)) ** 2)) + 0.1


def test_a_kernel_of_all_pairs_of_outputs_is_one_matrix():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), _params())
    x, new = jnp.asarray(X, jnp.float32), jnp.asarray(NEW, jnp.float32)
    kernel, cross = empirical_ntk(_network, params, x), empirical_ntk(_network, params, new, x)
    fit = ridge_regression(kernel, Y, ridge=0.5)
    matrix = np.asarray(kernel, np.float64).transpose(0, 2, 1, 3).reshape(24, 24)
    alpha = np.linalg.solve(matrix + 0.5 * np.eye(24), Y.ravel()).reshape(12, 2)
    np.testing.assert_allclose(
        fit.predict(cross), np.einsum("mnop,np->mo", np.asarray(cross, np.float64), alpha), atol=1e-5
    )


def test_what_float32_cannot_tell_is_refused_and_float64_solves_it():
    scale = np.geomspace(1, 1e-9, 12)
    q = np.linalg.qr(RNG.standard_normal((12, 12)))[0]
    kernel = (q * scale) @ q.T
    with pytest.raises(ValueError, match=r"at least 1(\.0\d)?e-06, or compute the kernel in float64"):
        ridge_regression(kernel.astype(np.float32), Y, ridge=1e-8)
    with pytest.raises(ValueError, match="at least"):
        generalized_cross_validation(kernel.astype(np.float32), Y, [1e-8])
    assert generalized_cross_validation(kernel.astype(np.float32), Y).ridges[0] >= 1e-6 * (1 - 1e-6)
    with pytest.raises(ValueError, match=r"at least 0\.0"):
        ridge_regression(kernel, Y, ridge=1e-6, precision=jnp.bfloat16)
    # Relative to the largest condition number times float64's rounding.
    fit = ridge_regression(kernel, Y, ridge=0.0)
    np.testing.assert_allclose(kernel @ fit.coefficients, Y, atol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "targets", "message"),
    [
        (np.ones((3, 4)), Y[:3], r"\(N, N\), a square"),
        (np.array([[1.0, 0.5], [0.2, 1.0]]), Y[:2], "not symmetric"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), Y[:2], "not a number"),
        (np.eye(3), Y[:2], r"\(3, C\) or \(3,\)"),
        (np.ones((3, 3, 2)), Y[:3], r"kernel\[\.\.\., o\]"),
        (-np.eye(3), Y[:3], "not positive semidefinite"),
        (np.zeros((3, 3)), Y[:3], "zero"),
    ],
)
def test_what_is_no_kernel_is_refused(kernel, targets, message):
    with pytest.raises(ValueError, match=message):
        ridge_regression(kernel, targets)


def test_an_indefinite_kernel_is_refused_with_any_ridge():
    with pytest.raises(ValueError, match="not positive semidefinite"):
        ridge_regression(np.array([[1.0, 3.0], [3.0, 1.0]]), np.ones(2), ridge=1.0)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [(np.triu(np.ones((4, 4))), "not symmetric"), (np.diag([1, 1, 1, -0.9]), "not positive semidefinite")],
)
@pytest.mark.parametrize("kind", [np.float32, jnp.float16, jnp.bfloat16])
def test_no_precision_explains_everything(kernel, message, kind):
    with pytest.raises(ValueError, match=message):
        ridge_regression(kernel.astype(kind), np.arange(4.0))


def test_labels_as_targets():
    with pytest.raises(ValueError, match="run from 0 to 3"):
        class_targets([0, 3], 3)
    fit = ridge_regression(np.eye(3), class_targets([2, 0, 1], 3), ridge=0.1)
    assert fit.classify(np.eye(3)).tolist() == [2, 0, 1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rank", [0, 6])
def test_conjugate_gradients_on_a_network_are_cholesky_on_its_kernel(rank):
    params, x = _params(), jnp.asarray(X)
    apply_fn = PseudoLogit(_network)
    operator = ntk_operator(apply_fn, params, x, batch=5)
    preconditioner = Nystrom.of(operator, rank, jax.random.key(0)) if rank else None
    found = conjugate_gradients(operator, Y, 1e-3, preconditioner=preconditioner, tolerance=1e-10)
    exact = ridge_regression(empirical_ntk(apply_fn, params, x, output=0), Y, ridge=1e-3)
    np.testing.assert_allclose(
        found.coefficients, exact.coefficients, rtol=0, atol=1e-6 * abs(exact.coefficients).max()
    )
    between = ntk_operator(apply_fn, params, jnp.asarray(NEW), x)
    by_matrix = exact.predict(empirical_ntk(apply_fn, params, jnp.asarray(NEW), x, output=0))
    np.testing.assert_allclose(found.predict(between), by_matrix, rtol=0, atol=1e-6 * abs(by_matrix).max())


@pytest.mark.parametrize("seed", range(10))
def test_a_ridge_that_was_chosen_or_recommended_is_taken(seed):
    """Of float32 kernels whose smallest eigenvalues are rounding, and below 0."""
    x = np.random.default_rng(seed).standard_normal((60, 2))
    for kernel in (rbf(x, x).astype(np.float32), (x @ x.T).astype(np.float32)):
        assert np.linalg.eigvalsh(kernel.astype(np.float64))[0] < 0
        fit = ridge_regression(kernel, np.sin(x))
        assert ridge_regression(kernel, np.sin(x), fit.ridge).ridge == fit.gcv.ridge
        for refuses in (
            lambda kernel=kernel: ridge_regression(kernel, np.sin(x), 0.0),
            lambda kernel=kernel: generalized_cross_validation(kernel, np.sin(x), [1e-12]),
        ):
            with pytest.raises(ValueError, match="a ridge of at least") as refused:
                refuses()
            least = float(str(refused.value).split("at least ")[1].split(",")[0])
            assert ridge_regression(kernel, np.sin(x), least).ridge == least
            assert generalized_cross_validation(kernel, np.sin(x), [least]).ridge == least


def test_one_prediction_an_input_has_no_largest_class():
    fit = ridge_regression(rbf(X, X), np.sign(Y[:, 0]), 0.1)
    assert fit.predict(rbf(NEW, X)).shape == (5, 1)
    with pytest.raises(ValueError, match="no largest class"):
        fit.classify(rbf(NEW, X))


@pytest.mark.usefixtures("x64")
def test_all_outputs_by_products_are_those_of_the_kernel_of_all_pairs():
    params, x, new = _params(), jnp.asarray(X), jnp.asarray(NEW)
    found = conjugate_gradients(ntk_operator(_network, params, x), Y, 0.1, tolerance=1e-12)
    exact = ridge_regression(empirical_ntk(_network, params, x), Y, 0.1)
    between = ntk_operator(_network, params, new, x)
    expected = exact.predict(empirical_ntk(_network, params, new, x))
    assert found.outputs == 2
    np.testing.assert_allclose(found.predict(between), expected, rtol=1e-8)
    np.testing.assert_array_equal(found.classify(between), expected.argmax(1))


@pytest.mark.parametrize("most", [24, 25, 26, 27, 51])
def test_products_are_at_most_as_many_as_are_allowed(most):
    count = [0]
    matrix = jnp.diag(jnp.geomspace(1, 1e-9, 60))

    def product(v):
        jax.debug.callback(lambda: count.__setitem__(0, count[0] + 1))
        return matrix @ v

    with pytest.raises(ValueError, match="conjugate gradients"):
        conjugate_gradients(LinearOperator(product, product, 60, 60, jnp.float32), np.ones(60), 1e-9, max_matvecs=most)
    jax.effects_barrier()
    assert count[0] <= most


def _dense(matrix, dtype=jnp.float32):
    matrix = jnp.asarray(matrix, dtype)
    return LinearOperator(lambda v: matrix @ v, lambda v: v @ matrix, *matrix.shape, dtype)


def test_the_preconditioner_saves_products_as_its_theory_says():
    """Ten large eigenvalues are found by rank 20; what is left is conditioned like 2."""
    q = np.linalg.qr(np.random.default_rng(5).standard_normal((60, 60)))[0]
    values = np.r_[np.geomspace(1e4, 10, 10), np.full(50, 1e-2)]
    operator, y = _dense((q * values) @ q.T), RNG.standard_normal((60, 3))
    plain = conjugate_gradients(operator, y, 0.01, tolerance=1e-2)
    helped = conjugate_gradients(
        operator, y, 0.01, tolerance=1e-2, preconditioner=Nystrom.of(operator, 20, jax.random.key(0))
    )
    assert helped.num_matvecs <= 12 < plain.num_matvecs


def test_conjugate_gradients_say_why_they_stop():
    q = np.linalg.qr(np.random.default_rng(6).standard_normal((40, 40)))[0]
    matrix = (q * np.geomspace(1, 1e-9, 40)) @ q.T
    with pytest.raises(ValueError, match="after 3 products"):
        conjugate_gradients(_dense(matrix), RNG.standard_normal(40), 1e-3, max_matvecs=3)
    with pytest.raises(ValueError, match="what products in float32 tell"):
        conjugate_gradients(_dense(matrix), RNG.standard_normal(40), 1e-3, tolerance=1e-9)


def test_a_gaussian_process_is_that_of_scikit_learn():
    found = gaussian_process(rbf(X, X), rbf(NEW, X), rbf(NEW, NEW), Y, noise=0.1)
    theirs = GaussianProcessRegressor(RBF(1.0), alpha=0.1, optimizer=None).fit(X, Y[:, 0])
    mean, covariance = theirs.predict(NEW, return_cov=True)
    np.testing.assert_allclose(found.mean[:, 0], mean, rtol=1e-8)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-10)


def test_a_gaussian_process_factors_its_kernel_once(monkeypatch):
    """The fit's factor is handed on; solving the equations anew gives the same to float64 rounding."""
    calls = []
    for module in (scipy.linalg, np.linalg):
        original = module.cholesky
        monkeypatch.setattr(module, "cholesky", lambda *a, f=original, **k: calls.append(0) or f(*a, **k))
    train, cross, test = rbf(X, X), rbf(NEW, X), rbf(NEW, NEW)
    found = gaussian_process(train, cross, test, Y, noise=0.1)
    assert len(calls) == 1
    shifted = train + 0.1 * np.eye(len(train))
    # Condition number at most N / 0.1, in units of 1e-16.
    np.testing.assert_allclose(found.covariance, test - cross @ np.linalg.solve(shifted, cross.T), rtol=0, atol=1e-12)
    factor = ridge_regression(train, Y, 0.1).factor
    assert (np.tril(factor, -1) == 0).all()
    np.testing.assert_allclose(factor.T @ factor, shifted, rtol=0, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_gradient_flow_is_the_training_of_the_linearized_network():
    """Against the exponential of the parameters' own linear system: no kernel in it."""
    params, x, new = _params(), jnp.asarray(X), jnp.asarray(NEW)
    linear, flat = linearize(_network, params), jax.flatten_util.ravel_pytree(params)
    jacobian = np.asarray(jax.jacrev(lambda p: linear(flat[1](p), x).ravel())(flat[0]))
    wrong = np.asarray(_network(params, x)).ravel() - Y.ravel()
    kernel, cross = empirical_ntk(_network, params, x), empirical_ntk(_network, params, new, x)
    times = [0.0, 0.03, 0.4]
    found = gradient_flow(kernel, cross, Y, times, start=(_network(params, new), _network(params, x)))
    for time, prediction in zip(times, found, strict=True):
        # d theta / dt = -J^T (J theta + wrong) with theta(0) = 0, as one matrix exponential with a constant 1 beside.
        size = flat[0].size
        system = np.zeros((size + 1, size + 1))
        system[:size, :size], system[:size, size] = -jacobian.T @ jacobian, -jacobian.T @ wrong
        step = scipy.linalg.expm(system * time)[:size, size]
        np.testing.assert_allclose(prediction, linear(flat[1](flat[0] + step), new), atol=1e-8)


def test_the_end_of_gradient_flow_is_regression_without_ridge_and_noise_is_not_fitted():
    end = gradient_flow(rbf(X, X), rbf(NEW, X), Y, [np.inf])[0]
    np.testing.assert_allclose(end, ridge_regression(rbf(X, X), Y, ridge=0.0).predict(rbf(NEW, X)), rtol=1e-6)
    singular = np.outer(Y[:, 0], Y[:, 0]).astype(np.float32)
    with pytest.raises(ValueError, match="stop by"):
        gradient_flow(singular, singular, Y, [np.inf])
    assert np.isfinite(gradient_flow(singular, singular, Y, [10.0])).all()
