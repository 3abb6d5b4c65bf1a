"""Modules of other kinds, inputs and outputs of other shapes, and the kernel as a pure function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors as flax_errors
from flax import linen as nn
from flax import nnx

from mimicnorm_jax.diagnostics import EmpiricalNTK, TreeInputs, empirical_ntk, from_equinox, from_linen, from_nnx
from mimicnorm_jax.diagnostics.ntk import empirical_ntk_axes, empirical_ntk_fn
from tests.diagnostics.networks import close, draw, reference

pytestmark = pytest.mark.usefixtures("x64")


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(x) + jax.random.normal(self.make_rng("noise"), (1, 2))


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x):
        seen = self.variable("seen", "count", lambda: jnp.zeros(()))
        seen.value = seen.value + 1
        return nn.Dense(2, param_dtype=jnp.float64)(x) + seen.value


def test_what_a_linen_module_needs_is_named_and_given_it_works():
    x = draw(0, 3, 4)
    keys = {"params": jax.random.key(0), "noise": jax.random.key(1)}
    apply_fn, params = from_linen(Noisy(), Noisy().init(keys, x))
    with pytest.raises(ValueError, match=r"random numbers .*noise.*rngs="):
        empirical_ntk(apply_fn, params, x)
    variables = Counting().init(jax.random.key(0), x)
    apply_fn, params = from_linen(Counting(), variables)
    with pytest.raises(ValueError, match=r"held fixed .*mutable="):
        empirical_ntk(apply_fn, params, x)
    apply_fn, params = from_linen(Counting(), variables, mutable=["seen"])
    close(empirical_ntk(apply_fn, params, x), reference(apply_fn, params, x))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(inputs=nn.Dense(2, param_dtype=jnp.float64)(x))


class HoldsJitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        return JitDropped(name="inside")(x)


JitDropped = nn.jit(Dropped)  # one class, so that it keeps its traces from call to call


def test_dropout_is_left_out_whatever_nn_jit_has_traced_before_and_after_it_asks_for_its_key_as_ever():
    x, key = draw(0, 3, 4), jax.random.key(1)
    module = HoldsJitted()
    variables = module.init(key, x)
    kept = nn.Dense(2).apply({"params": variables["params"]["inside"]["Dense_0"]}, x)
    rngs = {"params": key}  # from which Flax draws what has no key of its own
    assert (module.apply(variables, x, rngs=rngs) != kept).any()
    for options in ({"rngs": rngs}, {"mutable": []}, {}):
        apply_fn, params = from_linen(module, variables, **options)
        close(apply_fn(params, x), kept)
    with pytest.raises(flax_errors.InvalidRngError):
        module.apply(variables, x)


class Perceptron(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.first = nnx.Linear(4, 5, rngs=rngs, param_dtype=jnp.float64)
        self.norm = nnx.BatchNorm(5, rngs=rngs, param_dtype=jnp.float64)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.last = nnx.Linear(5, 2, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


# Flax keeps running averages in float32.
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
def test_an_nnx_model_in_each_of_its_modes():
    x = draw(0, 6, 4)
    model = Perceptron(nnx.Rngs(0), rate=0.5)
    model.eval()
    apply_fn, params = from_nnx(model)
    close(apply_fn(params, x), model(x))
    close(empirical_ntk(apply_fn, params, x), reference(apply_fn, params, x))
    assert "2 layers" in str(EmpiricalNTK(apply_fn).plan(params, x))
    model.train()
    with pytest.raises(ValueError, match="dropout: leave it out"):
        empirical_ntk(*from_nnx(model), x)
    coupled = Perceptron(nnx.Rngs(0))
    before = np.asarray(coupled.norm.mean[...])
    apply_fn, params = from_nnx(coupled)
    with pytest.raises(ValueError, match="batch_coupled=True"):
        empirical_ntk(apply_fn, params, x)
    close(empirical_ntk(apply_fn, params, x, batch_coupled=True), reference(apply_fn, params, x), 1e-10)
    np.testing.assert_array_equal(coupled.norm.mean[...], before)
    with pytest.raises(ValueError, match="not a Dense"):
        from_nnx(nn.Dense(2))


def test_an_equinox_model():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed: pip install equinox")
    x = draw(0, 5, 3)
    apply_fn, params = from_equinox(eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0)))
    arrays, rest = eqx.partition(params, eqx.is_inexact_array)
    expected = reference(lambda arrays, x: apply_fn(eqx.combine(arrays, rest), x), arrays, x)
    close(empirical_ntk(apply_fn, params, x), expected, 1e-6)  # its parameters are in float32
    drop = eqx.nn.Sequential([eqx.nn.Linear(3, 2, key=jax.random.key(0)), eqx.nn.Dropout(0.5)])
    with pytest.raises(ValueError, match="inference_mode"):
        empirical_ntk(*from_equinox(drop), x)
    close(
        empirical_ntk(*from_equinox(eqx.nn.inference_mode(drop)), x),
        (np.asarray(x @ x.T) + 1)[:, :, None, None] * np.eye(2),
        1e-6,
    )
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(3, axis_name="batch", mode="batch")
    coupled = eqx.nn.Sequential([eqx.nn.Linear(3, 3, key=jax.random.key(0)), norm])
    with pytest.raises(ValueError, match="batch_coupled=True"):
        empirical_ntk(*from_equinox(coupled, state=state), x)
    wrong = eqx.nn.Sequential([eqx.nn.Linear(3, 2, key=jax.random.key(0)), eqx.nn.Lambda(lambda x: jnp.sin(x, axis=0))])
    with pytest.raises(ValueError, match=r"apply_fn\(params, x\) fails .* unexpected keyword"):  # no key that it lacks
        empirical_ntk(*from_equinox(wrong), x)


def test_from_equinox_without_equinox_says_what_it_takes():
    with pytest.raises(ValueError, match="callable equinox"):
        from_equinox(nn.Dense(2))


def _masked(params, x):
    """Mean over the tokens that count of embeddings, then a product, times a factor of each example."""
    vectors = params["embedding"][x["tokens"]] * x["mask"][..., None]
    mean = vectors.sum(1) / x["mask"].sum(1, keepdims=True)
    return jnp.tanh(mean @ params["kernel"]) * x["factor"][:, None]


def test_inputs_as_a_tree_are_proven_independent_and_have_the_kernel_of_their_jacobians():
    rng = np.random.default_rng(0)
    x = {
        "tokens": jnp.asarray(rng.integers(0, 7, (5, 4)), jnp.int32),
        "mask": jnp.asarray(rng.random((5, 4)) < 0.7).at[:, 0].set(True),
        "factor": draw(1, 5),
    }
    params = {"embedding": draw(2, 7, 3), "kernel": draw(3, 3, 2)}
    inputs = TreeInputs.of(x)
    apply_fn, packed = inputs.of_packed(_masked), inputs.pack(x)
    for a, b in zip(jax.tree.leaves(inputs.unpack(packed)), jax.tree.leaves(x), strict=True):
        np.testing.assert_array_equal(a, b)
    close(empirical_ntk(apply_fn, params, packed), reference(_masked, params, x))
    verdict = EmpiricalNTK(apply_fn).plan(params, packed).independence
    assert verdict is not None
    assert verdict.proven
    wide = {"tokens": np.asarray(x["tokens"], np.int64)}  # as NumPy makes them
    with jax.enable_x64(False):
        narrow = TreeInputs.of(wide)
        tokens = narrow.unpack(narrow.pack(wide))["tokens"]
    np.testing.assert_array_equal(tokens, x["tokens"])
    with pytest.raises(ValueError, match="described as"):
        inputs.pack({**x, "factor": x["factor"].astype(jnp.float32)})
    with pytest.raises(ValueError, match="first axis"):
        TreeInputs.of({"a": jnp.ones((3, 2)), "b": jnp.ones((2, 2))})


def test_a_batch_of_trees_whose_examples_meet_is_refused():
    x = {"a": draw(0, 4, 3), "b": draw(1, 4, 3)}
    inputs = TreeInputs.of(x)
    apply_fn = inputs.of_packed(lambda params, x: (x["a"] - x["b"].mean(0, keepdims=True)) @ params)
    with pytest.raises(ValueError, match="influence one another"):
        empirical_ntk(apply_fn, draw(2, 3, 2), inputs.pack(x))


def _tensor(params, x):
    """Outputs (N, 2, 3)."""
    return jnp.tanh(jnp.einsum("ni,iab->nab", jnp.tanh(x @ params["mixing"]), params["first"]))


@pytest.mark.parametrize(
    ("axes", "equation"),
    [
        (((), ()), "nmabcd->nmacbd"),
        (((1, 2), ()), "nmabab->nm"),
        (((), (-1, 1)), "nmabab->nmab"),
        (((2,), ()), "nmabcb->nmac"),
        (((1,), (2,)), "nmabab->nmb"),
        (((), (1,)), "nmabad->nmabd"),
    ],
)
def test_axes_of_outputs(axes, equation):
    params, x = {"first": draw(0, 4, 2, 3), "mixing": draw(1, 4, 4)}, draw(2, 3, 4)
    flat = reference(lambda p, x: _tensor(p, x).reshape(3, 6), params, x).reshape(3, 3, 2, 3, 2, 3)
    close(empirical_ntk_axes(_tensor, params, x, axes=axes), np.einsum(equation, flat))


@pytest.mark.parametrize("axes", [((0,), ()), ((1,), (1,)), ((1, -2), ()), ((3,), ())])
def test_axes_that_are_none(axes):
    with pytest.raises(ValueError, match="axes"):
        empirical_ntk_axes(_tensor, {"first": draw(0, 4, 2, 3), "mixing": draw(1, 4, 4)}, draw(2, 3, 4), axes=axes)


def test_axes_take_what_the_kernel_takes_and_refuse_what_is_no_network():
    params, x = {"first": draw(0, 4, 2, 3), "mixing": draw(1, 4, 4)}, draw(2, 3, 4)
    expected = empirical_ntk_axes(_tensor, params, x, axes=((1, 2), ()))
    close(empirical_ntk_axes(_tensor, {**params, "activation": "tanh"}, x.tolist(), axes=((1, 2), ())), expected)
    with pytest.raises(ValueError, match="must be one array"):
        empirical_ntk_axes(lambda p, x: (_tensor(p, x), x), params, x)
    with pytest.raises(ValueError, match="x is a NoneType"):
        empirical_ntk_axes(_tensor, params, None)
    with pytest.raises(ValueError, match="from_linen"):
        empirical_ntk_axes(Noisy(), params, x)


@dataclasses.dataclass
class ByValue:
    factor: float = 2.0

    def __call__(self, params, x):
        return self.factor * x @ params


def test_a_network_that_cannot_be_hashed_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"ByValue that cannot be hashed.*lambda params, x"):
        empirical_ntk(ByValue(), draw(0, 4, 2), draw(1, 3, 4))


def _smooth(params, x):
    return jnp.tanh(x @ params["first"]) @ params["last"]


def _written_out(params, x1, x2):
    rows = [jax.jacrev(_smooth)(params, x) for x in (x1, x2)]
    return sum(
        jnp.tensordot(a.reshape(*a.shape[:2], -1), b.reshape(*b.shape[:2], -1), (2, 2)).transpose(0, 2, 1, 3)
        for a, b in zip(jax.tree.leaves(rows[0]), jax.tree.leaves(rows[1]), strict=True)
    )


def test_a_pure_kernel_is_compiled_mapped_and_differentiated():
    """Its gradient is that of the written out kernel, which the structured derivatives' own would not be."""
    params = {"first": draw(0, 3, 4), "last": draw(1, 4, 2)}
    x1, x2 = draw(2, 3, 3), draw(3, 2, 3)
    kernel = empirical_ntk_fn(_smooth, params, x1, x2, implementation="structured_derivatives")
    close(jax.jit(kernel)(params, x1, x2), _written_out(params, x1, x2))
    ensemble = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    mapped = jax.jit(jax.vmap(kernel, (0, None, None)))(ensemble, x1, x2)
    close(mapped[1], _written_out(jax.tree.map(lambda leaf: 2 * leaf, params), x1, x2))
    weights = draw(4, 3, 2, 2, 2)
    found = jax.jit(jax.grad(lambda *a: jnp.vdot(weights, kernel(*a)), (0, 1, 2)))(params, x1, x2)
    expected = jax.jit(jax.grad(lambda *a: jnp.vdot(weights, _written_out(*a)), (0, 1, 2)))(params, x1, x2)
    jax.tree.map(close, found, expected)
    with pytest.raises(ValueError, match="prepared for"):
        kernel(params, x1[:2], x2)


def test_what_only_numbers_can_check_is_no_pure_function():
    @jax.custom_vjp
    def unknown(x):
        return x * 2

    unknown.defvjp(lambda x: (x * 2, None), lambda _, g: (2 * g,))
    params, x = {"first": draw(0, 3, 4), "last": draw(1, 4, 2)}, draw(2, 3, 3)
    with pytest.raises(ValueError, match="check=False"):
        empirical_ntk_fn(lambda p, x: unknown(_smooth(p, x)), params, x)
    kernel = empirical_ntk_fn(lambda p, x: unknown(_smooth(p, x)), params, x, check=False)
    close(kernel(params, x), 4 * _written_out(params, x, x))
