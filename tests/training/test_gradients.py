"""Microbatches against the whole batch, in double precision, and what each method may expect of them."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mimicnorm_jax import models
from mimicnorm_jax.data import Augmentation, Batch
from mimicnorm_jax.linen import LastBatchNorm
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.models import LastBatchNormHead, LayerFactory
from mimicnorm_jax.models.head import LAST_BN
from mimicnorm_jax.training import AXIS, StepConfig, train_step
from mimicnorm_jax.training.gradients import LossAndGrad
from tests.conftest import also
from tests.diagnostics.networks import filled
from tests.training.runs import create_state

pytestmark = pytest.mark.usefixtures("short")
SHAPE = (8, 8, 1)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (16, *SHAPE)).astype(np.uint8)
LABELS = RNG.integers(0, 5, 16).astype(np.int32)


SURER = replace(METHODS["mimicnorm"], logit_scale=2.0)


def _model(method, axis_name=None):
    options = {"dtype": jnp.float64, "param_dtype": jnp.float64, "running_variance": "unbiased"}
    return models.create("short", method=method, num_classes=5, width=0.25, axis_name=axis_name, **options)


def _close(a, b):
    # Sums in another order in double precision.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10), a, b)


def _furthest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(abs(x - y).max()), a, b)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("devices", "sync", "count"), [(1, False, 4), (2, True, 4), also(2, True, 2), (2, False, 2)])
def test_a_step_in_microbatches_is_the_step_on_the_whole_batch(devices, sync, count):
    """At a learning rate of 1 the new parameters are the old ones minus the gradient."""
    config = StepConfig(
        model=_model(SURER, AXIS if sync else None),
        tx=optax.sgd(1.0),
        augmentation=Augmentation(1, True),
        mean=(0.5,),
        std=(0.25,),
        dtype=jnp.float64,
        label_smoothing=0.1,
    )
    state = create_state(config.model, config.tx, SHAPE, seed=0, ema=False)

    batch = Batch(IMAGES.reshape(devices, -1, *SHAPE), LABELS.reshape(devices, -1))
    whole, in_parts = (
        jax.device_get(jax.pmap(partial(train_step, part, state), AXIS, devices=jax.local_devices()[:devices])(batch))
        for part in (replace(config, microbatches=n) for n in (1, count))
    )
    assert _furthest(jax.tree.map(lambda leaf: leaf[0], whole[0].params), state.params) > 1e-2
    _close(in_parts, whole)


@pytest.mark.usefixtures("x64")
def test_batchnorm_in_microbatches_is_the_mean_of_what_each_gives_alone():
    model, key = _model("batchnorm"), jax.random.key(0)
    images, labels = jnp.asarray(IMAGES / 255.0), jnp.asarray(LABELS)
    variables = filled(model, images[:1])
    params, stats = variables["params"], variables["batch_stats"]
    alone = jax.jit(LossAndGrad(model).gradient)
    first = alone(params, stats, images[:8], labels[:8], key)
    second = alone(params, first.batch_stats, images[8:], labels[8:], key)
    found = jax.jit(LossAndGrad(model, microbatches=2).gradient)(params, stats, images, labels, key)
    _close(found.grads, jax.tree.map(lambda a, b: (a + b) / 2, first.grads, second.grads))
    _close(found.batch_stats, second.batch_stats)
    _close(found.logits, jnp.concatenate([first.logits, second.logits]))
    whole = alone(params, stats, images, labels, key)
    assert _furthest(found.grads, whole.grads) > 1e-3


class _Dropping(LastBatchNormHead, nn.Module):
    factory: LayerFactory
    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train):
        make = self.factory
        x = make.dense(32, name="dense")(x.reshape(len(x), -1))
        return make.logits(make.classifier(5)(make.dropout(self.rate, train, name="dropout")(x)), train)


@pytest.mark.usefixtures("x64")
def test_both_passes_drop_the_same_units_and_microbatches_drop_different_ones():
    model = _Dropping(_model("lastbn").factory)
    images, labels = jnp.asarray(IMAGES / 255.0), jnp.asarray(LABELS)
    key = jax.random.key(1)
    variables = filled(model, images, train=False)
    body = _Dropping(_model("none").factory)

    def loss(params):
        raw = [
            body.apply({"params": params}, part, True, rngs={"dropout": jax.random.fold_in(key, i)})
            for i, part in enumerate(jnp.split(images, 2))
        ]
        logits, _ = LastBatchNorm(False).apply(
            {"batch_stats": variables["batch_stats"][LAST_BN]}, jnp.concatenate(raw), mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    gradient = jax.jit(LossAndGrad(model, microbatches=2).gradient)
    params, stats = variables["params"], variables["batch_stats"]
    found = gradient(params, stats, images, labels, key)
    _close(found.grads, jax.jit(jax.grad(loss))(params))
    twice = [jnp.concatenate([half, half]) for half in (images[:8], labels[:8])]
    first, second = jnp.split(gradient(params, stats, *twice, key).logits, 2)
    assert float(abs(first - second).max()) > 0.1


@pytest.mark.usefixtures("x64")
def test_without_any_batchnorm_microbatches_change_nothing():
    model = _Dropping(_model("none").factory, rate=0.0)
    images, labels = jnp.asarray(IMAGES / 255.0), jnp.asarray(LABELS)
    params = filled(model, images, train=False)["params"]
    whole, parts = (
        jax.jit(LossAndGrad(model, 0.1, count).gradient)(params, {}, images, labels, jax.random.key(1))
        for count in (1, 4)
    )
    _close(parts, whole)


def test_microbatches_take_the_memory_of_one():
    model = models.create("short", num_classes=5, width=0.25)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *SHAPE)))
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = [jax.ShapeDtypeStruct((512, *shape), dtype) for shape, dtype in ((SHAPE, jnp.float32), ((), jnp.int32))]

    def temporary(parts):
        gradient = jax.jit(LossAndGrad(model, microbatches=parts).gradient)
        compiled = gradient.lower(shapes["params"], shapes["batch_stats"], *batch, key).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, eighth = temporary(1), temporary(8)
    assert eighth < whole / 4


def test_images_that_do_not_split_are_refused():
    model = models.create("short", num_classes=5)
    with pytest.raises(ValueError, match="16 images do not split into 3 equal microbatches"):
        LossAndGrad(model, microbatches=3).gradient({}, {}, jnp.zeros((16, *SHAPE)), jnp.zeros(16), jax.random.key(0))
