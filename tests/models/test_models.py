"""The networks against the published numbers, and the theorems that hold for all of them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax import CenteredConv, models
from mimicnorm_jax.functional import gain
from mimicnorm_jax.linen.scalars import ScaledReLU
from mimicnorm_jax.methods import BatchNorm, DynamicTanh, Method, SkipInit
from tests.diagnostics.networks import draw, filled


def _draw(key, name, suffix, **options):
    """Initial parameters whose path ends in `suffix`, by path; under jit the compiler drops the work for all others.

    Of a network of fewer `stages` or `blocks`, if these are given.
    """
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    depth = {name: options.pop(name) for name in ("stages", "blocks") if name in options}
    flat = _by_path(models.create(name, **options).clone(**depth).lazy_init(key, image)["params"])
    return {path: leaf for path, leaf in flat.items() if path.endswith(suffix)}


def _key():
    return jax.random.key(0, impl="rbg")  # compiles faster than the default generator


def _initial(name, suffix, **options):
    return jax.jit(lambda key: _draw(key, name, suffix, **options))(_key())


def _by_path(params):
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _branch_scales(name, end, **options):
    return [float(value) for _, value in sorted(_initial(name, f"{end}/conv/scale", **options).items())]


def test_residual_scalars_of_every_scheme():
    """Counted through a whole ResNet-50; of ResNet-18, three blocks that are each of other channels."""
    np.testing.assert_allclose(_branch_scales("resnet50", "conv3"), 1.728 / np.arange(1, 17), rtol=1e-6)
    blocks, three = np.arange(1, 4), {"stages": (1, 1, 1)}
    gains = [math.prod(gain(9 * c) for c in channels) for channels in [(64, 64), (64, 128), (128, 256)]]
    expected = {"published": 1.44 / blocks, "exact": gains / blocks, "text": blocks**-0.5, "he": 1 / blocks}
    for init, values in expected.items():
        np.testing.assert_allclose(_branch_scales("resnet18", "conv2", init=init, **three), values, rtol=1e-6)
    np.testing.assert_allclose(_branch_scales("seresnet18", "conv2", **three), 1.44 / blocks, rtol=1e-6)
    np.testing.assert_allclose(_branch_scales("seresnet18", "shortcut", **three), [1.2] * 2, rtol=1e-6)
    assert _branch_scales("resnet18", "conv2", method="skipinit", **three) == [0.0] * 3
    assert _branch_scales("resnet18", "conv2", method="fixup", **three) == [1.0] * 3
    # Without centering there is no gain to make up for, but the published code keeps its constants.
    np.testing.assert_allclose(_branch_scales("resnet18", "conv2", method="none", **three), 1.44 / blocks, rtol=1e-6)
    exact = _branch_scales("resnet18", "conv2", method="none", init="exact", **three)
    np.testing.assert_allclose(exact, 1 / blocks, rtol=1e-6)


def test_scalars_of_shufflenet_and_mobilenet():
    # 16 units, 3 shortcuts, the last convolution; nothing behind a ReLU in the ImageNet form.
    imagenet = sorted(float(scale) for scale in _initial("shufflenetv2_x0.5_imagenet", "scale").values())
    np.testing.assert_allclose(imagenet, [1.2] * 4 + [1.44] * 16, rtol=1e-6)
    scales = _initial("shufflenetv2_x1", "scale")
    for path, value in {
        "stage1_unit1/conv3/conv": 1.44,
        "stage1_unit1/shortcut2/conv": 1.2,
        "stage1_unit2/conv3/conv": 1.44,
        "stage1_unit2/after": 1.0,
        "last_conv/conv": 1.2,
    }.items():
        np.testing.assert_allclose(scales[f"{path}/scale"], value, rtol=1e-6)
    scales = {path: float(scale) for path, scale in sorted(_initial("mobilenetv2", "scale").items())}
    # The first block of each stage changes the width; l counts the ten others.
    widened = [scale for path, scale in scales.items() if "_block1/" in path]
    summed = [scale for path, scale in scales.items() if "_block1/" not in path]
    np.testing.assert_allclose(widened, [1.44] * 7, rtol=1e-6)
    np.testing.assert_allclose(summed, 1.44 / np.arange(1, 11), rtol=1e-6)


def test_squeezenet_sums_around_fire3_fire5_and_fire7_only(x64):
    """A fire whose kernels and biases are zero passes its input where there is a sum, and zeros elsewhere."""
    model = models.create("squeezenet", width=0.25, num_classes=5, dtype=float, param_dtype=float)
    images = draw(1, 1, 8, 8, 3)
    variables = filled(model, images)
    fires = [f"fire{number}" for number in range(2, 10)]

    @jax.jit
    def outputs(params):
        captured = {"capture_intermediates": lambda module, _: module.name in fires}
        return model.apply({**variables, "params": params}, images, **captured)[1]["intermediates"]

    for fire in fires:
        cleared = {**variables["params"], fire: jax.tree.map(jnp.zeros_like, variables["params"][fire])}
        (output,) = outputs(cleared)[fire]["__call__"]
        assert bool(output.any()) == (fire in ("fire3", "fire5", "fire7")), fire


BASELINE = {"method": "batchnorm", "init": "published_batchnorm"}


@pytest.mark.parametrize(
    ("name", "options", "path", "variance"),
    [
        ("vgg11", {}, "stage4_conv1", 2.8 / (9 * 256)),
        ("vgg11", {"init": "he"}, "stage4_conv1", 2 / (9 * 256)),
        ("vgg11", {"init": "exact"}, "stage4_conv1", 2 * gain(9 * 256) ** 2 / (9 * 256)),
        ("vgg11", {"init": "exact", "method": "none"}, "stage4_conv1", 2 / (9 * 256)),
        ("resnet18", {}, "stage2_block1/conv1", 2 / (9 * 64)),
        ("resnet18", {"init": "exact"}, "stage2_block1/conv1", 2 / (9 * 64)),
        ("resnet18", {"init": "text"}, "stage2_block1/conv1", 2 * gain(9 * 64) ** 2 / (9 * 64)),
        ("resnet18", {"method": "fixup"}, "stage2_block1/conv1", 2 / (9 * 128) / 8),  # B^(-1/2) on the deviation
        ("resnet18", {"method": "fixup"}, "stage2_block1/shortcut", 2 / 128),
        ("resnet50", {"method": "fixup"}, "stage2_block1/conv2", 2 / (9 * 128) / 4),  # B^(-1/4), B = 16
        ("shufflenetv2_x1", {}, "stage3_unit2/conv2", 2 / (9 * 4)),
        ("mobilenetv2", {}, "stage6_block2/conv2", 2 / (9 * 2)),
        ("vgg11_imagenet", {}, "stage4_conv1", 2.8 / (9 * 512)),  # over the fan-out
        ("vgg11_imagenet", {"init": "exact"}, "stage4_conv1", 2 * gain(9 * 256) ** 2 / (9 * 256)),
        ("vgg11_imagenet", BASELINE, "stage4_conv1", 2.8 / (9 * 512)),
        ("seresnet18", {}, "stage4_block1/conv2", 2 / (9 * 516)),
        ("seresnet18", BASELINE, "stage4_block1/conv2", 2 / (9 * 516)),
        ("densenet121", {"blocks": (6, 12)}, "block2_layer12/conv1", 1 / 480),
        ("densenet121", {"init": "exact", "blocks": (6, 12)}, "block2_layer12/conv1", 2 * gain(480) ** 2 / 480),
        ("densenet121", BASELINE | {"blocks": (6, 12)}, "block2_layer12/conv1", 1 / (3 * 480)),
        ("shufflenetv2_x1_imagenet", {}, "stage3_unit2/conv2", 2 / (9 * 4)),
        ("shufflenetv2_x1_imagenet", BASELINE, "stage3_unit2/conv2", 1 / (3 * 9)),
        ("resnet18", {"method": "fixup"}, "stem", 1 / 81),
        ("resnet18", {"method": "fixup", "init": "he"}, "stem", 2 / (9 * 64)),
        ("resnet50", BASELINE | {"stages": (1, 1)}, "stage2_block1/conv2", 1 / (3 * 9 * 128)),
        ("resnet50_imagenet", BASELINE | {"stages": (1, 1)}, "stage2_block1/conv3", 2 / 512),
        ("vgg11", BASELINE, "stage4_conv1", 2.8 / (9 * 256)),
        ("squeezenet", BASELINE, "fire3/expand3", 2 / (9 * 16)),
        ("shufflenetv2_x1", BASELINE, "stem", 1 / 81),
        ("shufflenetv2_x1", BASELINE, "stage3_unit2/conv2", 2 / (9 * 232)),
        ("mobilenetv2", BASELINE, "stage6_block2/conv2", 2 / (9 * 960)),
    ],
)
def test_variance_of_kernels(name, options, path, variance):
    (kernel,) = _initial(name, f"{path}/conv/kernel", **options).values()
    # The variance of N normal draws has relative standard deviation sqrt(2 / N).
    assert abs(kernel.var() / variance - 1) < 5 * math.sqrt(2 / kernel.size)


@pytest.mark.parametrize("generator", ["rbg", "threefry2x32"])
def test_uniform_kernels_are_increasing_functions_of_the_normal_ones(generator):
    """P(z < raw kernel) of a normal z, in place of the raw kernel: as paired as the same kernel."""
    options = ({"method": "mimicnorm"}, {"method": "fixup"}, BASELINE)

    @jax.jit
    def draw(key):
        return [_draw(key, "resnet8", "kernel", **one) for one in options]

    raw, fixup, baseline = draw(jax.random.key(0, impl=generator))
    for path in ("stem/conv/kernel", "stage2_block1/conv1/conv/kernel", "classifier/kernel"):
        fan_in = math.prod(raw[path].shape[:-1])
        uniform = jax.lax.erf(raw[path] * math.sqrt(fan_in / 2) / math.sqrt(2)) / math.sqrt(fan_in)
        # float32: a few units in the last place of erf and its inverse.
        np.testing.assert_allclose(baseline[path], uniform, rtol=1e-5, atol=1e-6, err_msg=path)
    np.testing.assert_array_equal(fixup["stem/conv/kernel"], baseline["stem/conv/kernel"])
    assert 0.99 / math.sqrt(27) < abs(fixup["stem/conv/kernel"]).max() <= 1 / math.sqrt(27)


@pytest.mark.slow
def test_energy_through_vgg16_at_initialization():
    """Centering keeps it near 1; published kernels without centering grow by 1.4 a layer, 1.4^13 = 79 in all."""
    images = jax.random.normal(jax.random.key(1), (4, 32, 32, 3))
    energy = {}
    for method, init in (("mimicnorm", "published"), ("none", "published"), ("none", "he")):
        model = models.create("vgg16", method=method, init=init)

        @jax.jit
        def last_conv(key, model=model):
            _, state = model.init_with_output(
                key, images, capture_intermediates=lambda module, _: module.name == "stage5_conv3"
            )
            return state["intermediates"]["stage5_conv3"]["__call__"][0]

        output = last_conv(_key())
        energy[method, init] = float((jax.nn.relu(output) ** 2).mean() * 2)
    # One draw of a net with 512 channels at few pixels; zero padding loses energy and max-pooling gains some.
    assert 20 < energy["none", "published"] / energy["none", "he"] < 300
    assert energy["none", "published"] / energy["mimicnorm", "published"] > 10


@pytest.mark.parametrize(("name", "method"), [("resnet18", "skipinit"), ("resnet50", "fixup")])
@pytest.mark.usefixtures("shallow")
def test_residual_branches_start_at_zero(name, method, x64):
    """So changing a kernel inside a branch changes nothing behind it."""
    model = models.create(name, method=method, width=0.25, num_classes=5, dtype=float, param_dtype=float)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3), float)
    params = jax.jit(model.init)(_key(), images)["params"]
    params["classifier"]["kernel"] = jnp.ones_like(params["classifier"]["kernel"])
    apply = jax.jit(lambda params: model.apply({"params": params}, images))
    before = apply(params)
    params["stage2_block2"]["conv1"]["conv"]["kernel"] *= 3
    np.testing.assert_array_equal(apply(params), before)
    params["stage2_block1"]["shortcut"]["conv"]["kernel"] *= 3
    assert abs(apply(params) - before).max() > 1e-3


def test_strided_convolutions_pad_both_sides_and_not_as_xla_same(x64):
    model = models.create("resnet8", method="none", dtype=float, param_dtype=float)
    x = draw(1, 1, 8, 8, 3)
    variables = filled(model, x)
    captured = jax.jit(lambda variables: model.apply(variables, x, capture_intermediates=True)[1])
    inside = captured(variables)["intermediates"]
    block_input = inside["stage1_block1"]["__call__"][0]
    kernel = variables["params"]["stage2_block1"]["conv1"]["conv"]["kernel"]
    padded = np.pad(block_input, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corner = np.einsum("hwc,hwco->o", padded[0, 2:5, 4:7], kernel)
    np.testing.assert_allclose(inside["stage2_block1"]["conv1"]["__call__"][0][0, 1, 2], corner, rtol=1e-10)


def _train_mode(model):
    return jax.jit(lambda variables, x: model.apply(variables, x, train=True, mutable=["batch_stats"]))


def test_bfloat16_keeps_parameters_statistics_and_logits_in_float32():
    images = jax.random.normal(jax.random.key(1), (8, 8, 8, 3))
    for method in ("mimicnorm", "batchnorm"):
        model = models.create("resnet8", method=method, num_classes=5, dtype=jnp.bfloat16)
        variables = filled(model, images)
        logits, updated = _train_mode(model)(variables, images)
        kept = jax.eval_shape(model.init, _key(), images), updated, logits
        assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("float32")}
        exact = models.create("resnet8", method=method, num_classes=5)
        expected, _ = _train_mode(exact)(variables, images)
        # Ten layers, each rounding to 2^-9 relative, on logits of order 1.
        assert 0 < abs(logits - expected).max() < 0.15


def test_create_names_near_misses_and_says_why_not():
    for options, message in (
        ({"name": "resnt18"}, "unknown model 'resnt18': did you mean resnet18"),
        ({"name": "resnet18", "method": "mimicnrom"}, "unknown method 'mimicnrom': did you mean mimicnorm"),
        ({"name": "resnet18", "init": "published2"}, "did you mean published"),
        (
            {"name": "vgg16", "method": "fixup"},
            "fixup is about residual branches .* and vgg16 has none. Methods for vgg16: batchnorm",
        ),
        ({"name": "seresnet18", "method": "skipinit"}, "branches that end in a convolution, and seresnet18 has none"),
        ({"name": "mobilenetv2", "method": "fixup"}, "branches of ResNets, not for those of mobilenetv2"),
        ({"name": "resnet18", "init": "published_batchnorm"}, "method='mimicnorm' has none .* use init='published'"),
        ({"name": "resnet18", "num_classes": 1}, "num_classes is 1"),
        ({"name": "resnet18", "width": 0.0}, "width is 0.0"),
        (
            {"name": "resnet8", "method": Method("own", "", norm=BatchNorm(), residual=SkipInit())},
            "method='own' has BatchNorm behind every convolution, which divides away what SkipInit multiplies",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            models.create(**options)
    with pytest.raises(TypeError, match="unknown option of a network 'dtpe': did you mean dtype"):
        models.create("resnet18", dtpe="bfloat16")
    with pytest.raises(ValueError, match=r"vgg11 shrinks images by 32 .* these have 8 x 8"):
        models.check_image("vgg11", (8, 8, 1))
    models.check_image("resnet8", (8, 8, 1))
    models.create("resnet8", method=Method("own", "", norm=DynamicTanh(), residual=SkipInit()))  # keeps the scale


@pytest.mark.parametrize("scale", [1.3, -0.7])
def test_a_scale_behind_a_relu_comes_through_the_convolution_before(x64, scale):
    """ShuffleNetV2's branch end against s relu(conv) + b written out: values and gradients, for either sign of s."""

    class Folded(nn.Module):
        @nn.compact
        def __call__(self, x):
            relu = ScaledReLU(scaled=True, param_dtype=jnp.float64, name="after")
            return relu(CenteredConv(4, (1, 1), param_dtype=jnp.float64, name="conv")(x, relu.conv_scale()))

    def plain(params, x):
        z = CenteredConv(4, (1, 1), param_dtype=jnp.float64).apply({"params": params["conv"]}, x)
        return params["after"]["scale"] * jax.nn.relu(z) + params["after"]["bias"]

    keys = jax.random.split(jax.random.key(0), 4)
    x, weights = (jax.random.normal(key, (2, 5, 5, size), jnp.float64) for key, size in zip(keys, (3, 4), strict=False))
    params = {
        "conv": {"kernel": jax.random.normal(keys[2], (1, 1, 3, 4)), "bias": jax.random.normal(keys[3], (4,))},
        "after": {"scale": jnp.float64(scale), "bias": jnp.float64(0.2)},
    }
    found, expected = (
        jax.value_and_grad(lambda p, x, f=f: (f(p, x) * weights).sum(), (0, 1))(params, x)
        for f in (lambda p, x: Folded().apply({"params": p}, x), plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected)
