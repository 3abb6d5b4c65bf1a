"""Whether the examples of a batch are independent: what the jaxpr shows, and what is done where it shows nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax.diagnostics import EmpiricalNTK, empirical_ntk, from_linen, jacobian, nngp, perturbation_growth
from mimicnorm_jax.diagnostics.tracing import independence, sizes
from tests.diagnostics.networks import Normalized, draw, filled
from tests.diagnostics.ntk.random_programs import BATCH_OPS, centered

FIRST_COUPLED = list(BATCH_OPS).index("batch norm")
# What jnp.arange picks with may be each example's own place, so only numbers tell.
TRIED = ("indexed",)
SIZE = ("over size",)


def _around(op):
    def apply_fn(params, x):
        return op(jnp.tanh(x @ params["kernel"])) @ params["head"]

    return apply_fn


def _params():
    return {"kernel": draw(0, 5, 6), "head": draw(1, 6, 2)}


@pytest.mark.parametrize("name", list(BATCH_OPS)[:FIRST_COUPLED])
def test_what_keeps_examples_apart_is_proved(name):
    verdict = independence.require(_around(BATCH_OPS[name]), _params(), draw(2, 5, 5))
    assert verdict.proven == (name not in TRIED), verdict
    assert verdict.compared == 5


OPERATIONS = {
    "batch norm": "reduce_sum",
    "batch cumulative": "cumsum",
    "batch sorted": "sort",
    "batch softmax": "reduce_max",
    "batch rolled": "slice",
    "batch reversed": "rev",
    "batch scan": "scan",
    "batch gram": "dot_general",
    "wrong reshape": "reshape",
    "over size": "largest output",
    "place": "mul",
    "mask each": "select_n",
    "common branch": "reduce_sum",
    "after the first": "slice",
    "batch maximum": "reduce_max",
}


@pytest.mark.parametrize("name", list(BATCH_OPS)[FIRST_COUPLED:])
def test_what_brings_them_together_is_refused_by_name_and_line(name):
    file = "" if name in SIZE else r".*at .*\.py:\d+ "
    with pytest.raises(ValueError, match=f"{OPERATIONS[name]}{file}.*batch_coupled=True"):
        empirical_ntk(_around(BATCH_OPS[name]), _params(), draw(2, 5, 5))


def _beyond_the_fourth(h):
    return jnp.concatenate([h[:4], centered(h[4:])]) if len(h) > 4 else h


def _with_capacity(h):
    return jnp.where((jnp.cumsum(jnp.ones(len(h))) <= 3)[:, None], h, 0)


@pytest.mark.parametrize("op", [_beyond_the_fourth, _with_capacity])
def test_coupling_that_the_first_four_examples_do_not_show(op):
    with pytest.raises(ValueError, match="influence one another"):
        empirical_ntk(_around(op), _params(), draw(2, 6, 5))


def test_equal_examples_hide_nothing():
    x = jnp.repeat(draw(2, 1, 5), 4, 0)
    with pytest.raises(ValueError, match=r"reduce_sum at random_programs\.py:\d+ \(centered\)"):
        empirical_ntk(_around(BATCH_OPS["batch norm"]), _params(), x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_batch_norm_in_half_precision(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), _params())
    with pytest.raises(ValueError, match="influence one another"):
        empirical_ntk(_around(BATCH_OPS["batch norm"]), params, draw(2, 5, 5).astype(dtype))


@pytest.mark.parametrize(
    "measure",
    [
        lambda f, p, x: nngp.kernels(f, p, x),
        lambda f, p, x: nngp.moments(f, p, x),
        lambda f, p, x: perturbation_growth(f, p, x, key=jax.random.key(0)),
        lambda f, p, x: jacobian.jacobians(f, p, x),
        lambda f, p, x: jacobian.mean_square(f, p, x, key=jax.random.key(0)),
    ],
    ids=["nngp", "moments", "growth", "jacobian", "mean square"],
)
def test_the_other_diagnostics_refuse_an_uncoupled_batch_norm(measure):
    module, x = Normalized(), draw(3, 6, 5)
    apply_fn, params = from_linen(module, filled(module, x), mutable=["batch_stats"])
    with pytest.raises(ValueError, match=r"reduce_sum at .*batch_coupled=True"):
        measure(apply_fn, params, x)


SIZES = {
    "constant": lambda x: x / len(x),
    "sum of ones": lambda x: x / jnp.ones(len(x)).sum(),
    "power": lambda x: x ** len(x),
    "turns": lambda x: jax.lax.fori_loop(0, len(x), lambda _, h: jnp.tanh(h), x),
    "within": lambda x: jax.jit(lambda h: h * len(x))(x),
    "last place": lambda x: x * jnp.arange(len(x))[-1],
}
NO_SIZES = {
    "network": lambda x: jax.nn.softmax(jnp.einsum("nc,nd->ncd", x, jnp.tanh(x))).sum(1),
    "zeros": lambda x: jnp.zeros((len(x), 5)) + x,
    "map": lambda x: jax.lax.map(jnp.tanh, x),
    "vmap": lambda x: jax.vmap(lambda row: row - row.mean())(x),
}


@pytest.mark.parametrize("name", [*SIZES, *NO_SIZES])
def test_where_the_size_of_the_batch_becomes_a_number(name):
    op = (SIZES | NO_SIZES)[name]
    found = sizes.difference(*(jax.make_jaxpr(op)(jnp.ones((size, 5))) for size in (3, 1)))
    assert bool(found) == (name in SIZES), found


FIXED = {
    "squeezed": lambda h: jnp.squeeze(h[:, None]),
    "reshaped": lambda h: h.reshape(4, 6),
    "added to": lambda h: jnp.zeros((4, 6)) + h,
}


@pytest.mark.parametrize("name", FIXED)
def test_a_network_of_one_size_of_batch_is_refused_or_taken_whole(name, x64):
    apply_fn, params, x = _around(FIXED[name]), _params(), draw(2, 4, 5)
    with pytest.raises(ValueError, match=r"takes 4 examples, but one alone .*batch_coupled=True"):
        empirical_ntk(apply_fn, params, x)
    found = empirical_ntk(apply_fn, params, x, batch_coupled=True)
    np.testing.assert_allclose(found, empirical_ntk(_around(lambda h: h), params, x), rtol=1e-12, atol=1e-12)


def test_a_size_is_not_taken_for_rounding():
    """Kernels at the edge of a step, in half precision: rounding alone changes outputs by more than the size does."""
    params = {"kernel": jnp.full((5, 3), 0.125, jnp.bfloat16)}

    def apply_fn(params, x):
        kernel = params["kernel"] + jax.lax.stop_gradient(jnp.round(4 * params["kernel"]) / 4 - params["kernel"])
        return x @ kernel.astype(x.dtype) + 1 / len(x)

    x = draw(2, 3, 5).astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"in the batch and alone \(which differ at add at test_independence\.py"):
        empirical_ntk(apply_fn, params, x)


def _with_derivative(rule, backward=False):
    """The identity, with a derivative of its own."""
    if backward:
        op = jax.custom_vjp(lambda h: h)
        op.defvjp(lambda h: (h, None), lambda _, g: (rule(g),))
    else:
        op = jax.custom_jvp(lambda h: h)
        op.defjvp(lambda primals, tangents: (primals[0], rule(tangents[0])))
    return lambda h: op(h)


DERIVATIVES = {
    "other examples": (
        lambda t: t - t.mean(0, keepdims=True),
        "reduce_sum.*brings different examples.*in the derivative of custom_",
    ),
    "place": (lambda t: t * jnp.arange(1.0, 1 + len(t))[:, None], "mul.*place in the batch, in the derivative of cust"),
}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_derivative_of_its_own_keeps_examples_apart_or_is_refused(name, backward):
    """The outputs of these are independent, their derivatives are not."""
    rule, message = DERIVATIVES[name]
    with pytest.raises(ValueError, match=message):
        EmpiricalNTK(_around(_with_derivative(rule, backward))).plan(_params(), draw(2, 5, 5))
    scaled = _around(_with_derivative(lambda t: 2 * t - t.mean(-1, keepdims=True), backward))
    assert independence.require(scaled, _params(), draw(2, 5, 5)).proven


@pytest.mark.parametrize(
    "op",
    [_with_derivative(lambda t: t / len(t)), lambda h: h / len(h) + jax.lax.stop_gradient(h - h / len(h))],
    ids=["rule", "stopped"],
)
def test_a_derivative_that_knows_the_size_of_the_batch_is_not_proved(op):
    by_size = _around(op)
    verdict = independence.require(by_size, _params(), draw(2, 5, 5))
    assert "derivatives for a batch and for one example differ at div at test_independence" in verdict.reason
    with pytest.raises(ValueError, match="by a direct product of gradients"):
        empirical_ntk(by_size, _params(), draw(2, 5, 5))


def test_windows_over_several_values_follow_all_of_them():
    def op(places, h):
        def first(a, b):
            return jax.lax.max(a[0], b[0]), a[1] + b[1]

        return jax.lax.reduce_window((h, places(h)), (-np.inf, 0.0), first, (1, 2), (1, 2), "VALID")[0]

    def follow(places):
        program = jax.make_jaxpr(lambda _, h: op(places, h))(0.0, jnp.ones((5, 6)))
        return independence.prove(program, 1, 5)

    assert follow(lambda h: 2 * h) == ""
    with pytest.raises(ValueError, match=r"reduce_window.*place in the batch"):
        follow(lambda h: jnp.broadcast_to(jnp.arange(5.0)[:, None], h.shape))


def _unknown(function):
    """Behind a call that no rule follows."""

    def op(h):
        return jax.pure_callback(function, jax.ShapeDtypeStruct(h.shape, h.dtype), h, vmap_method="expand_dims")

    def with_derivative(h):
        apply = jax.custom_jvp(op)
        apply.defjvp(lambda primals, tangents: (op(*primals), 0 * tangents[0]))
        return h + apply(h)

    return with_derivative


def test_what_is_neither_proved_nor_refuted_is_tried_over_the_whole_batch():
    each = _around(_unknown(lambda h: np.tanh(h)))
    kernel = EmpiricalNTK(each)
    plan = kernel.plan(_params(), draw(2, 6, 5))
    assert "numerical trial only: pure_callback at" in str(plan)
    assert plan.checked  # the guard is on where something is not proved

    def last_sees_first(h):
        h = np.array(h)
        if h.ndim == 2 and len(h) > 4:
            h[-1] += h[0]
        return h

    with pytest.raises(ValueError, match="an example's outputs differ by"):
        EmpiricalNTK(_around(_unknown(last_sees_first))).plan(_params(), draw(2, 6, 5))


def test_equal_examples_are_changed_in_a_trial():
    """Only other inputs show that the last example looks at the first."""

    def difference(h):
        h = np.array(h)
        if h.ndim == 2:
            h[-1] += h[0] - h[-1]
        return h

    x = jnp.repeat(draw(2, 1, 5), 6, 0)
    with pytest.raises(ValueError, match="with other examples beside it"):
        EmpiricalNTK(_around(_unknown(difference))).plan(_params(), x)


class _Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=False, rng_collection="noise")(nn.Dense(8)(x)))


def test_dropout_of_any_collection():
    module, x = _Noisy(), draw(3, 4, 5)
    rngs = {"noise": jax.random.key(2)}
    variables = module.init({"params": jax.random.key(0), **rngs}, x)
    apply_fn, params = from_linen(module, variables, rngs=rngs)
    np.testing.assert_array_equal(apply_fn(params, x), module.apply(variables, x, rngs=rngs))
    with pytest.raises(ValueError, match="depend on the place in the batch"):  # each example has a mask of its own
        empirical_ntk(apply_fn, params, x)
    without, _ = from_linen(module, variables, rngs={"dropout": jax.random.key(2)})
    # Two rows are another product than four to some compilers: float32, sums of 5 and 8 terms of size 1.
    np.testing.assert_allclose(without(params, x[:2]), without(params, x)[:2], atol=1e-6)
    assert empirical_ntk(without, params, x).shape == (4, 4, 3, 3)
    every, _ = from_linen(module, variables, rngs=jax.random.key(2))  # Flax's default for all collections
    np.testing.assert_array_equal(every(params, x), module.apply(variables, x, rngs=jax.random.key(2)))
