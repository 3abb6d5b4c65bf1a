"""The identities of weight centering."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mimicnorm_jax.functional import kernels

SHAPES = [(7, 5), (3, 6, 4), (3, 3, 8, 16), (3, 3, 2, 16), (2, 3, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_center_agrees_with_a_loop_over_output_channels(shape, x64):
    kernel = np.asarray(jax.random.normal(jax.random.key(0), shape)) + 3
    expected = np.stack([kernel[..., o] - kernel[..., o].sum() / math.prod(shape[:-1]) for o in range(shape[-1])], -1)
    np.testing.assert_allclose(kernels.center(jnp.asarray(kernel)), expected, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_center_is_an_orthogonal_projection(shape, x64):
    v, w = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    once = kernels.center(v)
    np.testing.assert_allclose(kernels.center(once), once, atol=1e-14)
    assert abs(jnp.vdot(w, once) - jnp.vdot(kernels.center(w), v)) < 1e-12


def test_bfloat16_kernels_are_centered_in_float32():
    kernel = (jax.random.normal(jax.random.key(0), (3, 3, 64, 8)) + 1).astype(jnp.bfloat16)
    centered = kernels.center(kernel)
    assert centered.dtype == jnp.bfloat16
    # Rounding the result moves each weight by at most 2^-9 of itself; a mean in bfloat16 is off by more.
    wide = centered.astype(jnp.float32)
    assert (abs(wide.mean((0, 1, 2))) <= 2**-9 * abs(wide).mean((0, 1, 2))).all()


def test_nothing_to_center_is_an_error():
    with pytest.raises(ValueError, match="fan-in 1"):
        kernels.center(jnp.ones((1, 1, 1, 8)))
    with pytest.raises(ValueError, match="shape \\(8,\\)"):
        kernels.center(jnp.ones(8))
    with pytest.raises(ValueError, match="at least 2"):
        kernels.gain(1)


def test_gain_keeps_the_energy_of_a_centered_relu_layer(x64):
    """E q_1 / q_0 = 1 for q = E[x^2] after a ReLU on Gaussian input; forgetting n/(n-1) gives 0.9 at n = 10."""
    n, draws = 10, 400_000
    pre, kernel = jax.random.split(jax.random.key(0))
    x = jax.nn.relu(jax.random.normal(pre, (draws, n)))  # E[x^2] = 1/2, not centered
    w = kernels.center(jax.random.normal(kernel, (draws, n)).T).T * kernels.gain(n) * math.sqrt(2 / n)
    ratio = (jax.nn.relu((w * x).sum(1)) ** 2).mean() / (x**2).mean()
    # Standard deviation of the ratio is below 4 / sqrt(draws) = 0.006.
    assert abs(ratio - 1) < 0.02


def test_rules():
    stem, depthwise, wide = (3, 3, 3, 64), (3, 3, 1, 64), (1, 1, 64, 64)
    published = [kernels.PUBLISHED_CIFAR_RULE(shape, 1) for shape in (stem, depthwise, wide)]
    assert published == [False, False, True]
    assert [kernels.ungrouped(depthwise, 64), kernels.ungrouped(stem, 1)] == [False, True]
    assert [kernels.always(depthwise, 64), kernels.never(wide, 1)] == [True, False]


def test_project_centers_the_selected_leaves_and_no_others():
    kernel = jnp.ones((3, 3, 8, 2)) * jnp.arange(8.0).reshape(1, 1, 8, 1)
    tree = {
        "a": {"kernel": kernel, "bias": jnp.ones(2)},
        "head": {"kernel": jnp.ones((72, 2))},
        "stem": {"kernel": kernel[:, :, :3]},
    }
    projected = kernels.center_params(tree)
    assert abs(projected["a"]["kernel"].sum((0, 1, 2))).max() < 1e-4
    for name in ("head", "stem"):
        np.testing.assert_array_equal(projected[name]["kernel"], tree[name]["kernel"])
    np.testing.assert_array_equal(projected["a"]["bias"], tree["a"]["bias"])
    everything = kernels.center_params(tree, lambda path, leaf: path[0] == "head" and leaf.ndim > 1)
    assert abs(everything["head"]["kernel"]).max() == 0


def test_keep_kernels_centered_keeps_kernels_centered_under_any_optimizer():
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 8, 4))}
    tx = optax.chain(optax.adamw(0.1), kernels.keep_kernels_centered(kernels.select_conv_kernels(window=2)))
    state = tx.init(params)
    for i in range(3):
        grads = {"kernel": jax.random.normal(jax.random.key(i + 1), (3, 3, 8, 4))}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    # float32: the sum of 72 numbers of order 1.
    assert abs(params["kernel"].sum((0, 1, 2))).max() < 72 * 1e-6
    with pytest.raises(ValueError, match="needs the parameters"):
        kernels.keep_kernels_centered().update(params, optax.EmptyState())


def test_boxed_kernels_are_centered_in_their_boxes():
    """As `nn.with_partitioning` leaves them."""
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 4))
    box = nn.Partitioned(kernel, (None, None, None, "model"))
    projected = kernels.center_params({"conv": {"kernel": box, "bias": nn.Partitioned(jnp.ones(4), ("model",))}})
    assert projected["conv"]["kernel"].names == box.names
    np.testing.assert_array_equal(projected["conv"]["kernel"].value, kernels.center(kernel))
    with pytest.raises(ValueError, match="conv/kernel"):
        kernels.center_params({"conv": {"kernel": nn.Partitioned(kernel, ("layers", None, None, None))}})


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
        kernels.center_params(tree)


def test_what_the_user_says_of_kernels_is_taken_unless_a_bias_contradicts():
    leaves = {"query": jnp.ones((64, 2, 4)), "conv": jax.random.normal(jax.random.key(0), (3, 3, 8, 4))}
    tree = {name: {"kernel": kernel} for name, kernel in leaves.items()}
    projected = kernels.center_params(tree, kernels.select_conv_kernels(window=2))
    np.testing.assert_array_equal(projected["conv"]["kernel"], kernels.center(leaves["conv"]))
    np.testing.assert_array_equal(projected["query"]["kernel"], leaves["query"])
    with pytest.raises(ValueError, match=r"bias \(3, 4\)"):
        kernels.center_params({"scan": {"kernel": leaves["conv"], "bias": jnp.ones((3, 4))}}, lambda *_: True)
    stacked = kernels.center_params({"kernel": leaves["conv"]}, lambda path, leaf: jax.vmap(kernels.center))
    np.testing.assert_allclose(
        stacked["kernel"], leaves["conv"] - leaves["conv"].mean((1, 2), keepdims=True), atol=1e-6
    )
