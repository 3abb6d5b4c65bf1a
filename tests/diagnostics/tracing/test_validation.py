"""Leaves that are no weights, wrong arguments, meshes, hand-written derivatives, and the guard."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax.cli import diagnose
from mimicnorm_jax.diagnostics import (
    EmpiricalNTK,
    curvature,
    empirical_ntk,
    from_linen,
    jacobian,
    nngp,
    perturbation_growth,
)
from mimicnorm_jax.diagnostics.ntk import IMPLEMENTATIONS, features, ntk_vector_product
from tests.conftest import also
from tests.diagnostics.networks import close, draw, reference
from tests.diagnostics.ntk.random_programs import straight_through


def _apply(params, x):
    return jnp.tanh(x @ params["kernel"]) @ params["head"]


def _params(**more):
    return {"kernel": draw(0, 5, 7), "head": draw(1, 7, 3), **more}


LEAVES = {
    "integers": jnp.arange(3),
    "flag": np.bool_(True),
    "key": jax.random.key(0),
    "number": 0.5,
    "count": 3,
    "empty": jnp.zeros((0, 3)),
    "function": jax.nn.relu,
    "name": "same",
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_leaves_that_are_no_weights_are_left_out_and_named(implementation):
    params, x = _params(**LEAVES), draw(2, 4, 5)

    def apply_fn(params, x):
        assert params["name"] == "same"
        noise = jax.random.normal(params["key"], (5,))[None]
        h = params["function"](x + noise) * params["number"] * params["integers"][1]
        return _apply(params, h)

    kernel = EmpiricalNTK(apply_fn, implementation=implementation)
    weights = _params()
    expected = reference(lambda weights, x: apply_fn({**LEAVES, **weights}, x), weights, x)
    close(kernel(params, x), expected, 1e-5)
    left_out = kernel.plan(params, x).left_out
    assert [text.split(" ")[0] for text in left_out] == sorted(LEAVES)
    assert "key (key<fry>)" in str(kernel.plan(params, x))
    for other in ({"number": 0.25}, {"key": jax.random.key(1)}):  # fixed values are not what was compiled before
        changed = {**params, **other}
        expected = reference(lambda w, x, c=changed: apply_fn({**c, **w}, x), weights, x)
        close(kernel(changed, x), expected, 1e-5)


def test_leaves_that_cannot_be_held_fixed_are_refused():
    x = draw(2, 4, 5)
    with pytest.raises(ValueError, match="complex is complex: keep its real"):
        empirical_ntk(_apply, _params(complex=jnp.ones(2, jnp.complex64)), x)
    with pytest.raises(ValueError, match="bytearray at odd, which is neither an array nor hashable"):
        empirical_ntk(_apply, _params(odd=bytearray(2)), x)
    with pytest.raises(ValueError, match=r"no floating-point array .* steps \(int32\)"):
        empirical_ntk(lambda params, x: x, {"steps": jnp.arange(3)}, x)


def test_the_other_diagnostics_hold_them_fixed_too():
    params, x, key = _params(**LEAVES), draw(2, 4, 5), jax.random.key(0)
    weights = _params()
    assert list(nngp.kernels(_apply, params, x)) == ["kernel", "head"]
    np.testing.assert_array_equal(jacobian.jacobians(_apply, params, x), jacobian.jacobians(_apply, weights, x))
    found = curvature.ntk_eigenvalues(_apply, params, x, key=key).values
    np.testing.assert_allclose(found, curvature.ntk_eigenvalues(_apply, weights, x, key=key).values, rtol=1e-6)
    v = jnp.ones((4, 3))
    product = ntk_vector_product(_apply, params, x)(v)
    np.testing.assert_allclose(product, ntk_vector_product(_apply, weights, x)(v), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": {"image": jnp.ones((4, 5))}}, "x is a dict, not one array"),
        ({"x": jnp.ones((4, 6))}, r"fails for x of shape \(4, 6\) .*Are these the inputs"),
        ({"params": jnp.ones((4, 5)), "x": _params}, "are params and x swapped"),
        ({"apply_fn": nn.Dense(3)}, r"a Dense, a module: from_linen"),
        ({"apply_fn": "network"}, r"apply_fn is a str: give a function"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = {"apply_fn": _apply, "params": _params(), "x": draw(2, 4, 5)} | change
    x = given["x"]() if callable(given["x"]) else given["x"]
    for measure in (empirical_ntk, nngp.kernels, ntk_vector_product):
        with pytest.raises(ValueError, match=message):
            measure(given["apply_fn"], given["params"], x)


def test_from_linen_takes_a_module_and_its_variables():
    variables = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 5)))
    with pytest.raises(ValueError, match="from_linen takes a linen module and its variables, not a dict and a Dense"):
        from_linen(variables, nn.Dense(3))


def test_files_by_name_and_outputs_by_any_integer(tmp_path):
    params, x = _params(), draw(2, 4, 5)
    whole = np.asarray(empirical_ntk(_apply, params, x))
    np.testing.assert_allclose(EmpiricalNTK(_apply)(params, x, out=str(tmp_path / "kernel.npy")), whole, rtol=1e-5)
    one = EmpiricalNTK(_apply, output=np.int64(1))(params, x)
    np.testing.assert_allclose(one, whole[:, :, 1, 1], rtol=1e-5)


MEASURES = {
    "ntk": lambda p, x, _: EmpiricalNTK(_apply, check=True)(p, x),
    "coupled": lambda p, x, _: EmpiricalNTK(_apply, batch_coupled=True)(p, x),
    "nngp": lambda p, x, _: nngp.kernels(_apply, p, x)["head"],
    "curvature": lambda p, x, key: curvature.gauss_newton_eigenvalues(_apply, p, x, key=key).values,
    "growth": lambda p, x, key: perturbation_growth(_apply, p, x, key=key).log_ratios,
    "product": lambda p, x, _: ntk_vector_product(_apply, p, x)(jnp.ones((8, 3))),
}


@pytest.mark.parametrize("name", ["ntk", "nngp", "product", *map(also, ("coupled", "curvature", "growth"))])
def test_inputs_on_an_explicit_mesh(name):
    params, x, key = _params(), draw(2, 8, 5), jax.random.key(0)
    mesh = jax.make_mesh((4,), ("batch",))
    assert mesh.axis_types[0] == jax.sharding.AxisType.Explicit
    expected = np.asarray(MEASURES[name](params, x, key))
    spread = jax.device_put(x, jax.NamedSharding(mesh, jax.P("batch")))
    copied = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    for context in (contextlib.nullcontext, functools.partial(jax.set_mesh, mesh)):
        with context():
            np.testing.assert_allclose(MEASURES[name](copied, spread, key), expected, rtol=2e-5)


def test_the_command_line_checks_unless_told_not_to():
    parser = diagnose.make_parser()
    assert parser.parse_args(["ntk"]).check
    assert not parser.parse_args(["ntk", "--no-check"]).check


def _binary(params, x):
    return straight_through(x @ straight_through(params["kernel"])) @ (params["gain"] * params["head"])


@pytest.mark.parametrize("implementation", ["auto", "structured_derivatives", "jacobian_contraction"])
@pytest.mark.usefixtures("x64")
def test_hand_written_derivatives(implementation):
    params, x = _params(gain=jnp.asarray(1.5)), draw(2, 4, 5)
    close(empirical_ntk(_binary, params, x, implementation=implementation), reference(_binary, params, x))


def test_implementations_that_cannot_take_them_say_why():
    params, x, key = _params(gain=jnp.asarray(1.5)), draw(2, 4, 5), jax.random.key(0)
    with pytest.raises(
        ValueError, match=r"ntk_vector_products' needs forward-mode derivatives, which custom_vjp_call .*at test_val"
    ):
        empirical_ntk(_binary, params, x, implementation="ntk_vector_products")
    with pytest.raises(ValueError, match="needs forward-mode derivatives"):
        ntk_vector_product(_binary, params, x)
    for measure in (jacobian.largest, perturbation_growth, curvature.ntk_eigenvalues):
        with pytest.raises(ValueError, match=r"jax\.custom_vjp cannot"):
            measure(_binary, params, x, key=key)
    assert EmpiricalNTK(_binary).plan(params, x).implementation != "ntk_vector_products"


@pytest.mark.parametrize(
    ("output", "options"),
    [
        *((output, {}) for output in ("full", "diagonal", "trace", 1)),
        *(("full", options) for options in ({"per_parameter": True}, {"batch_coupled": True}, {"memory": 9000})),
    ],
)
def test_a_wrong_kernel_does_not_pass_the_guard(output, options, monkeypatch):
    params, x = _params(), draw(2, 4, 5)
    EmpiricalNTK(_apply, output=output, implementation="structured_derivatives", check=True, **options)(params, x)
    right = features.contract
    monkeypatch.setattr(features, "contract", lambda *arguments: 1.01 * right(*arguments))
    with pytest.raises(ValueError, match=r"by structured_derivatives, but .* by a direct product of gradients"):
        EmpiricalNTK(_apply, output=output, implementation="structured_derivatives", check=True, **options)(params, x)
    EmpiricalNTK(_apply, output=output, implementation="structured_derivatives", **options)(
        params, x
    )  # it is off by default


def test_the_guard_sees_what_a_hand_written_derivative_does_to_a_batch():
    """No rule follows a gradient that is written by hand; here it is normalized by the batch."""

    @jax.custom_vjp
    def identity(h):
        return h

    identity.defvjp(lambda h: (h, None), lambda _, g: (g / jnp.sqrt(len(g)),))
    with pytest.raises(ValueError, match="by a direct product of gradients"):
        empirical_ntk(lambda params, x: identity(_apply(params, x)), _params(), draw(2, 4, 5))
