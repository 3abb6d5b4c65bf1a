"""The largest batch and the ways out, on machines whose memory is a formula."""

import dataclasses

import pytest

from mimicnorm_jax.errors import ConfigError, DoesNotFitError
from mimicnorm_jax.training import config as config_lib
from mimicnorm_jax.training import fit


class _Machine:
    """Stands for a target: a run takes `fixed + each * images of a microbatch` bytes, in steps of `grain` images."""

    def __init__(self, usable, fixed=1000, each=10.0, grain=1, refuses=None, says=True):
        self.usable, self.fixed, self.each, self.grain = usable, fixed, each, grain
        self.refuses, self.says = refuses, says
        self.batches = []

    def __call__(self, config):
        self.batches.append(config.batch_size)
        images = -(-config.batch_size // config.microbatches // self.grain) * self.grain
        needed = int(self.fixed + self.each * images)
        if self.refuses is not None and needed > self.refuses:
            raise DoesNotFitError("too large", *((needed, self.usable) if self.says else (None, None)))
        plan = dataclasses.make_dataclass("Plan", ["missing_bytes", "peak_bytes", "step"])
        step = dataclasses.make_dataclass("Step", ["usable_bytes"])(self.usable)
        found = plan(needed - self.usable, needed, step)
        found.fits = found.missing_bytes <= 0
        return found


def _config(**fields):
    return config_lib.validate(config_lib.base(**{"dataset": "cifar10", "batch_size": 64} | fields))


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("batch", [16, 256, 32768])
@pytest.mark.parametrize("grain", [1, 64, 100])
def test_the_largest_batch_fits_and_the_next_does_not(devices, batch, grain):
    machine = _Machine(40_000, grain=grain)
    config = _config(batch_size=batch)
    found = fit.largest_batch(machine, config, devices)
    assert machine(dataclasses.replace(config, batch_size=found)).missing_bytes <= 0
    assert machine(dataclasses.replace(config, batch_size=found + 8 * devices)).missing_bytes > 0
    assert found % (8 * devices) == 0
    assert found + 8 * devices in machine.batches[:-1]


def test_a_line_takes_few_plans():
    machine = _Machine(40_000)
    assert fit.largest_batch(machine, _config()) == 3896
    assert len(machine.batches) <= 5


@pytest.mark.parametrize("says", [True, False])
def test_a_compiler_that_refuses(says):
    """A TPU's compiler gives no plan of what does not fit, and perhaps not even a size."""
    machine = _Machine(40_000, refuses=40_000, says=says)
    assert fit.largest_batch(machine, _config(batch_size=8192)) == 3896


def test_the_dataset_bounds_the_batch():
    assert fit.largest_batch(_Machine(10**9), _config()) == 50_000
    with pytest.raises(ConfigError, match="fewer than 2048 training images"):
        fit.largest_batch(_Machine(10**9), _config(dataset="digits"), 256)


def test_nothing_fits():
    assert fit.largest_batch(_Machine(500), _config()) == 0
    with pytest.raises(DoesNotFitError, match="no smaller batch fits either"):
        fit.require_fit(_Machine(500), _config())


def test_what_is_missing_and_what_would_do():
    gib = 2**30
    machine = _Machine(2 * gib, fixed=gib, each=gib / 64)
    with pytest.raises(DoesNotFitError) as caught:
        fit.require_fit(machine, _config(batch_size=256))
    assert "it needs 5.00 GiB of 2.00 usable on each device, 3.00 GiB too much" in str(caught.value)
    assert "--config.microbatches=4" in str(caught.value)
    assert "--config.batch_size=64" in str(caught.value)
    assert (caught.value.needed, caught.value.available) == (5 * gib, 2 * gib)


def test_what_is_missing_is_said_of_a_data_set_smaller_than_the_smallest_batch_too():
    config = _config(dataset="digits", microbatches=256, batch_size=1024)
    with pytest.raises(DoesNotFitError, match=r"does not fit: it needs .*; no smaller batch fits either"):
        fit.require_fit(_Machine(500), config)


def test_a_run_that_fits_is_planned_once():
    machine = _Machine(10_000)
    assert fit.require_fit(machine, _config()).fits
    assert machine.batches == [64]
