"""A converted linen network is the network that one would write by hand, wherever it stands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax import CenteredConv
from mimicnorm_jax.interop import layer_report, mimic
from mimicnorm_jax.linen import IdentityNorm, LastBatchNorm, WithLastBatchNorm
from tests.conftest import also
from tests.diagnostics.networks import filled
from tests.interop.foreign import IMAGES, NORMAL, Block, Net, ResNet, applied, assert_equal, pooled, shapes


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


def _without_norms(tree):
    """A tree of parameters less those of BatchNorms, which hold a scale."""
    if not isinstance(tree, dict):
        return tree
    return {name: _without_norms(sub) for name, sub in tree.items() if not (isinstance(sub, dict) and "scale" in sub)}


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
    assert_equal(found, expected)
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
    assert shapes(variables["params"]) == expected["params"]
    assert shapes(variables["batch_stats"]) == {name: {"last_bn": {"mean": (5,), "var": (5,)}}}
    alone = {"params": variables["params"][name], "batch_stats": variables["batch_stats"][name]}
    logits, _ = applied(mimic(Net()), alone, 2 * IMAGES, train=True, mutable=["batch_stats"])
    y, _ = applied(Parent(True, in_setup), variables, IMAGES, mutable=["batch_stats"])
    # float32: two programs.
    expected = nn.Dense(3).apply({"params": variables["params"]["more"]}, logits)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_modules_in_fields_of_a_module_keep_their_names():
    """Flax binds them before the wrapper takes its scope."""
    plain = nn.Sequential(
        [nn.Sequential([nn.Conv(8, (5, 5)), nn.BatchNorm(False)]), nn.remat(nn.Conv)(4, (3, 3)), pooled]
    )
    ours = mimic(plain, select=lambda layer: layer.path in {("layers_0", "layers_0"), ("layers_1",)})
    assert layer_report(ours, IMAGES).paths("centered") == ["layers_0/layers_0", "layers_1"]
    variables = filled(ours, IMAGES)
    assert shapes(variables["params"]) == {
        "layers_0": {"layers_0": {"bias": (8,), "kernel": (5, 5, 3, 8)}},
        "layers_1": {"bias": (4,), "kernel": (3, 3, 8, 4)},
    }
    hand = nn.Sequential([nn.Sequential([CenteredConv(8, (5, 5))]), CenteredConv(4, (3, 3)), pooled])
    expected = LastBatchNorm(False).apply(
        {"batch_stats": variables["batch_stats"]["last_bn"]},
        applied(hand, {"params": variables["params"]}, IMAGES),
        mutable=["batch_stats"],
    )[0]
    # float32: two programs, and the norm of four images.
    np.testing.assert_allclose(
        applied(ours, variables, IMAGES, mutable=["batch_stats"])[0], expected, rtol=1e-4, atol=1e-4
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
    assert again[0] == again[1] == shapes(params["block"])


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


def test_a_checkpoint_of_the_plain_network_loads_where_flax_made_up_the_names():
    plain = ResNet((1,), 8, 5)
    params = _without_norms(filled(plain, IMAGES)["params"])
    ours = mimic(plain)
    assert shapes(filled(ours, IMAGES)["params"]) == shapes(params)

    class Conv(CenteredConv):
        pass  # Flax names a layer by its class: `Conv_0`

    by_name = WithLastBatchNorm(ResNet((1,), 8, 5, conv=Conv, norm=IdentityNorm))
    variables = {"params": params, "batch_stats": {"last_bn": {"mean": jnp.zeros(5), "var": jnp.ones(5)}}}
    assert_equal(*(applied(one, variables, IMAGES, train=False) for one in (ours, by_name)))


class Twice(nn.Module):
    """A network that sees two batches, as in contrastive training."""

    def setup(self):
        self.net = mimic(Net())

    def __call__(self, both):
        return self.net(both[0], train=False), self.net(both[1], train=False)


def test_a_converted_network_can_be_called_twice():
    """Within one apply, and bound: with the variables of one call."""
    model = mimic(Net())
    variables = filled(model, IMAGES)
    both = (IMAGES, IMAGES[::-1] + 1)
    once = tuple(applied(model, variables, x, train=False) for x in both)
    inside = {name: {"net": tree} for name, tree in variables.items()}
    assert shapes(jax.eval_shape(Twice().init, jax.random.key(0), both)) == shapes(inside)
    assert_equal(applied(Twice(), inside, both), once)
    bound = model.bind(variables)
    assert_equal(bound(IMAGES, False), bound(IMAGES, False))


def test_the_last_norm_is_synchronized_where_the_norms_were():
    model = mimic(ResNet((1,), 8, 5, axis_name="batch"))
    variables = filled(model, IMAGES)

    def apply(x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    halves = jax.jit(jax.vmap(apply, axis_name="batch"))(IMAGES.reshape(2, 2, 8, 8, 3)).reshape(4, 5)
    whole, _ = applied(mimic(ResNet((1,), 8, 5)), variables, IMAGES, train=True, mutable=["batch_stats"])
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
