"""Folded networks: the same function, and nothing but convolutions; what cannot be folded is refused, and why."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax import interop, models, optim
from mimicnorm_jax.errors import FoldError
from mimicnorm_jax.interop.affine import read_affine
from mimicnorm_jax.models import LastBatchNormHead
from tests.conftest import also

FAMILIES = (
    *("vgg11", "vgg16_imagenet", "resnet18", "resnet50", "resnet18_imagenet", "resnet50_imagenet"),
    *("seresnet18", "seresnet50", "densenet121", "squeezenet", "shufflenetv2_x0.5", "shufflenetv2_x0.5_imagenet"),
    "mobilenetv2",
)
"""One network of each kind, of the fewest layers, besides `resnet8`, which has every method."""
FAST = ("batchnorm", "mimicnorm", "nf")
UNFOLDABLE = ("ws_gn", "groupnorm", "dyt")


def _network(name, method, width=0.125, shape=(32, 32, 3), seed=0):
    """A network with random variables far from any initialization: statistics, biases and scalars, of either sign."""
    model = models.create(name, method=method, num_classes=5, width=width)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, *shape)))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if leaf.ndim > 1:
            return rng.normal(size=leaf.shape) * math.sqrt(2 / math.prod(leaf.shape[:-1])) + 0.02
        size = rng.uniform(0.5, 1.5, leaf.shape)
        if path[-1].key == "var":
            return size
        return size * rng.choice([-1, 1], leaf.shape) * (1 if path[-1].key == "scale" else 0.3)

    tree = jax.tree_util.tree_map_with_path(draw, shapes)
    return model, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def _images(shape=(32, 32, 3)):
    return jnp.asarray(np.random.default_rng(1).normal(size=(3, *shape)), jnp.float32)


def _logits(model, variables, x):
    return np.asarray(jax.jit(model.apply)(variables, x))


def _assert_same_logits(a, b):
    # Of the largest logit, as rounding is relative to the sums that make one.
    assert abs(a).max() > 1e-2
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * abs(a).max())


def _operations(jaxpr):
    found = set()
    for eqn in jaxpr.eqns:
        inner = [sub for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr) if _is_jaxpr(sub)]
        found |= (
            set().union(*(_operations(getattr(sub, "jaxpr", sub)) for sub in inner)) if inner else {eqn.primitive.name}
        )
    return found


def _is_jaxpr(value):
    return hasattr(value, "eqns")


PLAIN = {"conv_general_dilated", "dot_general", "add", "max", "reduce_sum", "div", "clamp", "min", "concatenate"} | {
    "reduce_window_max",
    "reduce_window_sum",
}
SHAPES = {
    "reshape",
    "broadcast_in_dim",
    "transpose",
    "squeeze",
    "slice",
    "split",
    "pad",
    "reduce_window_max",
    "reduce_window_sum",
}
NOTHING = {"convert_element_type", "optimization_barrier", "name", "row_major", "copy"}
POOLING = {"gt", "select_n"}  # which place of a window won: for a backward pass, dropped by compilers without one


def _is_left(name, method):
    """Whether it folds, and no fast case says so."""
    fast = (("shufflenetv2_x0.5", "mimicnorm"), ("mobilenetv2", "batchnorm"), ("densenet121", "mimicnorm"))
    return (name, method) not in (*fast, ("densenet121", "batchnorm"))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("resnet8", method) for method in FAST),
        ("shufflenetv2_x0.5", "mimicnorm"),
        ("mobilenetv2", "batchnorm"),
        ("densenet121", "mimicnorm"),
        *(also("resnet8", method) for method in models.methods_of("resnet8") if method not in (*FAST, *UNFOLDABLE)),
        *(also(name, method) for name in FAMILIES for method in ("batchnorm", "mimicnorm") if _is_left(name, method)),
        also("resnet50", "nf"),
    ],
)
@pytest.mark.usefixtures("shallow")
def test_a_folded_network_is_the_same_function_of_plain_convolutions(name, method):
    shape = (8, 8, 3) if name == "resnet8" else (32, 32, 3)
    model, variables = _network(name, method, shape=shape)
    plain, plain_variables = interop.fold(model, variables, image_shape=shape)
    x = _images(shape)
    _assert_same_logits(_logits(model, variables, x), _logits(plain, plain_variables, x))
    assert set(plain_variables) == {"params"}
    done = _operations(jax.make_jaxpr(plain.apply)(plain_variables, x).jaxpr)
    # What stays, elementwise: the constant of nf's ReLU, signs behind ShuffleNetV2's, gates of squeeze-and-excitation.
    left = {"mul"} if method == "nf" else {"mul", "sign"} if name == "shufflenetv2_x0.5" else set()
    left |= {"mul", "logistic"} if name.startswith("seresnet") else set()
    assert done <= PLAIN | SHAPES | NOTHING | POOLING | left
    if method in ("mimicnorm", "batchnorm"):
        before = _operations(jax.make_jaxpr(model.apply)(variables, x).jaxpr)
        assert {"sub", "rsqrt"} <= before


def test_the_scale_of_normalized_logits_is_folded():
    shape = (8, 8, 3)
    model, variables = _network("resnet8", "mimicnorm", shape=shape)
    surer = dataclasses.replace(model.factory.method, logit_scale=2.0)
    scaled = models.create("resnet8", method=surer, num_classes=5, width=0.125)
    plain, plain_variables = interop.fold(scaled, variables, image_shape=shape)
    x = _images(shape)
    _assert_same_logits(2 * _logits(model, variables, x), _logits(plain, plain_variables, x))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("resnet34", "batchnorm"), ("shufflenetv2_x1", "mimicnorm")])
def test_whole_networks_fold(name, method, x64):
    """In double precision, since deep random networks multiply float32's rounding; deeper ones repeat these blocks."""
    model, variables = _network(name, method, width=0.0625)
    model = model.clone(factory=dataclasses.replace(model.factory, dtype=jnp.float64, param_dtype=jnp.float64))
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
    plain, plain_variables = interop.fold(model, variables)
    ours, theirs = _logits(model, variables, _images()), _logits(plain, plain_variables, _images())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10 * abs(ours).max())


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("resnet8", "none"),
        also("resnet8", "lastbn"),
        *(also(name, "none") for name in ("vgg11", "resnet18_imagenet", "resnet50", "seresnet18", "squeezenet")),
        *(also(name, "none") for name in ("shufflenetv2_x0.5", "mobilenetv2")),
    ],
)
def test_batch_norms_are_absorbed_by_a_network_without(name, method):
    shape = (8, 8, 3) if name == "resnet8" else (32, 32, 3)
    model, variables = _network(name, "batchnorm", shape=shape)
    x = _images(shape)
    target, absorbed = interop.absorb_batchnorm(model, variables, method=method, image_shape=shape)
    _assert_same_logits(_logits(model, variables, x), _logits(target, absorbed, x))
    # What no method of that name has: a bias of every shortcut of CIFAR bottlenecks, and ReLU6 without a norm.
    changed = name in ("resnet50", "mobilenetv2")
    assert target.factory.method.name == (f"{method}_absorbed" if changed else method)
    if not changed:
        same = models.create(name, method=method, num_classes=5, width=0.125)
        np.testing.assert_array_equal(_logits(same, absorbed, x), _logits(target, absorbed, x))
    if name == "mobilenetv2":
        relu = target.clone(
            factory=dataclasses.replace(target.factory, method=dataclasses.replace(target.factory.method, relu6=False))
        )
        assert abs(_logits(relu, absorbed, x) - _logits(target, absorbed, x)).max() > 1e-2


