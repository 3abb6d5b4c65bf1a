"""Layers of Flax read their kernels through one transform, each over its own fan-in, and nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax import interop
from mimicnorm_jax.diagnostics import saved_for_backward
from mimicnorm_jax.functional import KernelTransform, center, standardize
from mimicnorm_jax.functional.transform import CENTER
from mimicnorm_jax.linen import (
    CenteredConv,
    CenteredDense,
    Transformed,
    WithLastBatchNorm,
    find_kernels,
    select_kernels,
)
from mimicnorm_jax.optim import center_params
from mimicnorm_jax.utils.trees import path_names

X = (2, 6, 6, 4)
LAYERS = {
    "conv": (nn.Conv(6, (3, 3), feature_group_count=2), (0, 1, 2)),
    "transposed": (nn.ConvTranspose(6, (3, 3), strides=(2, 2)), (0, 1, 2)),
    "transposed kernel": (nn.ConvTranspose(6, (3, 3), transpose_kernel=True), (0, 1, 3)),
    "local": (nn.ConvLocal(6, (3, 3), padding="VALID"), (2,)),
    "dense": (nn.Dense(5), (0,)),
    "heads": (nn.DenseGeneral((2, 3)), (0,)),
    "from heads": (nn.DenseGeneral((5,), axis=(1, -1), use_bias=False), (0, 1)),
    "batched": (nn.DenseGeneral((2, 3), batch_dims=(0,)), (1,)),
    "einsum": (nn.Einsum((6, 4, 5), "abcd,bde->abce"), (1,)),
}


def _inputs(dtype=float):
    return jax.random.normal(jax.random.key(1), X, dtype)


def _loss(layer, params, x):
    return jnp.sin(layer.apply({"params": params}, x)).sum()


def _centered(kernel, axes):
    return kernel - kernel.mean(axes, keepdims=True)


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_the_plain_layer_with_kernels_centered_by_hand(name, x64):
    layer, axes = LAYERS[name]
    layer = layer.clone(param_dtype=float, bias_init=nn.initializers.normal(1))
    x, ours = _inputs(), Transformed(layer, CENTER)
    y, variables = jax.jit(ours.init_with_output)(jax.random.key(0), x)
    params = variables["params"]
    known = jax.jit(layer.init)(jax.random.key(0), x)["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), params, known)

    def by_hand(params, x):
        return _loss(layer, {**params, "kernel": _centered(params["kernel"], axes)}, x)

    found = jax.jit(jax.value_and_grad(functools.partial(_loss, ours), (0, 1)))(params, x)
    expected = jax.jit(jax.value_and_grad(by_hand, (0, 1)))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, expected)
    np.testing.assert_allclose(jnp.sin(y).sum(), found[0], rtol=1e-12)
    (kernel,) = find_kernels(ours, x).values()
    assert kernel.layout.fan_in == axes
    assert kernel.transformed


class Attention(nn.Module):
    """Attention whose kernels are centered inside of the network, or not."""

    centered: bool

    @nn.compact
    def __call__(self, x):
        layer = nn.MultiHeadDotProductAttention(
            2, qkv_features=8, param_dtype=x.dtype, bias_init=nn.initializers.normal(1)
        )
        return (Transformed(layer, CENTER) if self.centered else layer)(x)


def test_attention_is_that_of_kernels_centered_by_hand_under_flaxs_own_names(x64):
    x = _inputs()
    ours, plain = Attention(True), Attention(False)
    variables = jax.jit(plain.init)(jax.random.key(0), x)
    started = jax.jit(ours.init)(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, started, variables)

    def by_hand(params, x):
        (name,) = params
        axes = {"query": 0, "key": 0, "value": 0, "out": (0, 1)}
        layers = {n: {**p, "kernel": _centered(p["kernel"], axes[n])} for n, p in params[name].items()}
        return _loss(plain, {name: layers}, x)

    found = jax.jit(jax.value_and_grad(functools.partial(_loss, ours)))(variables["params"], x)
    expected = jax.jit(jax.value_and_grad(by_hand))(variables["params"], x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), found, expected)


class Block(nn.Module):
    """What is scanned or vmapped: boxed kernels, one layer of each kind, ours among them, and one under `nn.jit`."""

    transform: KernelTransform | None

    @nn.compact
    def __call__(self, x, _):
        boxed = nn.with_partitioning(nn.initializers.normal(1), ("in", "out"))
        layers = [
            nn.MultiHeadDotProductAttention(2, qkv_features=6, name="attention"),
            nn.Dense(4, kernel_init=boxed, use_bias=False, name="dense"),
            nn.remat(nn.ConvTranspose)(4, (3,), transpose_kernel=True, name="transposed"),
            nn.jit(nn.Conv)(4, (3,), feature_group_count=2, name="conv"),
            CenteredConv(4, (3,), name="ours"),  # its own rule leaves its kernel raw
        ]
        for layer in layers:
            x = jnp.sin(Transformed(layer, self.transform)(x) if self.transform is not None else layer(x))
        return x, None


class Stack(nn.Module):
    """A block in a loop over stacked parameters, or side by side."""

    transform: KernelTransform | None
    lift: str

    @nn.compact
    def __call__(self, x):
        options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        options["metadata_params"] = {nn.PARTITION_NAME: "stack"}
        if self.lift == "scan":
            return nn.scan(Block, length=5, **options)(self.transform, name="block")(x, None)[0]
        return nn.vmap(Block, in_axes=(None, None), axis_size=5, **options)(self.transform, name="block")(x, None)[0]


@pytest.mark.parametrize(("lift", "function"), [("scan", center), ("vmap", standardize)])
def test_in_scan_and_vmap_a_layer_computes_what_the_plain_net_does_with_projected_parameters(lift, function):
    """The projection of the stacked, boxed kernels is the slow path: two ways to one net."""
    x = _inputs(jnp.float32)[0]
    transform = KernelTransform(function, lambda shape, groups: True)
    ours, plain = Stack(transform, lift), Stack(None, lift)
    variables = jax.jit(plain.init)(jax.random.key(0), x)
    raw = plain.apply(variables, x)  # `nn.jit` holds a trace without transforms from now on
    select = select_kernels(plain, x, transform=transform)
    projected = center_params(variables["params"], lambda path, leaf: "ours" not in path and select(path, leaf))
    dense = projected["block"]["dense"]["kernel"]
    assert dense.names == ("stack", "in", "out")
    np.testing.assert_allclose(jax.vmap(function)(variables["params"]["block"]["dense"]["kernel"].value), dense.value)
    # float32: numbers of order 1, the same sums in another order.
    found = ours.apply(variables, x)
    np.testing.assert_allclose(found, plain.apply({"params": projected}, x), atol=2e-5)
    assert abs(raw - found).max() > 0.01
    kernels = {"/".join(path): kernel.transformed for path, kernel in find_kernels(ours, x).items()}
    assert [name for name, transformed in kernels.items() if not transformed] == ["block/ours/kernel"]
    assert len(kernels) == 8


@pytest.mark.parametrize("name", ["transposed", "local", "heads"])
def test_backward_pass_keeps_raw_kernel_and_input_only_and_centers_before_it_casts(name):
    layer, axes = LAYERS[name]
    layer = layer.clone(dtype=jnp.bfloat16)
    ours, x = Transformed(layer, CENTER), _inputs(jnp.bfloat16)
    variables = ours.init(jax.random.key(0), x)
    assert saved_for_backward(lambda arguments: ours.apply(*arguments), (variables, x)) == ()
    params = variables["params"]
    expected = layer.apply({"params": {**params, "kernel": _centered(params["kernel"], axes)}}, x)
    # A kernel centered after its cast to bfloat16 would differ by parts in 200; here a rounding may fall otherwise.
    found = np.asarray(ours.apply(variables, x), np.float32)
    assert (found == np.asarray(expected, np.float32)).mean() > 0.98


class OwnParam(nn.Dense):
    """A layer that reads its kernel in its own way."""

    def param(self, name, *args, **options):
        return 2 * super().param(name, *args, **options)


class Held(nn.Module):
    """A module with another in a field, which Flax binds before scopes are shared."""

    inner: nn.Module

    def __call__(self, x):
        return self.inner(x)


class Holder(nn.Module):
    """One that makes its wrapped module in `setup`."""

    def setup(self):
        self.part = Transformed(Held(nn.Dense(4)), CENTER)

    def __call__(self, x):
        return self.part(x)


class Given(nn.Module):
    """One whose layers are its own, and given to the wrapped module."""

    @nn.compact
    def __call__(self, x):
        return Transformed(nn.Sequential([nn.Dense(4), nn.Dense(4, name="named")]), CENTER)(x)


class Shared(nn.Module):
    """A wrapper of the user's own that shares its scope with what it holds."""

    base: nn.Module

    def setup(self):
        nn.share_scope(self, self.base)

    def __call__(self, x):
        return self.base(x)


