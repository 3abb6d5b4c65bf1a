"""A converted linen network is the network that one would write by hand, wherever it stands, and no other is made."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax import CenteredConv, CenteredDense, models
from mimicnorm_jax.data import DATASETS
from mimicnorm_jax.functional import KernelTransform, always, center, gain, never
from mimicnorm_jax.interop import layer_report, mimic, rescale_init
from mimicnorm_jax.linen import IdentityNorm, LastBatchNorm, WithLastBatchNorm
from mimicnorm_jax.training.model import require_trainable, train_option
from tests.conftest import also
from tests.diagnostics.networks import filled
from tests.interop.foreign import ResNet, UNet

IMAGES = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
NORMAL = nn.initializers.normal(0.1)


class Block(nn.Module):
    """What is scanned, with rematerialization inside."""

    conv: type[nn.Module]
    norm: type[nn.Module]
    train: bool
    init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.remat(self.conv)(8, (3, 3), kernel_init=self.init, name="conv1")(x)
        y = nn.relu(self.norm(use_running_average=not self.train, name="norm1")(y))
        y = self.conv(8, (3, 3), feature_group_count=2, kernel_init=self.init, name="conv2")(y)
        return nn.relu(x + self.norm(use_running_average=not self.train, name="norm2")(y)), None


class Net(nn.Module):
    """A network of other code; by default with Flax's layers."""

    kind: str = "plain"
    conv: type[nn.Module] = nn.Conv
    norm: type[nn.Module] = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        init = NORMAL
        if self.kind == "partitioned":
            init = nn.with_partitioning(NORMAL, (None, None, None, "model"))
        x = self.conv(8, (3, 3), kernel_init=init, name="stem")(x)
        x = self.norm(use_running_average=not train, name="norm")(x)
        block = functools.partial(Block, self.conv, self.norm, train, init)
        if self.kind == "scanned":
            axes = {"params": 0, "batch_stats": 0}
            scanned = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=3)
            x, _ = scanned(self.conv, self.norm, train, init, name="blocks")(x, None)
        else:
            for i in range(2):
                x, _ = block(name=f"block{i}")(x)
        return nn.Dense(5, name="classifier")(x.mean((1, 2)))


class Hand(nn.Module):
    """The same by hand: centered convolutions, no norms, a last one."""

    kind: str

    @nn.compact
    def __call__(self, x, train=False):
        net = Net(self.kind, conv=CenteredConv, norm=IdentityNorm)
        nn.share_scope(self, net)
        return LastBatchNorm(use_running_average=not train, name="last_bn")(net(x, train))


class Parent(nn.Module):
    """A network in a network."""

    converted: bool
    in_setup: bool = False

    def setup(self):
        if self.in_setup:
            self.net = mimic(Net()) if self.converted else Net()

    @nn.compact
    def __call__(self, x):
        net = self.net if self.in_setup else mimic(Net()) if self.converted else Net()
        return nn.Dense(3, name="more")(net(2 * x, True))


def _apply(model, variables, x, **options):
    return jax.jit(functools.partial(model.apply, **options))(variables, x)


def _equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def _without_norms(tree):
    """A tree of parameters less those of BatchNorms, which hold a scale."""
    if not isinstance(tree, dict):
        return tree
    return {name: _without_norms(sub) for name, sub in tree.items() if not (isinstance(sub, dict) and "scale" in sub)}


def _shapes(tree):
    return jax.tree.map(jnp.shape, tree)


