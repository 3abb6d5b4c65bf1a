"""What autodiff keeps, on functions small enough to count by hand."""

import jax
import jax.numpy as jnp

from mimicnorm_jax.diagnostics import nbytes, saved_for_backward

X = jax.ShapeDtypeStruct((8, 4), jnp.float32)


def test_counts_each_array_once_and_neither_arguments_nor_constants():
    square = jnp.ones((4, 4))
    linear = saved_for_backward(lambda w, x: (x @ w).sum(), square, X)
    assert linear == ()  # x is an argument
    twice = saved_for_backward(lambda w, x: (jnp.exp(x @ w) @ w + jnp.exp(x @ w) @ square).sum(), square, X)
    assert nbytes(twice) == 2 * 8 * 4 * 4  # each exp keeps its output, which w's second use needs too
    shared = saved_for_backward(lambda w, x: (lambda y: y @ w + y @ square)(jnp.exp(x @ w)).sum(), square, X)
    assert nbytes(shared) == 8 * 4 * 4


def test_a_checkpoint_keeps_its_inputs_instead():
    def layer(w, x):
        return jnp.sin(jnp.sin(x @ w))

    w = jnp.ones((4, 4))
    assert nbytes(saved_for_backward(lambda w, x: layer(w, x).sum(), w, X)) == 2 * 8 * 4 * 4
    assert saved_for_backward(lambda w, x: jax.checkpoint(layer)(w, x).sum(), w, X) == ()
