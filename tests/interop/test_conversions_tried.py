"""Public families of networks, converted: the table of docs/conversion.md, and equality with the networks by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from mimicnorm_jax import CenteredConv, functional
from mimicnorm_jax.interop import layer_report, mimic
from mimicnorm_jax.linen import IdentityNorm, WithLastBatchNorm
from tests.conftest import ROOT
from tests.interop.foreign import CNN, ConvNeXt, ResNet, UNet

IMAGE = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
RESNET = "ResNet-50 of Flax's ImageNet example"


def inner(layer):
    """Ungrouped convolutions and all dense layers but the last, the only one of this name."""
    return layer.groups == 1 and layer.path != ("Dense_36",)


TRIED = {
    "resnet": (RESNET, ResNet(), "rule=ungrouped", {"rule": functional.ungrouped}),
    "bias": (RESNET, ResNet(), "rule=ungrouped, keep_bias=True", {"rule": functional.ungrouped, "keep_bias": True}),
    "convnext": ("ConvNeXt-T", ConvNeXt(), "", {}),
    "inner": ("ConvNeXt-T", ConvNeXt(), "select=inner", {"select": inner}),
    "unet": ("U-Net, 64 to 1024 channels", UNet(), "norm=None", {"norm": None}),
    "nnx": (
        "CNN of NNX, two convolutions",
        functools.partial(CNN, rngs=nnx.Rngs(0)),
        "num_classes=10",
        {"num_classes": 10},
    ),
}


class Conv(CenteredConv):
    """Its layers have the names of Flax's."""


def _linen_counts(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


def _nnx_counts(make):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(make(), nnx.Param)))


def _row(name, plain, call, options):
    if isinstance(plain, nn.Module):
        ours = mimic(plain, **options)
        before, after, report = _linen_counts(plain), _linen_counts(ours), layer_report(ours, IMAGE)
    else:
        ours = mimic(plain(), **options)
        before, after, report = _nnx_counts(plain), _nnx_counts(lambda: ours), layer_report(ours)
    kernels = [one for one in report.layers if one.shape is not None]
    cells = (
        name,
        f"`mimic(model{', ' if call else ''}{call})`",
        f"{before:,}",
        f"{after:,}",
        f"{len(report.paths('centered'))} of {len(kernels)}",
        str(len(report.paths("identity"))),
    )
    return "| " + " | ".join(cells) + " |"


@pytest.mark.slow
@pytest.mark.parametrize("tried", TRIED)
def test_the_table_of_the_page_says_what_conversion_does(tried):
    assert _row(*TRIED[tried]) in (ROOT / "docs" / "conversion.md").read_text().splitlines()


@pytest.mark.slow
def test_a_converted_resnet50_with_biases_has_the_parameters_of_the_published_one_but_its_scalars():
    published, scalars = 25_530_492, 16 + 4  # one a block, and one a shortcut
    assert _linen_counts(mimic(ResNet(), keep_bias=True)) == published - scalars


@pytest.mark.parametrize(
    ("make", "norm"),
    [
        (functools.partial(ResNet, (1, 1), 8, 5), True),
        pytest.param(functools.partial(ConvNeXt, (1, 1), (16, 16), 5), True, marks=pytest.mark.slow),
        pytest.param(functools.partial(UNet, (8, 16)), False, marks=pytest.mark.slow),
    ],
    ids=["resnet", "convnext", "unet"],
)
def test_it_is_the_network_by_hand_where_flax_makes_up_the_names(make, norm):
    x = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    centered = make(conv=Conv) if make.func is ConvNeXt else make(conv=Conv, norm=IdentityNorm)
    train = {"deterministic": False} if make.func is ConvNeXt else {"train": True}

    def results(model, variables):
        def loss(params):
            y, moved = model.apply({**variables, "params": params}, x, **train, mutable=["batch_stats"])
            return jnp.sin(y).sum(), (y, moved)

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    ours, hand = (mimic(make()), WithLastBatchNorm(centered)) if norm else (mimic(make(), norm=None), centered)
    variables = jax.jit(ours.init)(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, jax.eval_shape(hand.init, jax.random.key(0), x)) == jax.tree.map(
        jnp.shape, variables
    )
    found, expected = jax.jit(lambda variables: [results(model, variables) for model in (ours, hand)])(variables)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
