"""Initial values of converted networks keep the scale that BatchNorms kept."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax.functional import gain
from mimicnorm_jax.interop import layer_report, mimic, rescale_init
from tests.diagnostics.networks import filled
from tests.interop.foreign import IMAGES, NORMAL, Net, ResNet, assert_equal


class Deep(nn.Module):
    """Convolutions with nothing to keep their scale but BatchNorm."""

    @nn.compact
    def __call__(self, x):
        for i in range(8):
            x = nn.Conv(64, (3, 3), padding="CIRCULAR", kernel_init=NORMAL, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(False)(x))
        self.sow("intermediates", "out", x)
        return x.mean((1, 2))


def test_rescaled_kernels_keep_the_energy_of_the_input_through_the_layers():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 64))
    model = mimic(Deep())
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    rescaled = rescale_init(params, layer_report(model, x))

    apply = jax.jit(functools.partial(model.apply, mutable=["intermediates", "batch_stats"]))

    def energy(params):
        _, found = apply({"params": params}, x)
        return float((found["intermediates"]["out"][0] ** 2).mean())

    # Theorem 3 for infinite width; at 64 channels each of eight layers is off by some percent.
    assert 0.4 < energy(rescaled) < 2.5
    assert energy(params) > 10
    for i in range(8):
        wanted = 2 * gain(576) ** 2 / 576
        assert float((rescaled[f"conv{i}"]["kernel"] ** 2).mean()) == pytest.approx(wanted, rel=1e-5)
        np.testing.assert_array_equal(rescaled[f"conv{i}"]["bias"], params[f"conv{i}"]["bias"])
    with pytest.raises(ValueError, match="no kernel of conv0"):
        rescale_init({"others": params}, layer_report(model, x))


@pytest.mark.parametrize(("kind", "name"), [("partitioned", "block0"), ("scanned", "blocks")])
def test_boxed_and_stacked_kernels_are_rescaled(kind, name):
    model = mimic(Net(kind))
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape), shapes)
    rescaled = rescale_init(params, layer_report(model, IMAGES))
    assert jax.tree.structure(rescaled) == jax.tree.structure(params)
    for conv, channels in (("conv1", 8), ("conv2", 4)):
        kernel = nn.meta.unbox(rescaled)[name][conv]["kernel"]
        # 2 gain(n)**2 / n for a centered kernel; two groups leave a fan-in of 36, below the rule's, to He's where a
        # BatchNorm stood behind.
        centered = 9 * channels > 50
        wanted = 2 * (gain(9 * channels) ** 2 if centered else 1) / (9 * channels)
        assert float((kernel**2).mean()) == pytest.approx(wanted, rel=1e-5)


class Residual(nn.Module):
    """A branch that ends in a norm which starts at zero."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.Conv(8, (3, 3), use_bias=False)(nn.relu(x))
        return x + nn.BatchNorm(use_running_average=True, scale_init=nn.initializers.zeros)(y), None


class Stacked(nn.Module):
    """Several of them in one leaf, then another."""

    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Residual, length=4, **axes)(name="stack")(x, None)
        return Residual(name="after")(x, None)[0].mean((1, 2))


def test_ends_of_several_branches_in_one_leaf_are_refused():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    model = mimic(Stacked(), norm=None)
    params, report = model.init(jax.random.key(0), x)["params"], layer_report(model, x)
    with pytest.raises(ValueError, match="stack/Conv_0 is a stack of 4, which end residual branches"):
        rescale_init(params, report)
    scaled = rescale_init(params, report, branch_ends=["after/Conv_0"])
    for kernel in scaled["stack"]["Conv_0"]["kernel"], scaled["after"]["Conv_0"]["kernel"]:
        assert float((kernel**2).mean()) == pytest.approx(2 * gain(72) ** 2 / 72, rel=1e-5)


def test_branches_get_their_share_and_the_branch_is_read_from_its_norm():
    model = mimic(ResNet((2,), 16, 5))
    report = layer_report(model, IMAGES)
    blocks = {"/".join(one.path): one.block for one in report.layers if one.block}
    assert blocks == {"Bottleneck_0/Conv_2": 1, "Bottleneck_1/Conv_2": 2}
    params = filled(model, IMAGES)["params"]
    by_norm = rescale_init(params, report)
    by_hand = rescale_init(params, report, branch_ends=["Bottleneck_0/Conv_2", "Bottleneck_1/Conv_2"])
    assert_equal(by_norm, by_hand)
    none = rescale_init(params, report, branch_ends=[])
    last = ("Bottleneck_1", "Conv_2", "kernel")
    pick = functools.partial(functools.reduce, lambda tree, name: tree[name], last)
    # A gain over the l-th block's number: one rounding more.
    np.testing.assert_allclose(2 * pick(by_norm), pick(none), rtol=1e-6)
    with pytest.raises(ValueError, match="branch_ends: Dense_0 is no layer with a gain"):
        rescale_init(params, report, branch_ends=["Dense_0"])
