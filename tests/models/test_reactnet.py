"""Binary ReActNets under their methods: what is binary, blocks written out, folding, and how small they are."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax import interop, models
from mimicnorm_jax.functional import KernelTransform, binarize, binary_sign, standardize_by_deviation
from mimicnorm_jax.interop.affine import read_affine
from mimicnorm_jax.interop.packing import reads_signs
from mimicnorm_jax.linen import TransformedConv, find_kernels
from mimicnorm_jax.models import reactnet
from tests.conftest import also

IMAGES = np.random.default_rng(1).normal(size=(3, 8, 8, 3))  # of two, a last BatchNorm leaves only signs
METHODS = ("batchnorm", "bnn_nobn", "bnn_mimic")
PUBLISHED_BLOCKS = reactnet.BLOCKS
NEITHER = {"stem", "classifier"}
"""What is not binary."""


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Blocks of 8, 8 and 16 channels, and ReActNet-A with three blocks, one of each kind."""
    monkeypatch.setattr(reactnet, "BLOCKS", ((2, 1), (4, 2), (4, 1)))
    for name, whole, options in (
        ("tiny", "reactnet8", {"stages": (2, 1), "channels": 8}),
        ("tiny_step1", "reactnet8_step1", {"stages": (2, 1), "channels": 8}),
    ):
        known = models.ARCHITECTURES[whole]
        known = dataclasses.replace(known, build=partial(known.build, **options), stride=2)
        monkeypatch.setitem(models.ARCHITECTURES, name, known)


def _network(name, method, width=1.0, dtype=float):
    """With variables far from any initialization."""
    model = models.create(name, method=method, num_classes=5, width=width, dtype=dtype, param_dtype=dtype)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        positive = path[-1].key in ("var", "slope", "scale", "gain")
        return jnp.asarray(rng.uniform(0.3, 1.5, leaf.shape) if positive else rng.normal(size=leaf.shape) + 0.1, dtype)

    return model, jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0), IMAGES))


def test_the_published_sizes():
    """Channels of ReActNet-A's blocks; ReActNet-18's 3x3 stem and four stages of four blocks of one 3x3 convolution."""
    assert [32 * multiple for multiple, _ in PUBLISHED_BLOCKS] == [64, *2 * [128], *2 * [256], *6 * [512], *2 * [1024]]
    model = models.create("reactnet18", method="bnn_nobn")
    kernels = find_kernels(model, jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    shapes = {"/".join(path[:2]): layer.layout.shape for path, layer in kernels.items()}
    stages = [64, 128, 256, 512]
    whole = {
        f"stage{stage}_block{block}/conv1": (3, 3, before if block == 1 else channels, channels)
        for stage, (before, channels) in enumerate(zip([64, *stages], stages, strict=False), 1)
        for block in (1, 2, 3, 4)
    }
    whole |= {f"stage{s}_block1/shortcut": (1, 1, 32 * 2 ** (s - 1), 64 * 2 ** (s - 1)) for s in (2, 3, 4)}
    assert shapes == whole | {"stem/conv": (3, 3, 3, 64), "classifier/kernel": (512, 100)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "width"), [("tiny", 1.0), ("reactnet_a_imagenet", 0.25)])
def test_all_but_stem_and_classifier_is_binary_and_that_in_the_second_step_alone(name, width, method, x64):
    """As a layer reads its kernel and as it acts in evaluation: entries of one size in each output channel."""
    model, variables = _network(name, method, width)
    first = models.create(f"{name}_step1", method=method, num_classes=5, width=width)
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    assert {path[0] for path, kernel in find_kernels(model, image).items() if not reads_signs(kernel)} == NEITHER
    assert not any(map(reads_signs, find_kernels(first, image).values()))
    shapes = [jax.tree.map(jnp.shape, jax.eval_shape(net.init, jax.random.key(0), IMAGES)) for net in (model, first)]
    assert shapes[0] == shapes[1]  # so the second step goes on with the first one's variables
    for path, layer in read_affine(model, variables, (8, 8, 3)).layers.items():
        sizes = abs(np.asarray(layer.kernel)).reshape(-1, layer.kernel.shape[-1])
        assert np.allclose(sizes, sizes[:1], rtol=1e-12) == (path[0] not in NEITHER), path


