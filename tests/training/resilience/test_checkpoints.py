"""Checkpoints come back bit for bit, or not at all."""

import functools
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mimicnorm_jax import models
from mimicnorm_jax.errors import DamagedCheckpointError, WorkdirError
from mimicnorm_jax.optim import hyperball, lawn
from mimicnorm_jax.training import TrainState
from mimicnorm_jax.training.resilience import CheckpointMetadata, CheckpointReader, Checkpoints
from tests.conftest import also
from tests.training.runs import create_state

# Orbax leaves coroutines behind where it reads, and where a file that it reads is missing.
pytestmark = [
    pytest.mark.usefixtures("short"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


SGD = optax.sgd(0.1, momentum=0.9)
HELD = hyperball(optax.scale_by_adam(), 0.1), lawn(optax.adam(0.1), 3)
"""Their states hold the norms that kernels have to keep."""


@functools.cache
def _fresh(width, method, tx, seed) -> TrainState:
    model = models.create("short", method=method, num_classes=5, width=width)
    return create_state(model, tx, (8, 8, 1), seed=seed, ema=True)


def _state(step=0, width=0.5, method="mimicnorm", tx=SGD, seed=0) -> TrainState:
    """With buffers of its own."""
    return jax.tree.map(jnp.copy, _fresh(width, method, tx, seed)).replace(step=jnp.int32(step))


def _save(folder, accuracies):
    with Checkpoints(folder, keep=2) as checkpoints:
        for step, accuracy in enumerate(accuracies, 1):
            checkpoints.save(_state(step, seed=step), CheckpointMetadata(step, accuracy))


@pytest.mark.parametrize("tx", [SGD, *map(also, HELD)], ids=["sgd", "hyperball", "lawn"])
def test_round_trip_is_bit_for_bit_also_when_the_buffers_are_overwritten(tx, tmp_path):
    state = _state(7, tx=tx)
    expected = jax.tree.map(lambda leaf: np.array(leaf), state)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(state, CheckpointMetadata(3, 0.5))
        jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0, s), donate_argnums=0)(state))
    with Checkpoints(tmp_path, 2) as checkpoints:
        # Shapes are enough: nothing is initialized, compiled or read to restore.
        restored, metadata = checkpoints.restore(7, jax.eval_shape(partial(_state, tx=tx)))
    assert metadata == CheckpointMetadata(3, 0.5)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_a_checkpoint_of_the_same_step_replaces_another_and_one_is_always_there(tmp_path):
    """Of an epoch that could not be evaluated; killed before the new one is whole, the old one is put back."""
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(_state(7), CheckpointMetadata(0, None, (1.0, 2.0, 3.0)))
        checkpoints.save(_state(7), CheckpointMetadata(1, 0.5))
        assert checkpoints.restore(7, jax.eval_shape(_state))[1] == CheckpointMetadata(1, 0.5)
        assert checkpoints.best == 7
    assert [path.name for path in tmp_path.iterdir()] == ["7"]
    (tmp_path / "7").rename(tmp_path / "replaced-7")
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.restore(7, jax.eval_shape(_state))[1] == CheckpointMetadata(1, 0.5)
    shutil.copytree(tmp_path / "7", tmp_path / "replaced-7")
    with Checkpoints(tmp_path, 2):
        assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_keeps_the_newest_and_the_best(tmp_path):
    _save(tmp_path, [0.1, 0.9, 0.3, 0.4, 0.2])
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert (checkpoints.latest, checkpoints.best) == (5, 2)
    assert sorted(int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()) == [2, 4, 5]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"width": 0.25}, "there and float32"),
        ({"method": "batchnorm"}, "missing here|missing there|is missing"),
        ({"tx": optax.adam(0.1)}, "opt_state"),
    ],
)
def test_checkpoint_of_another_network_or_optimizer_is_refused_by_name(tmp_path, other, named):
    _save(tmp_path, [0.5])
    message = f"belongs to another network or optimizer: .*({named})"
    with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(WorkdirError, match=message):
        checkpoints.restore(1, _state(**other))


