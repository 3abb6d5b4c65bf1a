"""A stream of the same images gives the resident run to the bit, as users compile it."""

import itertools

import jax
import numpy as np
import pytest

from mimicnorm_jax.training import base, build_spec, build_trainer, validate
from tests.training.test_streaming import noise_runs

pytestmark = [pytest.mark.slow, pytest.mark.optimized]


def test_two_epochs_of_noise_and_their_evaluation_are_the_same(monkeypatch):
    jax.tree.map(np.testing.assert_array_equal, *noise_runs(monkeypatch))


def _state_after(trainer, count):
    state = trainer.data_parallel.replicate(trainer.spec.init_state())
    for feed, num_steps in itertools.islice(trainer.pipeline.train_feeds(0, 0), count):
        state, metrics = trainer.train_steps(state, trainer.pipeline.train, feed, num_steps)
        jax.block_until_ready(metrics)
    return jax.device_get(state)


@pytest.mark.cifar100
def test_cifar100_streamed_is_cifar100_resident_to_the_bit(cifar100_dir):
    """Batches in mid-epoch, all of the test set, and the state after eight augmented steps."""
    fields = {"dataset": "cifar100", "data_dir": cifar100_dir, "batch_size": 256, "seed": 5, "width_multiplier": 0.25}
    fields |= {"mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_padding": 4, "flip": True, "rotation": 15.0}
    trainers = [build_trainer(build_spec(validate(base(**fields, streaming=stream)))) for stream in (False, True)]
    jax.tree.map(np.testing.assert_array_equal, *(_state_after(trainer, 8) for trainer in trainers))
    resident, stream = (trainer.pipeline for trainer in trainers)
    (images, labels), (test_images, test_labels) = jax.tree.map(np.asarray, (resident.train, resident.test))
    pairs = itertools.islice(zip(resident.train_feeds(1, 3), stream.train_feeds(1, 3), strict=True), 4)
    for (selection, _), (batch, _) in pairs:
        np.testing.assert_array_equal(batch.images, images[selection.index].reshape(batch.images.shape))
        np.testing.assert_array_equal(batch.labels, labels[selection.index])
    for selection, batch in zip(resident.test_feeds(), stream.test_feeds(), strict=True):
        counts = np.asarray(batch.mask) == 1
        np.testing.assert_array_equal(counts, selection.mask == 1)
        shown = test_images[selection.index].reshape(batch.images.shape)
        np.testing.assert_array_equal(np.asarray(batch.images)[counts], shown[counts])
        np.testing.assert_array_equal(np.asarray(batch.labels)[counts], test_labels[selection.index][counts])
