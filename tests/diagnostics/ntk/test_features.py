"""Inner products of factored derivatives against the derivatives written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics.ntk import features
from mimicnorm_jax.diagnostics.ntk.costs import costs
from mimicnorm_jax.diagnostics.ntk.features import contract, gram
from mimicnorm_jax.diagnostics.ntk.jacobians import FactoredJacobian, Jacobian

pytestmark = pytest.mark.usefixtures("x64")
# Groups of examples, examples in a group, outputs, positions, groups of channels, fan-in, channels.
SIZES = {
    "dense": (40, 1, 3, 1, 1, 5, 4),
    "convolution": (24, 1, 12, 6, 1, 5, 3),
    "grouped": (5, 1, 3, 4, 2, 3, 2),
    "depthwise, odd count": (7, 1, 2, 4, 3, 2, 1),
    "coupled": (1, 6, 2, 8, 1, 5, 3),
}


def _pair(sizes, factored, bias, seed=0):
    n, q, o, s, g, f, c = sizes
    rng = np.random.default_rng(seed)
    patches, cotangents = rng.standard_normal((n, s, g, f)), rng.standard_normal((n, q, o, s, g, c))
    return FactoredJacobian(jnp.asarray(patches), jnp.asarray(cotangents), jnp.asarray(bias), factored)


def _written(pair):
    """Rows `(a, o, k)`, the bias as one more input."""
    n, s, g, _ = pair.patches.shape
    inputs = np.concatenate([pair.patches, np.full((n, s, g, 1), np.sqrt(pair.bias))], -1)
    rows = np.einsum("nsgf,nqosgc->nqogfc", inputs, pair.cotangents)
    return rows.reshape(n * rows.shape[1], rows.shape[2], -1)


def _expected(left, right, output):
    full = np.einsum("aok,bpk->aobp", _written(left), _written(right))
    diagonal = np.einsum("aobo->abo", full)
    return {"full": full, "diagonal": diagonal, "trace": diagonal.sum(-1)}[output]


@pytest.mark.parametrize("output", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_inner_products(sizes, output):
    for factored, bias in ((True, 0.7), (False, 0.0)):
        left = _pair(sizes, factored, bias)
        right = _pair((max(1, sizes[0] - 2), *sizes[1:]), factored, bias, seed=1)
        for other, symmetric in ((right, False), (left, True)):
            measured = contract(left, other, output, symmetric)
            np.testing.assert_allclose(measured, _expected(left, other, output), rtol=1e-12, atol=1e-11)
            if not factored:
                rows = contract(left.rows(), other.rows(), output, symmetric)
                np.testing.assert_allclose(rows, _expected(left, other, output), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("output", ["full", "diagonal", "trace"])
def test_channels_in_pieces(monkeypatch, output):
    """Sums over pieces of the channels are those over all of them, in a group of its own or not."""
    monkeypatch.setattr(features, "PIECE", 1)
    monkeypatch.setattr(features, "COLUMNS", 1)
    for sizes in (SIZES["convolution"], SIZES["grouped"], SIZES["coupled"]):
        left, right = _pair(sizes, False, 0.0), _pair(sizes, False, 0.0, seed=1)
        assert features.num_pieces(left.cotangents.shape, sizes[-2]) == sizes[-1]
        for other, symmetric in ((right, False), (left, True)):
            measured = contract(left, other, output, symmetric)
            np.testing.assert_allclose(measured, _expected(left, other, output), rtol=1e-12, atol=1e-11)


def test_symmetric_gram_of_many_rows():
    """Enough rows to be cut twice, an odd number of them."""
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((301, 7)))
    np.testing.assert_allclose(gram(rows, rows, True), rows @ rows.T, rtol=1e-12, atol=1e-12)


def test_symmetric_gram_matrices_of_many_examples():
    """Enough examples to be cut twice, an odd number of them."""
    pair = _pair((131, 1, 2, 3, 1, 2, 2), True, 0.7)
    measured = contract(pair, pair, "trace", True)
    np.testing.assert_allclose(measured, _expected(pair, pair, "trace"), rtol=1e-12, atol=1e-11)


def test_rows_are_a_matrix_of_the_kernels_entries():
    pair = _pair(SIZES["grouped"], False, 0.0)
    rows = pair.rows()
    assert isinstance(rows, Jacobian)
    # The order of entries is free; their sum of squares is not.
    np.testing.assert_allclose((np.asarray(rows.rows) ** 2).sum(-1)[:, 0], (_written(pair) ** 2).sum(-1), rtol=1e-12)


def test_small_factors_are_not_multiplied_pair_by_pair():
    """The last stage of resnet8 on all digits has fewer MACs as factors, but in five million turns of a loop.

    Of ResNet-18's last stage factors are cheaper by far.
    """
    for sizes in ((4, 1, 288, 64), (4, 1, 576, 64), (4, 1, 32, 64)):
        cost = costs(sizes, (1797, None), 1, 1, "full")
        assert cost["written"] < cost["factored"]
    cost = costs((16, 1, 4608, 512), (8, None), 1, 10, "full")
    assert 10 * cost["factored"] < cost["written"]
