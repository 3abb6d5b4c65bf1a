"""What the interpreter of a jaxpr sees, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax import relu
from mimicnorm_jax.diagnostics import empirical_ntk
from mimicnorm_jax.diagnostics.ntk.matching import match_kernels
from mimicnorm_jax.diagnostics.tracing import TracedNetwork
from mimicnorm_jax.diagnostics.tracing.layers import prepared

pytestmark = pytest.mark.usefixtures("x64")


def _params(**shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(shape)) for name, shape in shapes.items()}


def nested(params, x):
    """A product in a jit in a remat, one behind a custom derivative, one in a loop."""

    @jax.checkpoint
    def inner(x):
        return jax.jit(lambda x: relu(x @ params["a"]))(x)

    x = relu(inner(x) @ params["b"])
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ params["loop"]), None), x, None, length=2)[0]


def test_products_are_found_through_jit_and_remat_but_not_in_loops():
    params, x = _params(a=(3, 4), b=(4, 2), loop=(2, 2)), jnp.ones((5, 3))
    network = TracedNetwork(nested, params, x)
    assert [layer.name for layer in network.layers] == ["a", "b"]
    assert [network.paths[leaf] for leaf in network.direct] == [("loop",)]
    np.testing.assert_array_equal(network.run(params, x)[0], nested(params, x))


def test_what_the_outputs_do_not_need_is_no_layer():
    """A dead head, within a jit too; its hand-written derivative stands in nobody's way."""

    @jax.custom_vjp
    def squared(x):
        return x**2

    squared.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))

    def two_heads(params, x):
        return jax.jit(lambda x: (x @ params["head"], squared(x @ params["aux"])))(jnp.tanh(x @ params["body"]))

    params, x = _params(body=(3, 4), head=(4, 2), aux=(4, 7)), jnp.ones((5, 3))
    network = TracedNetwork(lambda params, x: two_heads(params, x)[0], params, x)
    assert [layer.name for layer in network.layers] == ["body", "head"]
    assert not network.direct
    assert "custom_vjp" not in str(network.program)


def test_perturbations_are_added_to_products_and_frozen_kernels_have_no_derivative():
    params, x = _params(a=(3, 4), b=(4, 2), loop=(2, 2)), jnp.ones((5, 3))
    network = TracedNetwork(nested, params, x)

    def outputs(params, shift):
        return network.run(params, x, perturbations={0: shift}, frozen_kernels=True)[0].sum()

    gradient, shifted = jax.grad(outputs, argnums=(0, 1))(params, jnp.zeros((5, 4)))
    assert not np.any(gradient["a"])
    assert np.any(gradient["loop"])
    moved = jax.grad(lambda shift: _nested_with(params, x, shift).sum())(jnp.zeros((5, 4)))
    np.testing.assert_allclose(shifted, moved, rtol=1e-12)


def _nested_with(params, x, shift):
    x = relu(relu(x @ params["a"] + shift) @ params["b"])
    return jnp.tanh(jnp.tanh(x @ params["loop"]) @ params["loop"])


def test_a_network_does_not_see_the_products_of_activations_or_of_parameters():
    def apply_fn(params, x):
        kernel = params["a"] @ params["b"]
        return (x @ x.T) @ x @ kernel

    params = _params(a=(3, 4), b=(4, 2))
    network = TracedNetwork(apply_fn, params, jnp.ones((5, 3)))
    (layer,) = network.layers
    assert len(layer.leaves) == 2
    assert not network.direct
    assert not match_kernels(network)


def test_matching_kernels():
    """What may be treated as a kernel or a bias, and look-alikes that may not."""

    def apply_fn(params, x):
        def centered(kernel):
            return kernel - kernel.mean(0, keepdims=True)

        x = jnp.tanh(x @ params["plain"] + params["bias"][None])
        x = jnp.tanh(x @ (params["scale"] * centered(params["centered"])) + 2 * params["doubled"][None])
        x = jnp.tanh(x @ (params["masked"] * jnp.tri(4)) + params["twice"][None]) + params["twice"][None]
        x = jnp.tanh(x @ (params["standardized"] / jnp.linalg.norm(params["standardized"])))
        x = jnp.tanh(x @ (params["halved"] / 2))  # the tangent kernel's own parametrization
        x = jnp.tanh(x @ (params["fixed_norm"] / jax.lax.stop_gradient(jnp.linalg.norm(params["fixed_norm"]))))
        y = x @ params["skipped"]
        x = jnp.tanh(y + params["bias2"][None]) + y  # the product's cotangent is not the bias's
        x = jnp.tanh(x @ params["decayed"]) + 1e-3 * params["decayed"].sum()
        return x @ params["tied"] @ params["tied"].T + params["reversed"][None, ::-1]

    square = (4, 4)
    params = _params(
        plain=(3, 4), bias=(4,), scale=(), centered=square, doubled=(4,), masked=square, twice=(4,),
        standardized=square, halved=square, fixed_norm=square, skipped=square, bias2=(4,), decayed=square,
        tied=square, reversed=(4,),
    )  # fmt: skip
    network = TracedNetwork(apply_fn, params, jnp.ones((5, 3)))
    names = [path[0] for path in network.paths]
    found = match_kernels(network)
    known = {names[kernel.leaf]: kernel for kernel in found.values()}
    assert set(known) == {"plain", "centered", "skipped", "halved", "fixed_norm"}
    assert {name for name, kernel in known.items() if kernel.scaled} == {"centered", "halved", "fixed_norm"}
    assert known["skipped"].bias is None
    assert not known["plain"].centered
    assert known["centered"].centered
    assert [names[scalar] for scalar in known["centered"].scalars] == ["scale"]
    assert names[known["plain"].bias] == "bias"
    assert known["centered"].bias is None
    # And all of it gives the right kernel, the output's own bias included.
    structured, contracted = (
        empirical_ntk(apply_fn, params, jnp.ones((2, 3)), implementation=name)
        for name in ("structured_derivatives", "jacobian_contraction")
    )
    np.testing.assert_allclose(structured, contracted, rtol=1e-10)


def test_products_and_those_of_derivatives_are_not_rounded_as_accelerators_do():
    """To TF32 on GPUs, bfloat16 on TPUs, where nothing is said; a CPU does not show it."""
    apply_fn, params, x = prepared(lambda params, x: jnp.tanh(x @ params) @ params, jnp.ones((3, 3)), jnp.ones((2, 3)))
    loss = jax.grad(lambda params: apply_fn(params, x).sum())
    products = [e for e in jax.make_jaxpr(loss)(params).eqns if e.primitive.name == "dot_general"]
    assert len(products) == 5
    assert all(set(e.params["precision"]) == {jax.lax.Precision.HIGHEST} for e in products)
