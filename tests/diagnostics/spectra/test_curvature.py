"""Eigenvalues by products against dense matrices, and against gradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import curvature, from_linen
from mimicnorm_jax.diagnostics.spectra import Search
from tests.diagnostics.networks import Convolutional, Normalized, draw, filled

KEY = jax.random.key(0)


def _network(kind):
    """A convolutional network, or one whose examples are coupled by BatchNorm."""
    if kind == "coupled":
        x = 1 + draw(0, 6, 4)
        return *from_linen(module := Normalized(), filled(module, x), mutable=["batch_stats"]), x
    x = draw(0, 5, 6, 6, 2)
    return *from_linen(module := Convolutional(), filled(module, x)), x


def _dense(apply_fn, params, x):
    """The outputs `(N, O)` and the Jacobian `(N, O, P)` by all parameters."""
    jacobian = jax.jit(jax.jacrev(lambda params: apply_fn(params, x)))(params)
    rows = [leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(jacobian)]
    return np.asarray(jax.jit(apply_fn)(params, x)), np.concatenate(rows, -1)


@pytest.mark.parametrize("kind", ["independent", "coupled"])
def test_against_dense_matrices(kind, x64):
    """The tangent kernel J J^T, and G = J^T H J / N with H differentiated from the loss itself."""
    apply_fn, params, x = _network(kind)
    outputs, jacobian = _dense(apply_fn, params, x)
    losses = {"softmax": lambda f: jax.nn.logsumexp(f) - f[0], "squared": lambda f: 0.5 * jnp.sum((f - 3.0) ** 2)}
    dense, found = {}, {}
    if kind == "coupled":
        flat = jacobian.reshape(-1, jacobian.shape[-1])
        dense["ntk"] = flat @ flat.T
        found["ntk"] = curvature.ntk_eigenvalues(apply_fn, params, x, key=KEY, search=Search(3, tolerance=1e-8))
        del losses["squared"]
    for name, loss in losses.items():
        hessians = jax.jit(jax.vmap(jax.hessian(loss)))(outputs)
        dense[name] = np.einsum("nop,noq,nqr->pr", jacobian, hessians, jacobian) / len(x)
        options = {"key": KEY, "loss": name, "search": Search(3, tolerance=1e-8)}
        found[name] = curvature.gauss_newton_eigenvalues(apply_fn, params, x, **options)
    for name, matrix in dense.items():
        assert found[name].converged
        np.testing.assert_allclose(found[name].values, np.linalg.eigvalsh(matrix)[:-4:-1], rtol=1e-10)


def test_gradient_descent_diverges_above_two_over_the_largest_eigenvalue(x64):
    """On a model that is linear in its parameters, and on none below."""
    x, targets, kernel = draw(0, 8, 3), draw(1, 8, 2), {"kernel": draw(2, 3, 2)}

    def apply_fn(params, x):
        return x @ params["kernel"]

    sharpness = curvature.gauss_newton_eigenvalues(
        apply_fn, kernel, x, key=KEY, loss="squared", search=Search(tolerance=1e-8)
    )
    gradient = jax.grad(lambda params: 0.5 * jnp.sum((apply_fn(params, x) - targets) ** 2) / len(x))

    @jax.jit
    def descend(rate):
        step = lambda _, params: jax.tree.map(lambda p, g: p - rate * g, params, gradient(params))  # noqa: E731
        return jnp.linalg.norm(jax.lax.fori_loop(0, 4000, step, kernel)["kernel"])

    # 4000 steps at 1 % from the edge multiply the top eigenvector's share by 1.02^4000 or 0.98^4000.
    assert descend(0.99 * 2 / sharpness.values[0]) < 10
    assert descend(1.01 * 2 / sharpness.values[0]) > 1e30


def _head(params, x):
    return x @ params["kernel"]


def test_bfloat16_network_is_summed_in_float32():
    """At a zero kernel p = 1/3, so the largest eigenvalue is that of X^T X / N over 3; rounding is 0.4 % a product."""
    params, x = {"kernel": jnp.zeros((4, 3), jnp.bfloat16)}, draw(0, 7, 4).astype(jnp.bfloat16)
    expected = np.linalg.eigvalsh(np.asarray((x.T @ x).astype(jnp.float32)))[-1] / 21
    found = curvature.gauss_newton_eigenvalues(_head, params, x, key=KEY, search=Search(tolerance=0.02))
    assert found.values.dtype == jnp.float32
    np.testing.assert_allclose(found.values, expected, rtol=0.02)
    with pytest.raises(ValueError, match=r"1 of 7 examples \(x\[2\]"):
        curvature.gauss_newton_eigenvalues(
            _head, params, x.at[2, 0].set(jnp.inf), key=KEY, search=Search(tolerance=0.02)
        )


def test_bad_input_is_named():
    params, x = {"kernel": jnp.ones((2, 3))}, jnp.ones((5, 2))
    with pytest.raises(ValueError, match="unknown loss 'softmx': did you mean softmax"):
        curvature.gauss_newton_eigenvalues(_head, params, x, key=KEY, loss="softmx")  # pyright: ignore
    with pytest.raises(ValueError, match="count is 16: the matrix has 15"):
        curvature.ntk_eigenvalues(_head, params, x, key=KEY, search=Search(16))
    with pytest.raises(ValueError, match=r"\(N, O\) = \(5, number of outputs\)"):
        curvature.ntk_eigenvalues(lambda params, x: _head(params, x).sum(1), params, x, key=KEY)
