"""The regime's numbers from explicit Jacobians, and what precision allows to say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax.diagnostics import RegimeMeter, condition_number, from_linen, unit_diagonal
from mimicnorm_jax.diagnostics.regime import describe_condition
from mimicnorm_jax.linen import Dropout
from mimicnorm_jax.theory import random_mlp

pytestmark = pytest.mark.usefixtures("x64")


def test_condition_numbers_say_what_their_precision_knows():
    assert condition_number(np.diag([1.0, 4.0, 2.0])) == 4
    assert condition_number(np.ones((2, 2)) - np.eye(2)) == np.inf
    assert describe_condition(3e7, np.dtype("float64")) == "3e+07"
    assert describe_condition(3e7, np.dtype("float32")).startswith(">= 1e6")
    assert describe_condition(np.inf, np.dtype("float32")).startswith(">= 1e6")
    assert describe_condition(np.inf, np.dtype("float64")) == "singular"


def test_regime_of_mlps():
    """kappa from Jacobians written out; weight mean amplifies a perturbation more than a plain MLP."""
    x = jax.random.normal(jax.random.key(1), (6, 32))
    chi = {}
    for kind in ("plain", "weight_mean"):
        mlp = getattr(random_mlp, kind)(inputs=32, width=64, depth=6, outputs=2)
        params = mlp.init(jax.random.key(0))
        found = RegimeMeter(mlp.apply, output=1)(params, x, jax.random.key(2))
        leaves = jax.tree.leaves(jax.jacrev(lambda p, mlp=mlp: mlp.apply(p, x)[:, 1])(params))
        rows = np.concatenate([np.asarray(leaf).reshape(6, -1) for leaf in leaves], 1)
        np.testing.assert_allclose(found.kappa, np.linalg.cond(rows) ** 2, rtol=1e-8)
        np.testing.assert_allclose(found.kappa_unit_diagonal, condition_number(unit_diagonal(rows @ rows.T)), rtol=1e-8)
        np.testing.assert_allclose(found.chi ** (found.layers - 1), found.growth, rtol=1e-8)
        chi[kind] = found.chi
    # 1 and 1.467 at infinite width; at width 64 the spread of one network's is about 0.1.
    assert chi["weight_mean"] > 1.2 > chi["plain"]


def test_growth_of_batch_norm_starts_at_the_second_layer():
    mlp = random_mlp.batch_normalized(inputs=32, width=64, depth=4, outputs=1)
    params, x = mlp.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (8, 32))
    meter = RegimeMeter(mlp.apply, batch_coupled=True)
    # The theory's chi at a batch of 8 is 1.79; the first step would draw the mean down to about 1.5.
    assert meter(params, x, jax.random.key(2)).chi > 1.6


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(3, param_dtype=jnp.float64)(x))


class OursDropped(nn.Module):
    """As our networks drop: the layer is not there in evaluation, and recomputed in the backward pass."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(3, param_dtype=jnp.float64)(x)
        return nn.remat(Dropout)(0.5)(x) if train else x


@pytest.mark.parametrize("module", [Dropped(), OursDropped()], ids=["flax", "ours"])
def test_dropout_needs_its_random_numbers(module):
    x = jnp.ones((4, 2))
    variables = module.init(jax.random.key(0), x, train=False)
    without, params = from_linen(module, variables, train=True)
    np.testing.assert_array_equal(without(params, x), module.apply(variables, x, train=False))
    drawn, _ = from_linen(module, variables, train=True, rngs={"dropout": jax.random.key(1)})
    expected = module.apply(variables, x, train=True, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_array_equal(drawn(params, x), expected)
    assert np.any(expected != without(params, x))
    with pytest.raises(ValueError, match="no 'params'"):
        from_linen(module, {"batch_stats": {}})