def test_centering_goes_on_only_from_kernels_that_are_centered():
    model, variables = _network("resnet8", "batchnorm", shape=(8, 8, 3))
    with pytest.raises(FoldError, match=r"'mimicnorm' changes \d of 10 kernels, stage.* by 0\..* no bias carries it"):
        interop.absorb_batchnorm(model, variables, method="mimicnorm", image_shape=(8, 8, 3))
    variables["params"] = optim.center_params(variables["params"], optim.select_conv_kernels(window=2))
    target, absorbed = interop.absorb_batchnorm(model, variables, method="mimicnorm", image_shape=(8, 8, 3))
    x = _images((8, 8, 3))
    assert target.factory.method.name == "mimicnorm"
    _assert_same_logits(_logits(model, variables, x), _logits(target, absorbed, x))


def test_layers_are_what_the_text_says_they_are():
    """One layer written out: conv by hand, BatchNorm's formula behind."""
    model, variables = _network("resnet8", "batchnorm", shape=(8, 8, 3))
    params, stats = variables["params"]["stem"], variables["batch_stats"]["stem"]["bn"]
    factor = params["bn"]["scale"] / np.sqrt(stats["var"] + 1e-5)
    kernel, bias = read_affine(model, variables, (8, 8, 3)).layers["stem", "conv"]
    np.testing.assert_allclose(kernel, params["conv"]["kernel"] * factor[None, None, None], rtol=1e-5)
    np.testing.assert_allclose(bias, params["bn"]["bias"] - stats["mean"] * factor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("resnet8", "ws_gn", r"stem/gn is a GroupNorm, which normalizes by statistics of its own"),
        ("resnet8", "dyt", r"stem/dyt is a DynamicTanh, which is no affine map"),
        ("densenet121", "batchnorm", r"block1_layer1/norm/bn is a BatchNorm behind no convolution of its own"),
    ],
)
@pytest.mark.usefixtures("shallow")
def test_what_no_kernel_can_hold_is_refused(name, method, message):
    model, variables = _network(name, method)
    with pytest.raises(FoldError, match=message):
        interop.fold(model, variables)