@pytest.mark.parametrize("kind", ["scanned", also("plain"), also("partitioned")])
def test_it_is_the_network_by_hand(kind):
    ours, hand = mimic(Net(kind)), Hand(kind)

    @jax.jit
    def both(x):
        results = []
        for model in (ours, hand):
            variables = model.init(jax.random.key(0), x)

            def loss(params, x, model=model, variables=variables):
                logits, moved = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
                return jnp.sin(logits).sum(), (logits, moved)

            trained = jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], x)
            averages = trained[0][1][1]
            results.append((variables, trained, model.apply({**variables, **averages}, x, train=False)))
        return results

    found, expected = both(IMAGES)
    _equal(found, expected)
    plain = jax.eval_shape(Net(kind).init, jax.random.key(0), IMAGES)
    assert list(found[0]["batch_stats"]) == ["last_bn"]
    norms = [path for path, _ in jax.tree_util.tree_leaves_with_path(plain["params"]) if "norm" in str(path)]
    assert len(jax.tree.leaves(plain["params"])) == len(jax.tree.leaves(found[0]["params"])) + len(norms)


@pytest.mark.parametrize("in_setup", [False, also(True)])
def test_inside_another_module_names_are_those_of_the_plain_network(in_setup):
    plain = jax.eval_shape(Parent(False, in_setup).init, jax.random.key(0), IMAGES)
    variables = filled(Parent(True, in_setup), IMAGES)
    name = "net" if in_setup else "Net_0"
    expected = {"params": jax.tree.map(lambda one: one.shape, plain["params"])}
    for part in (expected["params"][name], *(expected["params"][name][f"block{i}"] for i in range(2))):
        for norm in [one for one in part if one.startswith("norm")]:
            del part[norm]
    assert _shapes(variables["params"]) == expected["params"]
    assert _shapes(variables["batch_stats"]) == {name: {"last_bn": {"mean": (5,), "var": (5,)}}}
    alone = {"params": variables["params"][name], "batch_stats": variables["batch_stats"][name]}
    logits, _ = _apply(mimic(Net()), alone, 2 * IMAGES, train=True, mutable=["batch_stats"])
    y, _ = _apply(Parent(True, in_setup), variables, IMAGES, mutable=["batch_stats"])
    # float32: two programs.
    expected = nn.Dense(3).apply({"params": variables["params"]["more"]}, logits)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def _pooled(x):
    return x.mean((1, 2))


def test_modules_in_fields_of_a_module_keep_their_names():
    """Flax binds them before the wrapper takes its scope."""
    plain = nn.Sequential(
        [nn.Sequential([nn.Conv(8, (5, 5)), nn.BatchNorm(False)]), nn.remat(nn.Conv)(4, (3, 3)), _pooled]
    )
    ours = mimic(plain, select=lambda layer: layer.path in {("layers_0", "layers_0"), ("layers_1",)})
    assert layer_report(ours, IMAGES).paths("centered") == ["layers_0/layers_0", "layers_1"]
    variables = filled(ours, IMAGES)
    assert _shapes(variables["params"]) == {
        "layers_0": {"layers_0": {"bias": (8,), "kernel": (5, 5, 3, 8)}},
        "layers_1": {"bias": (4,), "kernel": (3, 3, 8, 4)},
    }
    hand = nn.Sequential([nn.Sequential([CenteredConv(8, (5, 5))]), CenteredConv(4, (3, 3)), _pooled])
    expected = LastBatchNorm(False).apply(
        {"batch_stats": variables["batch_stats"]["last_bn"]},
        _apply(hand, {"params": variables["params"]}, IMAGES),
        mutable=["batch_stats"],
    )[0]
    # float32: two programs, and the norm of four images.
    np.testing.assert_allclose(
        _apply(ours, variables, IMAGES, mutable=["batch_stats"])[0], expected, rtol=1e-4, atol=1e-4
    )


class _Takes(nn.Module):
    conv: nn.Module

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(4, name="head")(self.conv(x).mean((1, 2)))


class _Gives(nn.Module):
    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(8, (3, 3), name="given")
        chosen = mimic(_Takes(conv), select=lambda layer: layer.path == ("given",))
        return chosen(x, train=True)


