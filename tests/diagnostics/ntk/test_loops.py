"""Scans are read as the layers of their turns, where that is right and cheaper."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

from mimicnorm_jax.diagnostics import EmpiricalNTK, from_linen
from mimicnorm_jax.diagnostics.ntk import empirical_ntk_fn, structured_derivatives
from mimicnorm_jax.diagnostics.ntk.matching import match_kernels
from mimicnorm_jax.diagnostics.ntk.structured_derivatives import StructuredDerivatives
from mimicnorm_jax.diagnostics.tracing import TracedNetwork, loops
from tests.diagnostics.networks import close, draw, filled, reference
from tests.diagnostics.ntk.random_programs import centered

pytestmark = pytest.mark.usefixtures("x64")
PARAMS = {"w": (3, 5, 5), "b": (3, 5), "v": (5, 5), "u": (2, 3, 5, 5), "head": (5, 2)}


def _params():
    return {name: 0.6 * draw(i, *shape) for i, (name, shape) in enumerate(PARAMS.items())}


def _layer(h, w):
    return jnp.tanh(h @ w)


def stacked(p, x):
    def body(h, layer):
        w, b = layer
        return jax.checkpoint(lambda h: jnp.tanh(h @ w + b[None]))(h), h.sum(1)

    h, sums = lax.scan(body, x, (p["w"], p["b"]), reverse=True)
    return h @ p["head"] + sums[0][:, None]


def centered_outside(p, x):
    return lax.scan(lambda h, w: (_layer(h, w), None), x, 0.5 * jax.vmap(centered)(p["w"]))[0] @ p["head"]


def shared(p, x):
    return lax.scan(lambda h, _: (_layer(h, centered(2 * p["v"])), None), x, None, length=3)[0] @ p["head"]


def twice(p, x):
    for _ in range(2):
        x = lax.scan(lambda h, w: (_layer(h, 3 * w), None), x, p["w"])[0]
    return x @ p["head"]


def nested(p, x):
    def outer(h, block):
        return lax.scan(lambda h, w: (_layer(h, w), None), h, block)[0], None

    return lax.scan(outer, x, p["u"])[0] @ p["head"]


def from_zeros(p, x):
    """What is handed on depends on the inputs from the second turn on."""
    h = lax.scan(lambda h, v: (jnp.tanh(h @ p["v"] + v[:, None] * p["b"][:1]), None), jnp.zeros((len(x), 5)), x.T)[0]
    return h @ p["head"]


NETWORKS = {f.__name__: f for f in (stacked, centered_outside, shared, twice, nested, from_zeros)}
LOOPED = {"stacked": 3, "centered_outside": 3, "shared": 3, "twice": 6, "nested": 6, "from_zeros": 5}


def _always(monkeypatch):
    monkeypatch.setattr(structured_derivatives, "costs", lambda *_: {"factored": 0.0, "written": 1e99})


@pytest.mark.parametrize("name", NETWORKS)
def test_turns_are_layers(name, monkeypatch):
    _always(monkeypatch)
    params, x = _params(), draw(9, 4, 5)
    kernel = EmpiricalNTK(NETWORKS[name], implementation="structured_derivatives")
    how = kernel.prepare(params, x)[1].implementation
    assert isinstance(how, StructuredDerivatives)
    assert not how.general
    assert sum(known.layer.index in how.network.looped for known in how.kernels) == LOOPED[name]
    assert f"{LOOPED[name]} of the layers in unrolled loops" in kernel.plan(params, x).detail
    close(kernel(params, x), reference(NETWORKS[name], params, x))


def test_parameters_apart_weights_and_derivatives(monkeypatch):
    _always(monkeypatch)
    params, x = _params(), draw(9, 4, 5)
    expected = reference(stacked, params, x)
    parts = EmpiricalNTK(stacked, implementation="structured_derivatives", per_parameter=True)(params, x)
    close(sum(parts.values()), expected)
    weigh = lambda path, _: 0.0 if path[-1] == "w" else 1.0  # noqa: E731
    rest = EmpiricalNTK(stacked, implementation="structured_derivatives", weights=weigh)(params, x)
    close(rest, expected - parts["w"])
    function = empirical_ntk_fn(stacked, params, x, implementation="structured_derivatives", output="trace")
    slow = empirical_ntk_fn(stacked, params, x, implementation="jacobian_contraction", output="trace")
    gradients = [jax.grad(lambda p, f=f: f(p, x).sum())(params)["w"] for f in (function, slow)]
    close(*gradients)


UNKNOWN = {
    "a part and the whole": lambda p, x: nested(p, x) + x @ p["u"].sum((0, 1)) @ p["head"],
    "unequal factors": lambda p, x: centered_outside(p, lax.scan(lambda h, w: (_layer(h, w), None), x, p["w"])[0]),
    "a mean over the layers": lambda p, x: (
        lax.scan(lambda h, w: (_layer(h, w), None), x, centered(p["w"]))[0] @ p["head"]
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_parts_that_are_not_apart_are_differentiated(name, monkeypatch):
    _always(monkeypatch)
    params, x = _params(), draw(9, 4, 5)
    network = TracedNetwork(UNKNOWN[name], params, x[:1]).unrolled()
    assert network.looped
    assert not any(i in match_kernels(network) for i in network.looped)
    found = EmpiricalNTK(UNKNOWN[name], implementation="structured_derivatives")(params, x)
    close(found, reference(UNKNOWN[name], params, x))


def test_long_loops_are_kept_and_named(monkeypatch):
    monkeypatch.setattr(loops, "MOST_OPERATIONS", 5)
    params, x = _params(), draw(9, 4, 5)
    kernel = EmpiricalNTK(shared, implementation="structured_derivatives")
    assert "3 turns of" in kernel.plan(params, x).detail
    assert "over 5" in kernel.plan(params, x).detail
    close(kernel(params, x), reference(shared, params, x))


def narrow(p, x):
    rows = x[:, None, :1] * jnp.arange(1.0, 65)[None, :, None]
    return lax.scan(lambda h, _: (_layer(h, p["s"]), None), rows, None, length=2)[0][:, :, 0]


def test_a_loop_whose_layers_would_be_written_out_is_left_alone():
    params, x = {"s": draw(0, 1, 1)}, draw(9, 1, 5)
    assert len(TracedNetwork(narrow, params, x).unrolled().looped) == 2
    how = EmpiricalNTK(narrow, implementation="structured_derivatives", output="trace").prepare(params, x)[1]
    assert isinstance(how.implementation, StructuredDerivatives)
    assert not how.implementation.network.looped


class Scanned(nn.Module):
    """Layers of `nn.scan`, then a recurrent network over the images' rows."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 1}, split_rngs={"params": True}, length=2, in_axes=nn.broadcast
        )
        x, _ = layers()(x, None)
        h = nn.RNN(nn.SimpleCell(5, param_dtype=x.dtype))(x)
        return nn.Dense(2, param_dtype=x.dtype)(h[:, -1])


class Block(nn.Module):
    """A residual layer."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.Dense(x.shape[-1], param_dtype=x.dtype)(x)), None


@pytest.mark.slow
def test_flax_scans(monkeypatch):
    _always(monkeypatch)
    x = draw(9, 3, 4, 5)
    apply_fn, params = from_linen(Scanned(), filled(Scanned(), x))
    kernel = EmpiricalNTK(apply_fn, implementation="structured_derivatives")
    how = kernel.prepare(params, x)[1].implementation
    assert isinstance(how, StructuredDerivatives)
    known = {how.network.titles[kernel.leaf] for kernel in how.kernels}
    assert known == {title for title in how.network.titles if title.endswith("kernel")}
    close(kernel(params, x), reference(apply_fn, params, x))
