"""The canonical form of products against the products themselves."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mimicnorm_jax.diagnostics.tracing import TracedNetwork

pytestmark = pytest.mark.usefixtures("x64")
DRAW = np.random.default_rng(0)


def _check(function, x_shape, kernel_shape, positions):
    """`sum_f patch[s, g, f] kernel[g, f, c]` is the product, and `unkernel` inverts `kernel`."""
    x, kernel = (jnp.asarray(DRAW.standard_normal(shape)) for shape in (x_shape, kernel_shape))

    def apply_fn(params, x):
        return function(x, params["kernel"]).reshape(x.shape[0], -1)

    network = TracedNetwork(apply_fn, {"kernel": kernel}, x)
    _, evaluation = network.run({"kernel": kernel}, x)
    (layer,) = network.layers
    form = layer.product
    patches, canonical = form.patches(evaluation.operands[0]), form.kernel(evaluation.kernels[0])
    assert form.sizes == (positions, *canonical.shape)
    product = np.einsum("sgf,gfc->sgc", patches, canonical)
    np.testing.assert_allclose(product, form.outputs(evaluation.products[0]), rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(form.unkernel(canonical), evaluation.kernels[0])
    np.testing.assert_array_equal(network.kernels({"kernel": kernel})[0], kernel)


@pytest.mark.parametrize(
    ("equation", "x_shape", "kernel_shape", "positions"),
    [
        ("nf,fc->nc", (3, 4), (4, 5), 3),
        ("nf,cf->nc", (3, 4), (5, 4), 3),
        ("cf,nf->nc", (3, 4), (5, 4), 3),
        ("nsfg,gfc->nsgc", (2, 3, 4, 5), (5, 4, 2), 6),
        ("nsfg,fgcd->nscd", (2, 3, 4, 5), (4, 5, 2, 3), 6),
    ],
)
def test_einsums(equation, x_shape, kernel_shape, positions):
    def function(x, kernel):
        operands = (kernel, x) if equation.startswith("cf") else (x, kernel)
        return jnp.einsum(equation, *operands)

    _check(function, x_shape, kernel_shape, positions)


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "options", "positions"),
    [
        ((2, 5, 6, 3), (3, 2, 3, 4), {"window_strides": (1, 1), "padding": "SAME"}, 60),
        ((2, 7, 6, 4), (3, 3, 2, 6), {"window_strides": (2, 3), "padding": "VALID", "feature_group_count": 2}, 12),
        ((2, 5, 5, 4), (3, 3, 1, 8), {"window_strides": (1, 2), "padding": [(1, 1)] * 2, "feature_group_count": 4}, 30),
        (
            (1, 9, 9, 2),
            (3, 3, 2, 3),
            {"window_strides": (2, 1), "padding": [(2, 0), (-1, 3)], "rhs_dilation": (2, 3)},
            20,
        ),
        (
            (1, 3, 4, 2),
            (3, 3, 2, 3),
            {"window_strides": (1, 1), "padding": [(1, 2), (2, 1)], "lhs_dilation": (2, 3)},
            66,
        ),
    ],
)
def test_convolutions(x_shape, kernel_shape, options, positions):
    dimensions = ("NHWC", "HWIO", "NHWC")

    def function(x, kernel):
        return lax.conv_general_dilated(x, kernel, dimension_numbers=dimensions, **options)

    _check(function, x_shape, kernel_shape, positions)


def test_other_layouts_and_one_dimension():
    def images(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 2), "SAME", dimension_numbers=("CNHW", "OIHW", "NCWH"))

    _check(lambda x, kernel: images(x.transpose(1, 0, 2, 3), kernel), (2, 3, 4, 5), (6, 3, 2, 3), 24)

    def sequences(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1,), [(2, 0)], dimension_numbers=("NHC", "HIO", "NHC"))

    _check(sequences, (2, 5, 3), (3, 3, 4), 10)
