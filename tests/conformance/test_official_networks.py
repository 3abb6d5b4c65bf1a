"""Every published network: counts, shapes of all parameters, and which kernels are centered.

`official.json` holds, read off the authors' code, by our names: how often each shape occurs among the trainable
parameters, in PyTorch's layout (a scalar is `1`), of 100 classes or 1,000 in ImageNet forms; how many convolutions
there are and how many the training script centers. The largest networks have numbers only.
"""

import json
import math
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from mimicnorm_jax import models
from mimicnorm_jax.linen import TransformedConv
from tests.conftest import also

OFFICIAL = json.loads((Path(__file__).parent / "official.json").read_text())
# Tracing the others takes longer.
FAST = ("vgg11", "resnet18", "resnet50", "seresnet18", "squeezenet", "shufflenetv2_x0.5", "mobilenetv2")
FAST += ("vgg11_imagenet", "resnet18_imagenet", "resnet50_imagenet", "shufflenetv2_x0.5_imagenet")
CASES = [(name, method) for name, methods in OFFICIAL.items() for method in methods]


def _traced(name, method):
    """Shapes of parameters, and of centered and all kernels as the convolutions themselves say."""
    side, classes = (224, 1000) if name.endswith("_imagenet") else (32, 100)
    model = models.create(name, method=method, num_classes=classes)
    centered, every = [], []

    def look(call, args, options, context):
        layer = context.module
        if isinstance(layer, TransformedConv) and context.method_name == "__call__":
            groups = layer.feature_group_count
            shape = (*layer.kernel_size, args[0].shape[-1] // groups, layer.features)
            every.append(shape)
            if layer.kernel_transform.takes(shape, groups):
                centered.append(shape)
        return call(*args, **options)

    with nn.intercept_methods(look):
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
    return [leaf.shape for leaf in jax.tree.leaves(params)], centered, every


def _tally(shapes):
    """How often each shape occurs, in PyTorch's layout."""

    def torch(shape):
        match shape:
            case (height, width, channels, features):
                return (features, channels, height, width)
            case (channels, features):
                return (features, channels)
        return shape or (1,)

    return Counter("x".join(map(str, torch(shape))) for shape in shapes)


@pytest.mark.parametrize(("name", "method"), [case if case[0] in FAST else also(*case) for case in CASES])
def test_shapes_counts_and_centered_kernels_are_the_published_ones(name, method):
    official = OFFICIAL[name][method]
    params, centered, every = _traced(name, method)
    # The published ResNets of CIFAR hold one scalar that nothing uses.
    unused = int(method == "mimicnorm" and name.startswith("resnet") and not name.endswith("_imagenet"))
    found = _tally(params) + Counter({"1": unused})
    assert len(every) == official["convs"]
    assert len(centered) == (official["centered"] if method == "mimicnorm" else 0)
    if "shapes" in official:
        assert found == official["shapes"]
    if "centered_shapes" in official:
        assert _tally(centered) == official["centered_shapes"]
    assert sum(map(math.prod, params)) + unused == official["count"]


def test_every_network_but_ours_is_compared():
    """`resnet8` and binary networks are no part of the published code, nor ResNet-34 and -152 for ImageNet."""
    others = {name for name, known in models.ARCHITECTURES.items() if known.binary}
    assert set(models.ARCHITECTURES) - set(OFFICIAL) - others == {"resnet8", "resnet34_imagenet", "resnet152_imagenet"}


@pytest.mark.parametrize(
    ("name", "batchnorm", "channels", "scalars"),
    [("resnet34_imagenet", 21797672, 8512, 16 + 3), also("resnet152_imagenet", 60192808, 75712, 50 + 4)],
)
def test_imagenet_resnets_that_the_authors_left_out_follow_the_others(name, batchnorm, channels, scalars):
    """With BatchNorm as in every implementation; without, one number a channel instead of two, and the scalars."""
    counts = [sum(map(math.prod, _traced(name, method)[0])) for method in ("batchnorm", "mimicnorm")]
    assert counts == [batchnorm, batchnorm - channels + scalars]
