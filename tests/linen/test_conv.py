"""Layers with a kernel transform are drop-ins for Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from mimicnorm_jax.diagnostics import saved_for_backward
from mimicnorm_jax.functional import KernelTransform, center, scaled_standardize, standardize
from mimicnorm_jax.functional.transform import IDENTITY
from mimicnorm_jax.linen import CenteredConv, CenteredDense, TransformedConv, TransformedDense

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


TRANSFORMS = {
    "center": KernelTransform(center),
    "standardize": KernelTransform(standardize),
    "scaled": KernelTransform(scaled_standardize, lambda shape, groups: groups == 1),
    "none": IDENTITY,
}


def _pair(options, transform):
    key = jax.random.key(0)
    options = {"features": 6, **options}
    x = jax.random.normal(jax.random.key(1), (2, 9, 9, 8))
    plain, layer = nn.Conv(**options), TransformedConv(**options, kernel_transform=transform)
    params = plain.init(key, x)["params"]
    jax.tree.map(np.testing.assert_array_equal, params, layer.init(key, x)["params"])
    return plain, layer, params, x


@pytest.mark.parametrize(
    ("name", "transform", "recompute"),
    [
        *((name, "center", True) for name in CONVS),
        ("grouped", "standardize", True),
        ("grouped", "scaled", True),
        ("masked", "standardize", False),
        ("bfloat16", "none", True),
        ("strided", "none", False),
    ],
)
def test_a_call_is_bit_for_bit_the_plain_conv_with_the_transformed_kernel(name, transform, recompute):
    """So a kernel that is transformed once, for inference, gives the same."""
    transform = TRANSFORMS[transform]
    plain, layer, params, x = _pair(CONVS[name], transform)
    kernel = transform(params["kernel"], CONVS[name].get("feature_group_count", 1))
    expected = plain.apply({"params": {**params, "kernel": kernel}}, x)
    found = layer.clone(recompute_kernel=recompute).apply({"params": params}, x)
    np.testing.assert_array_equal(found, expected)


def test_conv_ranks_one_and_three():
    for rank in (1, 3):
        x = jax.random.normal(jax.random.key(1), (2, *(5,) * rank, 8))
        layer = CenteredConv(4, (3,) * rank, kernel_transform=KernelTransform(center))
        params = layer.init(jax.random.key(0), x)["params"]
        centered = {**params, "kernel": center(params["kernel"])}
        np.testing.assert_array_equal(
            layer.apply({"params": params}, x), nn.Conv(4, (3,) * rank).apply({"params": centered}, x)
        )


def test_the_rule_is_asked_with_the_shape_and_the_groups():
    asked = []
    transform = KernelTransform(center, lambda *a: asked.append(a) or False)
    layer = TransformedConv(6, (3, 3), feature_group_count=2, kernel_transform=transform)
    layer.init(jax.random.key(0), jnp.ones((1, 5, 5, 8)))
    assert set(asked) == {((3, 3, 4, 6), 2)}


class Lifted(nn.Module):
    """Two convolutions in a loop over stacked parameters, side by side, or one that is computed again."""

    transform: KernelTransform
    lift: str

    @nn.compact
    def __call__(self, x):
        def step(layer, x, _):
            return jnp.sin(layer(x)), None

        boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, "model"))
        conv = TransformedConv(4, (3,), kernel_transform=self.transform, kernel_init=boxed, name="conv")
        if self.lift == "remat":
            return nn.remat(step)(conv, x, None)[0]
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        options["metadata_params"] = {nn.PARTITION_NAME: "stack"}
        if self.lift == "scan":
            return nn.scan(step, length=2, **options)(conv, x, None)[0]
        return nn.vmap(step, in_axes=(0, None), **options)(conv, x, None)[0]


@pytest.mark.parametrize(("lift", "transform"), [("scan", "center"), ("vmap", "standardize"), ("remat", "center")])
def test_values_and_gradients_inside_lifted_transformations_with_boxed_kernels(lift, transform, x64):
    transform = TRANSFORMS[transform]
    x = jax.random.normal(jax.random.key(1), (2, 3, 5, 4), float)
    x = x if lift == "vmap" else x[0]
    net = Lifted(transform, lift)
    variables = net.init(jax.random.key(0), x)
    assert isinstance(variables["params"]["conv"]["kernel"], nn.Partitioned)

    def one(x, layer):
        plain = {"kernel": transform(layer["kernel"]), "bias": layer["bias"]}
        return jnp.sin(nn.Conv(4, (3,)).apply({"params": plain}, x))

    def expected(layer):
        if lift == "remat":
            return one(x, layer)
        first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], layer) for i in range(2))
        return one(one(x, first), second) if lift == "scan" else jnp.stack([one(x[0], first), one(x[1], second)])

    layer = nn.unbox(variables["params"]["conv"])
    found, plain = (
        jax.value_and_grad(lambda layer, f=f: (f(layer) ** 3).sum())(layer)
        for f in (lambda layer: net.apply({"params": {"conv": layer}}, x), expected)
    )
    # float32 parameters in float64: the same sums in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, plain)


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
    TransformedConv(6, (3, 3)),
    CenteredConv(6, (3, 3), feature_group_count=2, mask=jnp.ones((3, 3, 4, 6)), kernel_transform=TRANSFORMS["center"]),
    TransformedConv(6, (3, 3), kernel_transform=TRANSFORMS["standardize"]),
    CenteredDense(6, scale_init=nn.initializers.ones),
    TransformedDense(6, kernel_transform=TRANSFORMS["scaled"]),
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_backward_pass_keeps_raw_kernel_and_input_only_and_repeats_no_product(layer, dtype):
    layer = layer.clone(dtype=dtype)
    x = jnp.ones((2, 9, 9, 8), dtype)
    params = layer.init(jax.random.key(0), x)

    def output(arguments):
        params, x, scale = arguments
        return layer.apply(params, x, scale)

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
    centered = {**params, "kernel": center(params["kernel"])}
    np.testing.assert_array_equal(layer.apply({"params": params}, x), nn.Dense(6).apply({"params": centered}, x))


def test_checkpoints_of_plain_layers_load_under_names_of_the_users_own_and_not_under_those_that_flax_makes_up():
    class Net(nn.Module):
        conv: type
        named: bool

        @nn.compact
        def __call__(self, x):
            return self.conv(6, (3, 3), **({"name": "first"} if self.named else {}))(x)

    x = jnp.ones((1, 5, 5, 8))
    plain = Net(nn.Conv, True).init(jax.random.key(0), x)["params"]["first"]
    centered = {**plain, "kernel": center(plain["kernel"])}
    np.testing.assert_array_equal(
        Net(CenteredConv, True).apply({"params": {"first": plain}}, x),
        nn.Conv(6, (3, 3)).apply({"params": centered}, x),
    )
    assert [*Net(CenteredConv, False).init(jax.random.key(0), x)["params"]] == ["CenteredConv_0"]
