"""Kernels and biases that are functions of parameters: what is proved of them, and what they contribute."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mimicnorm_jax import models
from mimicnorm_jax.diagnostics import EmpiricalNTK, empirical_ntk, from_linen
from mimicnorm_jax.diagnostics.ntk import initial_variance
from mimicnorm_jax.diagnostics.ntk.matching import match_kernels
from mimicnorm_jax.diagnostics.tracing import TracedNetwork
from tests.diagnostics.networks import close, draw, filled, reference
from tests.diagnostics.ntk.random_programs import as_matrix, centered, rounded, straight_through

ROUNDINGS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""One rounding of each of the two derivatives that a contribution multiplies."""


def _params(dtype="float64", **more):
    shapes = {"kernel": (5, 7), "bias": (7,), "head": (7, 3)}
    return {name: draw(i, *shape).astype(dtype) for i, (name, shape) in enumerate(shapes.items())} | more


def _network(kernel=lambda w, params: w, bias=lambda b: b, dtype="float64"):
    def apply_fn(params, x):
        h = x.astype(dtype) @ kernel(params["kernel"], params).astype(dtype)
        return jnp.tanh(h + bias(params["bias"]).astype(dtype)[None]) @ params["head"].astype(dtype)

    return apply_fn


@pytest.mark.parametrize(
    "kernel",
    [
        lambda w, p: jax.nn.relu(w),
        lambda w, p: jax.nn.leaky_relu(w),
        lambda w, p: jnp.clip(w, -0.5, 2.5),
        lambda w, p: jnp.sign(w) * jnp.maximum(jnp.abs(w) - 0.2, 0),
        lambda w, p: jnp.where(jnp.abs(w) > 0.5, w, 0),
        lambda w, p: w * jnp.clip(p["gate"], 0, 1),
        lambda w, p: jnp.where(p["gate"] > 2, w, 0.1 * w),
    ],
    ids=["relu", "leaky", "clip", "soft", "pruned", "gate", "flag"],
)
@pytest.mark.usefixtures("x64")
def test_piecewise_linear_kernels_are_differentiated_where_they_are(kernel):
    params, x = _params(gate=jnp.asarray(1.5)), draw(9, 4, 5)
    apply_fn = _network(kernel)
    close(empirical_ntk(apply_fn, params, x), reference(apply_fn, params, x))


@pytest.mark.usefixtures("x64")
def test_the_mean_of_another_parameter_is_no_centering():
    params, x = _params(other=draw(3, 5, 7)), draw(9, 4, 5)
    apply_fn = _network(lambda w, p: w - p["other"].mean(0, keepdims=True))
    found = empirical_ntk(apply_fn, params, x, implementation="structured_derivatives")
    close(found, reference(apply_fn, params, x))


@pytest.mark.usefixtures("x64")
def test_piecewise_linear_biases():
    params, x = _params(), draw(9, 4, 5)
    apply_fn = _network(bias=jax.nn.relu)
    close(empirical_ntk(apply_fn, params, x), reference(apply_fn, params, x))


def _form(kernel, shape=(4, 4), dtype="float32"):
    params = {
        "w": jnp.ones(shape, dtype),
        "u": jnp.ones(shape, dtype),
        "s": jnp.ones((), dtype),
        "v": jnp.ones(shape[-1:], dtype),
    }

    def apply_fn(params, x):
        return x @ kernel(params["w"], params)

    network = TracedNetwork(apply_fn, params, jnp.ones((1, shape[0]), dtype))
    found = match_kernels(network).get(0)
    return None if found is None or found.by_channel else (found.centered, found.scaled)