def test_there_has_to_be_a_batch_norm_to_absorb():
    for method in ("mimicnorm", "ws_gn"):
        with pytest.raises(FoldError, match="has no BatchNorm between layers to absorb"):
            interop.absorb_batchnorm(*_network("resnet8", method))
    with pytest.raises(FoldError, match="did you mean none"):
        interop.absorb_batchnorm(*_network("resnet8", "batchnorm"), method="nonee")
    with pytest.raises(FoldError, match="has norms between layers itself"):
        interop.absorb_batchnorm(*_network("resnet8", "batchnorm"), method="ws_gn")


def test_other_networks_and_variables_are_refused():
    model, variables = _network("resnet8", "mimicnorm")
    with pytest.raises(FoldError, match="a Dense is no network of models"):
        interop.fold(nn.Dense(3), variables)
    with pytest.raises(FoldError, match="a mapping with params"):
        interop.fold(model, variables["params"])
    with pytest.raises(FoldError, match=r"not those of this ResNet for images .* give image_shape"):
        interop.fold(model, _network("resnet8", "mimicnorm", width=0.25)[1])
    with pytest.raises(FoldError, match=r"for images \(8, 8, 1\)"):
        interop.fold(model, variables, image_shape=(8, 8, 1))


class _Own(LastBatchNormHead, nn.Module):
    """Doubles its logits before the last BatchNorm, and may leave its norms in training mode."""

    factory: models.LayerFactory
    trains: bool = False
    factor: float = 1.0

    @nn.compact
    def __call__(self, x, train=False):
        factory = self.factory
        x = factory.relu(models.ConvNorm(factory, 4, 3, name="conv1")(x, train or self.trains)).mean((1, 2))
        return factory.logits(self.factor * factory.classifier(5)(x), train or self.trains)


@pytest.mark.parametrize("method", ["batchnorm", "mimicnorm"])
def test_a_network_of_ones_own_folds_or_is_refused(method):
    factory = models.create("resnet8", method=method).factory
    images = _images((8, 8, 3))
    model = _Own(factory)
    variables = model.init(jax.random.key(0), images)
    _assert_same_logits(
        _logits(model, variables, images), _logits(*interop.fold(model, variables, image_shape=(8, 8, 3)), images)
    )
    which = "conv1/bn" if method == "batchnorm" else "last_bn"
    with pytest.raises(FoldError, match=f"{which} is in training mode"):
        interop.fold(model.clone(trains=True), variables, image_shape=(8, 8, 3))
    if method == "mimicnorm":  # the mean that is subtracted is not that of the classifier's output then
        variables["batch_stats"]["last_bn"]["mean"] = jnp.arange(5.0)
        with pytest.raises(FoldError, match="does something between its layers"):
            interop.fold(model.clone(factor=2.0), variables, image_shape=(8, 8, 3))
