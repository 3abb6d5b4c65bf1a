"""What holds for every method, on every kind of network that it makes sense for."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mimicnorm_jax import models
from mimicnorm_jax.functional import scaled_standardize, standardize, ungrouped
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.methods.norms import NormOptions
from mimicnorm_jax.models.resnet import Bottleneck, ResNet
from tests.conftest import also


def _key():
    return jax.random.key(0, impl="rbg")  # compiles faster than the default generator


def _by_path(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


@pytest.mark.usefixtures("small", "shallow")
@pytest.mark.parametrize(
    "name",
    [
        "resnet8",
        *map(also, ("vgg11", "small", "small_gated", "small_dense", "squeezenet", "shufflenetv2_x0.5", "mobilenetv2")),
    ],
)
def test_same_seed_gives_every_method_the_same_raw_kernels(name):
    """Bit for bit, but for Fixup, where up to scale or zero."""

    @jax.jit  # one program, in which what is the same draw is drawn once
    def draw(key):
        image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        trees = {
            method: _by_path(models.create(name, method=method, width=0.25).lazy_init(key, image)["params"])
            for method in models.methods_of(name)
        }
        return {m: {path: leaf for path, leaf in t.items() if path.endswith("kernel")} for m, t in trees.items()}

    by_method = draw(_key())
    assert len(by_method) >= 6
    reference = by_method["mimicnorm"]
    for method, leaves in by_method.items():
        assert leaves.keys() == reference.keys()
        for path, kernel in leaves.items():
            if method != "fixup":
                np.testing.assert_array_equal(kernel, reference[path], err_msg=path)
            elif kernel.any() and path != "stem/conv/kernel":  # Fixup's is uniform
                ratio = jnp.linalg.norm(kernel) / jnp.linalg.norm(reference[path])
                np.testing.assert_allclose(kernel, ratio * reference[path], rtol=1e-4, atol=1e-7, err_msg=path)


def _random_like(shapes, seed=0):
    """Parameters far from any initialization, biases and scalars included, that keep activations of order 1."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim < 2:
            return jnp.asarray(rng.uniform(0.2, 0.6, leaf.shape))
        return jnp.asarray(rng.normal(size=leaf.shape) * math.sqrt(2 / math.prod(leaf.shape[:-1])))

    return jax.tree.map(draw, shapes)


@pytest.fixture
def small(monkeypatch):
    """A ResNet of a block and two blocks of bottlenecks, by the name `small`; as small a gated one and DenseNet."""
    build = partial(ResNet, block=Bottleneck, stages=(1, 2), channels=64)
    architecture = dataclasses.replace(models.ARCHITECTURES["resnet50"], build=build, stride=2)
    monkeypatch.setitem(models.ARCHITECTURES, "small", architecture)
    for name, whole, option in (("small_gated", "seresnet50", "stages"), ("small_dense", "densenet121", "blocks")):
        known = models.ARCHITECTURES[whole]
        known = dataclasses.replace(known, build=partial(known.build, **{option: (1, 2)}), stride=2)
        monkeypatch.setitem(models.ARCHITECTURES, name, known)


