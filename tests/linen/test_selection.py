"""Kernels of convolutions are known by their module, in trees where shapes tell nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax import CenteredConv, select_convolutions
from mimicnorm_jax.functional import always, center
from mimicnorm_jax.optim import center_params


class Block(nn.Module):
    """What is scanned: a convolution without a bias, and attention, whose stacked kernels have a convolution's rank."""

    @nn.compact
    def __call__(self, x, _):
        x = CenteredConv(8, (3,), use_bias=False, name="conv")(x)
        return nn.MultiHeadDotProductAttention(2, use_bias=False, qkv_features=64, name="attention")(x), None


class Net(nn.Module):
    length: int
    axis: int = 0

    @nn.compact
    def __call__(self, x):
        partitioned = nn.with_partitioning(nn.initializers.normal(1), (None, None, None, "model"))
        x = nn.Conv(8, (3, 3), kernel_init=partitioned, name="boxed")(x)
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        scan = functools.partial(nn.scan, variable_axes={"params": self.axis}, split_rngs={"params": True})
        return scan(Block, length=self.length)(name="stack")(x.reshape(len(x), -1, 8), None)[0]


@pytest.mark.parametrize("axis", [0, 1])
def test_only_convolutions_are_centered_and_each_of_a_stack_by_itself(axis):
    module, x = Net(5, axis), jnp.ones((2, 6, 6, 8))
    params = module.init(jax.random.key(0), x)["params"]
    projected = center_params(params, select_convolutions(module, x, rule=lambda shape, groups: groups == 1))
    raw = params["stack"]["conv"]["kernel"]
    for layer in range(5):
        one, expected = (jnp.take(k, layer, axis) for k in (projected["stack"]["conv"]["kernel"], raw))
        # float32: a mean of 24 numbers of order 1.
        np.testing.assert_allclose(one, center(expected), atol=1e-6)
    np.testing.assert_array_equal(projected["boxed"]["kernel"].value, center(params["boxed"]["kernel"].value))
    for path in (("depthwise",), ("stack", "attention")):
        before, after = (functools.reduce(lambda tree, name: tree[name], path, tree) for tree in (params, projected))
        jax.tree.map(np.testing.assert_array_equal, before, after)


def test_variables_of_a_module_are_as_good_as_its_parameters():
    module, x = Net(5), jnp.ones((2, 6, 6, 8))
    variables = module.init(jax.random.key(0), x)
    select = select_convolutions(module, x)
    whole = center_params(variables, select)["params"]
    jax.tree.map(np.testing.assert_array_equal, whole, center_params(variables["params"], select))


def test_a_stack_as_long_as_the_window_and_parameters_of_another_module_are_refused():
    module, x = Net(3), jnp.ones((2, 6, 6, 8))
    params = module.init(jax.random.key(0), x)["params"]
    select = select_convolutions(module, x, rule=always)
    with pytest.raises(ValueError, match=r"stack/conv/kernel of shape \(3, 3, 8, 8\).* several axes.*jax.vmap"):
        center_params(params, select)
    with pytest.raises(ValueError, match=r"boxed/kernel of shape \(5, 3, 8, 8\).* is not one"):
        center_params({"boxed": {"kernel": jnp.ones((5, 3, 8, 8))}}, select)
