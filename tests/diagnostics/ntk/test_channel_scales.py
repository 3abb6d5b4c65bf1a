"""Kernels with a factor by output channel: what is proved of them, and what they contribute."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mimicnorm_jax import models
from mimicnorm_jax.diagnostics import EmpiricalNTK, from_linen
from mimicnorm_jax.diagnostics.ntk import structured_derivatives
from mimicnorm_jax.diagnostics.ntk.structured_derivatives import StructuredDerivatives
from mimicnorm_jax.diagnostics.tracing import TracedNetwork
from mimicnorm_jax.diagnostics.tracing.channels import ChannelScale, scales_by_channel
from mimicnorm_jax.functional import scaled_standardize, standardize
from tests.diagnostics.networks import close, draw, filled, reference
from tests.diagnostics.ntk.random_programs import centered, rounded, straight_through

pytestmark = pytest.mark.usefixtures("x64")


def _norm(w):
    return jnp.sqrt((w**2).sum(0, keepdims=True))


KNOWN = {
    "standardized": (lambda w, p: standardize(w), (True, True)),
    "scaled": (lambda w, p: scaled_standardize(w, gain=1.7) * p["v"][None], (True, True)),
    "gain": (lambda w, p: p["v"][None] * w, (False, False)),
    "function of a gain": (lambda w, p: centered(w) / (2 + jnp.tanh(p["v"] @ p["u"]))[None], (True, False)),
    "normalized": (
        lambda w, p: jax.checkpoint(lambda w: w / _norm(w) * jnp.exp(p["v"])[None])(w) * p["s"],
        (False, True),
    ),
    "normalized by itself, centered": (lambda w, p: centered(w) / _norm(w), (True, True)),
    "plus a constant": (lambda w, p: (w + jnp.linspace(0, 1, 6)[:, None]) * _norm(w), (False, True)),
    "with its norm fixed": (lambda w, p: w / lax.stop_gradient(_norm(w)), (False, True)),
    "as a convolution": (lambda w, p: standardize(w.reshape(2, 3, 4)).reshape(6, 4), (True, True)),
    "scaled before": (lambda w, p: (2 * w) * w.sum(0, keepdims=True), (False, True)),
    "in vain": (lambda w, p: w * (0 * w.sum(0, keepdims=True)), (False, True)),
}
UNKNOWN = {
    "by input": lambda w, p: w * w.sum(1, keepdims=True),
    "another channel's": lambda w, p: w * jnp.roll(w.sum(0, keepdims=True), 1, 1),
    "all channels'": lambda w, p: w / jnp.linalg.norm(w) * p["v"][None],
    "mixed": lambda w, p: w * jnp.tanh(w.sum(0, keepdims=True) @ p["u"]),
    "its own sign by hand": lambda w, p: w * straight_through(w.sum(0, keepdims=True)),
    "its own rounding": lambda w, p: w * rounded(w.sum(0, keepdims=True)),
    "scaled before a mean": lambda w, p: centered(2 * w) * w.sum(0, keepdims=True),
    "through integers": lambda w, p: (w * p["v"][None]).astype(int).astype(w.dtype),
    "plus a parameter": lambda w, p: (w + p["s"]) * w.sum(0, keepdims=True),
    "centered after": lambda w, p: centered(w * w.sum(0, keepdims=True) ** 2 / p["v"][None]),
    "elementwise": lambda w, p: w * p["w2"],
    "of two uses": lambda w, p: w * p["v"][None] + 0 * w[0, 0],
}


def _params():
    params = {"w": draw(0, 6, 4), "v": 2 + draw(1, 4), "u": draw(2, 4, 4), "s": jnp.asarray(1.3), "w2": draw(3, 6, 4)}
    return params | {"b": draw(4, 4), "head": draw(5, 4, 2)}


def _network(kernel, p, x):
    return jnp.tanh(x @ kernel(p["w"], p) + p["b"][None]) @ p["head"]


@pytest.fixture
def factors(monkeypatch):
    monkeypatch.setattr(structured_derivatives, "costs", lambda *_: {"factored": 0.0, "written": 1e99})


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known(name):
    kernel, (is_centered, own) = KNOWN[name]
    network = TracedNetwork(lambda p, x: _network(kernel, p, x), _params(), draw(9, 1, 6))
    leaf = network.titles.index("w")
    assert scales_by_channel(network) == {0: ChannelScale(leaf, is_centered, own)}


@pytest.mark.usefixtures("factors")
def test_what_is_known_contributes_what_its_jacobian_does():
    params, x = {name: _params() for name in KNOWN}, draw(9, 3, 6)

    def apply_fn(params, x):
        return sum(_network(kernel, params[name], x) for name, (kernel, _) in KNOWN.items())

    kernel = EmpiricalNTK(apply_fn, implementation="structured_derivatives", per_parameter=True)
    assert f"{len(KNOWN)} of the layers with a factor by channel" in kernel.plan(params, x).detail
    jacobian = jax.jit(jax.jacrev(apply_fn))(params, x)
    for title, found in kernel(params, x).items():
        name, leaf = title.split("/")
        rows = jacobian[name][leaf].reshape(3, 2, -1)
        expected = jnp.einsum("nok,mpk->nmop", rows, rows)
        close(found, expected)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not(name):
    network = TracedNetwork(lambda p, x: _network(UNKNOWN[name], p, x), _params(), draw(9, 1, 6))
    assert 0 not in scales_by_channel(network)


@pytest.mark.parametrize(("groups", "batch_coupled"), [(2, False), (1, True)])
@pytest.mark.usefixtures("factors")
def test_convolutions(groups, batch_coupled):
    params = {"w": draw(0, 3, 3, 4 // groups, 6), "g": 2 + draw(1, 6), "head": draw(2, 6, 2)}

    def apply_fn(p, x):
        kernel = standardize(p["w"]) * p["g"][None, None, None]
        y = lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )
        y = y - y.mean(0, keepdims=True) if batch_coupled else y
        return jnp.tanh(y).mean((1, 2)) @ p["head"]

    x = draw(9, 3, 4, 4, 4)
    kernel = EmpiricalNTK(apply_fn, implementation="structured_derivatives", batch_coupled=batch_coupled)
    assert "1 of the layers with a factor by channel" in kernel.plan(params, x).detail
    close(kernel(params, x), reference(apply_fn, params, x))


@pytest.mark.slow
@pytest.mark.usefixtures("short", "factors")
def test_weight_standardized_network():
    model, x = models.create("short", method="ws_gn", width=0.25, num_classes=2, dtype="float64"), draw(9, 2, 8, 8, 3)
    apply_fn, params = from_linen(model, filled(model, x))
    kernel = EmpiricalNTK(apply_fn, implementation="structured_derivatives")
    how = kernel.prepare(params, x)[1].implementation
    assert isinstance(how, StructuredDerivatives)
    assert not how.general
    assert sum(known.own for known in how.kernels) == len(how.kernels) - 1
    close(kernel(params, x), reference(apply_fn, params, x))


def test_the_cheaper_way_is_taken():
    """A wide dense layer's factors are; a narrow convolution's derivatives by the kernel are."""
    params = {"w": draw(0, 64, 16), "head": draw(1, 16, 2)}
    wide = EmpiricalNTK(
        lambda p, x: jnp.tanh(x @ standardize(p["w"])) @ p["head"], implementation="structured_derivatives"
    )
    assert "1 of the layers with a factor by channel" in wide.plan(params, draw(9, 3, 64)).detail
    narrow = EmpiricalNTK(
        lambda p, x: jnp.tanh(x @ standardize(p["w"])).mean(1) @ p["head"], implementation="structured_derivatives"
    )
    assert "1 through their kernel's derivative" in narrow.plan(params, draw(9, 3, 256, 64)).detail
