"""NNX layers give linen's numbers, to the bit, and train where Flax's own layers do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from mimicnorm_jax import linen, models
from mimicnorm_jax.diagnostics import saved_for_backward
from mimicnorm_jax.functional import KernelTransform, center, gain, standardize, ungrouped
from mimicnorm_jax.nnx import CenteredConv, CenteredLinear, LastBatchNorm, TransformedConv, TransformedLinear
from tests.conftest import also

CENTER, STANDARDIZE = KernelTransform(center), KernelTransform(standardize)
ONES = nn.initializers.ones
MASK = np.ones((3, 3, 8, 6), np.float32)
MASK[0] = 0
CONVS = {
    "strided": {"strides": 2, "padding": ((1, 1), (0, 2)), "bias_init": nn.initializers.normal(1)},
    "grouped": {"feature_group_count": 2, "use_bias": False, "kernel_transform": STANDARDIZE},
    "masked": {"mask": MASK, "padding": "CIRCULAR", "kernel_transform": CENTER},
    "scaled": {"scale_init": nn.initializers.constant(1.7), "bias_init": nn.initializers.normal(1)},
    "bfloat16": {"dtype": jnp.bfloat16, "precision": "highest"},
    "kept": {"recompute_kernel": False, "kernel_dilation": 2, "padding": "VALID"},
}
LINEARS = {
    "plain": {"bias_init": nn.initializers.normal(1)},
    "scaled": {"use_bias": False, "scale_init": nn.initializers.constant(1.7)},
    "bfloat16": {"dtype": jnp.bfloat16, "kernel_transform": STANDARDIZE, "recompute_kernel": False},
}


def _equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def _pure(module, kind=nnx.Param):
    return nnx.to_pure_dict(nnx.state(module, kind))


@pytest.mark.parametrize(
    ("kind", "name"),
    [("conv", name) if name in ("strided", "grouped", "scaled") else also("conv", name) for name in CONVS]
    + [("linear", "plain"), also("linear", "scaled"), also("linear", "bfloat16")],
)
def test_output_and_gradients_are_those_of_linen(kind, name):
    x = jax.random.normal(jax.random.key(1), (2, 9, 9, 8))
    if kind == "conv":
        layer = linen.CenteredConv(6, (3, 3), **CONVS[name])
        ours = CenteredConv(8, 6, (3, 3), **CONVS[name], rngs=nnx.Rngs(0))
    else:
        layer, ours = linen.CenteredDense(6, **LINEARS[name]), CenteredLinear(8, 6, **LINEARS[name], rngs=nnx.Rngs(0))
    params = layer.init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, _pure(ours))
    nnx.update(ours, params)

    def with_loss(y):
        return jnp.sin(y).astype(jnp.float32).sum(), y

    def loss(params, x):
        return with_loss(layer.apply({"params": params}, x))

    (_, y), (by_params, by_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)

    @nnx.jit
    def found(ours, x):
        return nnx.value_and_grad(lambda ours, x: with_loss(ours(x)), argnums=(0, 1), has_aux=True)(ours, x)

    (_, ours_y), (ours_by_params, ours_by_x) = found(ours, x)
    assert y.dtype == ours_y.dtype
    _equal((ours_y, nnx.to_pure_dict(ours_by_params), ours_by_x), (y, by_params, by_x))


@pytest.mark.parametrize("mode", [{}, {"graph": False}, {"graph": False, "graph_updates": False}])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("unbiased", jnp.float32), also("biased", jnp.bfloat16)],
)
def test_last_batch_norm_is_that_of_linen_in_graph_and_tree_mode(kind, dtype, mode):
    z = (3 * jax.random.normal(jax.random.key(1), (3, 16, 5)) + 1).astype(dtype)
    options = {"running_variance": kind, "momentum": 0.8, "epsilon": 1e-3, "scale": 1.5}
    layer, ours = linen.LastBatchNorm(**options), LastBatchNorm(5, **options)
    stats = layer.init(jax.random.key(0), z[0], use_running_average=False)["batch_stats"]
    _equal(_pure(ours, nnx.BatchStat), stats)

    @jax.jit
    def expected(stats, z):
        def loss(z):
            y, state = layer.apply({"batch_stats": stats}, z, use_running_average=False, mutable="batch_stats")
            return jnp.sin(y).sum(), (y, state["batch_stats"])

        (_, (y, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(z)
        return y, gradient, stats

    @nnx.jit(**mode)
    def found(ours, z):
        def loss(ours, z):
            y = ours(z)
            return jnp.sin(y).sum(), y

        own = {name: value for name, value in mode.items() if name == "graph"}
        (_, y), gradient = nnx.value_and_grad(loss, argnums=1, has_aux=True, **own)(ours, z)
        return y, gradient

    for batch in z:  # the averages go on from one another
        y, gradient, stats = expected(stats, batch)
        _equal(found(ours, batch), (y, gradient))
        _equal(_pure(ours, nnx.BatchStat), stats)
    ours.eval()
    _equal(ours(z[0]), layer.apply({"batch_stats": stats}, z[0], use_running_average=True))
    _equal(_pure(ours, nnx.BatchStat), stats)
    trained = nnx.view(ours, use_running_average=False)
    assert not np.array_equal(trained(z[0]), ours(z[0]))


def test_synchronized_statistics_are_those_of_linen():
    z = jax.random.normal(jax.random.key(1), (4, 8, 5))
    layer = linen.LastBatchNorm(axis_name="d", use_running_average=False)
    stats = layer.init(jax.random.key(0), z[0])

    def found(z):
        ours = LastBatchNorm(5, axis_name="d")
        return ours(z), {"batch_stats": _pure(ours, nnx.BatchStat)}

    def expected(z):
        return layer.apply(stats, z, mutable="batch_stats")

    _equal(*(jax.jit(jax.vmap(f, axis_name="d"))(z) for f in (found, expected)))


def test_last_batch_norm_refuses_what_it_cannot_normalize():
    with pytest.raises(ValueError, match="training batch of 1"):
        LastBatchNorm(3)(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="training batch of 0"):
        LastBatchNorm(3)(jnp.ones((0, 3)))
    with pytest.raises(ValueError, match="needs use_running_average"):
        LastBatchNorm(3, use_running_average=None)(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        LastBatchNorm(4)(jnp.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"LastBatchNorm\(1\).*\(2, 4\)"):  # the averages of one would broadcast
        LastBatchNorm(1, use_running_average=True)(jnp.ones((2, 4)))
    with pytest.raises(ValueError, match="'exact'"):
        LastBatchNorm(3, running_variance="exact")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"positive number; got 0\.0"):
        LastBatchNorm(3, scale=0.0)


@pytest.mark.parametrize("ours", [TransformedConv, TransformedLinear])
def test_initial_values_and_checkpoints_are_those_of_the_plain_layer(ours):
    plain, options = (nnx.Conv, {"kernel_size": 3}) if ours is TransformedConv else (nnx.Linear, {})
    options |= {"in_features": 8, "out_features": 6, "bias_init": nn.initializers.normal(1)}
    known = plain(**options, rngs=nnx.Rngs(0))
    _equal(_pure(ours(**options, rngs=nnx.Rngs(0))), _pure(known))
    x = jax.random.normal(jax.random.key(1), (2, 9, 8))
    loaded = ours(**options, kernel_transform=CENTER, rngs=nnx.Rngs(1))
    nnx.update(loaded, nnx.state(known))
    known.kernel[...] = center(known.kernel[...])
    _equal(loaded(x), known(x))


def test_promote_dtype_of_a_plain_layer_transforms_its_kernel_without_a_subclass():
    def centered(arrays, **options):
        x, kernel, bias = arrays
        return nnx.nn.dtypes.promote_dtype((x, center(kernel), bias), **options)

    x = jax.random.normal(jax.random.key(1), (2, 9, 9, 8))
    plain = nnx.Conv(8, 6, (3, 3), dtype=jnp.bfloat16, promote_dtype=centered, rngs=nnx.Rngs(0))
    ours = TransformedConv(8, 6, (3, 3), dtype=jnp.bfloat16, kernel_transform=CENTER, rngs=nnx.Rngs(0))
    _equal(plain(x), ours(x))


@pytest.mark.parametrize("transform", [CENTER, KernelTransform(center, ungrouped)])
def test_centered_layers_start_with_the_exact_gain_where_they_center_and_with_hes_variance_elsewhere(transform):
    key = nnx.Rngs(0).params()
    ours = CenteredConv(8, 6, (3, 3), feature_group_count=2, kernel_transform=transform, rngs=nnx.Rngs(0))
    layer = linen.CenteredConv(6, (3, 3), feature_group_count=2, kernel_transform=transform)
    g = gain(36) if transform is CENTER else 1.0
    expected = math.sqrt(2 / 36) * g * jax.random.normal(key, (3, 3, 4, 6))
    np.testing.assert_allclose(ours.kernel[...], expected, rtol=1e-6)
    x = jnp.ones((1, 5, 5, 8))
    drawn = layer.init(jax.random.key(0), x)["params"]["kernel"]
    plain = linen.TransformedConv(6, (3, 3), feature_group_count=2, kernel_init=nn.initializers.normal(1))
    normal = plain.init(jax.random.key(0), x)["params"]["kernel"]
    np.testing.assert_allclose(drawn, math.sqrt(2 / 36) * g * normal, rtol=1e-6)
    np.testing.assert_allclose(
        CenteredLinear(8, 6, rngs=nnx.Rngs(0)).kernel[...], gain(8) / 2 * jax.random.normal(key, (8, 6)), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("ours", "options"), [(CenteredConv, {"kernel_size": (3, 3), "mask": MASK}), (CenteredLinear, {})]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_backward_pass_keeps_raw_kernel_and_input_only_and_repeats_no_product(ours, options, dtype):
    layer = ours(8, 6, **options, dtype=dtype, scale_init=ONES, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    arguments = (params, jnp.ones((2, 9, 9, 8), dtype), jnp.float32(1.5))

    def output(arguments):
        params, x, scale = arguments
        return nnx.merge(graph, params, rest)(x, scale=scale)

    assert saved_for_backward(output, arguments) == ()
    program = jax.jit(jax.grad(lambda arguments: output(arguments).astype(jnp.float32).sum()))
    text = program.lower(arguments).as_text()
    assert text.count("stablehlo.convolution") + text.count("stablehlo.dot_general") == 2


@pytest.mark.parametrize("lift", ["scan", "vmap"])
def test_values_and_gradients_of_partitioned_layers_inside_scan_and_vmap(lift):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, None, "model"))
    named = {nnx.PARTITION_NAME: "stack"}

    def stack(layer, **options):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(transform_metadata=named)
        def make(rngs):
            return layer(4, 4, 3, kernel_init=init, **options, rngs=rngs)

        with nnx.use_eager_sharding(False):
            return make(nnx.Rngs(0))

    def loss(layers, x):
        if lift == "scan":
            step = nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry, transform_metadata=named)
        else:
            step = nnx.vmap(in_axes=(0, None), transform_metadata=named)
        return (step(lambda layer, x: jnp.sin(layer(x)))(layers, x) ** 3).sum()

    ours, plain = stack(TransformedConv, kernel_transform=CENTER), stack(nnx.Conv)
    plain.kernel[...], pull = jax.vjp(jax.vmap(center), plain.kernel[...])
    x = jax.random.normal(jax.random.key(1), (2, 5, 4))
    with nnx.use_eager_sharding(False):
        found, expected = (nnx.jit(nnx.value_and_grad(loss))(layers, x) for layers in (ours, plain))
    assert ours.kernel.get_metadata("out_sharding") == ("stack", None, None, "model")
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    # The same sums in another order, of numbers of order 1.
    np.testing.assert_allclose(found[1]["kernel"][...], *pull(expected[1]["kernel"][...]), atol=1e-5)
    np.testing.assert_allclose(found[1]["bias"][...], expected[1]["bias"][...], atol=1e-5)


@pytest.mark.usefixtures("short")
def test_a_network_of_ours_trains_in_nnx_as_in_linen():
    network = models.create("short", method="mimicnorm", num_classes=10)
    x = jax.random.normal(jax.random.key(1), (16, 8, 8, 1))
    labels = jnp.arange(16) % 10
    ours = nnx.bridge.ToNNX(network, rngs=nnx.Rngs(0)).lazy_init(x)
    params, stats = _pure(ours), _pure(ours, nnx.BatchStat)
    tx = optax.sgd(0.1, momentum=0.9)
    optimizer, moments = nnx.Optimizer(ours, tx, wrt=nnx.Param), tx.init(params)

    def cross_entropy(logits):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @nnx.jit
    def step(ours, optimizer):
        loss, gradient = nnx.value_and_grad(lambda ours: cross_entropy(ours(x, train=True, mutable=["batch_stats"])))(
            ours
        )
        optimizer.update(ours, gradient)
        return loss

    @jax.jit
    def linen_step(params, stats, moments):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            logits, state = network.apply(variables, x, train=True, mutable=["batch_stats"])
            return cross_entropy(logits), state["batch_stats"]

        (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, moments = tx.update(gradient, moments, params)
        return value, optax.apply_updates(params, updates), stats, moments

    losses = []
    for _ in range(4):
        loss, params, stats, moments = linen_step(params, stats, moments)
        losses.append((float(step(ours, optimizer)), float(loss)))
    assert [a for a, _ in losses] == [b for _, b in losses]
    assert losses[-1][0] < losses[0][0]
    _equal((_pure(ours), _pure(ours, nnx.BatchStat)), (params, stats))