@pytest.mark.usefixtures("small", "shallow")
@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, "mimicnorm") for name in ("resnet8", "shufflenetv2_x0.5", "small_dense")),
        *(also(name, "mimicnorm") for name in ("vgg11", "small", "small_gated", "squeezenet", "mobilenetv2")),
        *(("resnet8", "weightmean"), ("resnet8", "ws_gn"), ("small", "nf")),
        *(also("small", "ws_gn"), also("resnet8", "nf"), also("mobilenetv2", "nf")),
    ],
)
def test_logits_loss_and_gradients_ignore_constants_added_to_transformed_kernels(name, method, x64):
    """Any constant for each output channel of each such raw kernel; and, where kernels are standardized, any factor."""
    size = models.ARCHITECTURES[name].stride
    model = models.create(name, method=method, num_classes=5, width=0.125, dtype=float, param_dtype=float)
    # What is centered does not depend on the width then.
    model = model.clone(factory=dataclasses.replace(model.factory, rule=ungrouped))
    images = jnp.asarray(np.random.default_rng(1).normal(size=(3, size, size, 3)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes.get("batch_stats", {}))

    @jax.jit
    def evaluate(params):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            rngs = {"dropout": jax.random.key(3)}
            logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(3)).mean(), logits

        return jax.value_and_grad(loss, has_aux=True)(params)

    rng = np.random.default_rng(2)
    centers = METHODS[method].centers
    moved = set()

    def shift(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        depthwise = leaf.ndim == 4 and leaf.shape[2] == 1
        if leaf.ndim < 4 or (depthwise if centers else path.startswith("classifier")):
            return leaf
        moved.add(path)
        factor = 1.0 if centers else rng.uniform(2, 3, size=(1, 1, 1, leaf.shape[-1]))
        return factor * (leaf + rng.normal(size=(1, 1, 1, leaf.shape[-1])))

    params = _random_like(shapes["params"])
    before, after = evaluate(params), evaluate(jax.tree_util.tree_map_with_path(shift, params))
    scale = optax.tree.norm(before[1])
    assert len(moved) > 2
    assert scale > 1e-3
    # `standardize` has an epsilon of 1e-5 beside n times a variance of order 1.
    tolerance = (
        {"rtol": 1e-8, "atol": 1e-9 * scale} if centers or method == "nf" else {"rtol": 1e-3, "atol": 1e-4 * scale}
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), before[0], after[0])
    # The gradients of kernels that took a factor are divided by it.
    grads = [
        {path: g for path, g in _by_path(one[1]).items() if centers or path not in moved} for one in (before, after)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), *grads)


