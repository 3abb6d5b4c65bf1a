"""Alignment of kernels with labels against its definition, and where there is none."""

import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics.regression import alignment, class_targets
from tests.diagnostics.regression.kernels import X, Y, rbf


@pytest.mark.parametrize("centered", [False, True])
def test_alignment_against_its_definition(centered):
    kernel, middle = rbf(X, X), np.eye(12) - (1 / 12 if centered else 0)
    first, second = middle @ kernel @ middle, middle @ Y @ Y.T @ middle
    expected = np.trace(first @ second) / np.sqrt(np.trace(first @ first) * np.trace(second @ second))
    np.testing.assert_allclose(alignment(kernel, Y, centered=centered), expected, rtol=1e-12)
    # What all examples share changes the plain one only.
    shifted = alignment(kernel + 7, Y, centered=centered)
    assert np.isclose(shifted, expected) == centered


def test_a_kernel_of_bfloat16_keeps_what_is_more_than_its_rounding():
    signs = np.sign(np.arange(12) - 5.5)
    kernel = 1 + 0.05 * (np.outer(signs, signs) + np.eye(12))
    exact = alignment(kernel, signs, centered=True)
    # Entries of about 1 are rounded by up to 0.004, a tenth of what tells the classes apart.
    assert alignment(jnp.asarray(kernel, jnp.bfloat16), signs, centered=True) == pytest.approx(exact, abs=0.05)
    assert np.isnan(alignment(jnp.asarray(1 + 0.002 * np.outer(signs, signs), jnp.bfloat16), signs, centered=True))


def test_alignment_of_what_is_the_same_for_all_examples_is_no_number():
    one_class, kernel = class_targets(np.full(7, 2), 3), rbf(X[:7], X[:7])
    assert np.isnan(alignment(kernel, one_class, centered=True))
    assert np.isfinite(alignment(kernel, one_class))
    same = np.full((7, 7), 0.1)
    assert np.isnan(alignment(same, Y[:7], centered=True))
    rounded = same.astype(np.float32) + np.float32(1e-8) * np.eye(7, dtype=np.float32)
    assert np.isnan(alignment(rounded, Y[:7], centered=True))
    assert np.isnan(alignment(0 * kernel, Y[:7]))
