"""Explicit meshes (what `jax.make_mesh` gives) and exported programs compute what one device does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

from mimicnorm_jax import LastBatchNorm, models
from mimicnorm_jax.functional import center, max_pool, relu_save_mask
from mimicnorm_jax.functional.layout import over_fan_in
from mimicnorm_jax.linen import CenteredConv
from tests.conftest import also
from tests.diagnostics.networks import filled


def _spread(tree, *axes):
    sharding = NamedSharding(jax.make_mesh((4,), ("batch",)), PartitionSpec(*axes))
    assert sharding.mesh.axis_types == (jax.sharding.AxisType.Explicit,)
    return jax.device_put(tree, sharding)


def _training_gradients(name):
    """The gradients of a training step as a function of variables and images, and these."""
    model = models.create(name, num_classes=5, width=0.125)
    size = models.ARCHITECTURES[name].stride
    images = jax.random.normal(jax.random.key(1), (8, size, size, 3))
    variables = filled(model, images)

    def loss(params, variables, images):
        rngs = {"dropout": jax.random.key(2)}
        logits, _ = model.apply({**variables, "params": params}, images, True, mutable=["batch_stats"], rngs=rngs)
        return (logits**3).sum()

    return jax.jit(lambda variables, images: jax.grad(loss)(variables["params"], variables, images)), variables, images


@pytest.mark.parametrize("name", ["vgg11", "resnet8", also("shufflenetv2_x0.5")])
@pytest.mark.usefixtures("shallow")
def test_gradients_of_a_batch_on_an_explicit_mesh_are_those_of_one_device(name):
    """VGG's with the same dropout masks."""
    gradients, variables, images = _training_gradients(name)
    expected = gradients(variables, images)
    found = gradients(_spread(variables), _spread(images, "batch"))
    scale = max(abs(leaf).max() for leaf in jax.tree.leaves(expected))
    # float32: sums over the batch in another order; another mask would be of order 1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * scale), found, expected)


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_last_batch_norm_takes_the_whole_batch_under_jit_and_the_devices_share_under_shard_map(kind):
    """Without an axis_name: programs under `jit` see whole arrays, whatever the mesh; inside `shard_map`, shares."""
    types = {"auto": jax.sharding.AxisType.Auto, "explicit": jax.sharding.AxisType.Explicit}
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(types[kind],))
    share = PartitionSpec("batch")
    z = jax.random.normal(jax.random.key(0), (8, 3)) + jnp.arange(8.0)[:, None]  # no two devices have one mean
    layer = LastBatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), z)

    def apply(z, layer=layer):
        return layer.apply(variables, z, mutable=["batch_stats"])

    whole = apply(z)
    spread = jax.device_put(z, NamedSharding(mesh, share))
    # float32: the same sums in another order, of numbers of order 10.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jax.jit(apply)(spread), whole)

    mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=share, check_vma=False)
    alone, stats = jax.jit(mapped(lambda z: jax.tree.map(lambda x: x[None], apply(z)), out_specs=share))(spread)
    alone, stats = jax.device_get((alone, stats))
    for device in range(4):
        expected = apply(z[2 * device : 2 * device + 2])
        found = jax.tree.map(lambda x, device=device: x[device], (alone, stats))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    assert abs(alone.reshape(8, 3) - whole[0]).max() > 0.5

    named = functools.partial(apply, layer=layer.clone(axis_name="batch"))
    synced = jax.jit(mapped(named, out_specs=(share, PartitionSpec())))(spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), synced, whole)


@pytest.mark.parametrize("axis", [2, 3])
def test_kernels_spread_over_an_explicit_mesh_are_centered(axis):
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 8, 8))
    axes = [None] * 4
    axes[axis] = "batch"
    # float32: a mean of 72 numbers of order 1, summed in another order.
    np.testing.assert_allclose(center(_spread(kernel, *axes)), center(kernel), atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 3])
@pytest.mark.parametrize("kind", ["mask", "pool"])
def test_what_keeps_bits_for_its_derivative_does_on_maps_spread_over_an_explicit_mesh(kind, axis):
    """By rows, as by images, or by channels, of which a byte holds several."""
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 16))
    axes: list[str | None] = [None] * 4
    axes[axis] = "batch"

    @jax.jit
    def computed(x):
        return jax.grad(lambda x: function(x).sum())(x), function(x)  # whole numbers, and no rounding

    pool = functools.partial(max_pool, window=(6, 6), strides=(2, 2), padding=2)
    function = relu_save_mask if kind == "mask" else pool
    jax.tree.map(np.testing.assert_array_equal, computed(_spread(x, *axes)), computed(x))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("axis", [2, 3])
def test_a_layer_with_a_kernel_spread_over_an_explicit_mesh_is_lowered_for_every_platform(axis, platform):
    """`row_major` moves the kernel there, and no kernel that is spread: a reshape of it is refused."""
    axes: list[str | None] = [None] * 4
    axes[axis] = "batch"
    kernel = _spread(jnp.ones((3, 3, 8, 8)), *axes)
    convolution = functools.partial(
        jax.lax.conv_general_dilated, out_sharding=jax.typeof(kernel).sharding.update(spec=())
    )
    layer = CenteredConv(8, (3, 3), use_bias=False, conv_general_dilated=convolution)
    images = _spread(jnp.ones((4, 5, 5, 8)))

    def loss(kernel, images):
        return layer.apply({"params": {"kernel": kernel}}, images).sum()

    def barriers(kernel, images):
        traced = jax.jit(jax.grad(loss)).trace(kernel, images)
        return traced.lower(lowering_platforms=(platform,)).as_text().count("optimization_barrier")

    assert barriers(kernel, images) < barriers(_spread(jnp.ones((3, 3, 8, 8))), images)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_attention_kernels_spread_over_an_explicit_mesh_are_centered_in_their_place(axis):
    kernel = jax.random.normal(jax.random.key(0), (8, 4, 8))
    axes = [None] * 3
    axes[axis] = "batch"
    found = over_fan_in(center, [0])(_spread(kernel, *axes))
    # float32: a mean of 8 numbers of order 1, summed in another order.
    np.testing.assert_allclose(found, kernel - kernel.mean(0, keepdims=True), atol=1e-6)
    if axis:  # the outputs stay where they are
        assert jax.typeof(found).sharding.spec == PartitionSpec(*axes)


@pytest.mark.parametrize("running_variance", ["biased", "unbiased"])
def test_exported_for_any_batch_the_last_batch_norm_is_the_same_and_refuses_a_batch_of_one_by_nan(running_variance):
    layer = LastBatchNorm(use_running_average=False, running_variance=running_variance)
    z = jax.random.normal(jax.random.key(0), (8, 3))
    variables = layer.init(jax.random.key(0), z)
    apply = jax.jit(lambda variables, z: layer.apply(variables, z, mutable=["batch_stats"]))
    logits = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), 3), z.dtype)
    exported = export.export(apply)(variables, logits)
    for batch in (2, 8):
        found, expected = exported.call(variables, z[:batch]), apply(variables, z[:batch])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)
    assert jnp.isnan(exported.call(variables, z[:1])[0]).all()


@pytest.mark.usefixtures("shallow")
def test_a_training_pass_with_dropout_is_exported_for_any_batch():
    gradients, variables, images = _training_gradients("vgg11")
    batch = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), *images.shape[1:]), images.dtype)
    exported = export.export(gradients)(variables, batch)
    found, expected = exported.call(variables, images[:6]), gradients(variables, images[:6])
    scale = max(abs(leaf).max() for leaf in jax.tree.leaves(expected))
    # float32, and another program for the same sums.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * scale), found, expected)
