"""The supernet is its networks, one program serves all paths, only scales are trained, evolution finds the best."""

import itertools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from mimicnorm_jax import search
from mimicnorm_jax.search import PUBLISHED, SMALL, SearchSpace
from mimicnorm_jax.search.scales import is_scale
from tests.conftest import also

TINY = SearchSpace(((4, 1, 1), (6, 1, 2)), stem=4, first=4, last=8, windows=(3, 5), expansions=(2,))
IMAGES = jax.random.normal(jax.random.key(1), (8, 4, 4, 1))
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles fast
LABELS = jnp.arange(8) % 3


def _made(method: str, space: SearchSpace = TINY) -> Any:
    network = search.supernet(space, method=method, num_classes=3)
    path = jnp.zeros(space.num_layers, jnp.int32)
    return network, jax.jit(lambda key: network.init(key, IMAGES, path=path))(KEY)


def _copied(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


@pytest.fixture(scope="module", params=["batchnorm", also("mimicnorm")])
def made(request):
    return _made(request.param)


def test_the_published_space():
    assert (PUBLISHED.num_layers, len(PUBLISHED.choices)) == (21, 6)
    assert set(PUBLISHED.choices) == set(itertools.product((3, 5, 7), (3, 6)))


def test_a_choice_that_a_layer_does_not_have_is_refused(made):
    with pytest.raises(ValueError, match="chooses 9 in layer1, which has choices_0, choices_1"):
        search.of_path(made[1], (0, 9))
    for path in ((0,), (0, 1, 1)):
        with pytest.raises(ValueError, match=f"of {len(path)} layers, and the network has 2"):
            search.of_path(made[1], path)
    frozen, plain = (search.of_path(variables, (0, 1)) for variables in (flax.core.freeze(made[1]), made[1]))
    assert jax.tree.structure(frozen) == jax.tree.structure(plain)


@pytest.mark.slow
def test_a_network_of_its_own_starts_and_trains_as_within_the_supernet(made):
    network, variables = made
    path = (1, 0)
    alone = network.clone(architecture=path)
    own = jax.jit(lambda key: alone.init(key, IMAGES))(KEY)
    jax.tree.map(np.testing.assert_array_equal, own, search.of_path(variables, path))

    def loss(params, rest):
        logits, rest = alone.apply({"params": params, **rest}, IMAGES, train=True, mutable=list(rest))
        targets = optax.smooth_labels(jax.nn.one_hot(LABELS, 3), 0.1)
        return optax.softmax_cross_entropy(logits, targets).mean(), rest

    optimizer = optax.sgd(0.1, momentum=0.9)
    step = search.make_step(network, optimizer)
    start = _copied(variables)
    state = (start, optimizer.init(start["params"]))
    own_state, gradient = optimizer.init(own["params"]), jax.jit(jax.value_and_grad(loss, has_aux=True))
    for _ in range(3):
        state, theirs = step(state, IMAGES, LABELS, jnp.array(path))
        (value, rest), grads = gradient(own["params"], {k: v for k, v in own.items() if k != "params"})
        updates, own_state = optimizer.update(grads, own_state, own["params"])
        own = {"params": optax.apply_updates(own["params"], updates), **rest}
        np.testing.assert_allclose(theirs, value, rtol=1e-4)
    # float32 sums in another order, over three steps of one program and another
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), own, search.of_path(state[0], path))


def test_only_scales_of_chosen_blocks_are_trained_by_one_program_for_all_paths(made):
    network, variables = made
    optimizer = search.scales_only(search.published_optimizer(10), variables["params"])
    step = search.make_step(network, optimizer)
    start = _copied(variables)
    state = (start, optimizer.init(start["params"]))
    assert all(leaf.size <= 6 for leaf in jax.tree.leaves(state[1]))  # no momentum of a kernel
    for path in ((0, 1), (1, 1), (0, 1)):
        state, _ = step(state, IMAGES, LABELS, jnp.array(path))
    assert step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]
    before: Any = flatten_dict(variables["params"])
    after: Any = flatten_dict(state[0]["params"])
    changed = {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}
    assert all(is_scale(path) for path in changed)
    chosen = {("layer0", "choices_0"), ("layer0", "choices_1"), ("layer1", "choices_1")}
    assert chosen <= {path[:2] for path in changed}
    per_choice = {path[3:] for path in before if is_scale(path)}
    assert per_choice in ({("bn", "scale"), ("bn", "bias")}, {("conv", "scale")})


def test_the_published_optimizer():
    optimizer = search.published_optimizer(1000)
    updates: Any
    updates, _ = optimizer.update(jnp.array(2.0), optimizer.init(jnp.array(3.0)), jnp.array(3.0))
    np.testing.assert_allclose(updates, -0.25 * (2 + 4e-5 * 3), rtol=1e-6)