KNOWN = {
    "itself": (lambda w, p: w, (False, False)),
    "cast": (lambda w, p: w.astype(jnp.bfloat16).astype(w.dtype), (False, False)),
    "transposed": (lambda w, p: w.T.reshape(2, 8).reshape(4, 4), (False, False)),
    "scaled": (lambda w, p: 2 * w * jnp.exp(p["s"]) / p["s"], (False, True)),
    "plus a constant": (lambda w, p: w + p["s"] + jnp.eye(4), (False, False)),
    "centered": (lambda w, p: centered(w), (True, False)),
    "centered twice": (lambda w, p: centered(centered(w)), (True, False)),
    "centered as a matrix": (lambda w, p: as_matrix(w), (True, False)),
    "centered in float32": (lambda w, p: centered(w.astype(jnp.bfloat16)).astype(w.dtype), (True, False)),
    "centered, scaled": (lambda w, p: p["s"] * centered(3 * w), (True, True)),
    "scaled, centered": (lambda w, p: centered(p["s"] * w), (True, True)),
    "plus minus its mean": (lambda w, p: -w.mean(0, keepdims=True) + w, (True, False)),
    "of fixed norm": (lambda w, p: w / lax.stop_gradient(jnp.linalg.norm(w)), (False, True)),
    "jitted": (lambda w, p: jax.jit(centered)(jax.checkpoint(lambda w: 2 * w)(w)), (True, True)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known(name):
    kernel, expected = KNOWN[name]
    assert _form(kernel) == expected


UNKNOWN = {
    "masked": lambda w, p: w * jnp.tri(4),
    "by channel": lambda w, p: w * p["v"][None],
    "with a mean over outputs": lambda w, p: centered(w, 1),
    "with a mean of another": lambda w, p: w - (2 * w).mean(0, keepdims=True),
    "with a mean of another parameter": lambda w, p: w - p["u"].mean(0, keepdims=True),
    "with a mean of its transpose": lambda w, p: w - w.T.mean(0, keepdims=True),
    "with a mean over too many": lambda w, p: w - w.sum(0, keepdims=True) / 5,
    "with a mean in bfloat16": lambda w, p: w - w.sum(0, keepdims=True) * jnp.bfloat16(1 / 4.01).astype(w.dtype),
    "with another number's mean": lambda w, p: w * p["s"] - (w * (p["s"] + 1)).mean(0, keepdims=True),
    "plus its mean": lambda w, p: w + w.mean(0, keepdims=True),
    "repeated": lambda w, p: jnp.broadcast_to(w[:1], w.shape),
    "its absolute value": lambda w, p: jnp.abs(w),
    "selected": lambda w, p: jnp.where(p["s"] > 0, w, w),
    "of unit norm": lambda w, p: w / jnp.linalg.norm(w),
    "its own gate": lambda w, p: w * w.max(),
    "straight through": lambda w, p: straight_through(w),
    "rounded": lambda w, p: rounded(w),
    "with a hand-written gain": lambda w, p: w * straight_through(p["s"]),
    "of two uses": lambda w, p: w @ w,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not(name):
    assert _form(UNKNOWN[name]) is None


@pytest.mark.parametrize("dtype", ROUNDINGS)
@pytest.mark.parametrize(
    "kernel",
    [lambda w, p: w / 2, lambda w, p: centered(w), lambda w, p: w * jnp.tri(5, 7), lambda w, p: jnp.abs(w)],
    ids=["halved", "centered", "masked", "absolute"],
)
def test_half_precision(dtype, kernel):
    """To a rounding of each derivative; the kernel is in float32."""
    params, x = _params("float32"), draw(9, 4, 5)
    apply_fn = _network(kernel, dtype=dtype)
    found = EmpiricalNTK(apply_fn, implementation="structured_derivatives")(params, x)
    assert found.dtype == jnp.float32
    close(found, reference(apply_fn, params, x), ROUNDINGS[dtype])


@pytest.mark.usefixtures("short")
def test_mimicnorm_in_bfloat16():
    model, x = models.create("short", width=0.5, num_classes=3, dtype="bfloat16"), draw(9, 3, 8, 8, 3)
    apply_fn, params = from_linen(model, filled(model, x))
    expected = reference(apply_fn, params, x)
    close(empirical_ntk(apply_fn, params, x, implementation="structured_derivatives"), expected, ROUNDINGS["bfloat16"])


@pytest.mark.parametrize(
    ("leaves", "inside", "outputs", "kernel", "rtol"),
    [
        ("float32", "float64", "float64", "float64", 2.0**-22),
        ("bfloat16", "float32", "float32", "float32", 2.0**-8),
        ("float32", "bfloat16", "bfloat16", "float32", 2.0**-5),
        ("float64", "float32", "float32", "float32", 2.0**-20),
    ],
)
@pytest.mark.parametrize("implementation", ["structured_derivatives", "jacobian_contraction", "ntk_vector_products"])
@pytest.mark.usefixtures("x64")
def test_mixed_precision(implementation, leaves, inside, outputs, kernel, rtol):
    """Kernels that are transformed, so that their derivative is asked for; in the outputs' type, at least float32."""
    params, x = _params(leaves), draw(9, 4, 5)

    def apply_fn(params, x):
        h = jnp.tanh(x.astype(inside) @ (params["kernel"] / jnp.linalg.norm(params["kernel"])).astype(inside))
        return (h @ (3 * params["head"]).astype(inside)).astype(outputs)

    found = EmpiricalNTK(apply_fn, implementation=implementation)(params, x)
    assert found.dtype == kernel
    # bfloat16 tangents and outputs are rounded at every layer by ntk_vector_products.
    close(found, reference(apply_fn, params, x), rtol)


@pytest.mark.parametrize("implementation", ["structured_derivatives", "jacobian_contraction", "ntk_vector_products"])
def test_preferred_element_type(implementation):
    params, x = _params("bfloat16"), draw(9, 4, 5).astype(jnp.bfloat16)

    def apply_fn(params, x):
        h = jnp.matmul(x, 2 * jnp.abs(params["kernel"]), preferred_element_type=jnp.float32)
        return jnp.tanh(h) @ params["head"].astype(jnp.float32)

    close(empirical_ntk(apply_fn, params, x, implementation=implementation), reference(apply_fn, params, x), 2.0**-7)


@pytest.mark.usefixtures("x64")
def test_paths_that_read_alike_are_kept_apart():
    params, x = {"a": {"b": draw(0, 5, 7)}, "a/b": draw(1, 7, 3)}, draw(2, 4, 5)

    def apply_fn(params, x):
        return jnp.tanh(x @ params["a"]["b"]) @ params["a/b"]

    parts = EmpiricalNTK(apply_fn, per_parameter=True, implementation="structured_derivatives")(params, x)
    assert set(parts) == {"a/b", "a\\/b"}
    close(sum(parts.values()), reference(apply_fn, params, x))
    close(empirical_ntk(apply_fn, params, x, implementation="structured_derivatives"), reference(apply_fn, params, x))


def test_biases_have_no_initial_variance():
    params = {
        "conv": {"weight": jnp.full((4, 3, 3, 3), 2.0), "bias": jnp.ones((4, 1, 1))},
        "narrow": {"kernel": jnp.full((1, 1, 4), 2.0)},
        "unnamed": [jnp.full((6, 1), 2.0), jnp.ones((4, 1, 1)), jnp.ones(1)],
        "steps": jnp.arange(3),
    }
    weigh = initial_variance(params)
    kernels = [("conv", "weight"), ("narrow", "kernel"), ("unnamed", "0")]
    assert [weigh(path, None) for path in kernels] == [4.0, 4.0, 4.0]
    assert [weigh(path, None) for path in [("conv", "bias"), ("unnamed", "1"), ("unnamed", "2")]] == [0.0, 0.0, 0.0]