def test_a_layer_made_outside_keeps_its_path():
    """It is chosen by its path in the tree, and centered inside: a constant on its kernel changes nothing."""
    model = _Gives()
    variables = model.init(jax.random.key(0), IMAGES)
    assert "given" in variables["params"]
    moved = jax.tree.map(lambda leaf: leaf, variables["params"])
    moved["given"]["kernel"] = moved["given"]["kernel"] + 0.5
    outputs = [
        model.apply({**variables, "params": params}, IMAGES, mutable=["batch_stats"])[0]
        for params in (variables["params"], moved)
    ]
    # float32, of a kernel of order 1/3 that was moved by 1/2.
    np.testing.assert_allclose(*outputs, atol=1e-4)


JITTED = nn.jit(Block)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return JITTED(nn.Conv, nn.BatchNorm, False, NORMAL, name="block")(x)[0].mean((1, 2))


def test_a_part_that_was_compiled_as_it_was_is_not_taken_for_the_converted_one():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 8))
    plain, ours = Jitted(), mimic(Jitted(), norm=None)
    variables = filled(plain, x)
    params = {"block": {name: variables["params"]["block"][name] for name in ("conv1", "conv2")}}
    before = plain.apply(variables, x)
    for _ in range(2):
        hand, _ = Block(CenteredConv, IdentityNorm, False, NORMAL).apply({"params": params["block"]}, x)
        # float32: one network compiled as a whole, one step by step.
        np.testing.assert_allclose(ours.apply({"params": params}, x), hand.mean((1, 2)), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(plain.apply(variables, x), before)
    again = [jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)["params"]["block"]) for _ in range(2)]
    assert again[0] == again[1] == _shapes(params["block"])


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
            _equal(hand.apply({"params": variables["params"]["first"]}, *args), y)
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


def test_a_kept_bias_is_the_bias_of_the_convolution():
    """The networks of the paper have one behind each convolution, where those with BatchNorm have none."""
    ours = mimic(ResNet((1,), 8, 5), keep_bias=True)
    variables = filled(ours, IMAGES)
    biases = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 0.3 if "bias" in str(path) else leaf, variables["params"]
    )
    flat = dict(biases["Bottleneck_0"])
    hand = {f"Conv_{i}": flat[f"Conv_{i}"] | flat[f"BatchNorm_{i}"] for i in range(3)}
    hand |= {"conv_proj": flat["conv_proj"] | flat["norm_proj"]}
    params = {
        "conv_init": biases["conv_init"] | biases["bn_init"],
        "Bottleneck_0": hand,
        "Dense_0": biases["Dense_0"],
    }

    class Conv(CenteredConv):
        """Its name is Flax's, so the names of its layers are."""

        use_bias: bool = True

    def conv(*args, use_bias, **options):
        del use_bias
        return Conv(*args, **options)

    by_hand = WithLastBatchNorm(ResNet((1,), 8, 5, conv=conv, norm=IdentityNorm))
    apply = functools.partial(jax.jit, static_argnums=0)(
        lambda model, params: model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]}, IMAGES, train=True, mutable=["batch_stats"]
        )
    )
    # float32: a bias is added inside of one layer, or behind it.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        apply(ours, biases),
        apply(by_hand, params),
    )


class Deep(nn.Module):
    """Convolutions with nothing to keep their scale but BatchNorm."""

    @nn.compact
    def __call__(self, x):
        for i in range(8):
            x = nn.Conv(64, (3, 3), padding="CIRCULAR", kernel_init=NORMAL, name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(False)(x))
        self.sow("intermediates", "out", x)
        return x.mean((1, 2))


