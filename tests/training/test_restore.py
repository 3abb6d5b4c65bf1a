"""A run that starts from another one's checkpoint: the same variables, a fresh optimizer; what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimicnorm_jax.data import datasets
from mimicnorm_jax.errors import ConfigError
from mimicnorm_jax.optim import FixedNormState
from mimicnorm_jax.training import build_spec, config, loop, restore, workdir
from mimicnorm_jax.training.resilience import CheckpointMetadata, Checkpoints
from mimicnorm_jax.training.spec import make_model

# Orbax leaves coroutines behind where it reads.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def _config(**fields):
    return config.validate(config.base(width_multiplier=0.25, method="batchnorm", **fields))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The folder of a run's first step, its best checkpoint the older one, and the state of that."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    fields = _config(model="reactnet8_step1", optimizer="adam")
    workdir.prepare(folder, fields)
    fresh = build_spec(fields).init_state()
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), fresh)
    with Checkpoints(folder / "checkpoints", 2) as checkpoints:
        checkpoints.save(trained.replace(step=jnp.int32(5)), CheckpointMetadata(1, 0.9))
        checkpoints.save(fresh.replace(step=jnp.int32(9)), CheckpointMetadata(2, 0.5))
    return folder, trained


def test_the_second_step_starts_from_the_first_ones_best_with_a_fresh_optimizer(first):
    folder, trained = first
    spec = build_spec(_config(model="reactnet8", optimizer="adam", init_from=str(folder), ema_decay=0.9))
    state = restore.start(spec)
    jax.tree.map(np.testing.assert_array_equal, state.params, trained.params)
    jax.tree.map(np.testing.assert_array_equal, state.ema_params, trained.params)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, trained.batch_stats)
    jax.tree.map(np.testing.assert_array_equal, state.ema_batch_stats, trained.batch_stats)
    assert int(state.step) == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "resnet8"}, r"there batch_stats/stage1_block1/conv1/bn/mean is missing, .*resnet8.* it is \(4,\)"),
        ({"model": "reactnet8", "dataset": "cifar100"}, r"there params/classifier/bias is \(10,\), .* is \(100,\)"),
    ],
)
def test_another_network_is_refused_by_its_first_leaf_that_differs(first, fields, message):
    spec = build_spec(_config(**fields, init_from=str(first[0])))
    with pytest.raises(ConfigError, match=message):
        restore.start(spec)


def test_a_run_on_other_data_is_read_by_its_own_folder(first, tmp_path):
    """That the new run's data lie elsewhere says nothing of the first one's; what is gone is named with the reason."""
    folder = tmp_path / "second"
    shutil.copytree(first[0], folder)
    lost = workdir.as_json(_config(model="reactnet8_step1", optimizer="adam"))
    (folder / "config.json").write_text(json.dumps(lost | {"dataset": "folder:/nowhere", "image_size": 8}))
    spec = build_spec(_config(model="reactnet8", init_from=str(folder)))
    with pytest.raises(ConfigError, match=r"config.init_from is .*second', of whose data set .* /nowhere/train is not"):
        restore.start(spec)


def test_a_network_of_ones_own_starts_from_a_run_of_the_librarys_that_has_its_leaves(first):
    folder, trained = first
    own = make_model(_config(model="reactnet8"), datasets.get_spec("digits"))
    spec = build_spec(config.validate(config.base(init_from=str(folder))), model=own)
    jax.tree.map(np.testing.assert_array_equal, restore.start(spec).params, trained.params)


def test_a_run_of_a_network_of_its_own_cannot_be_built_again(first, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(first[0], folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | {"model": "Net", "method": "own"}))
    spec = build_spec(_config(model="reactnet8", init_from=str(folder)))
    with pytest.raises(ConfigError, match=r"init_from is '.*own', a run of Net, a network of its own: give that one"):
        restore.start(spec)


def test_a_folder_without_a_run_is_refused_before_anything_is_written(tmp_path):
    fields = _config(model="reactnet8", init_from=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"config.init_from is .*nowhere', which holds no run with a checkpoint"):
        loop.run(fields, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("centering", ["in_call", "after_step"])
def test_the_norms_that_a_run_keeps_are_those_of_the_kernels_that_it_starts_from(first, centering):
    """Also where it centers them first."""
    folder, trained = first
    fields = {"constraint": "hyperball", "weight_decay": 0.0, "momentum": 0.0, "warmup_epochs": 0.0}
    if centering == "after_step":
        spec = build_spec(config.validate(config.base(model="resnet8", centering=centering, **fields)))
        state = spec.init_state()
    else:
        spec = build_spec(_config(model="reactnet8", init_from=str(folder), learning_rate=1e-4, **fields))
        state = restore.start(spec)
        jax.tree.map(np.testing.assert_array_equal, state.params, trained.params)
    kept = [leaf.norms for leaf in jax.tree.leaves(state.opt_state, is_leaf=_keeps) if _keeps(leaf)]
    assert len(kept) == 1

    def compare(path, norm, leaf):
        if norm > 0:
            # A sum of up to some 10,000 squares in float32.
            np.testing.assert_allclose(norm, np.linalg.norm(np.asarray(leaf, np.float64)), rtol=1e-5)
        return bool(norm > 0)

    assert sum(jax.tree.leaves(jax.tree.map_with_path(compare, kept[0], state.params))) > 5


def _keeps(node):
    return isinstance(node, FixedNormState)
