"""Initial values for layers of one's own keep the signal, and are those that our networks have."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from mimicnorm_jax import CenteredConv, CenteredDense, models
from mimicnorm_jax import nnx as ours_nnx
from mimicnorm_jax.functional import KernelTransform, center, compose, gain, ungrouped
from mimicnorm_jax.functional.kernels import PUBLISHED_GAIN
from mimicnorm_jax.functional.transform import CENTER_PUBLISHED
from mimicnorm_jax.initializers import centered_he, residual_scale

WIDTH, DEPTH, BRANCHES, SEEDS = 96, 20, 8, 32
RAW = KernelTransform(center, lambda shape, groups: False)


class Deep(nn.Module):
    """Twenty layers with their default initial values."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x):
        def step(layer, x, _):
            return nn.relu(layer(x)), None

        scan = nn.scan(step, length=DEPTH, variable_axes={"params": 0}, split_rngs={"params": True})
        return scan(self.layer, x, None)[0]


@pytest.mark.parametrize(
    "layer",
    [
        CenteredDense(WIDTH),
        CenteredDense(WIDTH, kernel_transform=RAW),
        CenteredConv(WIDTH, (1,)),
        CenteredConv(WIDTH, (1,), feature_group_count=2, kernel_transform=KernelTransform(center, ungrouped)),
    ],
)
def test_twenty_layers_keep_the_mean_square(layer):
    """In the mean over kernels. At this width one net's logarithm has a deviation of about 1, the mean of 32 of 0.2.

    Flax's default keeps (1 / 2.934)^20 = 4.5e-10 with centered kernels, He's variance (2 / 2.934)^20 = 5e-4.
    """

    @jax.jit
    @jax.vmap
    def kept(key):
        x = nn.relu(jax.random.normal(jax.random.fold_in(key, 1), (1, WIDTH)))
        return (Deep(layer).init_with_output(key, x)[0] ** 2).mean() / (x**2).mean()

    ratios = kept(jax.random.split(jax.random.key(0), SEEDS))
    assert 0.4 < ratios.mean() < 1.8
    assert abs(jnp.log(ratios)).max() < 5


@pytest.mark.parametrize(
    ("shape", "axes", "fan_in"),
    [
        ((3, 3, 8, 6), {}, 72),
        ((3, 3, 6, 8), {"out_axis": -2}, 72),  # of a transposed convolution's forward kernel
        ((5, 5, 72, 6), {"batch_axis": (0, 1)}, 72),  # of a local convolution
        ((2, 36, 3, 4), {"out_axis": (-2, -1), "batch_axis": 0}, 36),
    ],
)
def test_one_key_draws_one_kernel_times_the_exact_deviation_over_the_fan_in(shape, axes, fan_in):
    key = jax.random.key(0)
    normal = jax.random.normal(key, shape)
    for rule, factor in ((lambda *_: True, gain(fan_in)), (lambda *_: False, 1.0)):
        found = centered_he(rule, **axes)(key, shape, jnp.float32)
        np.testing.assert_allclose(found, math.sqrt(2 / fan_in) * factor * normal, rtol=1e-6)


def test_the_rule_is_asked_with_outputs_last_and_groups_and_a_fan_in_of_one_is_refused():
    asked = []
    centered_he(lambda *a: asked.append(a) or False, 2, out_axis=-2)(jax.random.key(0), (3, 3, 6, 8))
    assert asked == [((3, 3, 8, 6), 2)]
    with pytest.raises(ValueError, match="fan-in of at least 2"):
        centered_he()(jax.random.key(0), (1, 1, 1, 8))


def test_sums_of_scaled_branches_grow_as_the_theorem_says():
    """By the product of 1 + 1/l^2 in the mean over kernels: the branches' ends have mean 0."""

    class Sums(nn.Module):
        @nn.compact
        def __call__(self, x):
            for block in range(1, BRANCHES + 1):
                x += CenteredDense(WIDTH, scale_init=residual_scale(block), use_bias=False)(nn.relu(x))
            return x

    @jax.jit
    @jax.vmap
    def grown(key):
        x = jax.random.normal(jax.random.fold_in(key, 1), (1, WIDTH))
        return (Sums().init_with_output(key, x)[0] ** 2).mean() / (x**2).mean()

    mean = grown(jax.random.split(jax.random.key(0), SEEDS)).mean()
    # One net's deviation is about 0.2 of it, that of the mean of 32 nets 0.04.
    assert abs(mean / math.prod(1 + 1 / block**2 for block in range(1, BRANCHES + 1)) - 1) < 0.15


def test_the_networks_scalars_are_those_of_the_helper():
    net = models.create("resnet8", method="mimicnorm", num_classes=10, width=0.25)
    params = jax.jit(net.init)(jax.random.key(0), jnp.ones((1, 8, 8, 1)))["params"]
    for block in (1, 2, 3):
        scale = params[f"stage{block}_block1"]["conv2"]["conv"]["scale"]
        kernels = [params[f"stage{block}_block1"][name]["conv"]["kernel"].shape for name in ("conv1", "conv2")]
        gains = [PUBLISHED_GAIN for shape in kernels if math.prod(shape[:-1]) > 50]
        np.testing.assert_array_equal(scale, residual_scale(block, gains)(jax.random.key(0), (), jnp.float32))
    with pytest.raises(ValueError, match="block=0"):
        residual_scale(0)


def test_defaults_are_named_initializers_and_boxes_hold_them():
    x = jnp.ones((1, 5, 5, 8))
    key = jax.random.key(0)
    boxed = CenteredConv(6, (3, 3), kernel_init=nn.with_partitioning(centered_he(), (None, None, None, "model")))
    plain = CenteredConv(6, (3, 3))
    other = nn.Conv(6, (3, 3), kernel_init=centered_he())
    kernels = [nn.unbox(layer.init(key, x))["params"]["kernel"] for layer in (boxed, plain, other)]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    np.testing.assert_array_equal(kernels[1], kernels[2])


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_composition_starts_with_the_gain_where_a_part_of_it_centers(library):
    """n times the variance: 2 for a fan-in of 27, which the published rule leaves, 2 g^2 where it centers."""
    half = KernelTransform(lambda kernel: kernel / 2)
    for channels, expected in ((3, 2.0), (64, 2 * gain(576) ** 2)):
        transform = compose(CENTER_PUBLISHED, half)
        if library == "linen":
            layer = CenteredConv(512, (3, 3), kernel_transform=transform)
            kernel = layer.init(jax.random.key(0), jnp.ones((1, 5, 5, channels)))["params"]["kernel"]
        else:
            options = {"kernel_transform": transform, "rngs": nnx.Rngs(0)}
            kernel = ours_nnx.CenteredConv(channels, 512, (3, 3), **options).kernel[...]
        # Three standard deviations of the variance of 13,824 normal numbers: 0.036 of it.
        assert float(kernel.var() * 9 * channels) == pytest.approx(expected, rel=0.036)