def test_rescaled_kernels_keep_the_energy_of_the_input_through_the_layers():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 64))
    model = mimic(Deep())
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    rescaled = rescale_init(params, layer_report(model, x))

    apply = jax.jit(functools.partial(model.apply, mutable=["intermediates", "batch_stats"]))

    def energy(params):
        _, found = apply({"params": params}, x)
        return float((found["intermediates"]["out"][0] ** 2).mean())

    # Theorem 3 for infinite width; at 64 channels each of eight layers is off by some percent.
    assert 0.4 < energy(rescaled) < 2.5
    assert energy(params) > 10
    for i in range(8):
        wanted = 2 * gain(576) ** 2 / 576
        assert float((rescaled[f"conv{i}"]["kernel"] ** 2).mean()) == pytest.approx(wanted, rel=1e-5)
        np.testing.assert_array_equal(rescaled[f"conv{i}"]["bias"], params[f"conv{i}"]["bias"])
    with pytest.raises(ValueError, match="no kernel of conv0"):
        rescale_init({"others": params}, layer_report(model, x))


@pytest.mark.parametrize(("kind", "name"), [("partitioned", "block0"), ("scanned", "blocks")])
def test_boxed_and_stacked_kernels_are_rescaled(kind, name):
    model = mimic(Net(kind))
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
    params = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape), shapes)
    rescaled = rescale_init(params, layer_report(model, IMAGES))
    assert jax.tree.structure(rescaled) == jax.tree.structure(params)
    for conv, channels in (("conv1", 8), ("conv2", 4)):
        kernel = nn.meta.unbox(rescaled)[name][conv]["kernel"]
        # 2 gain(n)**2 / n for a centered kernel; two groups leave a fan-in of 36, below the rule's, to He's where a
        # BatchNorm stood behind.
        centered = 9 * channels > 50
        wanted = 2 * (gain(9 * channels) ** 2 if centered else 1) / (9 * channels)
        assert float((kernel**2).mean()) == pytest.approx(wanted, rel=1e-5)


def test_branches_get_their_share_and_the_branch_is_read_from_its_norm():
    model = mimic(ResNet((2,), 16, 5))
    report = layer_report(model, IMAGES)
    blocks = {"/".join(one.path): one.block for one in report.layers if one.block}
    assert blocks == {"Bottleneck_0/Conv_2": 1, "Bottleneck_1/Conv_2": 2}
    params = filled(model, IMAGES)["params"]
    by_norm = rescale_init(params, report)
    by_hand = rescale_init(params, report, branch_ends=["Bottleneck_0/Conv_2", "Bottleneck_1/Conv_2"])
    _equal(by_norm, by_hand)
    none = rescale_init(params, report, branch_ends=[])
    last = ("Bottleneck_1", "Conv_2", "kernel")
    pick = functools.partial(functools.reduce, lambda tree, name: tree[name], last)
    # A gain over the l-th block's number: one rounding more.
    np.testing.assert_allclose(2 * pick(by_norm), pick(none), rtol=1e-6)
    with pytest.raises(ValueError, match="branch_ends: Dense_0 is no layer with a gain"):
        rescale_init(params, report, branch_ends=["Dense_0"])


def test_a_checkpoint_of_the_plain_network_loads_where_flax_made_up_the_names():
    plain = ResNet((1,), 8, 5)
    params = _without_norms(filled(plain, IMAGES)["params"])
    ours = mimic(plain)
    assert _shapes(filled(ours, IMAGES)["params"]) == _shapes(params)

    class Conv(CenteredConv):
        pass  # Flax names a layer by its class: `Conv_0`

    by_name = WithLastBatchNorm(ResNet((1,), 8, 5, conv=Conv, norm=IdentityNorm))
    variables = {"params": params, "batch_stats": {"last_bn": {"mean": jnp.zeros(5), "var": jnp.ones(5)}}}
    _equal(*(_apply(one, variables, IMAGES, train=False) for one in (ours, by_name)))


class Silent(nn.Module):
    """Says nowhere whether it is trained."""

    @nn.compact
    def __call__(self, x):
        return nn.Conv(8, (3, 3))(nn.Conv(8, (3, 3))(x)).mean((1, 2))


