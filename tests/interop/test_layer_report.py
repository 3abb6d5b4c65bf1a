"""What a conversion did to each layer, and why."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from mimicnorm_jax import CenteredConv, CenteredDense, models
from mimicnorm_jax import nnx as ours_nnx
from mimicnorm_jax.functional import KernelTransform, always, center, compose, gain
from mimicnorm_jax.functional.transform import CENTER, CENTER_PUBLISHED
from mimicnorm_jax.interop import layer_report, mimic
from tests.diagnostics.networks import filled
from tests.interop.foreign import IMAGES, assert_equal


class Padded(nn.Conv):
    """A convolution with a call around Flax's."""

    @nn.compact
    def __call__(self, x):
        return 2 * super().__call__(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))


class Own(nn.Conv):
    """A convolution with a call of its own."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        return x @ kernel


class Various(nn.Module):
    """Layers of many kinds."""

    @nn.compact
    def __call__(self, x, train=False):
        x = Padded(8, (3, 3), padding="VALID", name="padded")(x)
        x = nn.GroupNorm(2, name="group")(Own(8, (1, 1), name="own")(x))
        x = nn.Conv(8, (1, 1), feature_group_count=8, name="single")(x)
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = nn.Conv(8, (3, 3), conv_general_dilated_cls=lambda: jax.lax.conv_general_dilated, name="product")(x)
        shared = nn.Conv(8, (3, 3), name="shared")
        x = nn.BatchNorm(not train, name="norm")(shared(nn.relu(shared(x))))
        x = nn.ConvTranspose(8, (2, 2), name="transposed")(x)
        return nn.Dense(5, name="second")(nn.relu(nn.Dense(6, name="first")(x.mean((1, 2)))))


def _by_path(report):
    return {"/".join(one.path): one for one in report.layers}


def test_the_report_says_of_each_layer_what_was_done_and_why():
    model = mimic(Various(), rule=always)
    records = _by_path(layer_report(model, IMAGES, train=True))
    assert {path: one.action for path, one in records.items()} == {
        "padded": "centered",
        "own": "left",
        "group": "left",
        "single": "left",
        "depthwise": "centered",
        "product": "left",
        "shared": "centered",
        "norm": "identity",
        "transposed": "left",
        "first": "left",
        "second": "left",
        "last_bn": "last norm",
    }
    assert "fan-in of 1" in records["single"].reason
    assert "__call__ of its own" in records["own"].reason
    assert "behind shared" in records["norm"].reason
    assert records["depthwise"].shape == (3, 3, 1, 8)
    assert records["depthwise"].groups == 8
    assert records["depthwise"].gain == gain(9)
    # What the report says is what the module does: a constant on a channel's kernel is seen, or it is not.
    variables = filled(model, IMAGES)
    apply = jax.jit(model.apply)
    logits = apply(variables, IMAGES)
    for path in ("padded", "own", "single", "depthwise", "product", "shared", "transposed", "first"):
        params = dict(variables["params"])
        params[path] = params[path] | {"kernel": params[path]["kernel"] + 0.5}
        changed = float(abs(apply({**variables, "params": params}, IMAGES) - logits).max())
        assert (changed < 1e-4) == (records[path].action == "centered"), path


def test_a_choice_by_path_takes_dense_layers_too():
    model = mimic(Various(), select=lambda layer: layer.path in {("first",), ("depthwise",)})
    assert layer_report(model, IMAGES).paths("centered") == ["depthwise", "first"]
    variables = filled(model, IMAGES)

    def first(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.module.name == "first" and isinstance(context.module, nn.Dense):
            hand = CenteredDense(6, kernel_transform=KernelTransform(center))
            assert_equal(hand.apply({"params": variables["params"]["first"]}, *args), y)
            seen.append(y)
        return y

    seen = []
    with nn.intercept_methods(first):
        model.apply(variables, IMAGES[:1, :4, :4])
    assert len(seen) == 1


def test_the_report_of_our_own_networks_says_which_kernels_are_centered():
    network = models.create("resnet8", method="mimicnorm", num_classes=10)
    report = layer_report(network, IMAGES)
    stem, *rest = [one for one in report.layers if one.kind == "TransformedConv"]
    assert stem.action == "left"
    assert "fan-in 27" in stem.reason
    assert {one.action for one in rest if one.shape[0] == 3} == {"centered"}
    assert "stem/conv" in str(report)
    assert layer_report(models.create("resnet8", method="batchnorm", num_classes=10), IMAGES).paths("centered") == []


def test_the_report_asks_each_transform_of_a_composition_by_its_own_rule():
    half = KernelTransform(lambda kernel: kernel / 2)
    for transform, actions in (
        (compose(CENTER_PUBLISHED, half), ["left", "centered"]),  # the rule leaves out a fan-in of 27
        (compose(half, CENTER), ["centered", "centered"]),
    ):
        layers = [CenteredConv(8, (3, 3), kernel_transform=transform) for _ in range(2)]
        report = layer_report(nn.Sequential(layers), IMAGES)
        assert [one.action for one in report.layers] == actions
        twins = [ours_nnx.CenteredConv(n, 8, (3, 3), kernel_transform=transform, rngs=nnx.Rngs(0)) for n in (3, 8)]
        assert [one.action for one in layer_report(nnx.Sequential(*twins)).layers] == actions


def test_inputs_can_be_shapes_by_position_and_by_name():
    shape = jax.ShapeDtypeStruct(IMAGES.shape, IMAGES.dtype)
    model = mimic(Various(), rule=always)
    expected = str(layer_report(model, IMAGES, train=False))
    assert str(layer_report(model, shape, train=False)) == str(layer_report(model, x=shape, train=False)) == expected


JitDense = nn.jit(nn.Dense)  # one class, so that it keeps its traces from call to call


class Jitted(nn.Module):
    """A network with a layer under `nn.jit`."""

    @nn.compact
    def __call__(self, x):
        return JitDense(4, name="last")(nn.Conv(8, (3, 3), name="first")(x).mean((1, 2)))


def test_layers_in_what_nn_jit_has_traced_before_are_reported():
    for _ in range(2):
        assert ["/".join(one.path) for one in layer_report(Jitted(), IMAGES).layers] == ["first", "last"]
