"""Tangent kernels written out."""

import jax
import numpy as np


def written_out(apply_fn, params, x1, x2=None, weights=lambda path, leaf: 1.0):
    """The kernel `(N, M, O, P)`, parameters weighted by path: no line of the library in it."""
    total = 0
    jacobian = jax.jit(jax.jacrev(apply_fn))
    first = jacobian(params, x1)
    second = first if x2 is None else jacobian(params, x2)
    for path, j1 in jax.tree_util.tree_leaves_with_path(first):
        j2 = _leaf(second, path)
        weight = weights(tuple(entry.key for entry in path), None)
        rows = [np.asarray(j).reshape(*j.shape[:2], -1) for j in (j1, j2)]
        total = total + weight * np.einsum("nok,mpk->nmop", *rows)
    return total


def _leaf(tree, path):
    for entry in path:
        tree = tree[entry.key]
    return tree


def close(measured, expected, rtol=1e-10):
    np.testing.assert_allclose(measured, expected, rtol=0, atol=rtol * np.abs(expected).max())
