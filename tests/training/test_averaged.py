"""Running averages of the averaged network, against moments of what its norms are given."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mimicnorm_jax.data import batching, datasets, normalize
from mimicnorm_jax.linen import LastBatchNorm
from mimicnorm_jax.training import Metrics, averaged, build_spec, build_trainer, loop, parallel, trainer
from mimicnorm_jax.training.spec import make_model
from tests.conftest import also
from tests.training.runs import restored, small_config

# Orbax leaves coroutines behind where it reads, and where a file that it reads is missing.
pytestmark = [
    pytest.mark.usefixtures("short"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PLAIN = {"crop_padding": 0, "rotation": 0.0}
DEVICES = 4


def _groups(fields, num_batches, epoch=0):
    """Normalized images that one norm sees at a time, of an epoch's first batches."""
    digits = datasets.load("digits")
    order = batching.epoch_order(fields.seed, epoch, len(digits.train))
    parts = 1 if fields.method == "mimicnorm" else fields.microbatches
    for batch in list(batching.train_batches(order, fields.batch_size, DEVICES))[:num_batches]:
        seen = batch.reshape(DEVICES, parts, -1).swapaxes(0, 1)
        for index in seen.reshape(parts, -1) if fields.sync_bn else seen.reshape(parts * DEVICES, -1):
            yield normalize(jnp.asarray(digits.train.images[index]), digits.mean, digits.std)


def _by_hand(model, params, batch_stats, groups):
    """By a norm's path: mean and variance of what it is given in training, averaged over groups."""
    found = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm | LastBatchNorm) and context.method_name == "__call__":
            given = np.asarray(args[0], np.float64).reshape(-1, args[0].shape[-1])
            found.setdefault(context.module.path, []).append((given.mean(0), given.var(0)))
        return call(*args, **kwargs)

    for images in groups:
        with nn.intercept_methods(note):
            model.apply({"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"])
    return {path: np.mean(moments, 0) for path, moments in found.items()}


def _assert_by_hand(fields, state, num_batches, epoch=0):
    groups = _groups(fields, num_batches, epoch)
    expected = _by_hand(make_model(fields, datasets.get_spec("digits")), state.ema_params, state.batch_stats, groups)
    paths = jax.tree.leaves_with_path(state.ema_batch_stats)
    assert len(paths) == 2 * len(expected)
    for path, leaf in paths:
        *norm, kind = (key.key for key in path)
        moments = expected[tuple(norm)][("mean", "var").index(kind)]
        # Float32 activations through some layers; variances differ by orders of magnitude from the raw network's.
        np.testing.assert_allclose(leaf, moments, rtol=2e-4, atol=1e-4 * np.abs(moments).max(), err_msg=str(path))


def _another_network(state):
    """The averaged network moved away from the raw one."""
    return replace(state, ema_params=jax.tree.map(lambda leaf: 1.5 * leaf + 0.01, state.ema_params))


def _estimated(fields, state=None, model=None):
    run = build_trainer(build_spec(fields, model=model))
    state = _another_network(run.spec.init_state()) if state is None else state
    return jax.device_get(averaged.with_own_statistics(run, run.data_parallel.replicate(state), 0))


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"microbatches": 4}, 50),
        ({"method": "batchnorm", "steps_per_call": 2}, 3),
        ({"method": "batchnorm", "microbatches": 2}, 2),
        also({"method": "batchnorm", "sync_bn": False}, 2),
        also({"sync_bn": False}, 22),
        also({"method": "batchnorm", "parallelism": "shard_map"}, 2),
    ],
)
def test_statistics_are_the_mean_of_the_batches_moments(fields, limit, monkeypatch):
    fields = small_config(**PLAIN, **fields)
    monkeypatch.setattr(averaged, "MAX_BATCHES", limit)
    _assert_by_hand(fields, _estimated(fields), min(limit, 22))


@pytest.fixture(scope="module")
def run(short, tmp_path_factory):
    """The config and the last state of a short run with a long memory."""
    fields = small_config(**PLAIN, ema_decay=0.98, epochs=3)
    folder = tmp_path_factory.mktemp("run")
    summary = loop.run(fields, folder)
    return fields, restored(folder, fields)[0], summary


def test_a_runs_checkpoint_has_them(run):
    fields, state, _ = run
    _assert_by_hand(fields, state, 22, epoch=fields.epochs - 1)


def test_the_averaged_network_is_evaluated_far_better_than_with_the_raw_ones_statistics(run):
    fields, state, summary = run
    digits = datasets.load("digits")
    images, labels = normalize(jnp.asarray(digits.test.images), digits.mean, digits.std), digits.test.labels

    def loss(variables):
        model = make_model(fields, datasets.get_spec("digits"))
        return Metrics.from_logits(model.apply(variables, images, train=False), labels).loss

    own = loss(state.eval_variables)
    np.testing.assert_allclose(own, summary["final_test_loss"], rtol=1e-3)
    assert loss({"params": state.ema_params, "batch_stats": state.batch_stats}) > 1.5 * own


@pytest.mark.parametrize("method", ["mimicnorm", also("batchnorm")])
def test_four_devices_find_what_one_finds(method, monkeypatch):
    fields = small_config(method=method)
    four = _estimated(fields)
    every = parallel.DataParallel
    monkeypatch.setattr(trainer.parallel, "DataParallel", lambda devices, kind: every(devices[:1], kind))
    one = _estimated(fields)
    # Float32 sums in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), four.ema_batch_stats, one.ema_batch_stats
    )


