"""A converted NNX network is the one that one would write by hand, and the given one stays as it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mimicnorm_jax import linen
from mimicnorm_jax.functional import always, gain, never
from mimicnorm_jax.interop import layer_report, mimic, rescale_init
from mimicnorm_jax.nnx import CenteredConv, IdentityNorm, LastBatchNorm
from tests.conftest import also
from tests.interop.foreign import CNN

IMAGES = jax.random.normal(jax.random.key(1), (6, 28, 28, 1))
SMALL = jax.random.normal(jax.random.key(1), (6, 5, 5, 8))


class Hand(CNN):
    """The same by hand: a centered second convolution, no norms, a last one."""

    def __init__(self, *, rngs):
        def conv(features, *args, **options):
            return (nnx.Conv if features == 1 else CenteredConv)(features, *args, **options)

        super().__init__(rngs=rngs, conv=conv, norm=IdentityNorm, width=8)
        self.last_bn = LastBatchNorm(10)

    def __call__(self, x):
        return self.last_bn(super().__call__(x))


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


class Shared(nnx.Module):
    """A list of layers, one of them in two places, and a stack of three."""

    def __init__(self, rngs):
        self.layers = nnx.List([Layer(rngs), Layer(rngs)])
        self.again = self.layers[0]
        self.stack = nnx.split_rngs(splits=3)(nnx.vmap(Layer))(rngs)

    def __call__(self, x):
        for layer in (*self.layers, self.again):
            x = layer(x)
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.stack).mean(
            (1, 2)
        )


class Told(Layer):
    def __call__(self, x, train):
        return self.norm(self.conv(x), use_running_average=not train).mean((1, 2))


class Renorm(nnx.BatchNorm):
    def __call__(self, x, use_running_average=None, *, mask=None):
        return x / 2


class Own(nnx.Conv):
    def __call__(self, inputs, out_sharding=None):
        return inputs @ self.kernel[0, 0]


class Half(nnx.Conv):
    """A subclass with Flax's call."""


class Various(nnx.Module):
    def __init__(self, rngs, norm=nnx.BatchNorm):
        self.own = Own(8, 8, (1, 1), rngs=rngs)
        self.half = Half(8, 8, (3, 3), rngs=rngs)
        self.single = nnx.Conv(8, 8, (1, 1), feature_group_count=8, rngs=rngs)
        self.norm = norm(8, rngs=rngs)
        self.group = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.linear = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        return self.linear(self.group(self.norm(self.single(self.half(self.own(x))))).mean((1, 2)))


def _equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def _pure(model, kind=nnx.Param):
    return nnx.to_pure_dict(nnx.state(model, kind))


@pytest.mark.parametrize("graph", [True, also(False)])
def test_it_is_the_network_by_hand_and_the_given_one_stays(graph):
    plain, hand = CNN(rngs=nnx.Rngs(0), width=8), Hand(rngs=nnx.Rngs(0))
    before = _pure(plain, nnx.Variable)
    ours = mimic(plain, num_classes=10)
    assert isinstance(ours, CNN)
    _equal(_pure(plain, nnx.Variable), before)
    assert type(plain.conv2) is nnx.Conv
    assert type(plain.norm1) is nnx.BatchNorm
    # The tree is the plain one's less its BatchNorms.
    names = {name: value for name, value in before.items() if not name.startswith("norm")}
    _equal(_pure(ours), names)
    nnx.update(hand, nnx.state(ours))

    @functools.partial(nnx.jit, graph=graph)
    def results(model, x):
        def loss(model, x):
            y = model(x)
            return jnp.sin(y).sum(), y

        return nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True, graph=graph)(model, x)

    (found, expected) = (results(model, IMAGES) for model in (ours, hand))
    _equal(jax.tree.leaves(found), jax.tree.leaves(expected))
    _equal(_pure(ours, nnx.BatchStat), _pure(hand, nnx.BatchStat))
    for model in (ours, hand):
        model.eval()
    apply = nnx.jit(lambda model, x: model(x), graph=graph)
    _equal(apply(ours, IMAGES), apply(hand, IMAGES))


def test_shared_and_stacked_layers_are_converted_in_each_place():
    plain = Shared(nnx.Rngs(0))
    ours = mimic(plain, num_classes=8)
    assert ours.again is ours.layers[0]
    assert type(ours.again.conv) is CenteredConv
    logits = nnx.jit(lambda model, x: model(x))(ours, SMALL)
    # A constant on an output channel of a centered kernel does nothing, in each of a stack.
    for conv in (ours.again.conv, ours.layers[1].conv, ours.stack.conv):
        conv.kernel[...] += 0.5
    # float32: means of 72 numbers of order 1 are off by 1e-7, through six layers and a norm.
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(ours, SMALL), logits, atol=1e-3)
    records = {"/".join(one.path): one for one in layer_report(ours).layers}
    assert records["stack/conv"].shape == (3, 3, 8, 8)
    assert records["stack/conv"].action == "centered"


