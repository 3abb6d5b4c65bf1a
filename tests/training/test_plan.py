"""Plans of training runs: the run's own program, without its data."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from mimicnorm_jax.data import datasets
from mimicnorm_jax.data.pipeline import Selection, gather_batch
from mimicnorm_jax.errors import ConfigError, DataError
from mimicnorm_jax.training import build_spec, parallel, plan_training
from mimicnorm_jax.training import config as config_lib
from mimicnorm_jax.training.moments import Observed
from tests.planning.programs import needs_cuda

pytestmark = [pytest.mark.optimized, pytest.mark.usefixtures("short")]


def _config(**fields):
    return config_lib.validate(
        config_lib.base(**{"model": "short", "batch_size": 16, "width_multiplier": 0.5} | fields)
    )


def test_counts_are_those_of_the_dataset():
    dataset = datasets.load("digits")
    spec = dataset.spec
    assert (spec.num_train, spec.num_test) == (len(dataset.train), len(dataset.test))
    assert dataset.train.images.shape[1:] == spec.image_shape
    assert set(dataset.train.labels.tolist()) == set(range(spec.num_classes))


@pytest.fixture(scope="module")
def no_data():
    def refuse(*arguments):
        raise AssertionError("the dataset was read")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", refuse)
        patch.setattr(datasets, "require_prepared", refuse)
        yield


CONFIG = _config(ema_decay=0.9, crop_padding=1, rotation=10.0)


@pytest.fixture(scope="module")
def planned(short, no_data):
    """On four devices that share a batch of 16."""
    return plan_training(CONFIG, "cpu", devices=4)


def _state():
    spec = build_spec(CONFIG, 4)
    config, _ = spec.make_step(1437, (0.5,), (0.25,))
    return config, spec.state_template()


def test_it_is_the_program_that_the_run_maps(planned):
    """What `jax.pmap` compiles for four devices takes the same memory and moves the same, to the byte."""
    config, state = _state()
    data = jax.ShapeDtypeStruct((1437, 8 * 8 * 1), jnp.uint8), jax.ShapeDtypeStruct((1437,), jnp.int32)
    feeds, count = Selection(jax.ShapeDtypeStruct((4, 1, 4), jnp.int32)), jax.ShapeDtypeStruct((), jnp.int32)
    data_parallel = parallel.DataParallel(tuple(jax.devices()), "pmap")
    run: jax.stages.Wrapped = data_parallel.make_train_steps(config, partial(gather_batch, (8, 8, 1)))
    compiled = run.lower(state, data, feeds, count).compile()
    memory = compiled.memory_analysis()
    assert planned.step.temporary_bytes == memory.temp_size_in_bytes
    assert planned.step.argument_bytes == memory.argument_size_in_bytes
    assert planned.step.aliased_bytes == memory.alias_size_in_bytes
    assert planned.step.bytes_accessed == compiled.cost_analysis()["bytes accessed"]


def test_the_state_is_donated_and_the_dataset_resident(planned):
    _, state = _state()
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert planned.step.aliased_bytes == nbytes
    an_image = 8 * 8 + 4  # with its label
    places = 4 * 4
    assert planned.step.argument_bytes == nbytes + 1437 * an_image + places
    assert planned.test_bytes == 360 * an_image
    held = sum(leaf.size * 4 for leaf in jax.tree.leaves(state.eval_variables))
    assert planned.evaluation.argument_bytes == held + 360 * an_image + 2 * places
    assert planned.waiting_bytes == nbytes - held + 1437 * an_image + 2 * places
    assert {b.layer for b in planned.step.live} >= {"data[0]", "data[1]", "state.step"}


def test_a_run_with_an_average_has_a_program_more_and_may_peak_there(planned):
    """What `jax.pmap` compiles of it takes the same; beside it lie the test images and all that it does not read."""
    config, state = _state()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state, state.batch_stats)))
    data = jax.ShapeDtypeStruct((1437, 8 * 8 * 1), jnp.uint8), jax.ShapeDtypeStruct((1437,), jnp.int32)
    feeds, count = Selection(jax.ShapeDtypeStruct((4, 1, 4), jnp.int32)), jax.ShapeDtypeStruct((), jnp.int32)
    data_parallel = parallel.DataParallel(tuple(jax.devices()), "pmap")
    sums: jax.stages.Wrapped = data_parallel.make_sum_of_moved(config, partial(gather_batch, (8, 8, 1)))
    observed = Observed(state.eval_variables, jax.ShapeDtypeStruct((), jnp.int32))
    memory = sums.lower(observed, data, feeds, count).compile().memory_analysis()
    assert planned.estimate.temporary_bytes == memory.temp_size_in_bytes
    assert planned.estimate.argument_bytes == memory.argument_size_in_bytes
    everything = held + (1437 + 360) * (8 * 8 + 4) + 2 * (4 * 4) + 2 * 4
    assert planned.estimate.argument_bytes + planned.estimate_waiting_bytes == everything
    larger = dataclasses.replace(planned, estimate_waiting_bytes=10**9)
    assert larger.peak_bytes == planned.estimate.peak_bytes + 10**9 > planned.peak_bytes
    assert plan_training(dataclasses.replace(CONFIG, ema_decay=0.0), "cpu", devices=4).estimate is None


@pytest.mark.slow
def test_steps_of_one_program_are_turns_of_unknown_number(planned):
    three = plan_training(dataclasses.replace(CONFIG, steps_per_call=3), "cpu", devices=4).step
    assert (planned.step.unknown_loops, three.unknown_loops) == (0, 1)
    assert three.flops == planned.step.flops


@needs_cuda
@pytest.mark.slow
@pytest.mark.usefixtures("no_data")
def test_under_checkpointing_only_convolutions_results_are_kept():
    """Maps of 16 KiB an image or more; whether that saves memory is up to when the compiler makes the others again."""
    config = _config(method="batchnorm", dataset="cifar10", batch_size=64, width_multiplier=1.0, dtype="bfloat16")
    plain, checkpointed = (plan_training(config, "h100", checkpointed=each).step for each in (False, True))
    kept, kept_checkpointed = (
        {b.operation for b in found.live if b.role == "forward" and b.nbytes >= 64 * 2**14}
        for found in (plain, checkpointed)
    )
    assert kept == {"conv_general_dilated", "max"}
    assert kept_checkpointed == {"conv_general_dilated"}
    assert checkpointed.flops == plain.flops
    assert checkpointed.aliased_bytes == plain.aliased_bytes


@pytest.mark.parametrize(
    ("fields", "devices", "message"),
    [
        ({"batch_size": 10}, 4, "config.batch_size is 10, which 4 devices cannot share"),
        ({"batch_size": 2000}, 1, "more than the 1437 training images of digits"),
        ({"microbatches": 3}, 1, "config.microbatches is 3"),
        ({"model": "vgg16"}, 1, "config.model='vgg16'"),
        ({"model": "resnet9"}, 1, "did you mean"),
    ],
)
@pytest.mark.usefixtures("no_data")
def test_configs_that_cannot_be_trained(fields, devices, message):
    with pytest.raises(ConfigError, match=message):
        plan_training(_config(**fields), "cpu", devices)


def test_an_unknown_dataset():
    with pytest.raises(DataError, match="did you mean cifar1"):
        plan_training(dataclasses.replace(CONFIG, dataset="cifar11"), "cpu")