class _Noting(nn.Module):
    """Keeps averages of momentum 0.5, 0 and 0.999, a count, a largest value and an integer."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(10, use_bias=False)(x.reshape(len(x), -1))
        start = {"half": 2.0, "last": 2.0, "slow": 2.0, "count": 2.0, "largest": 2.0, "whole": 2}
        notes = {name: self.variable("batch_stats", name, jnp.asarray, value) for name, value in start.items()}
        if train:
            mean = jnp.square(x).mean() * 100
            for name, m in {"half": 0.5, "last": 0.0, "slow": 0.999}.items():
                notes[name].value = m * notes[name].value + (1 - m) * mean
            notes["count"].value += 1
            notes["largest"].value = jnp.maximum(notes["largest"].value, mean)
            notes["whole"].value += 1
        return x


def test_what_is_no_average_keeps_the_raw_runs_value():
    fields = replace(small_config(**PLAIN), width_multiplier=1.0, model="_Noting", method="own")
    found = _estimated(fields, model=_Noting()).ema_batch_stats
    assert (found["count"], found["whole"], found["largest"]) == (2.0, 2, 2.0)
    assert found["whole"].dtype == np.int32
    np.testing.assert_allclose(found["half"], found["last"], rtol=1e-5)
    np.testing.assert_allclose(found["slow"], found["last"], rtol=1e-3)
    assert found["last"] > 10


class _Frozen(nn.Module):
    """A norm that evaluates between two layers, and the last BatchNorm."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(10)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=True, name="frozen")(x)
        return LastBatchNorm(momentum=0.9, use_running_average=not train, name="last")(nn.Dense(10)(x))


def test_averages_behind_a_frozen_norm_are_those_of_the_network_that_has_it():
    fields = replace(small_config(**PLAIN), width_multiplier=1.0, model="_Frozen", method="own")
    state = _another_network(build_spec(fields, model=_Frozen()).init_state())
    frozen = {"mean": jnp.full(10, 0.3), "var": jnp.full(10, 0.01)}
    state = replace(state, batch_stats={**state.batch_stats, "frozen": frozen})
    found = _estimated(fields, state, _Frozen()).ema_batch_stats
    jax.tree.map(np.testing.assert_array_equal, found["frozen"], frozen)
    groups = _groups(replace(fields, sync_bn=False), 22)
    mean, var = _by_hand(_Frozen(), state.ema_params, state.batch_stats, groups)["last",]
    np.testing.assert_allclose(found["last"]["var"], var, rtol=1e-3)  # float32, and an estimated momentum
    np.testing.assert_allclose(found["last"]["mean"], mean, atol=1e-3 * np.sqrt(var).max())


class _Spectral(nn.Module):
    """Layers whose outputs depend on an estimate that moves in training."""

    @nn.compact
    def __call__(self, x, train=False):
        for width in (12, 10):
            x = nn.SpectralNorm(nn.Dense(width))(x.reshape(len(x), -1), update_stats=train)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, use_scale=False, use_bias=False)(x)
        return x


def test_averages_behind_an_estimate_that_moves_are_those_of_the_network_that_has_it():
    fields = replace(small_config(**PLAIN), width_multiplier=1.0, model="_Spectral", method="own")
    state = _another_network(build_spec(fields, model=_Spectral()).init_state())
    found = _estimated(fields, state, _Spectral()).ema_batch_stats
    expected = _by_hand(_Spectral(), state.ema_params, state.batch_stats, _groups(replace(fields, sync_bn=False), 22))
    for (name,), (mean, var) in expected.items():
        np.testing.assert_allclose(found[name]["var"], var, rtol=1e-3)
        np.testing.assert_allclose(found[name]["mean"], mean, atol=1e-3 * np.sqrt(var).max())
    for name in ("SpectralNorm_0", "SpectralNorm_1"):  # the raw network's, from which the averaged one's goes on
        (key,) = (key for key in found[name] if key.endswith("/u"))
        np.testing.assert_array_equal(found[name][key], state.batch_stats[name][key])


@pytest.mark.parametrize("method", ["mimicnorm", "batchnorm"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_no_statistics_of_the_librarys_networks_are_read_in_training(method, microbatches):
    run = build_trainer(build_spec(small_config(method=method, microbatches=microbatches)))
    assert not any(jax.tree.leaves(run.statistics_read))


def test_a_network_that_is_not_finite_keeps_the_raw_runs_values():
    fields = small_config(**PLAIN, method="batchnorm")
    state = build_spec(fields).init_state()
    broken = replace(state, ema_params=jax.tree.map(lambda leaf: leaf * jnp.inf, state.ema_params))
    found = _estimated(fields, broken)
    jax.tree.map(np.testing.assert_array_equal, found.ema_batch_stats, found.batch_stats)


def test_a_run_without_statistics_or_without_an_average_does_nothing(monkeypatch):
    for fields in (small_config(method="none"), small_config(ema_decay=0.0)):
        run = build_trainer(build_spec(fields))
        state = run.spec.init_state()
        assert state.ema_batch_stats is None
        assert state.eval_variables["batch_stats"] is state.batch_stats
        monkeypatch.setattr(type(run.pipeline), "train_feeds", lambda *_: pytest.fail("took a batch"))
        assert averaged.with_own_statistics(run, state, 0) is state
        monkeypatch.undo()
