"""Pseudo-kernel, kernel-vector products over data sets, linearized networks and projections, against Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

from mimicnorm_jax.diagnostics import EmpiricalNTK, empirical_ntk, from_linen
from mimicnorm_jax.diagnostics.ntk import (
    IMPLEMENTATIONS,
    PseudoLogit,
    linearize,
    ntk_operator,
    ntk_vector_product,
    project_gradients,
)
from tests.diagnostics.networks import Convolutional, Normalized, close, draw, filled, reference

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def network():
    x = draw(0, 5, 5, 5, 2)
    return *from_linen(Convolutional(), filled(Convolutional(), x)), x


def _matrix(kernel):
    n, m, o, p = kernel.shape
    return kernel.transpose(0, 2, 1, 3).reshape(n * o, m * p)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_pseudo_kernel_is_the_mean_over_rows_of_all_pairs_of_outputs(network, implementation):
    apply_fn, params, x = network
    expected = reference(apply_fn, params, x).sum((2, 3)) / 3
    close(empirical_ntk(apply_fn, params, x, output="pseudo", implementation=implementation), expected)
    close(EmpiricalNTK(apply_fn, output="pseudo")(params, x[:3], x[3:]), expected[:3, 3:])


def test_the_pseudo_kernel_of_what_is_no_network_is_refused(network):
    _, params, x = network
    with pytest.raises(ValueError, match=r"\(N, O\) = \(5, number of outputs\)"):
        empirical_ntk(lambda params, x: x.mean((1, 2, 3)) * params["head"]["bias"].sum(), params, x, output="pseudo")


@pytest.mark.parametrize("batch", [None, 2])
def test_an_operator_is_the_kernel_of_all_pairs_of_outputs(network, batch):
    apply_fn, params, x = network
    whole = _matrix(reference(apply_fn, params, x))
    operator = ntk_operator(apply_fn, params, x, batch=batch)
    close(jnp.stack([operator.matvec(row) for row in jnp.eye(15)]), whole)
    between = ntk_operator(apply_fn, params, x[:2], x[2:], batch=batch)
    assert between.shape == (6, 9)
    close(jnp.stack([between.matvec(row) for row in jnp.eye(9)], 1), whole[:6, 6:])
    close(jnp.stack([between.rmatvec(row) for row in jnp.eye(6)]), whole[:6, 6:])


def test_scipy_takes_the_operator_as_it_is(network):
    apply_fn, params, x = network
    operator = ntk_operator(PseudoLogit(apply_fn), params, x)
    kernel = reference(apply_fn, params, x).sum((2, 3)) / 3
    found = scipy.sparse.linalg.eigsh(operator, k=2, which="LM", return_eigenvectors=False)
    close(np.sort(found), np.linalg.eigvalsh(kernel)[-2:], 1e-9)


def test_matfree_takes_its_product(network):
    matfree = pytest.importorskip("matfree.decomp", reason="matfree is not installed: pip install matfree")
    apply_fn, params, x = network
    operator = ntk_operator(PseudoLogit(apply_fn), params, x)
    tridiagonal = matfree.tridiag_sym(5, materialize=True)(operator.matvec, jnp.ones(5)).J_small
    close(np.linalg.eigvalsh(tridiagonal), np.linalg.eigvalsh(reference(apply_fn, params, x).sum((2, 3)) / 3), 1e-8)


def test_a_product_refuses_sides_and_weights_that_are_none(network):
    apply_fn, params, x = network
    with pytest.raises(ValueError, match="both must be inputs of the same network"):
        ntk_vector_product(apply_fn, params, x, x[:, :-1])
    with pytest.raises(ValueError, match="a weight is finite and at least 0"):
        ntk_vector_product(apply_fn, params, x, weights=lambda path, leaf: -1.0)


def test_a_batch_that_is_coupled_is_not_split():
    x = draw(1, 6, 4)
    apply_fn, params = from_linen(Normalized(), filled(Normalized(), x), mutable=["batch_stats"])
    with pytest.raises(ValueError, match="influence one another"):
        ntk_operator(apply_fn, params, x, batch=3)
    with pytest.raises(ValueError, match="influence one another"):
        ntk_operator(apply_fn, params, x[:1], x, batch=3)
    whole = ntk_operator(apply_fn, params, x)
    close(jnp.stack([whole.matvec(row) for row in jnp.eye(12)]), _matrix(reference(apply_fn, params, x)))


def test_weights_and_what_has_no_forward_mode(network):
    apply_fn, params, x = network
    only_head = ntk_operator(apply_fn, params, x, weights=lambda path, leaf: 3.0 * (path[0] == "head"))
    held = {"first": params["first"]}
    head = reference(lambda head, x: apply_fn({**held, "head": head}, x), params["head"], x)
    close(jnp.stack([only_head.matvec(row) for row in jnp.eye(15)]), 3 * _matrix(head))

    @jax.custom_vjp
    def backwards_only(x):
        return x

    backwards_only.defvjp(lambda x: (x, None), lambda _, g: (g,))
    with pytest.raises(ValueError, match="forward-mode derivatives"):
        ntk_operator(lambda params, x: backwards_only(apply_fn(params, x)), params, x)


def test_a_linearized_network_is_linear_and_has_the_kernel_of_its_start_everywhere(network):
    apply_fn, params, x = network
    linear = linearize(apply_fn, params)
    moved = jax.tree.map(lambda leaf: leaf + draw(2, *leaf.shape), params)
    jacobian = jax.jacrev(apply_fn)(params, x)
    step = jax.tree.map(lambda j, a, b: jnp.tensordot(j, b - a, b.ndim), jacobian, params, moved)
    close(linear(moved, x), apply_fn(params, x) + sum(jax.tree.leaves(step)))
    close(reference(linear, moved, x), reference(apply_fn, params, x))
    with pytest.raises(ValueError, match="linearized at"):
        linear({"head": params["head"]}, x)


def test_projections_estimate_the_kernel_within_the_error_they_state(network):
    apply_fn, params, x = network
    found = project_gradients(apply_fn, params, x, key=jax.random.key(0), num_directions=512, batch=2)
    exact = reference(apply_fn, params, x)
    off = (np.asarray(found.kernel()) - exact) / np.asarray(found.standard_error())
    # The error is an upper bound that random signs nearly reach: over 225 correlated entries a mean square below 1.5,
    # and above a twentieth, lest it promise less than it keeps.
    assert 0.05 < np.mean(off**2) < 1.5
    # The same key gives the same directions whatever the batch.
    again = project_gradients(apply_fn, params, x[3:], key=jax.random.key(0), num_directions=512)
    close(again.features, found.features[3:])


def test_a_direction_is_a_sign_for_every_parameter():
    """Of two parameters there are four directions."""
    x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    found = project_gradients(
        lambda params, x: x * params["a"] + (x**2) * params["b"],
        {"a": jnp.ones((1, 2)), "b": jnp.ones((1, 2))},
        x,
        key=jax.random.key(3),
        num_directions=1,
    )
    # One direction: phi = x r_a + x^2 r_b, elementwise.
    options = [[x * a + x**2 * b for a in (-1, 1)] for b in (-1, 1)]
    for o in range(2):
        assert any(np.allclose(found.features[:, o, 0], case[:, o]) for row in options for case in row)


def test_weights_that_are_traced_are_refused(network):
    apply_fn, params, x = network

    def largest(_, leaf):
        return jnp.abs(leaf).max()

    def product(params):
        return ntk_vector_product(apply_fn, params, x, weights=largest)(jnp.ones((5, 3)))

    expected = product(params)  # of concrete parameters they are numbers
    assert jnp.isfinite(expected).all()
    with pytest.raises(ValueError, match=r"weights give a traced value for .*: compute them of concrete parameters"):
        jax.jit(product)(params)