HELD = Held(nn.remat(nn.Dense)(4))
JitDense = nn.jit(nn.Dense)  # one class, so that it keeps its traces from call to call
NETS = {
    "alone": Transformed(nn.Sequential([nn.Dense(4), HELD]), CENTER),
    "setup": Holder(),
    "given": Given(),
    "jitted": Transformed(Held(JitDense(4)), CENTER),
    "shared": Shared(nn.Sequential([nn.Dense(4), Holder(name="head"), Given(name="layers_0")])),
    "under a last norm": WithLastBatchNorm(Transformed(nn.Sequential([nn.Dense(4), HELD]), CENTER)),
}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_kernels_are_found_at_the_paths_of_their_parameters(net):
    x = _inputs(jnp.float32)[:, 0, 0]
    first, params = (jax.eval_shape(net.init, jax.random.key(0), x)["params"] for _ in range(2))
    assert first == params
    paths = {path_names(path) for path, _ in jax.tree.leaves_with_path(params)}
    assert {path for path in paths if path[-1] == "kernel"} == set(find_kernels(net, x))


def test_one_conversion_in_another_is_refused():
    x = _inputs(jnp.float32)
    plain = nn.Sequential([nn.Conv(64, (3, 3)), nn.Conv(8, (3, 3)), lambda x: x.mean((1, 2))])
    wrapped = Transformed(plain, CENTER)
    for net in (Transformed(interop.mimic(plain), CENTER), interop.mimic(nn.Sequential([wrapped]))):
        with pytest.raises(ValueError, match=r"Transformed|converted twice"):
            net.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"linen.find_kernels"):
        interop.layer_report(wrapped, x)
    with pytest.raises(ValueError, match=r"interop.layer_report"):
        find_kernels(interop.mimic(plain), x)