class Renorm(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        return x / 2


class WithRenorm(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return Renorm(not train, name="renorm")(nn.Conv(8, (5, 5))(x)).mean((1, 2))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: mimic(nn.Sequential([nn.GroupNorm(3), _pooled])),
            "no convolution and no dense layer",
        ),
        (lambda: mimic(Net(), rule=never), r"no kernel of Net is centered.*by the rule: fan-in 27"),
        (lambda: mimic(nn.Dense(3)), "a dense layer, which the rule does not take"),
        (lambda: mimic(UNet((8, 16))), r"stands on logits \(B, C\); UNet gives \(4, 8, 8, 2\)"),
        (lambda: mimic(WithRenorm()), "renorm is a Renorm, a BatchNorm with a __call__ of its own"),
        (lambda: mimic(mimic(Net())), "Net has a last BatchNorm already"),
        (lambda: mimic(nn.Sequential([mimic(Net())])), "converted twice"),
    ],
)
def test_what_cannot_be_converted_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model().init, jax.random.key(0), IMAGES)


def test_an_object_that_is_no_module_is_refused():
    with pytest.raises(TypeError, match="linen or NNX; got function"):
        mimic(lambda x: x)


def test_without_a_last_norm_any_output_will_do():
    model = mimic(UNet((8, 16)), norm=None)
    y, variables = jax.eval_shape(functools.partial(model.init_with_output, train=True), jax.random.key(0), IMAGES)
    assert set(variables) == {"params"}
    assert y.shape == (4, 8, 8, 2)


def test_training_takes_a_converted_network_as_it_takes_the_plain_one():
    spec = dataclasses.replace(DATASETS["digits"], num_classes=5)
    for module in (Net(), mimic(Net())):
        assert train_option(module, True) == {"train": True}
        require_trainable(module, spec, jnp.float32)


class Half(nn.Module):
    """One norm is frozen."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(True)(nn.BatchNorm(not train)(nn.Conv(8, (5, 5))(x))).mean((1, 2))


def test_a_call_that_does_not_say_whether_it_is_training_is_refused():
    for module, options, message in ((Silent(), {}, "nothing says"), (Half(), {"train": True}, "disagree")):
        model = mimic(module)
        variables = filled(model, IMAGES)
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(functools.partial(model.apply, **options, mutable=["batch_stats"]), variables, IMAGES)
        said = mimic(module, norm=functools.partial(LastBatchNorm, use_running_average=False))
        logits, _ = _apply(said, variables, IMAGES, **options, mutable=["batch_stats"])
        # The variance is over four images and epsilon 1e-5.
        np.testing.assert_allclose(logits.mean(0), 0, atol=1e-4)


def test_the_last_norm_is_synchronized_where_the_norms_were():
    model = mimic(ResNet((1,), 8, 5, axis_name="batch"))
    variables = filled(model, IMAGES)

    def apply(x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    halves = jax.jit(jax.vmap(apply, axis_name="batch"))(IMAGES.reshape(2, 2, 8, 8, 3)).reshape(4, 5)
    whole, _ = _apply(mimic(ResNet((1,), 8, 5)), variables, IMAGES, train=True, mutable=["batch_stats"])
    # float32: moments of two halves instead of one mean.
    np.testing.assert_allclose(halves, whole, rtol=1e-3, atol=1e-3)


def test_identity_norms_take_the_arguments_of_batch_norms_and_leave_the_image():
    model = ResNet((1,), 8, 5, norm=IdentityNorm)
    variables = filled(model, IMAGES)
    assert set(variables) == {"params"}
    one = jax.jit(functools.partial(model.apply, variables, train=True))
    # Nothing couples the images of a batch; float32, batches of another size.
    np.testing.assert_allclose(one(IMAGES)[:1], one(IMAGES[:1]), rtol=1e-4, atol=1e-5)
    norm = IdentityNorm(dtype=jnp.bfloat16)
    x = IMAGES.astype(jnp.float16)
    assert norm.apply({}, x, use_running_average=False, mask=x > 0).dtype == jnp.bfloat16
