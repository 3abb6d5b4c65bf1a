"""The identities of weight centring."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mimicnorm_jax import centring

SHAPES = [(7, 5), (3, 6, 4), (3, 3, 8, 16), (3, 3, 2, 16), (2, 3, 3, 4, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_centre_agrees_with_a_loop_over_output_channels(shape, x64):
    kernel = np.asarray(jax.random.normal(jax.random.key(0), shape)) + 3
    expected = np.stack([kernel[..., o] - kernel[..., o].sum() / math.prod(shape[:-1]) for o in range(shape[-1])], -1)
    np.testing.assert_allclose(centring.centre(jnp.asarray(kernel)), expected, atol=1e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_centre_is_an_orthogonal_projection(shape, x64):
    v, w = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    once = centring.centre(v)
    np.testing.assert_allclose(centring.centre(once), once, atol=1e-14)
    assert abs(jnp.vdot(w, once) - jnp.vdot(centring.centre(w), v)) < 1e-12


def test_bfloat16_kernels_are_centred_in_float32():
    kernel = (jax.random.normal(jax.random.key(0), (3, 3, 64, 8)) + 1).astype(jnp.bfloat16)
    centred = centring.centre(kernel)
    assert centred.dtype == jnp.bfloat16
    # Rounding the result moves each weight by at most 2^-9 of itself; a mean in bfloat16 is off by more.
    wide = centred.astype(jnp.float32)
    assert (abs(wide.mean((0, 1, 2))) <= 2**-9 * abs(wide).mean((0, 1, 2))).all()


def test_nothing_to_centre_is_an_error():
    with pytest.raises(ValueError, match="fan-in 1"):
        centring.centre(jnp.ones((1, 1, 1, 8)))
    with pytest.raises(ValueError, match="shape \\(8,\\)"):
        centring.centre(jnp.ones(8))
    with pytest.raises(ValueError, match="at least 2"):
        centring.gain(1)


def test_gain_keeps_the_energy_of_a_centred_relu_layer(x64):
    """E q_1 / q_0 = 1 for q = E[x^2] after a ReLU on Gaussian input; forgetting n/(n-1) gives 0.9 at n = 10."""
    n, draws = 10, 400_000
    pre, kernel = jax.random.split(jax.random.key(0))
    x = jax.nn.relu(jax.random.normal(pre, (draws, n)))  # E[x^2] = 1/2, not centred
    w = centring.centre(jax.random.normal(kernel, (draws, n)).T).T * centring.gain(n) * math.sqrt(2 / n)
    ratio = (jax.nn.relu((w * x).sum(1)) ** 2).mean() / (x**2).mean()
    # Standard deviation of the ratio is below 4 / sqrt(draws) = 0.006.
    assert abs(ratio - 1) < 0.02


def test_rules():
    stem, depthwise, wide = (3, 3, 3, 64), (3, 3, 1, 64), (1, 1, 64, 64)
    published = [centring.PUBLISHED_CIFAR_RULE(shape, 1) for shape in (stem, depthwise, wide)]
    assert published == [False, False, True]
    assert [centring.ungrouped(depthwise, 64), centring.ungrouped(stem, 1)] == [False, True]
    assert [centring.always(depthwise, 64), centring.never(wide, 1)] == [True, False]


def test_project_centres_the_selected_leaves_and_no_others():
    kernel = jnp.ones((3, 3, 8, 2)) * jnp.arange(8.0).reshape(1, 1, 8, 1)
    tree = {
        "a": {"kernel": kernel, "bias": jnp.ones(2)},
        "head": {"kernel": jnp.ones((72, 2))},
        "stem": {"kernel": kernel[:, :, :3]},
    }
    projected = centring.project(tree)
    assert abs(projected["a"]["kernel"].sum((0, 1, 2))).max() < 1e-4
    for name in ("head", "stem"):
        np.testing.assert_array_equal(projected[name]["kernel"], tree[name]["kernel"])
    np.testing.assert_array_equal(projected["a"]["bias"], tree["a"]["bias"])
    everything = centring.project(tree, lambda path, leaf: path[0] == "head" and leaf.ndim > 1)
    assert abs(everything["head"]["kernel"]).max() == 0


def test_centre_after_step_keeps_kernels_centred_under_any_optimiser():
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 8, 4))}
    tx = optax.chain(optax.adamw(0.1), centring.centre_after_step(centring.conv_kernels(window=2)))
    state = tx.init(params)
    for i in range(3):
        grads = {"kernel": jax.random.normal(jax.random.key(i + 1), (3, 3, 8, 4))}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    # float32: the sum of 72 numbers of order 1.
    assert abs(params["kernel"].sum((0, 1, 2))).max() < 72 * 1e-6
    with pytest.raises(ValueError, match="needs the parameters"):
        centring.centre_after_step().update(params, optax.EmptyState())


def test_boxed_kernels_are_centred_in_their_boxes():
    """As `nn.with_partitioning` leaves them."""
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 4))
    box = nn.Partitioned(kernel, (None, None, None, "model"))
    projected = centring.project({"conv": {"kernel": box, "bias": nn.Partitioned(jnp.ones(4), ("model",))}})
    assert projected["conv"]["kernel"].names == box.names
    np.testing.assert_array_equal(projected["conv"]["kernel"].value, centring.centre(kernel))
    with pytest.raises(ValueError, match="conv/kernel"):
        centring.project({"conv": {"kernel": nn.Partitioned(kernel, ("layers", None, None, None))}})


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
    with pytest.raises(ValueError, match=r"layer/kernel of shape .*select=conv_kernels\(window=2\)"):
        centring.project(tree)


def test_what_the_user_says_of_kernels_is_taken_unless_a_bias_contradicts():
    kernels = {"query": jnp.ones((64, 2, 4)), "conv": jax.random.normal(jax.random.key(0), (3, 3, 8, 4))}
    tree = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    projected = centring.project(tree, centring.conv_kernels(window=2))
    np.testing.assert_array_equal(projected["conv"]["kernel"], centring.centre(kernels["conv"]))
    np.testing.assert_array_equal(projected["query"]["kernel"], kernels["query"])
    with pytest.raises(ValueError, match=r"bias \(3, 4\)"):
        centring.project({"scan": {"kernel": kernels["conv"], "bias": jnp.ones((3, 4))}}, lambda *_: True)
    stacked = centring.project({"kernel": kernels["conv"]}, lambda path, leaf: jax.vmap(centring.centre))
    np.testing.assert_allclose(
        stacked["kernel"], kernels["conv"] - kernels["conv"].mean((1, 2), keepdims=True), atol=1e-6
    )
