"""Schedules by hand, SGD by hand, and the two ways to keep kernels centered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mimicnorm_jax import models
from mimicnorm_jax.errors import ConfigError
from mimicnorm_jax.optim import center_params, keep_kernels_centered, select_conv_kernels
from mimicnorm_jax.training import build_spec, config
from mimicnorm_jax.training.optimizer import make_optimizer, make_schedule, not_classifier
from tests.conftest import also
from tests.diagnostics.networks import filled

pytestmark = pytest.mark.usefixtures("short")


def test_step_schedule_by_hand():
    fields = config.validate(
        config.base(epochs=10, warmup_epochs=2.0, schedule="step", decay_epochs=(4, 7), learning_rate=0.2)
    )
    schedule = make_schedule(fields, steps_per_epoch=5)
    expected = [0.02 * step for step in range(10)] + [0.2] * 10 + [0.02] * 15 + [0.002] * 15
    np.testing.assert_allclose([float(schedule(step)) for step in range(50)], expected, rtol=1e-5)


def test_linear_schedule_by_hand():
    fields = config.validate(config.base(epochs=4, warmup_epochs=0.0, schedule="linear", learning_rate=0.3))
    schedule = make_schedule(fields, steps_per_epoch=5)
    expected = [0.3 * (1 - step / 20) for step in range(21)]
    np.testing.assert_allclose([float(schedule(step)) for step in range(21)], expected, rtol=1e-5, atol=1e-8)


def test_cosine_schedule_by_hand():
    fields = config.validate(config.base(epochs=10, warmup_epochs=1.0, schedule="cosine", learning_rate=0.2))
    schedule = make_schedule(fields, steps_per_epoch=5)
    expected = [0.04 * step for step in range(5)] + [0.1 * (1 + np.cos(np.pi * s / 45)) for s in range(46)]
    np.testing.assert_allclose([float(schedule(step)) for step in range(51)], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_clipping_and_coupled_decay_by_hand(nesterov, x64):
    fields = config.validate(config.base(momentum=0.8, nesterov=nesterov, weight_decay=0.01, clip_norm=0.5))
    tx = make_optimizer(fields, lambda step: 0.1)
    w = np.array([1.0, -2.0])
    params, state, buffer = jnp.asarray(w), None, np.zeros(2)
    state = tx.init(params)
    for g in (np.array([3.0, 4.0]), np.array([0.1, -0.2]), np.array([0.0, 0.3])):
        updates, state = tx.update(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
        d = g * min(1, 0.5 / np.linalg.norm(g)) + 0.01 * w
        buffer = 0.8 * buffer + d
        w = w - 0.1 * (d + 0.8 * buffer if nesterov else buffer)
    np.testing.assert_allclose(params, w, rtol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "lion"])
@pytest.mark.parametrize("constraint", ["lawn", "hyperball"])
def test_constraints_keep_the_kernels_norms_from_where_they_begin(optimizer, constraint, x64):
    """LAWN after two of three epochs of two steps; a bias moves all the time."""
    fields = config.validate(
        config.base(optimizer=optimizer, constraint=constraint, free_epochs=2.0, weight_decay=0.0, momentum=0.5)
    )
    tx = make_optimizer(fields, lambda step: 0.1, steps_per_epoch=2)
    rng = np.random.default_rng(0)
    params = {"layer": {"kernel": jnp.asarray(rng.normal(size=(4, 3))), "bias": jnp.zeros(3)}}
    state, norms = tx.init(params), []
    for _ in range(6):
        before = params
        gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        norms.append(float(jnp.linalg.norm(params["layer"]["kernel"])))
        assert abs(params["layer"]["bias"] - before["layer"]["bias"]).min() > 0
    kept = norms[3:] if constraint == "lawn" else norms
    np.testing.assert_allclose(kept, kept[0], rtol=1e-13)
    assert (constraint == "lawn") == (abs(norms[0] / norms[3] - 1) > 1e-3)


def test_adaptive_clipping_bounds_every_unit_but_the_classifiers(x64):
    """A column's gradient is at most 0.1 of the column (at least 1e-3), and smaller ones pass."""
    fields = config.validate(config.base(adaptive_clip=0.1, weight_decay=0.0, momentum=0.0))
    tx = make_optimizer(fields, lambda step: 1.0)
    kernel = jnp.array([[3.0, 0.1], [4.0, 0.0]])
    gradient = jnp.array([[30.0, 0.001], [40.0, 0.0]])
    params = {name: {"kernel": kernel} for name in ("dense1", "classifier")}
    updates, _ = tx.update({name: {"kernel": gradient} for name in params}, tx.init(params), params)
    np.testing.assert_allclose(updates["dense1"]["kernel"], [[-0.3, -0.001], [-0.4, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(updates["classifier"]["kernel"], -gradient)


FAMILIES = (
    "vgg11",
    "mobilenetv2",
    "shufflenetv2_x0.5",
    "densenet121",
    "seresnet18",
    "reactnet8",
    "reactnet_a_imagenet",
)


@pytest.mark.parametrize("name", ["resnet8", "squeezenet", *map(also, FAMILIES)])
def test_what_adaptive_clipping_leaves_alone_is_what_gives_the_logits(name):
    """Dense or convolutional, in every family of networks; nothing else has as many outputs as classes here."""
    model = models.create(name, method="none", num_classes=7, width=0.25)
    size = models.ARCHITECTURES[name].stride
    params = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), "float32"))
    clipped = not_classifier(params["params"])
    logits = jax.tree.map(lambda leaf: leaf.ndim > 0 and leaf.shape[-1] == 7, params["params"])
    assert jax.tree.map(lambda leaf: not leaf, clipped) == logits
    assert any(jax.tree.leaves(logits))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"constraint": "lawn"}, r"config\.constraint is 'lawn'.*config\.weight_decay is 0\.0005, which would shrink"),
        ({"free_epochs": 2.0}, r"config\.free_epochs is 2\.0, of config\.constraint='lawn'"),
        ({"free_epochs": 2.0, "constraint": "hyperball", "weight_decay": 0.0}, r"config\.free_epochs is 2\.0"),
    ],
)
def test_a_constraint_with_weight_decay_and_a_free_phase_of_none_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        build_spec(config.validate(config.base(model="short", **fields)), num_devices=1)


