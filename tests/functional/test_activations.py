"""Derivatives of the lean activations, and what they keep."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mimicnorm_jax.diagnostics import saved_for_backward
from mimicnorm_jax.functional import relu, relu6, relu_save_mask

NHWC = ("NHWC", "HWIO", "NHWC")
POINTS = jnp.array([-3.0, -0.5, 0.0, 0.5, 5.9, 6.0, 7.0])


@pytest.mark.parametrize(
    ("lean", "reference"), [(relu, jax.nn.relu), (relu_save_mask, jax.nn.relu), (relu6, jax.nn.relu6)]
)
def test_agrees_with_jax_nn_in_value_and_every_kind_of_derivative(lean, reference):
    direction = jnp.arange(1.0, 8.0)

    def derivatives(f, x):
        return (
            f(x),
            jax.jvp(f, (x,), (direction,)),
            jax.vjp(f, x)[1](direction),
            jax.vmap(jax.grad(f))(x),
            jax.hessian(lambda x: (f(x) ** 2 * direction).sum())(x),
            jax.grad(lambda x: (f(f(x)) ** 2).sum())(x),
        )

    found, expected = (jax.jit(partial(derivatives, f))(POINTS) for f in (lean, reference))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_backward_pass_keeps_outputs_only():
    """Two layers keep two outputs, besides the arguments; jax.nn.relu keeps masks as well."""

    def kept(activation):
        def f(w, x):
            return (activation(activation(x @ w) @ w) @ w).sum()

        return [(a.shape, a.dtype) for a in saved_for_backward(f, jnp.ones((16, 16)), jnp.ones((8, 16)))]

    assert kept(relu) == [((8, 16), jnp.float32)] * 2
    assert len(kept(jax.nn.relu)) > 2


def test_relu_save_mask_keeps_a_bit_an_element():
    kept = saved_for_backward(lambda w, x: (relu_save_mask(x @ w) + x).sum(), jnp.ones((16, 16)), jnp.ones((8, 16)))
    assert [(a.shape, a.dtype) for a in kept] == [((8, 2), jnp.uint8)]


def test_a_compiler_for_a_cpu_keeps_a_bit_an_element_too():
    """It drops optimization barriers; a mask of slices was packed anew wherever it was read, and never kept."""
    kernel, x = jnp.ones((3, 3, 16, 16)), jnp.ones((8, 16, 16, 16))

    def planned(depth):
        def network(x):
            for _ in range(depth):
                x = relu_save_mask(lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC))
            return x.sum()

        return jax.jit(jax.grad(network)).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert planned(12) - planned(4) == 8 * x.nbytes / 32
