"""Every image in its place: batches of an epoch, and of the test set."""

import numpy as np
import pytest

from mimicnorm_jax.data.batching import epoch_order, eval_batches, grouped, train_batches


@pytest.mark.parametrize("devices", [1, 4])
def test_an_epoch_visits_no_image_twice_and_leaves_less_than_a_batch(devices):
    batches = list(train_batches(epoch_order(1, 2, 101), 12, devices))
    visited = np.concatenate([batch.ravel() for batch in batches])
    assert {batch.shape for batch in batches} == {(devices, 12 // devices)}
    assert len(set(visited.tolist())) == len(visited) == 96
    assert visited.max() < 101


def test_order_depends_on_seed_and_epoch_and_not_on_the_number_of_devices():
    def order(**changes):
        arguments = {"seed": 1, "epoch": 2, "devices": 1} | changes
        visited = epoch_order(arguments["seed"], arguments["epoch"], 96)
        return np.concatenate([batch.ravel() for batch in train_batches(visited, 12, arguments["devices"])])

    np.testing.assert_array_equal(order(), order(devices=4))
    assert (order() != order(epoch=3)).any()
    assert (order() != order(seed=2)).any()


@pytest.mark.parametrize("count", [5, 12, 25])
def test_evaluation_counts_every_image_once(count):
    counted = np.zeros(count)
    for index, mask in eval_batches(count, 12, 4):
        assert index.shape == mask.shape == (4, 3)
        np.add.at(counted, index.ravel(), mask.ravel())
    np.testing.assert_array_equal(counted, 1)


def test_groups_hold_every_batch_once_in_order_and_have_one_shape():
    single = list(train_batches(epoch_order(0, 0, 50), 8, 2))
    groups = list(grouped(iter(single), 4))
    assert [(index.shape, count) for index, count in groups] == [((2, 4, 4), 4), ((2, 4, 4), 2)]
    flat = [index[:, i] for index, count in groups for i in range(count)]
    np.testing.assert_array_equal(flat, single)