def test_adamw_and_lion_decouple_their_decay_and_adam_does_not(x64):
    """With a zero gradient the decoupled ones shrink by rate times decay; the coupled one takes a step of sign."""
    found = {}
    for optimizer in ("adam", "adamw", "lion"):
        tx = make_optimizer(config.validate(config.base(optimizer=optimizer, weight_decay=0.01)), lambda step: 0.1)
        params = jnp.array([2.0, -1.0])
        found[optimizer], _ = tx.update(jnp.zeros(2), tx.init(params), params)
    np.testing.assert_allclose(found["adam"], [-0.1, 0.1], rtol=1e-5)
    for optimizer in ("adamw", "lion"):
        np.testing.assert_allclose(found[optimizer], [-0.002, 0.001], rtol=1e-9)


@pytest.mark.parametrize("constraint", ["none", "lawn"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "lion"])
def test_scalars_move_as_at_their_own_rate_and_decay_and_the_rest_as_ever(optimizer, constraint, x64):
    """With both fields a scalar moves as in a run at a third of the rate without decay, a vector as in a plain run."""
    decay = 0.0 if constraint == "lawn" else 0.1
    about = {"optimizer": optimizer, "constraint": constraint, "free_epochs": float(constraint == "lawn")}
    rng = np.random.default_rng(0)
    gradients = [{"scale": jnp.asarray(rng.normal()), "bias": jnp.asarray(rng.normal(size=3))} for _ in range(4)]

    def after(rate, **fields):
        tx = make_optimizer(config.validate(config.base(**about, **fields)), lambda step: rate, steps_per_epoch=2)
        params = {"scale": jnp.asarray(2.0), "bias": jnp.arange(1.0, 4.0)}
        state = tx.init(params)
        for gradient in gradients:
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    found = after(0.3, weight_decay=decay, scalar_rate=1 / 3, decay_scalars=False)
    np.testing.assert_allclose(found["scale"], after(0.1, weight_decay=0.0)["scale"], rtol=1e-12)
    np.testing.assert_allclose(found["bias"], after(0.3, weight_decay=decay)["bias"], rtol=1e-12)
    assert after(0.3, weight_decay=decay, scalar_rate=0.0)["scale"] == 2.0


@pytest.mark.parametrize("field", [{"scalar_rate": 0.1}, {"decay_scalars": False}])
def test_a_network_without_scalars_has_none_that_could_be_treated_apart(field):
    fields = {"dataset": "digits", "model": "short", "width_multiplier": 0.25, **field}
    assert build_spec(config.validate(config.base(**fields)), num_devices=1)
    with pytest.raises(ConfigError, match=rf"config\.{next(iter(field))} is .*\.method='batchnorm'"):
        build_spec(config.validate(config.base(**fields, method="batchnorm")), num_devices=1)


