"""LAWN and Hyperball: norms stay, gradients are tangent, and the inner optimizer is itself where it is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from mimicnorm_jax.optim import center_params, hyperball, keep_kernels_centered, lawn

PARAMS = {
    "conv": {"kernel": np.random.default_rng(0).normal(size=(3, 3, 4, 5)), "bias": np.ones(5)},
    "dense": {"kernel": np.random.default_rng(1).normal(size=(5, 2)), "bias": np.zeros(2)},
}


def _conv(path, leaf):
    return path == ("conv", "kernel")


def _inputs():
    return jnp.asarray(np.random.default_rng(2).normal(size=(6, 3, 3, 4)))


def _loss(params):
    x = jnp.einsum("nhwi,hwio->no", _inputs(), params["conv"]["kernel"]) + params["conv"]["bias"][None]
    return jnp.sum(jnp.cos(x @ params["dense"]["kernel"] + params["dense"]["bias"][None]))


def _steps(tx, count, params=PARAMS, state=None):
    """Parameters after each step, and the state."""
    state, found = tx.init(params) if state is None else state, []

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(_loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(count):
        params, state = step(params, state)
        found.append(params)
    return found, state


def _norms(params):
    return [float(jnp.linalg.norm(params[name]["kernel"])) for name in ("conv", "dense")]


INNER = {
    "sgd": lambda: optax.sgd(0.05, momentum=0.9),
    "adam": lambda: optax.adam(0.05),
    "lion": lambda: optax.lion(0.01),
}


@pytest.mark.parametrize("name", INNER)
def test_lawn_is_the_inner_optimizer_until_the_norms_freeze_and_keeps_them_then(name, x64):
    free, _ = _steps(INNER[name](), 6)
    for project in (False, True):
        found, state = _steps(lawn(INNER[name](), 4, project_direction=project), 12)
        for ours, plain in zip(found[:4], free, strict=False):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), ours, plain)
        frozen = _norms(found[3])
        assert frozen != pytest.approx(_norms(PARAMS), rel=1e-3)
        for params in found[4:]:
            np.testing.assert_allclose(_norms(params), frozen, rtol=1e-13)
        assert abs(found[-1]["conv"]["kernel"] - found[3]["conv"]["kernel"]).max() > 1e-3
        assert abs(found[-1]["conv"]["bias"] - found[3]["conv"]["bias"]).max() > 1e-3
        assert state.num_steps == 12


def test_lawn_by_hand(x64):
    """One constrained step of momentum: the gradient loses its part along the kernel before the buffer sees it."""
    (found,), _ = _steps(lawn(optax.sgd(0.1, momentum=0.5), 0), 1)
    for name in ("conv", "dense"):
        w, g = (np.asarray(tree[name]["kernel"]) for tree in (PARAMS, jax.grad(_loss)(PARAMS)))
        g = g - (g * w).sum() / (w * w).sum() * w
        assert abs((g * w).sum()) < 1e-12 * np.linalg.norm(g) * np.linalg.norm(w)
        w_next = w - 0.1 * g
        np.testing.assert_allclose(
            found[name]["kernel"], w_next * np.linalg.norm(w) / np.linalg.norm(w_next), rtol=1e-12
        )
        bias = PARAMS[name]["bias"] - 0.1 * jax.grad(_loss)(PARAMS)[name]["bias"]
        np.testing.assert_allclose(found[name]["bias"], bias, rtol=1e-12)


def test_a_direction_that_is_projected_is_tangent_and_changes_adam_only(x64):
    """SGD's direction is tangent already in its first step; Adam's is not, since it is scaled by entry."""
    for name, changes in (("sgd", False), ("adam", True)):
        (one,), (other,) = (
            _steps(lawn(INNER[name](), 0, project_direction=project), 1)[0] for project in (False, True)
        )
        apart = abs(one["conv"]["kernel"] - other["conv"]["kernel"]).max()
        assert apart > 1e-6 if changes else apart < 1e-14
        w, step = np.asarray(PARAMS["conv"]["kernel"]), np.asarray(other["conv"]["kernel"])
        # Scaled back by |w| / |w + d| with d tangent, so along w exactly that is left.
        along = (step * w).sum() / (w * w).sum()
        turned = np.linalg.norm(step / along - w)
        np.testing.assert_allclose(along, 1 / np.sqrt(1 + (turned / np.linalg.norm(w)) ** 2), rtol=1e-12)


def test_hyperball_by_hand(x64):
    """A step turns a kernel by arctan of the rate where the direction is tangent, and never changes its norm."""
    rate = lambda count: 0.1 / (1 + count)  # noqa: E731
    found, _ = _steps(hyperball(optax.scale_by_adam(), rate), 5)
    for params in found:
        np.testing.assert_allclose(_norms(params), _norms(PARAMS), rtol=1e-13)
    w = np.asarray(PARAMS["conv"]["kernel"])
    u = np.sign(jax.grad(_loss)(PARAMS)["conv"]["kernel"])  # Adam's first direction, up to its epsilon
    size = np.linalg.norm(w)
    moved = w - 0.1 * size * u / np.linalg.norm(u)
    np.testing.assert_allclose(found[0]["conv"]["kernel"], moved * size / np.linalg.norm(moved), rtol=1e-5)
    bias = PARAMS["conv"]["bias"] - 0.1 * np.sign(jax.grad(_loss)(PARAMS)["conv"]["bias"])
    np.testing.assert_allclose(found[0]["conv"]["bias"], bias, rtol=1e-5)


@pytest.mark.parametrize("make", [lambda: lawn(INNER["adam"](), 2), lambda: hyperball(optax.scale_by_adam(), 0.05)])
def test_masked_chained_with_centering_and_resumed(make, x64):
    """A masked leaf takes the plain gradient; centering and the norm hold together; a restored state goes on."""
    mask = {"conv": True, "dense": False}
    masked, _ = _steps(optax.masked(make(), mask), 1)
    gradient = jax.grad(_loss)(PARAMS)["dense"]["kernel"]
    np.testing.assert_allclose(masked[0]["dense"]["kernel"], PARAMS["dense"]["kernel"] + gradient, rtol=1e-12)

    centered = center_params(PARAMS, _conv)
    both = optax.chain(make(), keep_kernels_centered(_conv))
    found, _ = _steps(both, 6, centered)
    for params in found:
        np.testing.assert_allclose(params["conv"]["kernel"].mean((0, 1, 2)), 0, atol=1e-14)
    np.testing.assert_allclose(_norms(found[-1])[1], _norms(found[2])[1], rtol=1e-12)

    whole, _ = _steps(make(), 6)
    first, state = _steps(make(), 3)
    leaves, tree = jax.tree.flatten(jax.device_get(state))
    rest, _ = _steps(make(), 3, first[-1], jax.tree.unflatten(tree, leaves))
    jax.tree.map(np.testing.assert_array_equal, rest[-1], whole[-1])


def test_centered_kernels_stay_centered_by_themselves_under_lawn(x64):
    """Scaling and centering commute: gradients of a centered layer have no mean, and scaling gives them none."""

    def loss(params):
        return _loss(center_params(params, _conv))

    tx, params = lawn(optax.sgd(0.05, momentum=0.9), 0), center_params(PARAMS, _conv)
    state = tx.init(params)
    for _ in range(5):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["conv"]["kernel"].mean((0, 1, 2)), 0, atol=1e-14)
    np.testing.assert_allclose(_norms(params), _norms(center_params(PARAMS, _conv)), rtol=1e-13)


def test_zero_leaves_and_bad_arguments(x64):
    zeros = {
        "conv": {"kernel": np.zeros((3, 3, 4, 5)), "bias": np.ones(5)},
        "dense": {"kernel": np.zeros((5, 2)), "bias": np.ones(2)},
    }
    for tx in (lawn(optax.sgd(0.1), 0), hyperball(optax.identity(), 0.1)):
        found, _ = _steps(tx, 3, zeros)
        # A kernel that starts at zero has no norm to keep: it takes the steps of the optimizer inside.
        expected, _ = _steps(optax.sgd(0.1), 3, zeros)
        assert min(_norms(expected[-1])) > 0
        jax.tree.map(np.testing.assert_array_equal, found[-1], expected[-1])
        with pytest.raises(ValueError, match="needs the parameters"):
            tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="free_steps is -1"):
        lawn(optax.sgd(0.1), -1)


@pytest.mark.parametrize("make", [lambda: lawn(optax.sgd(0.1), 0), lambda: hyperball(optax.scale_by_adam(), 0.3)])
def test_norms_of_boxed_kernels_and_of_nnx_variables_are_kept(make):
    """Boxes and variables hold their array in a field, and `nnx.Optimizer` shows one in `init` and none in `update`."""
    tx = make()
    dense = nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32)
    params = dense.init(jax.random.key(0), x)
    state, before = tx.init(params), jnp.linalg.norm(params["params"]["kernel"].value)
    layer = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
    optimizer, ours = nnx.Optimizer(layer, tx, wrt=nnx.Param), jnp.linalg.norm(layer.kernel[...])
    for _ in range(3):
        updates, state = tx.update(jax.grad(lambda p: (dense.apply(p, x) ** 2).sum())(params), state, params)
        params = optax.apply_updates(params, updates)
        optimizer.update(layer, nnx.grad(lambda layer: (layer(x) ** 2).sum())(layer))
    # float32, three scalings.
    np.testing.assert_allclose(jnp.linalg.norm(params["params"]["kernel"].value), before, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(layer.kernel[...]), ours, rtol=1e-5)


@pytest.mark.parametrize("make", [lambda: lawn(optax.sgd(0.1), 0), lambda: hyperball(optax.identity(), 0.1)])
def test_a_tree_without_names_of_flax_is_refused_and_a_group_without_kernels_is_not(make, x64):
    haiku = {"conv2_d": {"w": jnp.ones((3, 3, 2, 4)), "b": jnp.zeros(4)}}
    with pytest.raises(ValueError, match=r"no leaf is named 'kernel'.* conv2_d/w"):
        make().init(haiku)
    groups = {"rest": optax.sgd(1.0), "others": make()}
    labels = {"conv": {"kernel": "rest", "bias": "others"}, "dense": "rest"}
    optax.partition(groups, labels).init(PARAMS)
    found, _ = _steps(optax.masked(make(), {"conv": {"kernel": False, "bias": True}, "dense": False}), 1)
    np.testing.assert_allclose(found[0]["conv"]["bias"], _steps(make(), 1)[0][0]["conv"]["bias"], rtol=1e-6)
    make().init({"scale": jnp.ones(3)})
    make().init(jnp.ones(3))
    with pytest.raises(ValueError, match="no leaf is named 'kernel'"):
        make().init(jnp.ones((3, 3)))
    # A selection of one's own is what it says.
    lawn(optax.sgd(0.1), 0, lambda path, leaf: path[-1] == "w").init(haiku)


@pytest.mark.parametrize(
    "make",
    [lambda select: lawn(optax.adam(0.03), 2, select), lambda select: hyperball(optax.scale_by_adam(), 0.1, select)],
)
def test_a_stack_of_kernels_trains_as_its_kernels_by_themselves(make, x64):
    """As those of `nn.scan`: each keeps a norm of its own; taken as one leaf they would share one."""
    stack = np.random.default_rng(3).normal(size=(3, 4, 4)) * np.array([1.0, 2.0, 4.0])[:, None, None]
    x = np.random.default_rng(4).normal(size=(6, 4))

    def trained(loss, params, select):
        tx = make(select)
        state = tx.init(params)
        for _ in range(6):
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
        return params

    def loss(kernels):
        y = x
        for kernel in kernels:
            y = jnp.tanh(y @ kernel)
        return jnp.sum(jnp.cos(y))

    alone = {str(i): {"kernel": jnp.asarray(kernel)} for i, kernel in enumerate(stack)}
    expected = trained(lambda params: loss([params[str(i)]["kernel"] for i in range(3)]), alone, None)
    stacked = {"kernel": jnp.asarray(stack)}
    found = trained(lambda params: loss(params["kernel"]), stacked, lambda path, leaf: (0,))["kernel"]
    for i in range(3):
        # Of saturated units gradients are near Adam's epsilon, where it magnifies rounding.
        np.testing.assert_allclose(found[i], expected[str(i)]["kernel"], rtol=1e-6)
    shared = trained(lambda params: loss(params["kernel"]), stacked, None)["kernel"]
    assert np.abs(np.linalg.norm(shared, axis=(1, 2)) / np.linalg.norm(stack, axis=(1, 2)) - 1).max() > 0.01


def test_what_the_inner_optimizer_asks_for_comes_through_and_numbers_may_be_injected(x64):
    plateau = lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau(factor=0.5, patience=1))  # noqa: E731
    for tx, outside in (
        (lawn(plateau(optax.sgd(0.1)), 9), plateau(optax.sgd(0.1))),
        (optax.inject_hyperparams(lawn)(inner=plateau(optax.sgd(0.1)), free_steps=9), plateau(optax.sgd(0.1))),
    ):
        params, expected = PARAMS, PARAMS
        state, other = tx.init(params), outside.init(expected)
        for _ in range(5):  # a value that does not fall: the rate is halved
            updates, state = tx.update(jax.grad(_loss)(params), state, params, value=1.0)
            params = optax.apply_updates(params, updates)
            updates, other = outside.update(jax.grad(_loss)(expected), other, expected, value=1.0)
            expected = optax.apply_updates(expected, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), params, expected)
    rate = lambda step: 0.1 / (1 + step)  # noqa: E731
    injected, _ = _steps(optax.inject_hyperparams(hyperball)(direction=optax.scale_by_adam(), learning_rate=rate), 4)
    plain, _ = _steps(hyperball(optax.scale_by_adam(), rate), 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), injected[-1], plain[-1])  # a float32 rate
