"""Checkpoints come back bit for bit, or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mimicnorm_jax import models
from mimicnorm_jax.errors import WorkdirError
from mimicnorm_jax.training.checkpoints import Checkpoints, Record
from mimicnorm_jax.training.state import TrainState, create_state


def _state(step=0, width=0.5, method="mimicnorm", tx=None, seed=0) -> TrainState:
    model = models.create("resnet8", method=method, num_classes=5, width=width)
    state = create_state(model, tx or optax.sgd(0.1, momentum=0.9), (8, 8, 1), seed=seed, ema=True)
    return state.replace(step=jnp.int32(step))


def _save(folder, accuracies):
    with Checkpoints(folder, keep=2) as checkpoints:
        for step, accuracy in enumerate(accuracies, 1):
            checkpoints.save(_state(step, seed=step), Record(step, accuracy))


def test_round_trip_is_bit_for_bit_also_when_the_buffers_are_overwritten(tmp_path):
    state = _state(7)
    expected = jax.tree.map(lambda leaf: np.array(leaf), state)
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(state, Record(3, 0.5))
        jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda leaf: leaf * 0, s), donate_argnums=0)(state))
    with Checkpoints(tmp_path, 2) as checkpoints:
        restored, record = checkpoints.restore(7, _state())
    assert record == Record(3, 0.5)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


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
def test_checkpoint_of_another_network_or_optimiser_is_refused_by_name(tmp_path, other, named):
    _save(tmp_path, [0.5])
    message = f"belongs to another network or optimiser: .*({named})"
    with Checkpoints(tmp_path, 2) as checkpoints, pytest.raises(WorkdirError, match=message):
        checkpoints.restore(1, _state(**other))


def _files(folder):
    return sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda p: (-p.stat().st_size, str(p)))


def _flip(path, at):
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


DAMAGES = {
    "largest file truncated": lambda files: files[0].write_bytes(files[0].read_bytes()[: files[0].stat().st_size // 2]),
    "largest file deleted": lambda files: files[0].unlink(),
    "byte flipped in the middle": lambda files: _flip(files[0], 0.5),
    "byte flipped near the end": lambda files: _flip(files[0], 0.9),
    "every file emptied": lambda files: [path.write_bytes(b"") for path in files],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_detected_and_named(tmp_path, name):
    _save(tmp_path, [0.5])
    DAMAGES[name](_files(tmp_path / "1"))
    message = r"checkpoints? .* is damaged: .+ Delete the folder of that step"
    with pytest.raises(WorkdirError, match=message), Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.restore(1, _state())
