"""Layers that reach the outputs by one number a channel: what is proved of them, and what they contribute."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mimicnorm_jax import models
from mimicnorm_jax.diagnostics import EmpiricalNTK, from_linen
from mimicnorm_jax.diagnostics.ntk import structured_derivatives
from mimicnorm_jax.diagnostics.ntk.costs import pooled_cost
from mimicnorm_jax.diagnostics.ntk.features import contract
from mimicnorm_jax.diagnostics.ntk.jacobians import PooledJacobian
from mimicnorm_jax.diagnostics.tracing import TracedNetwork
from mimicnorm_jax.diagnostics.tracing.pooled import pooled_layers
from mimicnorm_jax.functional import relu, relu_save_mask
from tests.diagnostics.networks import by_output, close, draw, filled, reference
from tests.diagnostics.ntk.random_programs import centered

pytestmark = pytest.mark.usefixtures("x64")
C = 5


@jax.custom_vjp
def _clipped(x):
    """Its backward pass is no linear function."""
    return x


_clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@jax.custom_jvp
def _mixing(x):
    """Keeps channels apart; its derivative does not."""
    return jnp.tanh(x)


@_mixing.defjvp
def _(primals, tangents):
    return jnp.tanh(primals[0]), tangents[0] + tangents[0].mean(-1, keepdims=True)


def _conv(x, w):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _mean(y):
    return y.mean((1, 2))


def _wide_max(y):
    return lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").max((1, 2))


# From the second convolution's product, its input and the parameters to what the classifier multiplies.
POOLED = {
    "mean": lambda y, x, p: _mean(jax.nn.relu(y + p["b"].reshape(1, 1, 1, C))),
    "lean ReLU": lambda y, x, p: _mean(relu(y)),
    "ReLU that keeps a mask": lambda y, x, p: _mean(relu_save_mask(y)),
    "by a factor without gradient": lambda y, x, p: _mean(y * lax.stop_gradient(jax.nn.softmax(y))),
    "maximum": lambda y, x, p: _wide_max(jnp.tanh(y)),
    "shortcut": lambda y, x, p: _mean(jax.nn.relu(y * 0.3 + x)),
    "scaled by channel": lambda y, x, p: _mean(jnp.exp(y) * p["b"][None, None, None] + 1) ** 2,
    "gated by its input": lambda y, x, p: _mean(y * jax.nn.sigmoid(_mean(x) @ jnp.eye(C))[:, None, None]),
    "rematerialized": lambda y, x, p: jax.checkpoint(lambda y: _mean(jnp.sin(y)))(y),
    "normalized over positions": lambda y, x, p: _mean(
        jax.nn.relu((y - y.mean((1, 2), keepdims=True)) / jnp.sqrt(y.var((1, 2), keepdims=True) + 1))
    ),
    "in another order of axes": lambda y, x, p: jnp.tanh(y.transpose(0, 3, 2, 1)).reshape(len(y), C, -1).sum(2),
    "one position": lambda y, x, p: jnp.sin(y)[:, 0, 1],
}
NOT_POOLED = {
    "normalized over channels": lambda y, x, p: _mean(y / jnp.linalg.norm(y, axis=-1, keepdims=True)),
    "softmax": lambda y, x, p: _mean(jax.nn.softmax(y)),
    "gated by itself": lambda y, x, p: _mean(y * jax.nn.sigmoid(_mean(y) @ p["square"])[:, None, None]),
    "another order of channels": lambda y, x, p: _mean(y[..., ::-1]),
    "next to its neighbour": lambda y, x, p: _mean(jnp.cumsum(y, -1)),
    "rolled": lambda y, x, p: _mean(y * jnp.roll(y, 1, -1)),
    "a backward pass by hand": lambda y, x, p: _mean(_clipped(y)),
    "a derivative that mixes": lambda y, x, p: _mean(_mixing(y)),
}


def _params():
    params = {"first": draw(0, 3, 3, 2, C), "second": draw(1, 3, 3, C, C), "b": draw(2, C), "square": draw(3, C, C)}
    return params | {"head": draw(4, C, 3)}


def _network(pool, p, x):
    x = jnp.tanh(_conv(x, p["first"]))
    return pool(_conv(x, p["second"]), x, p) @ p["head"]


def _names(apply_fn, params):
    x = draw(9, 1, C, 4, 2)
    network = TracedNetwork(apply_fn, params, x)
    return {network.layers[i].name for i in pooled_layers(network, x, network.layers)}


@pytest.mark.parametrize("name", POOLED)
def test_what_is_proved(name):
    assert _names(functools.partial(_network, POOLED[name]), _params()) == {"second"}


@pytest.mark.parametrize("name", NOT_POOLED)
def test_what_is_not(name):
    assert _names(functools.partial(_network, NOT_POOLED[name]), _params()) == set()


def test_another_way_to_the_outputs():
    def apply_fn(p, x):
        x = jnp.tanh(_conv(x, p["first"]))
        y = jnp.tanh(_conv(x, p["second"]))
        return _mean(y) @ p["head"] + (y**2).sum((1, 2, 3))[:, None]

    assert _names(apply_fn, _params()) == set()


def test_a_convolution_of_one_position_that_reads_a_map():
    """It may skip what it was given, as this stride does: not one number a channel, though it multiplies as many."""

    def apply_fn(p, x):
        y = jnp.sin(_conv(jnp.tanh(_conv(x, p["first"])), p["second"])[:, :2, :2])
        last = p["head"].reshape(1, 1, C, 3)
        return lax.conv_general_dilated(y, last, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[:, 0, 0]

    assert _names(apply_fn, _params()) == set()


def test_outputs_that_are_pooled_themselves():
    """Of a classifier that is a convolution, the columns are those of the identity."""

    def apply_fn(p, x):
        return _mean(jax.nn.relu(_conv(jnp.tanh(_conv(x, p["first"])), p["second"]))) * jnp.arange(1.0, 1 + C)[None]

    params, x = {name: _params()[name] for name in ("first", "second")}, draw(9, 3, 4, 4, 2)
    assert _names(apply_fn, params) == {"second"}
    _check(apply_fn, params, x, 1)


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setattr(structured_derivatives, "pooled_cost", lambda *_: -1.0)


def _check(apply_fn, params, x, count):
    """All outputs, traces, diagonals and one output, of one set and of two, against the Jacobian."""
    every = by_output(reference(apply_fn, params, x))
    for output in ("full", "trace", "diagonal"):  # one output alone has nothing to share
        value = every[output]
        kernel = EmpiricalNTK(apply_fn, output=output, implementation="structured_derivatives")
        assert f"{count} of the layers by a column an output" in kernel.plan(params, x).detail
        close(kernel(params, x), value)
        close(kernel(params, x[:2], x[1:]), value[:2, 1:])


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("name", POOLED)
def test_what_is_proved_contributes_what_its_jacobian_does(name):
    apply_fn, params, x = functools.partial(_network, POOLED[name]), _params(), draw(9, 3, C, 4, 2)
    kernel = EmpiricalNTK(apply_fn, implementation="structured_derivatives")
    assert "1 of the layers by a column an output" in kernel.plan(params, x).detail
    close(kernel(params, x), reference(apply_fn, params, x))


@pytest.mark.usefixtures("forced")
def test_scaled_and_centered_kernels_with_scalars():
    """Both convolutions that end a block count; so does a scalar that is folded into a kernel."""

    def apply_fn(p, x):
        x = jnp.tanh(_conv(x, p["first"]))
        y = _conv(jnp.tanh(_conv(x, p["second"])), 0.3 * centered(p["third"], (0, 1, 2)) * p["scale"])
        return _mean(jax.nn.relu(y + _conv(x, centered(p["shortcut"], (0, 1, 2))))) @ p["head"]

    params = _params() | {"third": draw(5, 3, 3, C, C), "shortcut": draw(6, 1, 1, C, C), "scale": jnp.asarray(1.7)}
    del params["square"], params["b"]
    _check(apply_fn, params, draw(9, 3, 4, 4, 2), 2)


@pytest.mark.usefixtures("forced")
@pytest.mark.parametrize("method", ["mimicnorm", "none", "fixup"])
def test_networks_of_the_library(method):
    model, x = models.create("resnet8", method=method, width=0.25, num_classes=3, dtype="float64"), draw(9, 2, 8, 8, 3)
    apply_fn, params = from_linen(model, filled(model, x))
    kernel = EmpiricalNTK(apply_fn, implementation="structured_derivatives")
    assert "of the layers by a column an output" in kernel.plan(params, x).detail
    close(kernel(params, x), reference(apply_fn, params, x))


@pytest.mark.usefixtures("forced")
def test_one_output_and_blocks(tmp_path):
    """One output of several, contributions kept apart, and features that are written for blocks."""
    apply_fn, params, x = functools.partial(_network, POOLED["mean"]), _params(), draw(9, 5, 4, 4, 2)
    expected = reference(apply_fn, params, x)
    one = EmpiricalNTK(apply_fn, output=1, implementation="structured_derivatives")
    close(one(params, x), expected[:, :, 1, 1])
    apart = EmpiricalNTK(apply_fn, per_parameter=True, implementation="structured_derivatives")
    close(sum(apart(params, x).values()), expected)
    need = apart.plan(params, x[:2]).bytes
    small = EmpiricalNTK(apply_fn, memory=need, implementation="structured_derivatives")
    assert small.plan(params, x).block[0] < 5
    close(small(params, x), expected)


@pytest.mark.parametrize("output", ["full", "diagonal", "trace"])
def test_inner_products(monkeypatch, output):
    """In one product and row by row."""
    left, right = (PooledJacobian(draw(i, n, 6, 4), draw(i + 1, n, 3, 4)) for i, n in ((0, 5), (2, 7)))
    rows = [
        jnp.einsum("nfc,noc->nofc", side.maps, side.columns).reshape(len(side.maps), 3, -1) for side in (left, right)
    ]
    full = jnp.einsum("aok,bpk->aobp", *rows)
    expected = {"full": full, "diagonal": jnp.einsum("aobo->abo", full), "trace": jnp.einsum("aobo->ab", full)}
    for piece in (2**20, 1):
        monkeypatch.setattr("mimicnorm_jax.diagnostics.ntk.features.PIECE", piece)
        close(contract(left, right, output), expected[output])


def test_price():
    """Of a network with one output there is nothing to share; with many the price does not grow with their number."""
    sizes = (256, 1, 576, 64)
    one, ten, hundred = (pooled_cost(sizes, (32, None), outputs, "trace") for outputs in (1, 10, 100))
    assert ten < 1.1 * one
    assert hundred < 2 * one