def test_the_report_and_the_initial_scale():
    ours = mimic(Various(nnx.Rngs(0)), num_classes=5, rule=always)
    records = {"/".join(one.path): one for one in layer_report(ours).layers}
    assert {path: one.action for path, one in records.items()} == {
        "own": "left",
        "half": "centered",
        "single": "left",
        "norm": "identity",
        "group": "left",
        "linear": "left",
        "last_bn": "last norm",
    }
    assert isinstance(ours.half, Half)
    assert "__call__ of its own" in records["own"].reason
    before = _pure(ours)
    nnx.update(ours, rescale_init(nnx.state(ours, nnx.Param), layer_report(ours), branch_ends=["single", "half"]))
    after = _pure(ours)
    # The variance of He, at fan-in 1, and with Theorem 3's gain at fan-in 72 in the second branch.
    assert float((after["single"]["kernel"] ** 2).mean()) == pytest.approx(2, rel=1e-5)
    assert float((after["half"]["kernel"] ** 2).mean()) == pytest.approx(2 * gain(72) ** 2 / 72 / 4, rel=1e-5)
    for name in ("own", "linear", "group"):
        _equal(after[name], before[name])


def test_the_last_norm_is_synchronized_where_the_norms_were():
    plain = Layer(nnx.Rngs(0))
    assert mimic(plain, num_classes=8).last_bn.axis_name is None
    plain.norm.axis_name = "batch"
    assert mimic(plain, num_classes=8).last_bn.axis_name == "batch"
    for kind in (LastBatchNorm, linen.LastBatchNorm):
        told = mimic(plain, num_classes=8, norm=functools.partial(kind, momentum=0.5)).last_bn
        assert (type(told), told.axis_name, told.momentum) == (LastBatchNorm, "batch", 0.5)
    alone = functools.partial(LastBatchNorm, axis_name=None)
    assert mimic(plain, num_classes=8, norm=alone).last_bn.axis_name is None
    other = Shared(nnx.Rngs(0))
    other.again.norm.axis_name = "batch"
    with pytest.raises(ValueError, match="over different axes"):
        mimic(other, num_classes=8)


def test_options_of_the_last_norm_leave_its_mode():
    plain = CNN(rngs=nnx.Rngs(0), width=8)
    plain.eval()
    surer = mimic(plain, num_classes=10, norm=functools.partial(LastBatchNorm, scale=2.0))
    _equal(surer(IMAGES), 2 * mimic(plain, num_classes=10)(IMAGES))
    assert surer.last_bn.use_running_average


def test_a_kernel_of_two_layers_is_scaled_once():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = (nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(2))
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.norm(self.b(self.a(x))).mean((1, 2))

    ours = mimic(Tied(nnx.Rngs(0)), num_classes=8)
    scaled = rescale_init(nnx.state(ours, nnx.Param), layer_report(ours))
    assert float((scaled["a"]["kernel"][...] ** 2).mean()) == pytest.approx(2 * gain(72) ** 2 / 72, rel=1e-5)
    assert [one.reason for one in layer_report(ours).layers if one.gain is None and one.shape] == [
        "shares the kernel of a"
    ]


def test_a_kept_bias_is_added():
    plain = Layer(nnx.Rngs(0))
    ours = mimic(plain, norm=None, keep_bias=True)
    ours.norm.bias[...] += 0.5
    none = mimic(plain, norm=None)
    none.conv.bias[...] += 0.5
    assert set(_pure(ours)["norm"]) == {"bias"}
    # float32: the bias of the convolution, and another one on it.
    np.testing.assert_allclose(ours(SMALL), none(SMALL), rtol=1e-5, atol=1e-6)


def test_a_call_that_tells_norms_otherwise_is_refused():
    ours = mimic(Told(nnx.Rngs(0)), num_classes=8)
    ours(SMALL, train=True)
    moved = ours.last_bn.mean[...]
    with pytest.raises(ValueError, match=r"use_running_average=True in the call.*eval\(\)"):
        ours(SMALL, train=False)
    ours.eval()
    ours(SMALL, train=False)
    np.testing.assert_array_equal(ours.last_bn.mean[...], moved)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda: mimic(CNN(rngs=nnx.Rngs(0), width=8)), "give num_classes"),
        (lambda: mimic(CNN(rngs=nnx.Rngs(0), width=8), num_classes=10, rule=never), "by the rule: fan-in 72"),
        (lambda: mimic(nnx.GroupNorm(8, num_groups=2, rngs=nnx.Rngs(0)), num_classes=8), "no convolution"),
        (lambda: mimic(Various(nnx.Rngs(0), Renorm), num_classes=5, rule=always), "norm is a Renorm, a BatchNorm"),
        (lambda: mimic(mimic(Various(nnx.Rngs(0)), num_classes=5), num_classes=5), "converted already"),
        (lambda: mimic(CNN(rngs=nnx.Rngs(0), width=8), num_classes=10, norm=lambda n: n), "norm gives a int: of CNN"),
        (lambda: mimic(nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0)), num_classes=8)(SMALL), r"\(6, 5, 5, 8\)"),
    ],
)
def test_what_cannot_be_converted_is_refused(convert, message):
    with pytest.raises(ValueError, match=message):
        convert()


def test_identity_norms_take_the_arguments_of_batch_norms_and_no_other():
    norm = IdentityNorm(8, momentum=0.9, axis_name="batch", dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y = norm(SMALL, use_running_average=False, mask=SMALL > 0)
    np.testing.assert_array_equal(y, SMALL.astype(jnp.bfloat16))
    with pytest.raises(TypeError, match="momentun"):
        IdentityNorm(8, momentun=0.9)
