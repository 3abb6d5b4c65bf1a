"""Kernels of convolutions are known by their module, in trees where shapes tell nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mimicnorm_jax import CenteredConv, models, select_convolutions
from mimicnorm_jax.functional import KernelTransform, center, fan_in_above, standardize, ungrouped
from mimicnorm_jax.linen import find_kernels, select_kernels
from mimicnorm_jax.optim import center_params, keep_kernels_centered, select_conv_kernels


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
    projected = center_params(params, select_convolutions(module, x, transform=KernelTransform(center, ungrouped)))
    raw = params["stack"]["conv"]["kernel"]
    for layer in range(5):
        one, expected = (jnp.take(k, layer, axis) for k in (projected["stack"]["conv"]["kernel"], raw))
        # float32: a mean of 24 numbers of order 1.
        np.testing.assert_allclose(one, center(expected), atol=1e-6)
    np.testing.assert_array_equal(projected["boxed"]["kernel"].value, center(params["boxed"]["kernel"].value))
    for path in (("depthwise",), ("stack", "attention")):
        before, after = (functools.reduce(lambda tree, name: tree[name], path, tree) for tree in (params, projected))
        jax.tree.map(np.testing.assert_array_equal, before, after)


class Side(nn.Module):
    """Attention without biases, so that shapes tell nothing, side by side under `nn.vmap`."""

    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": 1}, "split_rngs": {"params": True}, "axis_size": 3}
        vmapped = nn.vmap(nn.MultiHeadDotProductAttention, in_axes=None, **options)
        return vmapped(2, use_bias=False, qkv_features=8, name="attention")(x)


def test_an_optimizer_keeps_the_selected_kernels_of_vmapped_attention_standardized_over_their_own_fan_in():
    module, x = Side(), jnp.ones((2, 5, 4))
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    every = select_kernels(module, x, transform=KernelTransform(standardize))
    tx = optax.chain(
        optax.adamw(0.1), keep_kernels_centered(lambda path, leaf: "key" not in path and every(path, leaf))
    )
    gradients = jax.tree.map(jnp.sin, params)
    updates, _ = tx.update(gradients, tx.init(params), params)
    after = optax.apply_updates(params, updates)["attention"]
    # Inputs of a query (4, 3 layers, 2 heads, 4); heads and their features of an output (2, 3 layers, 4, 4).
    for name, axes in (("query", 0), ("value", 0), ("out", (0, 2))):
        kernel = after[name]["kernel"]
        # float32; `standardize` adds 1e-5 to n times the variance, which is of order 1 here.
        assert abs(kernel.sum(axes)).max() < 1e-5
        np.testing.assert_allclose((kernel**2).sum(axes), 1, rtol=1e-3)
    assert abs(after["key"]["kernel"].sum(0)).max() > 0.1


def test_projection_takes_a_transform_of_the_users_own():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 4))
    params = {
        "conv": {"kernel": kernel, "bias": jnp.ones(4)},
        "narrow": {"kernel": kernel[:, :, :2], "bias": jnp.ones(4)},
    }
    transform = KernelTransform(standardize, fan_in_above(50))
    projected = center_params(params, select_conv_kernels(transform))
    np.testing.assert_array_equal(projected["conv"]["kernel"], standardize(kernel))
    np.testing.assert_array_equal(projected["narrow"]["kernel"], params["narrow"]["kernel"])


def test_what_a_network_reads_centered_is_known():
    """The published rule leaves out the stem and narrow pointwise kernels; classifiers are dense, and are found."""
    net = models.create("squeezenet", method="mimicnorm", num_classes=10, width=0.25)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    found = find_kernels(net, image, False)  # train
    raw = {path[:-2]: kernel.layout.shape for path, kernel in found.items() if not kernel.transformed}
    assert all(math.prod(shape[:-1]) <= 50 for shape in raw.values())
    assert ("stem",) in raw
    plain = models.create("squeezenet", method="none", num_classes=10, width=0.25)
    assert {path: kernel.layout for path, kernel in found.items()} == {
        path: kernel.layout for path, kernel in find_kernels(plain, image).items()
    }
    assert not any(kernel.transformed for kernel in find_kernels(plain, image).values())


def test_variables_of_a_module_are_as_good_as_its_parameters():
    module, x = Net(5), jnp.ones((2, 6, 6, 8))
    variables = module.init(jax.random.key(0), x)
    select = select_convolutions(module, x)
    whole = center_params(variables, select)["params"]
    jax.tree.map(np.testing.assert_array_equal, whole, center_params(variables["params"], select))


def test_a_stack_as_long_as_the_window_and_parameters_of_another_module_are_refused():
    module, x = Net(3), jnp.ones((2, 6, 6, 8))
    params = module.init(jax.random.key(0), x)["params"]
    select = select_convolutions(module, x, transform=KernelTransform(center))
    with pytest.raises(ValueError, match=r"stack/conv/kernel of shape \(3, 3, 8, 8\).* several axes.*jax.vmap"):
        center_params(params, select)
    with pytest.raises(ValueError, match=r"boxed/kernel of shape \(5, 3, 8, 8\).* is not one"):
        center_params({"boxed": {"kernel": jnp.ones((5, 3, 8, 8))}}, select)


def test_a_layer_that_is_not_chosen_is_not_taken_for_one_of_the_same_name_further_up():
    class Part(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.ConvTranspose(8, (3, 3), name="up", transpose_kernel=True)(x)

    class Whole(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Part(name="part")(nn.Conv(8, (3, 3), name="up")(x))

    x = jnp.ones((1, 6, 6, 8))
    variables = Whole().init(jax.random.key(0), x)
    select = select_convolutions(Whole(), x)
    for tree, params in ((variables, variables["params"]), (variables["params"],) * 2):
        centered = center_params(tree, select)
        centered = centered.get("params", centered)
        np.testing.assert_array_equal(centered["part"]["up"]["kernel"], params["part"]["up"]["kernel"])
        assert abs(centered["up"]["kernel"].sum((0, 1, 2))).max() < 1e-5  # float32: of 72 numbers below 1
