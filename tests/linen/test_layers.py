"""Centered layers are drop-ins for Flax's; the last BatchNorm against its definition and across devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from mimicnorm_jax.diagnostics import saved_for_backward
from mimicnorm_jax.functional import kernels
from mimicnorm_jax.linen.layers import CenteredConv, CenteredDense, LastBatchNorm

CONVS = {
    "strided": {"kernel_size": (3, 3), "strides": 2, "padding": ((1, 1), (0, 2))},
    "dilated": {"kernel_size": (3, 3), "kernel_dilation": 2, "use_bias": False},
    "grouped": {"kernel_size": (3, 3), "feature_group_count": 2},
    "depthwise": {"kernel_size": (3, 3), "feature_group_count": 8, "features": 8},
    "transposed": {"kernel_size": (3, 3), "input_dilation": 2, "padding": 1},
    "bfloat16": {"kernel_size": (3, 3), "dtype": jnp.bfloat16, "precision": "highest"},
    "masked": {"kernel_size": (3, 3), "mask": jnp.ones((3, 3, 8, 6)).at[0].set(0)},
    "circular": {"kernel_size": (3, 3), "padding": "CIRCULAR"},
    "flat": {"kernel_size": 3},  # further leading axes are batch
    "own product": {
        "kernel_size": (3, 3),
        "conv_general_dilated": lambda *a, **k: 2 * lax.conv_general_dilated(*a, **k),
    },
    "own dtypes": {"kernel_size": (3, 3), "promote_dtype": lambda *a, dtype: [x.astype(jnp.bfloat16) for x in a]},
}


def _pair(options, rule):
    key = jax.random.key(0)
    options = {"features": 6, **options}
    x = jax.random.normal(jax.random.key(1), (2, 9, 9, 8))
    plain, centered = nn.Conv(**options), CenteredConv(**options, rule=rule)
    params = plain.init(key, x)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, centered.init(key, x)["params"])
    return plain, centered, params, x


@pytest.mark.parametrize("name", CONVS)
def test_conv_is_bit_for_bit_the_plain_conv_of_the_centered_kernel(name):
    plain, centered, params, x = _pair(CONVS[name], kernels.always)
    expected = plain.apply({"params": {**params, "kernel": kernels.center(params["kernel"])}}, x)
    np.testing.assert_array_equal(centered.apply({"params": params}, x), expected)


def test_conv_ranks_one_and_three():
    for rank in (1, 3):
        x = jax.random.normal(jax.random.key(1), (2, *(5,) * rank, 8))
        layer = CenteredConv(4, (3,) * rank, rule=kernels.always)
        params = layer.init(jax.random.key(0), x)["params"]
        centered = {**params, "kernel": kernels.center(params["kernel"])}
        np.testing.assert_array_equal(
            layer.apply({"params": params}, x), nn.Conv(4, (3,) * rank).apply({"params": centered}, x)
        )


@pytest.mark.parametrize("name", ["strided", "grouped", "depthwise"])
def test_conv_that_the_rule_leaves_out_is_the_plain_conv(name):
    plain, centered, params, x = _pair(CONVS[name], kernels.never)
    np.testing.assert_array_equal(centered.apply({"params": params}, x), plain.apply({"params": params}, x))


def test_rule_is_asked_with_the_shape_and_the_groups():
    asked = []
    x = jnp.ones((1, 5, 5, 8))
    CenteredConv(6, (3, 3), feature_group_count=2, rule=lambda *a: asked.append(a) or False).init(jax.random.key(0), x)
    assert asked == [((3, 3, 4, 6), 2)]


def test_folded_scalar_multiplies_output_and_bias(x64):
    x = jax.random.normal(jax.random.key(1), (2, 9, 9, 8))
    options = {"kernel_size": (3, 3), "param_dtype": jnp.float64, "bias_init": nn.initializers.normal(1)}
    scaled = CenteredConv(6, **options, scale_init=nn.initializers.constant(1.7))
    bare = CenteredConv(6, **options)
    params = scaled.init(jax.random.key(0), x)["params"]
    rest = ("kernel", "bias")
    np.testing.assert_array_equal(params["kernel"], bare.init(jax.random.key(0), x)["params"]["kernel"])

    def loss(params, fold):
        if fold:
            return (scaled.apply({"params": params}, x) ** 2).sum()
        return ((params["scale"] * bare.apply({"params": {n: params[n] for n in rest}}, x)) ** 2).sum()

    grads = [jax.grad(loss)(params, fold) for fold in (True, False)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), *grads)


@pytest.mark.parametrize("layer", [CenteredConv(6, (3, 3), param_dtype=float), CenteredDense(6, param_dtype=float)])
def test_gradient_of_the_raw_kernel_sums_to_zero_over_the_fan_in(layer, x64):
    x = jax.random.normal(jax.random.key(1), (2, 9, 9, 8), float)
    params = layer.init(jax.random.key(0), x)
    kernel = jax.grad(lambda p: jnp.sin(layer.apply(p, x)).sum())(params)["params"]["kernel"]
    sums = kernel.sum(tuple(range(kernel.ndim - 1)))
    assert abs(sums).max() < 1e-12 * abs(kernel).sum()


LAYERS = [
    CenteredConv(6, (3, 3), scale_init=nn.initializers.ones),
    CenteredConv(6, (3, 3), rule=kernels.never),
    CenteredConv(6, (3, 3), feature_group_count=2, mask=jnp.ones((3, 3, 4, 6)), rule=kernels.always),
    CenteredDense(6, scale_init=nn.initializers.ones),
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_backward_pass_keeps_raw_kernel_and_input_only_and_repeats_no_product(layer, dtype):
    layer = layer.clone(dtype=dtype)
    x = jnp.ones((2, 9, 9, 8), dtype)
    params = layer.init(jax.random.key(0), x)

    def output(arguments):
        params, x, factor = arguments
        return layer.apply(params, x, factor)

    arguments = (params, x, jnp.float32(1.5))
    assert saved_for_backward(output, arguments) == ()
    program = jax.jit(jax.grad(lambda arguments: output(arguments).astype(jnp.float32).sum()))
    text = program.lower(arguments).as_text()
    # One for each gradient: the value itself is not asked for, and a sum's gradient does not need it.
    assert text.count("stablehlo.convolution") + text.count("stablehlo.dot_general") == 2


@pytest.mark.parametrize("layer", LAYERS)
def test_flax_sees_one_call_of_a_layer(layer):
    """An interceptor that adds a term adds it once; what the layer returns is captured once."""
    x = jax.random.normal(jax.random.key(1), (2, 9, 9, 8))
    variables = layer.init(jax.random.key(0), x)
    seen = []

    def add_one(call, args, kwargs, context):
        seen.append(context.method_name)
        return call(*args, **kwargs) + 1

    with nn.intercept_methods(add_one):
        raised, state = layer.apply(variables, x, capture_intermediates=True)
    assert seen == ["__call__"]
    np.testing.assert_array_equal(raised, layer.apply(variables, x) + 1)
    assert len(state["intermediates"]["__call__"]) == 1


def test_dense_is_bit_for_bit_the_plain_dense_of_the_centered_kernel():
    x = jax.random.normal(jax.random.key(1), (2, 8))
    layer = CenteredDense(6)
    params = layer.init(jax.random.key(0), x)["params"]
    centered = {**params, "kernel": kernels.center(params["kernel"])}
    np.testing.assert_array_equal(layer.apply({"params": params}, x), nn.Dense(6).apply({"params": centered}, x))


def _normalize(logits, stats=None, train=True, **options):
    layer = LastBatchNorm(**options)
    variables = stats or layer.init(jax.random.key(0), logits, use_running_average=False)
    return layer.apply(variables, logits, use_running_average=not train, mutable=["batch_stats"])


def test_last_batch_norm_against_its_definition(x64):
    z = 3 * jax.random.normal(jax.random.key(0), (16, 5), float) + 7
    y, stats = _normalize(z)
    z = np.asarray(z)
    mean, var = z.sum(0) / 16, ((z - z.sum(0) / 16) ** 2).sum(0) / 16
    np.testing.assert_allclose(y, (z - mean) / np.sqrt(var + 1e-5), rtol=1e-12)
    np.testing.assert_allclose(stats["batch_stats"]["mean"], 0.1 * mean, rtol=1e-12)
    np.testing.assert_allclose(stats["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-12)
    _, unbiased = _normalize(z, running_variance="unbiased")
    np.testing.assert_allclose(unbiased["batch_stats"]["var"], 0.9 + 0.1 * np.var(z, 0, ddof=1), rtol=1e-12)


def test_last_batch_norm_agrees_with_flax():
    z = jax.random.normal(jax.random.key(0), (16, 5))
    flax = nn.BatchNorm(use_running_average=False, momentum=0.9, use_scale=False, use_bias=False)
    expected, stats = flax.apply(flax.init(jax.random.key(0), z), z, mutable=["batch_stats"])
    y, ours = _normalize(z)
    # float32: a few units in the last place of numbers of order 1.
    np.testing.assert_allclose(y, expected, atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, stats)


def test_last_batch_norm_in_evaluation_uses_the_averages_and_leaves_them():
    z = jax.random.normal(jax.random.key(0), (1, 3))
    stats = {"batch_stats": {"mean": jnp.array([1.0, 2.0, 3.0]), "var": jnp.array([4.0, 1.0, 0.25])}}
    y, after = _normalize(z, stats, train=False)
    expected = (np.asarray(z) - [[1, 2, 3]]) / np.sqrt(np.array([[4, 1, 0.25]]) + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after, stats)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_synchronized_over_devices_equals_one_device(offset):
    z = jax.random.normal(jax.random.key(0), (4, 8, 5)) + offset
    layer = LastBatchNorm(use_running_average=False, axis_name="d", running_variance="unbiased")
    variables = layer.init(jax.random.key(0), z[0])

    def apply(z):
        return layer.apply(variables, z, mutable=["batch_stats"])

    y, stats = jax.pmap(apply, axis_name="d")(z)
    expected, whole = _normalize(z.reshape(32, 5), running_variance="unbiased")
    # The difference of moments loses a relative offset^2 of float32's 6e-8.
    tolerance = 1e-5 + 6e-7 * offset**2
    np.testing.assert_allclose(y.reshape(32, 5), expected, atol=tolerance, rtol=tolerance)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=tolerance), stats, whole)


def test_synchronization_is_one_collective_of_two_numbers_a_class():
    layer = LastBatchNorm(use_running_average=False, axis_name="d")
    variables = layer.init(jax.random.key(0), jnp.ones((2, 5)))
    text = str(
        jax.make_jaxpr(lambda z: layer.apply(variables, z, mutable=["batch_stats"]), axis_env=[("d", 4)])(
            jnp.ones((8, 5))
        )
    )
    assert text.count("psum") == 1
    assert next(line for line in text.splitlines() if "psum" in line).strip().split(":")[1].startswith("f32[2,5]")


def test_bfloat16_logits_are_normalized_in_float32():
    z = jax.random.normal(jax.random.key(0), (64, 5)).astype(jnp.bfloat16)
    y, _ = _normalize(z)
    expected, _ = _normalize(z.astype(jnp.float32))
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, expected)


def test_last_batch_norm_refuses_what_it_cannot_normalize():
    with pytest.raises(ValueError, match="training batch of 1"):
        _normalize(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        _normalize(jnp.ones((2, 3, 4)))
    with pytest.raises(ValueError, match="'exact'"):
        _normalize(jnp.ones((2, 3)), running_variance="exact")


def test_checkpoints_of_plain_layers_load_under_names_of_the_users_own_and_not_under_those_that_flax_makes_up():
    class Net(nn.Module):
        conv: type
        named: bool

        @nn.compact
        def __call__(self, x):
            return self.conv(6, (3, 3), **({"name": "first"} if self.named else {}))(x)

    x = jnp.ones((1, 5, 5, 8))
    plain, centered = (Net(conv, True).init(jax.random.key(0), x) for conv in (nn.Conv, CenteredConv))
    jax.tree.map(np.testing.assert_array_equal, plain, centered)
    assert [*Net(CenteredConv, False).init(jax.random.key(0), x)["params"]] == ["CenteredConv_0"]