def test_a_checkpoint_without_statistics_of_the_averaged_network_is_refused_by_name(tmp_path):
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(_state(1).replace(ema_batch_stats=None), CheckpointMetadata(1, 0.5))
        with pytest.raises(WorkdirError, match=r"ema_batch_stats.* is missing there and float32\[5\] here"):
            checkpoints.restore(1, jax.eval_shape(_state))


def _flip(path, at):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


def _of_state(folder):
    """The file that holds most of the state."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "state truncated": lambda f: _truncate(_of_state(f)),
    "state deleted": lambda f: _of_state(f).unlink(),
    "state flipped in the middle": lambda f: _flip(_of_state(f), 0.5),
    "state flipped near the end": lambda f: _flip(_of_state(f), 0.9),
    "manifest deleted": lambda f: (f / "state" / "manifest.ocdbt").unlink(),
    "description flipped": lambda f: _flip(f / "metadata" / "metadata", 0.5),
    "description emptied": lambda f: (f / "metadata" / "metadata").write_bytes(b""),
    "accuracy emptied": lambda f: (f / "metrics" / "metrics").write_bytes(b""),
    "accuracy changed": lambda f: (f / "metrics" / "metrics").write_text('{"accuracy": 0.9}'),
    "every file emptied": lambda f: [path.write_bytes(b"") for path in f.rglob("*") if path.is_file()],
}


@pytest.fixture(scope="module")
def two_checkpoints(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    _save(folder, [0.5, 0.7])
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_quarantined_for_the_one_before_it(tmp_path, two_checkpoints, name, capsys):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    DAMAGES[name](tmp_path / "2")
    with Checkpoints(tmp_path, 2) as checkpoints:
        state, metadata = checkpoints.restore_newest(_state())
        assert metadata == CheckpointMetadata(1, 0.5)
        jax.tree.map(np.testing.assert_array_equal, state, jax.device_get(_state(1, seed=1)))
        assert (tmp_path / "damaged-2-1").is_dir()
        told = capsys.readouterr().out
        assert f"warning: the checkpoint {tmp_path}/2 is damaged" in told
        # Its number is free again.
        checkpoints.save(_state(2, seed=9), CheckpointMetadata(2, 0.6))
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.restore_newest(_state())[1] == CheckpointMetadata(2, 0.6)


def _files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_reader_leaves_a_folder_as_it_is_in_which_a_run_may_be_writing(tmp_path, two_checkpoints, capsys):
    """In the midst of a save that replaces the newest checkpoint, with another of which files are damaged."""
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "1", tmp_path / "3")
    DAMAGES["description flipped"](tmp_path / "3")
    (tmp_path / "2").rename(tmp_path / "replaced-2")
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    before = _files(tmp_path)
    reader = CheckpointReader(tmp_path)
    assert (reader.latest, reader.best) == (2, 2)
    state, metadata = reader.restore(2, _state())
    assert metadata == CheckpointMetadata(2, 0.7)
    jax.tree.map(np.testing.assert_array_equal, state, jax.device_get(_state(2, seed=2)))
    assert f"warning: the checkpoint {tmp_path}/3 is damaged" in capsys.readouterr().out
    assert _files(tmp_path) == before
    shutil.rmtree(tmp_path / "replaced-2")
    with pytest.raises(WorkdirError, match=r"replaced-2 was removed while it was read.*: repeat the command"):
        reader.restore(2, _state())
    with Checkpoints(tmp_path, 2):  # of the run itself, which a kill has left so
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "damaged-3-1"]


def test_the_best_of_equal_checkpoints_is_the_newest_for_both_who_look(tmp_path):
    _save(tmp_path, [0.5, 0.9, 0.9, 0.7])
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.best == CheckpointReader(tmp_path).best == 3


def test_nothing_is_trained_from_scratch_when_every_checkpoint_is_damaged(tmp_path, two_checkpoints):
    shutil.copytree(two_checkpoints, tmp_path, dirs_exist_ok=True)
    for step in ("1", "2"):
        _flip(_of_state(tmp_path / step), 0.5)
    message = r"no checkpoint in .* is whole \(damaged-1-1, damaged-2-1\)"
    for _ in range(2):  # the second time there are only the quarantined
        with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(DamagedCheckpointError, match=message):
            checkpoints.restore_newest(_state())