def test_the_indicator_is_the_sum_of_mean_absolute_scales():
    _, variables = _made("batchnorm")
    params: Any = _copied(variables["params"])
    params["layer0"]["choices_1"]["conv3"]["bn"]["scale"] = jnp.array([-3.0, 1.0, 0.0, 0.0])
    params["layer1"]["choices_0"]["conv3"]["bn"]["scale"] = jnp.full(6, -0.5)
    params["first"]["conv3"]["bn"]["scale"] *= 100
    table = search.scores(params, TINY)
    np.testing.assert_array_equal(table, [[1, 1], [0.5, 1]])
    assert search.total(table, (1, 0)) == 1.5
    with pytest.raises(ValueError, match="nothing to train or judge it by"):
        search.scales_only(optax.sgd(1.0), {"stem": params["stem"]})
    del params["layer1"]["choices_1"]["conv3"]["bn"]
    with pytest.raises(ValueError, match="layer 1, choice 1 has no scale"):
        search.scores(params, TINY)


def _counted(closed):
    """Operations of a program's convolutions, by XLA."""
    total = 0
    for equation in closed.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            total += _counted(inner) if hasattr(inner, "eqns") else 0
        if equation.primitive.name == "conv_general_dilated":
            one = jax.jit(lambda *a, e=equation: e.primitive.bind(*a, **e.params))
            shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
            analysis: Any = one.lower(*shapes).cost_analysis()
            total += analysis["flops"]
    return total


@pytest.mark.parametrize(("space", "image"), [(TINY, (7, 5, 2)), also(SMALL, (8, 8, 3))])
def test_operations_are_those_of_the_program(space, image):
    found = search.flops(space, image, 3)
    for path in ((0,) * space.num_layers, (len(space.choices) - 1,) * space.num_layers):
        network = search.supernet(space, num_classes=3).clone(architecture=path)
        x = jax.ShapeDtypeStruct((1, *image), jnp.float32)
        variables = jax.eval_shape(network.init, jax.random.key(0), x)
        program = jax.make_jaxpr(network.apply)(variables, x)
        assert found.fixed + search.total(found.table, path) == _counted(program.jaxpr)


def test_evolution_finds_the_best_under_the_limit():
    generator = np.random.default_rng(0)
    table = generator.random((SMALL.num_layers, 6))
    cost = search.flops(SMALL, (8, 8, 1), 10).table
    limit = float(np.median(cost, axis=1).sum())

    def whole(each):
        grid = sum(np.expand_dims(row, tuple(j for j in range(len(each)) if j != i)) for i, row in enumerate(each))
        return np.asarray(grid)

    best = np.where(whole(cost) <= limit, whole(table), -np.inf).max()
    found = search.evolve(
        SMALL, lambda p: search.total(table, p), cost=lambda p: search.total(cost, p), limit=limit, seed=1
    )
    assert len(set(found)) == len(found) <= 21 * 50
    assert max(search.total(cost, path) for path in found) <= limit
    values = [search.total(table, path) for path in found]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(best)
    few = [
        search.evolve(SMALL, lambda _: 0.0, cost=lambda _: 0.0, limit=1, seed=seed, how=search.Evolution(rounds=2))
        for seed in (1, 1, 2)
    ]
    assert few[0] == few[1] != few[2]
    with pytest.raises(ValueError, match="none costs at most 1: raise the limit"):
        search.evolve(SMALL, lambda _: 0.0, cost=lambda _: 2.0, limit=1, how=search.Evolution(tries=3))


def test_every_choice_is_as_likely():
    generator = np.random.default_rng(0)
    counts = np.bincount(np.array([SMALL.sample(generator) for _ in range(1000)]).ravel(), minlength=6)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(6000 * 5 / 36)  # five standard deviations


def test_what_cannot_be_meant_is_refused():
    network = search.supernet(TINY, num_classes=3)

    def shapes(module, **kwargs):
        return jax.eval_shape(lambda: module.init(jax.random.key(0), IMAGES, **kwargs))

    with pytest.raises(ValueError, match="give path="):
        shapes(network)
    with pytest.raises(ValueError, match="of the architecture"):
        shapes(network.clone(architecture=(0, 0)), path=jnp.array([0, 0]))
    with pytest.raises(ValueError, match="2 layers"):
        shapes(network, path=jnp.array([0]))
    with pytest.raises(ValueError, match="choice 2 at layer 1"):
        shapes(network, path=np.array([0, 2]))
    for numbers, message in (
        ({"parents": 0}, "parents=0: it is at least 1"),
        ({"rounds": -1}, "rounds=-1: it is at least 0"),
        ({"mutation_rate": 1.5}, "mutation_rate=1.5: it is a chance"),
        ({"mutations": 26}, "more than population=50"),
    ):
        with pytest.raises(ValueError, match=message):
            search.Evolution(**numbers)
    with pytest.raises(ValueError, match=r"the score of \(.* is not a number"):
        search.evolve(TINY, lambda path: float("nan"), cost=sum, limit=9)
    with pytest.raises(ValueError, match="4 is even"):
        SearchSpace(((4, 1, 1),), windows=(4,))
    with pytest.raises(ValueError, match="fixup"):
        search.supernet(TINY, method="fixup", num_classes=3)