@pytest.mark.parametrize("method", models.methods_of("resnet8"))
def test_a_method_says_whether_it_couples_the_images_of_a_batch(method, x64):
    """In training the logits of one image depend on another image exactly where it says so, before and at the end."""
    record = METHODS[method]
    model = models.create("resnet8", method=method, num_classes=5, width=0.125, dtype=float, param_dtype=float)
    headless = model.clone(
        factory=dataclasses.replace(model.factory, method=dataclasses.replace(record, last_norm=None))
    )
    images = jax.random.normal(jax.random.key(1), (3, 4, 4, 3), float)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    params = _random_like(shapes["params"])
    stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes.get("batch_stats", {}))

    def first(net, second_image):
        variables = {"params": params, "batch_stats": stats}
        batch = images.at[1].set(second_image)
        return net.apply(variables, batch, train=True, mutable=["batch_stats"])[0][0]

    @jax.jit
    def moved(second_image):
        return [
            jax.jvp(lambda x, net=net: first(net, x), (second_image,), (second_image,))[1] for net in (model, headless)
        ]

    whole, body = (bool(abs(change).max() > 1e-9) for change in moved(images[1]))
    assert body == record.batch_norm
    assert whole == (record.batch_norm or record.last_batch_norm)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_normalizer_free_block_written_out(stride, x64):
    """Branch and sum of `nf` with kernels, gain, alpha and beta in the open."""
    model = models.create("resnet18", method="nf", num_classes=5, width=0.125, dtype=float, param_dtype=float)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3), float)
    params = _random_like(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    block = "stage1_block2" if stride == 1 else "stage2_block1"
    before = "stage1_block1" if stride == 1 else "stage1_block2"

    @jax.jit
    def outputs(params):
        _, state = model.apply(
            {"params": params}, images, capture_intermediates=lambda module, _: module.name in (before, block)
        )
        return [state["intermediates"][name]["__call__"][0] for name in (before, block)]

    x, found = outputs(params)

    def conv(x, unit, window, stride=1):
        layer = params[block][unit]["conv"]
        kernel = scaled_standardize(layer["kernel"])
        padding = [(window // 2, window // 2)] * 2
        return nn.Conv(kernel.shape[-1], (window, window), stride, padding).apply(
            {"params": {"kernel": kernel, "bias": layer["bias"]}}, x
        )

    gain, alpha = math.sqrt(2 / (1 - 1 / math.pi)), 0.2
    beta = math.sqrt(1 + (1 if stride == 1 else 2) * alpha**2)
    y = gain * jax.nn.relu(conv(x / beta, "conv1", 3, stride))
    y = alpha * params[block]["conv2"]["conv"]["scale"] * conv(y, "conv2", 3)
    expected = jax.nn.relu(x + y) if stride == 1 else gain * jax.nn.relu(conv(x / beta, "shortcut", 1, 2) + y)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_variance_through_a_normalizer_free_network_at_initialization():
    """Near 1 behind every block, whatever the raw kernels' scale, at the start, where branches are 0."""
    model = models.create("resnet18", method="nf", num_classes=5, width=0.5)
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))

    @jax.jit
    def outputs(key):
        variables = model.init(key, images)
        variables = {"params": jax.tree.map(lambda leaf: 7 * leaf if leaf.ndim == 4 else leaf, variables["params"])}
        _, state = model.apply(
            variables, images, capture_intermediates=lambda module, _: (module.name or "").startswith("stage")
        )
        return {name: out["__call__"][0].var() for name, out in state["intermediates"].items()}

    found = outputs(_key())
    # One draw; padding with zeros, which are not the mean of what comes out of a ReLU, is what is left.
    assert all(0.5 < float(variance) < 2 for variance in found.values()), found


@pytest.mark.parametrize("name", ["resnet8", *map(also, ("small_dense", "mobilenetv2", "shufflenetv2_x0.5"))])
@pytest.mark.usefixtures("small")
def test_groupnorm_of_standardized_kernels_is_ws_gn(name, x64):
    """The two methods differ by the kernel transform alone; which leaves fan-ins of 1 and classifiers as they are."""
    size = models.ARCHITECTURES[name].stride
    images = jax.random.normal(jax.random.key(1), (2, size, size, 3), float)
    nets = [
        models.create(name, method=method, num_classes=5, width=0.125, dtype=float, param_dtype=float)
        for method in ("groupnorm", "ws_gn")
    ]
    params = _random_like(jax.eval_shape(nets[1].init, jax.random.key(0), images)["params"])
    done = jax.tree.map(lambda leaf: standardize(leaf) if leaf.ndim == 4 and leaf[..., 0].size > 1 else leaf, params)
    if name == "mobilenetv2":  # its classifier is a convolution
        done["classifier"] = params["classifier"]
    found, expected = (jax.jit(net.apply)({"params": p}, images) for net, p in zip(nets, (done, params), strict=True))
    assert float(abs(expected).max()) > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("channels", "together"), [(2, 2), (16, 2), (32, 2), (24, 3), (58, 29), (64, 2), (256, 8)])
def test_groupnorm_normalizes_no_channel_by_itself(channels, together):
    """32 groups as published, from 64 channels on; fewer in narrow layers."""
    norm = METHODS["groupnorm"].norm
    assert norm is not None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return norm(False, NormOptions())(x)

    x = jax.random.normal(_key(), (1, 2, 2, channels))
    variables = Net().init(_key(), x)
    by_input = jax.grad(lambda x: Net().apply(variables, x)[0, 0, 0, 0])(x)
    assert int((jnp.abs(by_input).max((0, 1, 2)) > 0).sum()) == together


def test_the_gain_of_a_normalizer_free_relu_keeps_the_variance_of_a_normal_input(x64):
    """By quadrature; the published rounding of the gain, 1.7139588594, makes it 1.0013."""
    relu = METHODS["nf"].activation.relu
    z, weights = np.polynomial.hermite_e.hermegauss(200)
    p = weights / weights.sum()
    y = np.asarray(relu(jnp.asarray(z), output_saved_anyway=True, saved=False, rectified=False))
    # The quadrature is exact but for the kink, which costs about the distance of two nodes, 0.1, squared over 4.
    assert p @ y**2 - (p @ y) ** 2 == pytest.approx(1, abs=3e-3)
    gain = float(relu(jnp.ones(1), output_saved_anyway=True, saved=False, rectified=False)[0])
    assert gain == pytest.approx(1.712858, abs=1e-6)
    assert (1.7139588594 / gain) ** 2 == pytest.approx(1.00129, abs=1e-5)