def _conv(x, kernel, stride=1):
    pads = [(kernel.shape[0] // 2,) * 2] * 2
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=dims)


def _rprelu(x, params):
    x = x + params["before"]["bias"].reshape(1, 1, 1, -1)
    x = jnp.where(x > 0, x, params["slope"].reshape(1, 1, 1, -1) * x)
    return x + params["after"]["bias"].reshape(1, 1, 1, -1)


def _outputs(model, variables, blocks):
    """What some blocks give; nothing behind them is compiled."""

    @jax.jit
    def outputs(variables):
        _, state = model.apply(variables, IMAGES, capture_intermediates=lambda module, _: module.name in blocks)
        return [state["intermediates"][block]["__call__"][0] for block in blocks]

    return outputs(variables)


@pytest.mark.parametrize("name", ["tiny", "tiny_step1"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_block_of_bnn_nobn_written_out(name, stage, x64):
    """Alpha, beta, gains, signs and the skip in the open; in the second stage of a block that halves the image."""
    model, variables = _network(name, "bnn_nobn")
    block, before = ("stage1_block2", "stage1_block1") if stage == 1 else ("stage2_block1", "stage1_block2")
    x, found = _outputs(model, variables, (before, block))
    params = variables["params"][block]

    def kernel(layer):
        w = standardize_by_deviation(layer["conv"]["kernel"])
        return (binarize(w) if name == "tiny" else w) * layer["gain"].reshape(1, 1, 1, -1)

    scaled = x / math.sqrt(1 + stage * 0.2**2)  # as many branches were summed onto x
    signs = binary_sign(scaled + params["conv1"]["shift"]["bias"].reshape(1, 1, 1, -1))
    y = 0.2 * _conv(signs, kernel(params["conv1"]["conv"]), stage)
    skip = x if stage == 1 else _conv(nn.avg_pool(scaled, (2, 2), (2, 2)), kernel(params["shortcut"]))
    np.testing.assert_allclose(found, _rprelu(skip + y, params["act"]), rtol=1e-10, atol=1e-10)


def test_a_two_stage_block_of_bnn_nobn_written_out(x64):
    """The second one, which halves the image and doubles the channels."""
    model, variables = _network("reactnet_a_imagenet", "bnn_nobn", 0.25)
    x, found = _outputs(model, variables, ("block1", "block2"))
    params = variables["params"]["block2"]

    def branch(x, layer, stride=1):
        kernel = binarize(standardize_by_deviation(layer["conv"]["conv"]["kernel"]))
        signs = binary_sign(x + layer["shift"]["bias"].reshape(1, 1, 1, -1))
        return 0.2 * _conv(signs, kernel * layer["conv"]["gain"].reshape(1, 1, 1, -1), stride)

    scaled = x / math.sqrt(1 + 2 * 0.2**2)
    x = _rprelu(nn.avg_pool(scaled, (2, 2), (2, 2)) + branch(scaled, params["conv1"], 2), params["act1"])
    scaled = x / math.sqrt(1 + 0.2**2)
    parts = [x + branch(scaled, params[name]) for name in ("conv2a", "conv2b")]
    np.testing.assert_allclose(found, _rprelu(jnp.concatenate(parts, -1), params["act2"]), rtol=1e-10, atol=1e-10)


def _quadratic(x):
    inner = jnp.where(x < 0, 2 * x + x**2, 2 * x - x**2)
    return jnp.where(x < -1, -1.0, jnp.where(x < 1, inner, 1.0))


def _straight_through(function, surrogate):
    """The function, with a gradient that autodiff makes of its surrogate."""
    return lambda x: surrogate(x) + jax.lax.stop_gradient(function(x) - surrogate(x))


@pytest.mark.parametrize("method", ["batchnorm", also("bnn_nobn"), "bnn_mimic"])
def test_the_gradient_of_a_network_is_that_of_its_surrogates(method, x64, monkeypatch):
    """Every parameter's, of training: against autodiff of the surrogates, in the place of our derivatives."""
    model, variables = _network("tiny", method)

    def gradient():
        def loss(params):
            out, _ = model.apply(variables | {"params": params}, IMAGES, train=True, mutable=["batch_stats"])
            return (out * (jnp.arange(15.0) % 4).reshape(3, 5)).sum()

        return jax.jit(jax.grad(loss))(variables["params"])

    ours = gradient()
    monkeypatch.setattr(reactnet, "binary_sign", _straight_through(binary_sign, _quadratic))
    clipped = _straight_through(binarize, lambda w: jnp.clip(w, -1, 1))
    monkeypatch.setattr("mimicnorm_jax.models.conv_norm.binarize", clipped)
    theirs = gradient()
    size = max(float(abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    assert size > 1e-3
    # A BatchNorm multiplies the rounding of a channel that hardly varies by 1/sqrt(epsilon), 316.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7 * size), ours, theirs)


@pytest.mark.parametrize("method", METHODS)
def test_a_binary_network_folds_and_stays_binary(method):
    """In float32, where a sign could turn by rounding: fold compares logits itself, and refuses if one did."""
    model, variables = _network("tiny", method, dtype=jnp.float32)
    plain, plain_variables = interop.fold(model, variables, image_shape=(8, 8, 3))
    found, expected = (jax.jit(net.apply)(v, IMAGES) for net, v in ((plain, plain_variables), (model, variables)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * abs(expected).max())
    assert "batch_stats" not in plain_variables


def test_packed_bits_take_the_bytes_that_are_reported():
    """Every binary kernel packed by numpy and unpacked again, beside one number a channel."""
    model, variables = _network("tiny", "bnn_mimic", dtype=jnp.float32)
    size = interop.packed_size(model, (8, 8, 3))
    layers = read_affine(model, variables, (8, 8, 3)).layers
    binary = {path: np.asarray(layer.kernel) for path, layer in layers.items() if path[0] not in NEITHER}
    total = 0
    for kernel in binary.values():
        bits, sizes = np.packbits(kernel > 0), abs(kernel).max((0, 1, 2))
        total += bits.nbytes + sizes.nbytes
        signs = 2.0 * np.unpackbits(bits, count=kernel.size).reshape(kernel.shape) - 1
        np.testing.assert_allclose(signs * sizes, kernel, rtol=1e-6)
    assert size.binary_bytes == total
    assert size.binary_weights == sum(kernel.size for kernel in binary.values())
    everything = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    assert size.stored_bytes == everything == size.other_bytes + 4 * size.binary_weights
    half = interop.packed_size(
        model.clone(factory=dataclasses.replace(model.factory, param_dtype=jnp.bfloat16)), (8, 8, 3)
    )
    assert half.binary_weights == size.binary_weights
    # Running averages stay in float32, whatever the kernels are in.
    averages = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["batch_stats"]))
    assert half.other_bytes - averages == (size.other_bytes - averages) / 2
    assert interop.packed_size(models.create("resnet8", width=0.25), (8, 8, 3)).binary_weights == 0


def test_stacked_binary_kernels_take_as_many_bytes_as_each_alone():
    class Layers(nn.Module):
        scanned: bool

        @nn.compact
        def __call__(self, x):
            layer = partial(TransformedConv, 3, (3, 3), kernel_transform=KernelTransform(binarize))
            if not self.scanned:
                return layer()(layer()(x))
            axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            return nn.scan(lambda conv, x, _: (conv(x), None), length=2, **axes)(layer(), x, None)[0]

    scanned, alone = (interop.packed_size(Layers(scanned), (8, 8, 3)) for scanned in (True, False))
    assert scanned == alone
    assert scanned.binary_weights == 2 * 81


@pytest.mark.parametrize("method", ["bnn_nobn", "bnn_mimic"])
def test_methods_of_binary_networks_are_refused_elsewhere(method):
    with pytest.raises(ValueError, match=f"{method} is for binary convolutions, and resnet8 has none"):
        models.create("resnet8", method=method)
    assert method in models.methods_of("reactnet18")