def test_what_cannot_be_read_through_a_transform_is_refused_and_what_no_rule_takes_is_left():
    x = _inputs(jnp.float32)
    with pytest.raises(ValueError, match=r"OwnParam is a nn.Dense .* param of its own.* rule"):
        Transformed(OwnParam(3), CENTER).init(jax.random.key(0), x)
    left = Transformed(OwnParam(3), KernelTransform(center, lambda shape, groups: False))
    variables = left.init(jax.random.key(0), x)
    np.testing.assert_array_equal(left.apply(variables, x), OwnParam(3).apply(variables, x))
    options = {"dot_general_cls": lambda: jax.lax.dot_general}
    for layer in (Transformed(nn.Dense(3, **options), CENTER), CenteredDense(3, **options)):
        with pytest.raises(ValueError, match=r"Dense: .*dot_general_cls= .*give dot_general="):
            layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"Transformed in a Transformed.*compose"):
        Transformed(nn.Sequential([Transformed(nn.Dense(3), CENTER)]), CENTER).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"nothing in RNN would be transformed.* nn.Dense,"):
        Transformed(nn.RNN(nn.OptimizedLSTMCell(3)), CENTER).init(jax.random.key(0), x[0])
    with pytest.raises(ValueError, match=r"nn.Einsum.*by a letter; got '...,...->'"):
        Transformed(nn.Einsum(X, "...,...->", use_bias=False), CENTER).init(jax.random.key(0), x)
    with pytest.raises(Exception, match=r"generate shape \(4, 3\), but the existing .* \(5, 3\)"):
        Transformed(nn.Dense(3, use_bias=False), CENTER).apply({"params": {"kernel": jnp.ones((5, 3))}}, x)


def test_rules_are_asked_with_fan_in_axes_first_one_axis_of_outputs_and_groups():
    asked = set()
    transform = KernelTransform(center, lambda *a: asked.add(a) or False)
    x = _inputs(jnp.float32)
    for name in ("conv", "transposed kernel", "local", "from heads", "einsum"):
        Transformed(LAYERS[name][0], transform).init(jax.random.key(0), x)
    expected = {((3, 3, 2, 6), 2), ((3, 3, 4, 6), 1), ((36, 4 * 4 * 6), 1), ((6, 4, 5), 1), ((4, 6 * 5), 1)}
    assert asked == expected
