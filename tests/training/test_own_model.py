"""Networks of a user's own through the public entry point, against SGD written by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mimicnorm_jax import data, training
from mimicnorm_jax.data.batching import epoch_order, train_batches
from mimicnorm_jax.errors import ConfigError, NonFiniteLossError
from mimicnorm_jax.linen import Dropout
from mimicnorm_jax.models import SplitNetwork
from mimicnorm_jax.training import read_config, read_metrics, report
from mimicnorm_jax.training.optimizer import make_optimizer, make_schedule
from mimicnorm_jax.training.resilience import Checkpoints
from tests.training.runs import stopped_after_a_save


class Plain(nn.Module):
    """Neither `train` nor running averages."""

    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(images))
        return nn.Dense(10)(x.reshape(len(x), -1))


class Normalized(nn.Module):
    """A BatchNorm of its own, over all devices."""

    @nn.compact
    def __call__(self, images, train):
        x = nn.Conv(8, (3, 3), strides=2)(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=training.AXIS if train else None)(x)
        return nn.Dense(10)(nn.relu(x).mean((1, 2)))


def _config(**fields):
    return training.validate(training.base(**{"epochs": 1, "batch_size": 256, "warmup_epochs": 1.0} | fields))


def _by_hand(config, model):
    """One epoch on one device in plain Flax and Optax."""
    dataset = data.load("digits")
    options = {"train": True} if isinstance(model, Normalized) else {}
    variables = model.init(jax.random.key(config.seed), jnp.zeros((1, 8, 8, 1)), *[False] * len(options))
    params, stats = variables["params"], variables.get("batch_stats", {})
    tx = make_optimizer(config, make_schedule(config, len(dataset.train) // config.batch_size))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, stats, opt_state, images, labels):
        def loss(params):
            found = {"params": params, "batch_stats": stats}
            call = jax.vmap(
                lambda images: model.apply(found, images, mutable=["batch_stats"], **options),
                axis_name=training.AXIS,
                out_axes=(0, None),
            )
            logits, updated = call(images[None])
            return optax.softmax_cross_entropy_with_integer_labels(logits[0], labels).mean(), updated

        grads, updated = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), updated.get("batch_stats", {}), opt_state

    for index in train_batches(epoch_order(config.seed, 0, len(dataset.train)), config.batch_size, 1):
        images = (dataset.train.images[index[0]] / 255 - dataset.mean) / dataset.std
        batch = jnp.asarray(images, jnp.float32), dataset.train.labels[index[0]]
        params, stats, opt_state = step(params, stats, opt_state, *batch)
    return params, stats


@pytest.mark.parametrize("model", [Plain(), Normalized()], ids=lambda model: type(model).__name__)
def test_a_module_of_your_own_trains_as_by_hand_is_saved_and_evaluated(tmp_path, model):
    config = _config()
    training.run(config, tmp_path, model)
    saved = read_config(tmp_path)
    assert (saved.model, saved.method) == (type(model).__name__, "own")
    spec = training.build_spec(config, model=model)
    with Checkpoints(tmp_path / "checkpoints", 1) as checkpoints:
        state, _ = checkpoints.restore(5, spec.state_template())
    expected = _by_hand(config, model)
    # Float32 sums over four devices in another order, five steps.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, (state.params, state.batch_stats), expected)
    (row,) = read_metrics(tmp_path)
    results = training.evaluate_checkpoints(saved, tmp_path, model)
    assert results["latest"]["test_accuracy"] == row["test_accuracy"]
    with pytest.raises(ConfigError, match="a network of its own"):
        training.evaluate_checkpoints(saved, tmp_path)


@pytest.mark.parametrize(("model", "is_exact"), [(Plain(), True), (Normalized(), False)])
def test_microbatches_are_exact_where_no_statistics_join_examples_and_else_the_headline_says_so(model, is_exact):
    config = _config(microbatches=2, batch_size=64)
    trainers = [training.build_trainer(training.build_spec(fields, model=model)) for fields in (config, _whole(config))]
    states = []
    for trainer in trainers:
        state = trainer.data_parallel.replicate(trainer.spec.init_state())
        feed, num_steps = next(trainer.pipeline.train_feeds(0, 0))
        # The first step has learning rate 0: it is the second that moves.
        for _ in range(2):
            state, _ = trainer.train_steps(state, trainer.pipeline.train, feed, num_steps)
        states.append(jax.device_get(state))
    differences = jax.tree.map(lambda a, b: float(abs(a - b).max()), *(state.params for state in states))
    assert (max(jax.tree.leaves(differences)) < 1e-7) == is_exact  # float32 of order 1e-3 in another order
    said = ": the gradient of the whole batch" if is_exact else "not the gradient of the whole batch"
    assert said in report.headline(trainers[0], states[0], "folder")


def _whole(config):
    return dataclasses.replace(config, microbatches=1)


class Headed(nn.Module):
    """Declares its norm on the logits as the one place where examples meet."""

    has_head: bool = True

    @nn.compact
    def __call__(self, images, train=False):
        logits = nn.Dense(10)(images.reshape(len(images), -1))
        return _norm(not train)(logits) if self.has_head else logits

    @nn.nowrap
    def split_head(self):
        return SplitNetwork(Headed(has_head=False), _norm(False), "norm")


def _norm(use_running_average):
    return nn.BatchNorm(
        use_running_average, use_bias=False, use_scale=False, axis_name=None if use_running_average else training.AXIS,
        name="norm",
    )  # fmt: skip


def test_a_declared_head_makes_microbatches_exact():
    config = _config(microbatches=4, batch_size=64)
    states = []
    for fields in (config, _whole(config)):
        trainer = training.build_trainer(training.build_spec(fields, model=Headed()))
        state = trainer.data_parallel.replicate(trainer.spec.init_state())
        feed, num_steps = next(trainer.pipeline.train_feeds(0, 0))
        for _ in range(2):
            state, _ = trainer.train_steps(state, trainer.pipeline.train, feed, num_steps)
        states.append(jax.device_get(state))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *states)


class Dropping(nn.Module):
    ours: bool
    seen: Any

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(64)(jnp.ones((len(images), 1)))
        if train:
            x = Dropout(0.5, training.AXIS)(x) if self.ours else nn.Dropout(0.5, deterministic=False)(x)
            jax.debug.callback(self.seen, jax.lax.axis_index(training.AXIS), x == 0)
        return nn.Dense(10)(x)


@pytest.mark.parametrize("ours", [False, True])
def test_every_device_drops_units_of_its_own(ours):
    found = {}
    model = Dropping(ours, lambda device, dropped: found.update({int(device): np.asarray(dropped)}))
    trainer = training.build_trainer(training.build_spec(_config(batch_size=32), model=model))
    state = trainer.data_parallel.replicate(trainer.spec.init_state())
    feed, _ = next(trainer.pipeline.train_feeds(0, 0))
    jax.block_until_ready(trainer.train_steps(state, trainer.pipeline.train, feed, 1))
    jax.effects_barrier()
    masks = np.concatenate([found[device] for device in range(4)])
    assert masks.shape == (32, 64)
    assert len(np.unique(masks, axis=0)) == 32
    assert 0.4 < masks.mean() < 0.6  # nine standard deviations of 2,048 draws


class Bursting(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        logits = nn.Dense(10)(images.reshape(len(images), -1))
        return logits * jnp.where(train & (images[0].mean() > 0.2), jnp.nan, 1.0)


def test_the_logged_learning_rate_is_that_of_the_optimizer_where_steps_were_left_out(tmp_path, monkeypatch):
    """Before and after a run goes on from a checkpoint."""
    config = _config(epochs=2, batch_size=64, schedule="cosine", max_consecutive_nonfinite=1000)

    with stopped_after_a_save(monkeypatch):
        training.run(config, tmp_path, Bursting())
    training.run(config, tmp_path, Bursting())
    spec = training.build_spec(config, model=Bursting())
    schedule = make_schedule(config, 22)
    with Checkpoints(tmp_path / "checkpoints", 2) as checkpoints:
        for row in read_metrics(tmp_path):
            state, metadata = checkpoints.restore(row["step"], spec.state_template())
            (count,) = {int(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0}
            assert 0 < metadata.skipped == row["step"] - count
            assert row["learning_rate"] == float(schedule(count - 1))


class Broken(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(10)(images.reshape(len(images), -1)) * (jnp.nan if train else 1.0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's
def test_steps_left_out_in_a_row_are_counted_on_where_a_run_goes_on(tmp_path, monkeypatch):
    """One step an epoch: stopped after the first, as many are left as without."""
    config = _config(epochs=5, batch_size=1024, max_consecutive_nonfinite=2)
    with stopped_after_a_save(monkeypatch):
        training.run(config, tmp_path, Broken())
    with pytest.raises(NonFiniteLossError, match="not finite at step 3 "):
        training.run(config, tmp_path, Broken())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's
def test_a_run_with_a_network_of_its_own_is_read_with_that_network(tmp_path):
    config = _config()
    summary = training.run(config, tmp_path / "first", Plain())
    saved = read_config(tmp_path / "first")
    for asked in (training.build_spec, lambda config: training.evaluate_checkpoints(config, tmp_path / "first")):
        with pytest.raises(ConfigError, match=r"has a network of its own, Plain, .* Give the network as model="):
            asked(saved)
    found = training.evaluate_checkpoints(saved, tmp_path / "first", Plain())
    assert found["latest"]["test_accuracy"] == summary["final_accuracy"]
    # A learning rate of nearly 0: what is evaluated is what the run started from.
    again = _config(init_from=str(tmp_path / "first"), learning_rate=1e-30, momentum=0.0)
    assert training.run(again, tmp_path / "second", Plain())["final_accuracy"] == summary["best_accuracy"]


class Training(nn.Module):
    @nn.compact
    def __call__(self, images, training=False):
        return nn.Dense(10)(images.reshape(len(images), -1))


class Remembering(nn.Module):
    @nn.compact
    def __call__(self, images):
        self.variable("cache", "seen", jnp.zeros, ())
        return nn.Dense(10)(images.reshape(len(images), -1))


class Noisy(nn.Module):
    """Draws from a stream that no step gives it."""

    @nn.compact
    def __call__(self, images, train=False):
        noise = jax.random.normal(self.make_rng("noise"), images.shape) if train else 0.0
        return nn.Dense(10)((images + noise).reshape(len(images), -1))


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (Noisy(), {}, r"the network Noisy .*\"noise\""),
        (Plain(), {"method": "batchnorm"}, "config.method is 'batchnorm', but the run has a network of its own, Plain"),
        (Training(), {}, "the network Training takes training besides images"),
        (Remembering(), {}, "variables in the collection 'cache'"),
        (nn.Dense(10), {}, r"the network Dense maps 2 images to an array of shape \(2, 8, 8, 10\)"),
        (nn.Conv(10, (3,)), {}, "the network Conv"),
        (Normalized(), {"microbatches": 16, "batch_size": 64}, "microbatches is 16"),
        (Plain(), {"diagnostics_epochs": 1.0}, "config.diagnostics_epochs asks for diagnostics"),
    ],
)
def test_what_would_not_train_as_meant_is_refused(tmp_path, model, fields, message):
    with pytest.raises(ConfigError, match=message):
        training.run(_config(**fields), tmp_path / "new", model)
    assert not (tmp_path / "new").exists()
