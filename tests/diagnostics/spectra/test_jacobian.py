"""Jacobians against `jax.jacobian`, NumPy's SVD, products of kernels and random matrix theory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import from_linen, jacobian
from mimicnorm_jax.diagnostics.spectra import Ends, Quadrature, Search
from tests.diagnostics.networks import Convolutional, draw, filled

KEY = jax.random.key(0)
SIDES = (6, 8, 7, 5)


def _params(*sides):
    return {f"layer{i}": draw(i, a, b) for i, (a, b) in enumerate(itertools.pairwise(sides))}


def _net(params, x):
    for i, kernel in enumerate(params.values()):
        x = (jnp.tanh(x) if i else x) @ kernel
    return x


def _linear(params, x):
    for kernel in params.values():
        x = x @ kernel
    return x


def test_jacobians_between_any_two_places(x64):
    """Of tanh layers by hand: J = kernel^T diag(1 - tanh^2) kernel^T ..., and the chain rule over places."""
    params, x = _params(*SIDES), draw(9, 3, SIDES[0])
    kernels, expected, z = [np.asarray(k) for k in params.values()], {}, np.asarray(x)
    for i, kernel in enumerate(kernels):
        slope = 1 - np.tanh(z) ** 2 if i else np.ones_like(z)
        expected[i] = np.einsum("io,ni->noi", kernel, slope)
        z = (np.tanh(z) if i else z) @ kernel
    places = [None, "layer0", "layer1", None]
    for start, stop in ((0, 3), (0, 2), (1, 2), (1, 3)):
        product = expected[start]
        for i in range(start + 1, stop):
            product = expected[i] @ product
        found = jacobian.jacobians(_net, params, x, Ends(source=places[start], target=places[stop]))
        np.testing.assert_allclose(found, product, rtol=1e-11, atol=1e-12)


def test_linear_network_has_the_product_of_its_kernels(x64):
    """One matrix for all examples; its singular values by NumPy."""
    params, x = _params(*SIDES), draw(9, 2, SIDES[0])
    product = np.asarray(params["layer1"] @ params["layer2"]).T
    found = jacobian.jacobians(_linear, params, x, Ends(source="layer0", target="layer2"))
    np.testing.assert_allclose(found, np.stack([product] * 2), rtol=1e-12, atol=1e-12)
    values = jacobian.singular_values(_linear, params, x, Ends(source="layer0", target="layer2"))
    np.testing.assert_allclose(values, [np.linalg.svd(product, compute_uv=False)] * 2, rtol=1e-12)


def test_network_without_visible_layers_has_a_jacobian_by_its_inputs(x64):
    """Products in a loop are not seen, so there is no layer to start from; from the inputs none is needed."""
    params, x = {"loop": draw(0, 3, 4, 4)}, draw(1, 2, 4)

    def apply_fn(params, x):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, params["loop"])[0]

    product = np.linalg.multi_dot(np.asarray(params["loop"])).T
    np.testing.assert_allclose(jacobian.jacobians(apply_fn, params, x), np.stack([product] * 2), rtol=1e-11)
    with pytest.raises(ValueError, match="has no layers to name"):
        jacobian.jacobians(apply_fn, params, x, Ends(source="loop"))


def test_convolutional_network_against_jax_jacobian(x64):
    """Input to output, and from the first convolution's product through what follows it, written out."""
    x = draw(0, 2, 6, 6, 2)
    module = Convolutional()
    apply_fn, params = from_linen(module, filled(module, x))
    whole = jax.jit(jax.vmap(jax.jacobian(lambda x: apply_fn(params, x[None])[0])))(x).reshape(2, 3, -1)
    singular = jacobian.singular_values(apply_fn, params, x)
    np.testing.assert_allclose(singular, np.linalg.svd(whole, compute_uv=False), rtol=1e-11)
    first = jax.lax.conv_general_dilated(
        x, params["first"]["kernel"], (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    active = np.asarray(first).reshape(2, 9, 4) > 0
    rest = np.einsum("nsc,co->nosc", active, np.asarray(params["head"]["kernel"])).reshape(2, 3, -1) / 9
    np.testing.assert_allclose(jacobian.jacobians(apply_fn, params, x, Ends(source="first")), rest, rtol=1e-11)


def test_samples_that_are_an_orthogonal_basis_give_the_frobenius_norm(x64):
    """Hutchinson's estimator has no error on all columns of a Hadamard matrix."""
    matrix, two = draw(0, 5, 8), np.array([[1.0, 1.0], [1.0, -1.0]])
    signs = jnp.asarray(np.kron(two, np.kron(two, two)))
    found = jacobian.mean_squares(lambda v: matrix @ v, signs)
    np.testing.assert_allclose(found.mean(), (matrix**2).sum() / 5, rtol=1e-13)
    # Each alone is off by the products of different columns.
    assert abs(found / found.mean() - 1).max() > 0.05


def test_mean_square_and_its_standard_error(x64):
    """Over 200 examples the error in units of the standard error has mean 0 and variance (n - 1)/(n - 3) = 1.07."""
    params, x = _params(*SIDES), draw(9, 200, SIDES[0])
    exact = (jacobian.singular_values(_net, params, x) ** 2).sum(1) / SIDES[-1]
    found = jacobian.mean_square(_net, params, x, key=KEY, num_samples=32)
    deviations = np.asarray((found.mean - exact) / found.standard_error)
    assert abs(deviations.mean()) < 4 / np.sqrt(200)
    assert 0.75 < deviations.std() < 1.4  # Five standard deviations of a variance from 200.


def test_largest_singular_value(x64):
    params, x = _params(*SIDES), draw(9, 6, SIDES[0])
    exact = jacobian.singular_values(_net, params, x, Ends(target="layer1"))[:, 0] ** 2
    found = jacobian.largest(_net, params, x, Ends(target="layer1"), key=KEY, search=Search(tolerance=1e-8))
    assert found.converged.all()
    np.testing.assert_allclose(found.values[:, 0], exact, rtol=1e-12)


def test_density_of_a_diagonal_jacobian_is_exact(x64):
    """Every vector of random signs sees each axis with the same weight; two of six singular values vanish."""
    params = {"head": jnp.diag(jnp.array([0.0, 0.0, 0.1, 1.0, 3.0, 7.0]))}
    found = jacobian.density(_linear, params, draw(9, 2, 6), key=KEY, quadrature=Quadrature(2))
    np.testing.assert_allclose(found.vanishing, 2 / 6, rtol=1e-10)
    np.testing.assert_allclose(found.log_squares, np.repeat(2 * np.log([0.1, 1.0, 3.0, 7.0]), 4), atol=1e-10)
    np.testing.assert_allclose(found.weights, 1 / 24, rtol=1e-10)


def test_random_layer_has_the_marchenko_pastur_spectrum():
    """A square Gaussian layer, n = 256: squared singular values between 0 and 4 of density sqrt(4/s - 1) / 2 pi."""
    n, x = 256, jnp.ones((1, 256))
    params = {"head": draw(3, n, n) / 16}
    edge = jacobian.largest(_linear, params, x, key=KEY)
    assert edge.converged.all()
    # Tracy-Widom: mean 4 - 1.2 (16 / n^2)^(1/3) = 3.92, standard deviation 0.08.
    assert abs(edge.values[0, 0] - 3.92) < 0.32
    found = jacobian.density(_linear, params, x, key=KEY, quadrature=Quadrature(2, 30))
    squares = np.exp(found.log_squares)
    for bound in (0.5, 1.0, 2.0):
        # s = 4 sin^2 t: the share below is (2 t + sin 2 t) / pi. A node carries up to 2 / 30, and n singular values
        # scatter by less.
        t = np.arcsin(np.sqrt(bound) / 2)
        assert abs(found.weights[squares < bound].sum() - (2 * t + np.sin(2 * t)) / np.pi) < 0.06
    # Two samples' mean of v^T J J^T v / n: standard deviation 1 / sqrt(n).
    assert abs((found.weights * squares).sum() - 1) < 4 / np.sqrt(n)


def test_every_path_is_counted(x64):
    """A residual block: from the product that both its branch and its shortcut read."""
    params, x = {"stem": draw(0, 6, 5), "branch": draw(1, 5, 5), "head": draw(2, 5, 3)}, draw(3, 4, 6)

    def apply_fn(params, x):
        z = x @ params["stem"]
        return (z + jnp.tanh(z) @ params["branch"]) @ params["head"]

    stem, branch, head = (np.asarray(kernel) for kernel in params.values())
    block = np.eye(5) + np.einsum("io,ni->noi", branch, 1 - np.tanh(np.asarray(x) @ stem) ** 2)
    found = jacobian.jacobians(apply_fn, params, x, Ends(source="stem"))
    np.testing.assert_allclose(found, head.T @ block, rtol=1e-11, atol=1e-12)


def test_bad_input_is_named(monkeypatch):
    params, x = _params(*SIDES), draw(9, 3, SIDES[0])
    with pytest.raises(ValueError, match=r"unknown layer 'layer9': did you mean .*layer2"):
        jacobian.jacobians(_net, params, x, Ends(target="layer9"))
    for source in ("layer1", "layer2"):
        with pytest.raises(ValueError, match=f"source is layer '{source}', target is layer 'layer1'.*layer0, layer1"):
            jacobian.largest(_net, params, x, Ends(source, "layer1"), key=KEY)
    with pytest.raises(ValueError, match="num_samples is 1: a standard error"):
        jacobian.mean_square(_net, params, x, key=KEY, num_samples=1)
    with pytest.raises(ValueError, match="num_matvecs is 0"):
        Quadrature(num_matvecs=0)
    with pytest.raises(ValueError, match="num_matvecs is 0"):
        jacobian.largest(_net, params, x, key=KEY, search=Search(num_matvecs=0))
    with pytest.raises(ValueError, match="x is int32"):
        jacobian.jacobians(_net, params, jnp.ones((2, 6), jnp.int32))
    with pytest.raises(ValueError, match=r"1 of 3 examples \(x\[2\]"):
        jacobian.mean_square(_net, params, x.at[2, 0].set(jnp.nan), key=KEY, num_samples=2)
    monkeypatch.setattr(jacobian, "MAX_ENTRIES", 29)
    with pytest.raises(ValueError, match=r"5 by 6, more than the 29 entries .* use mean_square"):
        jacobian.singular_values(_net, params, x[:2])


@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16])
def test_rounding_of_a_network_is_no_spectrum(kind):
    """Of 64 singular values 8 are not zero."""
    params = {"a": draw(0, 64, 8), "b": draw(1, 8, 64)}
    params, x = jax.tree.map(lambda leaf: leaf.astype(kind), (params, draw(2, 4, 64)))
    found = jacobian.density(lambda p, x: (x @ p["a"]) @ p["b"], params, x, key=jax.random.key(0))
    assert found.vanishing == pytest.approx(1 - 8 / 64, abs=0.05)  # of 4 examples' random vectors
