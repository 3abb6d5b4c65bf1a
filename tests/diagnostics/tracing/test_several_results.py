"""What is one number, and which: results of several, and what is rounded; held against plain jax.jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.diagnostics import empirical_ntk

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
X, W, V, FIVE = (RNG.standard_normal(shape) for shape in ((3, 4), (4, 4), (4, 2), (5,)))


def _rows(w):
    return w * jnp.split(FIVE, [1])[1][:, None]


def _columns(w):
    return w * jnp.split(FIVE, [1])[1][None]


def _two_numbers(w):
    one, other = jax.lax.split(FIVE[:2], (1, 1))
    return w * other[:, None] - (w * one[:, None]).mean(0, keepdims=True)


def _mask(w):
    size = jnp.abs(jax.lax.stop_gradient(w))
    return w * jax.lax.fori_loop(0, 3, lambda i, m: m * (size * m > 0.3 + 0.1 * i), jnp.ones_like(w))


def _counted(w):
    state = jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.sin(s[1]) + s[0]), (0, FIVE[1:]))
    return w * state[1][:, None]


def _assert_plain(network, params):
    jacobian = jax.jacobian(network)(params, X)
    rows = [j.reshape(3, 2, -1) for j in jax.tree.leaves(jacobian)]
    expected = sum(jnp.einsum("nok,mpk->nmop", j, j) for j in rows)
    np.testing.assert_allclose(empirical_ntk(network, params, X), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("change", [_rows, _columns, _two_numbers, _mask, _counted])
def test_a_vector_beside_a_number_is_no_number(change):
    def network(params, x):
        return jnp.tanh(x @ change(params["w"])) @ params["v"]

    _assert_plain(network, {"w": W, "v": V})


def test_a_vector_beside_a_number_depends_on_the_place_in_the_batch():
    """Values do not tell: with the derivative stopped they are those of a network that treats all examples alike."""

    def network(params, x):
        hidden = jnp.tanh(x @ params["w"])
        factor = jnp.split(FIVE, [1])[1][: len(x), None]
        return (hidden * factor + jax.lax.stop_gradient(hidden - hidden * factor)) @ params["v"]

    with pytest.raises(ValueError, match=r"mul at .* combines the inputs with values that depend on the place in"):
        empirical_ntk(network, {"w": W, "v": V}, X)


def test_a_number_that_is_rounded_is_another_number():
    """A mean times the rounded scale is not the mean of what has the scale itself: 0.4 % of it stay."""

    def network(params, x):
        rounded = params["scale"].astype(jnp.bfloat16).astype(x.dtype)
        kernel = params["w"] * params["scale"] - params["w"].mean(0, keepdims=True) * rounded
        return jnp.tanh(x @ kernel) @ params["v"]

    _assert_plain(network, {"w": W, "v": V, "scale": np.float64(1.2345)})
