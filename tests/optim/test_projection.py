"""Centering of parameter trees: which leaves, and what a tree cannot tell."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mimicnorm_jax.functional import center
from mimicnorm_jax.optim import center_params, keep_kernels_centered, select_conv_kernels


def test_project_centers_the_selected_leaves_and_no_others():
    kernel = jnp.ones((3, 3, 8, 2)) * jnp.arange(8.0).reshape(1, 1, 8, 1)
    tree = {
        "a": {"kernel": kernel, "bias": jnp.ones(2)},
        "head": {"kernel": jnp.ones((72, 2))},
        "stem": {"kernel": kernel[:, :, :3]},
    }
    projected = center_params(tree)
    assert abs(projected["a"]["kernel"].sum((0, 1, 2))).max() < 1e-4
    for name in ("head", "stem"):
        np.testing.assert_array_equal(projected[name]["kernel"], tree[name]["kernel"])
    np.testing.assert_array_equal(projected["a"]["bias"], tree["a"]["bias"])
    everything = center_params(tree, lambda path, leaf: path[0] == "head" and leaf.ndim > 1)
    assert abs(everything["head"]["kernel"]).max() == 0


def test_keep_kernels_centered_keeps_kernels_centered_under_any_optimizer():
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 8, 4))}
    tx = optax.chain(optax.adamw(0.1), keep_kernels_centered(select_conv_kernels(window=2)))
    state = tx.init(params)
    for i in range(3):
        grads = {"kernel": jax.random.normal(jax.random.key(i + 1), (3, 3, 8, 4))}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    # float32: the sum of 72 numbers of order 1.
    assert abs(params["kernel"].sum((0, 1, 2))).max() < 72 * 1e-6
    with pytest.raises(ValueError, match="needs the parameters"):
        keep_kernels_centered().update(params, optax.EmptyState())


def test_boxed_kernels_are_centered_in_their_boxes():
    """As `nn.with_partitioning` leaves them."""
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 4))
    box = nn.Partitioned(kernel, (None, None, None, "model"))
    projected = center_params({"conv": {"kernel": box, "bias": nn.Partitioned(jnp.ones(4), ("model",))}})
    assert projected["conv"]["kernel"].names == box.names
    np.testing.assert_array_equal(projected["conv"]["kernel"].value, center(kernel))
    with pytest.raises(ValueError, match="conv/kernel"):
        center_params({"conv": {"kernel": nn.Partitioned(kernel, ("layers", None, None, None))}})


@pytest.mark.parametrize(
    ("shape", "bias"),
    [
        ((8, 9, 4), (4,)),  # a 1-D convolution, or an attention's output
        ((64, 2, 4), (2, 4)),  # an attention's query
        ((5, 3, 8, 4), (5, 4)),  # a stack of 1-D convolutions
        ((5, 3, 3, 8, 4), (5, 4)),  # a stack of 2-D convolutions
        ((3, 3, 3, 8, 4), (4,)),  # a 3-D convolution
        ((3, 3, 8, 4), None),  # a 2-D convolution, or a stack of anything
        ((3, 3, 8, 4), (8,)),  # a transposed convolution's kernel, output channels before the last axis
    ],
)
def test_kernels_that_a_tree_cannot_tell_are_refused(shape, bias):
    tree = {"layer": {"kernel": jnp.ones(shape)} | ({} if bias is None else {"bias": jnp.ones(bias)})}
    with pytest.raises(ValueError, match=r"layer/kernel of shape .*select=select_conv_kernels\(window=2\)"):
        center_params(tree)


def test_a_tree_without_flaxs_names_is_refused_instead_of_left_uncentered():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 4))
    tree = {"conv2_d": {"w": kernel, "b": jnp.zeros(4)}}  # as Haiku names them
    for select in (None, select_conv_kernels(window=2)):
        with pytest.raises(ValueError, match=r"named 'kernel', .* there are b, w: give a select"):
            center_params(tree, select)
    projected = center_params(tree, lambda path, leaf: path[-1] == "w")
    np.testing.assert_array_equal(projected["conv2_d"]["w"], center(kernel))
    assert center_params({}) == {}


def test_what_the_user_says_of_kernels_is_taken_unless_a_bias_contradicts():
    leaves = {"query": jnp.ones((64, 2, 4)), "conv": jax.random.normal(jax.random.key(0), (3, 3, 8, 4))}
    tree = {name: {"kernel": kernel} for name, kernel in leaves.items()}
    projected = center_params(tree, select_conv_kernels(window=2))
    np.testing.assert_array_equal(projected["conv"]["kernel"], center(leaves["conv"]))
    np.testing.assert_array_equal(projected["query"]["kernel"], leaves["query"])
    with pytest.raises(ValueError, match=r"bias \(3, 4\)"):
        center_params({"scan": {"kernel": leaves["conv"], "bias": jnp.ones((3, 4))}}, lambda *_: True)
    stacked = center_params({"kernel": leaves["conv"]}, lambda path, leaf: jax.vmap(center))
    np.testing.assert_allclose(
        stacked["kernel"], leaves["conv"] - leaves["conv"].mean((1, 2), keepdims=True), atol=1e-6
    )


def test_a_group_without_kernels_is_left_alone():
    """Each group of `optax.partition` sees its leaves alone."""
    params = {"conv": {"kernel": jnp.ones((3, 3, 8, 5)) * jnp.arange(1.0, 6.0)[None, None, None], "bias": jnp.ones(5)}}
    groups = {"conv": {"kernel": "matrices", "bias": "vectors"}}
    centering = keep_kernels_centered(select_conv_kernels(window=2))
    tx = optax.partition(dict.fromkeys(("matrices", "vectors"), optax.chain(optax.sgd(0.1), centering)), groups)
    updates, _ = tx.update(params, tx.init(params), params)
    after = optax.apply_updates(params, updates)
    np.testing.assert_allclose(after["conv"]["kernel"], 0, atol=2e-6)  # float32 means of numbers up to 5
    np.testing.assert_allclose(after["conv"]["bias"], 0.9)