@functools.cache
def _model(center_in_call):
    """A small MimicNorm ResNet, and its gradient, which is compiled once for all optimizers."""
    model = models.create(
        "short", num_classes=5, width=0.25, dtype=float, param_dtype=float, center_in_call=center_in_call
    )

    @jax.jit
    def gradient(params, stats, images, labels):
        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updated["batch_stats"]

        return jax.grad(loss, has_aux=True)(params)

    return model, gradient


CONV_KERNELS = select_conv_kernels(window=2)
_center = jax.jit(functools.partial(center_params, select=CONV_KERNELS))


def _trajectory(tx_of, center_in_call, start_centered):
    """Parameters after 20 steps, centered for comparison."""
    model, gradient = _model(center_in_call)
    images = jax.random.normal(jax.random.key(1), (4, 6, 4, 4, 3), float)
    labels = jax.random.randint(jax.random.key(2), (4, 6), 0, 5)
    variables = filled(model, images[0])
    params, stats = variables["params"], variables["batch_stats"]
    if start_centered:
        params = _center(params)
    tx = tx_of(optax.identity() if center_in_call else keep_kernels_centered(CONV_KERNELS))
    state = tx.init(params)

    @jax.jit
    def update(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(20):
        grads, stats = gradient(params, stats, images[i % 4], labels[i % 4])
        params, state = update(grads, state, params)
    return _center(params), stats


def _largest_difference(inside, after):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), inside, after)))


def test_centering_in_the_call_equals_centering_after_the_step_for_sgd(x64):
    """With momentum, Nesterov and coupled weight decay, from a centered start or a raw one."""
    fields = config.validate(config.base(nesterov=True, weight_decay=5e-4))

    def tx_of(last):
        return optax.chain(make_optimizer(fields, lambda step: 0.1), last)

    after = _trajectory(tx_of, False, True)
    for start_centered in (True, False):
        assert _largest_difference(_trajectory(tx_of, True, start_centered), after) < 1e-9


@pytest.mark.parametrize(
    "tx", [optax.adam(1e-2), also(optax.adamw(1e-2)), optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1))]
)
def test_for_adam_and_clipped_sgd_the_two_are_different_algorithms(tx, x64):
    inside, after = (_trajectory(lambda last: optax.chain(tx, last), in_call, True) for in_call in (True, False))
    assert _largest_difference(inside, after) > 1e-4


def test_the_config_puts_the_projection_into_the_optimizer():
    params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 8, 4))}
    tx = make_optimizer(config.validate(config.base()), lambda step: 0.1, centered=CONV_KERNELS)
    updates, _ = tx.update(params, tx.init(params), params)
    kernel = optax.apply_updates(params, updates)["kernel"]
    assert abs(kernel.sum((0, 1, 2))).max() < 1e-4  # float32, 72 numbers of order 1


@pytest.mark.parametrize("name", ["vgg11_imagenet", "shufflenetv2_x0.5_imagenet", "resnet8"])
def test_what_is_centered_after_a_step_is_what_the_network_would_center(name):
    """Where the two differ in one kernel they are two functions; export and diagnostics build the one that centers."""
    fields = {"model": name, "dataset": "cifar10", "width_multiplier": 0.125}
    after, inside = (
        build_spec(config.validate(config.base(**fields, centering=where))) for where in ("after_step", "in_call")
    )
    state = after.init_state()
    raw = inside.init_state()
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))

    def logits(spec, params):
        return jax.jit(spec.model.apply)({"params": params, "batch_stats": state.batch_stats}, images)

    expected = logits(inside, raw.params)
    scale = float(abs(expected).max())
    np.testing.assert_allclose(logits(after, state.params), expected, atol=1e-4 * scale)
    moved = jax.tree.map(lambda leaf: leaf + 1, state.params)
    updates, _ = make_optimizer(after.config, lambda step: 0.0, centered=after.centered).update(
        jax.tree.map(jnp.zeros_like, moved), after.make_step(8, (), ())[0].tx.init(moved), moved
    )
    changed = {path for path, leaf in jax.tree.leaves_with_path(updates) if abs(leaf).max() > 0.5}
    apart = jax.tree.map(jnp.subtract, raw.params, state.params)
    was = {path for path, leaf in jax.tree.leaves_with_path(apart) if leaf.any()}
    assert changed == was
