"""What the compilers for an H100 and a TPU v5e make of MimicNorm: one map for each convolution, and no kernel twice."""

import dataclasses
from functools import cache, partial

import jax.numpy as jnp
import pytest

from benchmarks import baselines
from mimicnorm_jax import models
from mimicnorm_jax.models.resnet import BasicBlock, ResNet
from mimicnorm_jax.planning import plan
from tests.planning.programs import needs_cuda, needs_tpu

pytestmark = pytest.mark.optimized

BATCH = 512  # so that maps are much larger than kernels, and than what a TPU keeps on the chip
MAP = BATCH * 32 * 32 * 64 * 2  # bytes in bfloat16
# libtpu 0.0.50 and 0.0.52 compute some of BatchNorm's maps again, so there is less to save.
MOST_OF_BATCHNORM = {"h100": 0.6, "v5e": 0.65}


once = pytest.mark.xdist_group("lean")
"""With `--dist loadgroup` in one process, which plans once."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A ResNet of one stage of four blocks, nine convolutions of 64 channels but for the first one's input."""
    build = partial(ResNet, block=BasicBlock, stages=(4,), channels=64)
    known = dataclasses.replace(models.ARCHITECTURES["resnet8"], build=build)
    monkeypatch.setitem(models.ARCHITECTURES, "small", known)


@cache
def _plan(variant, target):
    case = baselines.training_step("small", variant, BATCH, jnp.bfloat16)
    return plan(case.step, case.state, case.images, case.labels, target=target, donate=(0,))


@pytest.mark.parametrize(
    "target", [pytest.param("h100", marks=needs_cuda), pytest.param("v5e", marks=[needs_tpu, pytest.mark.slow, once])]
)
def test_a_residual_net_keeps_one_map_a_convolution_and_takes_over_the_state(target):
    ours = _plan("ours:mimicnorm", target)
    # What each of eight convolutions reads, the last map, and two gradients at the turn.
    assert ours.temporary_bytes <= 11.1 * MAP
    assert ours.aliased_bytes >= 0.99 * (ours.argument_bytes - BATCH * (32 * 32 * 3 * 2 + 4))  # but paddings


@pytest.mark.slow
@pytest.mark.parametrize(
    "target", [pytest.param("h100", marks=needs_cuda), pytest.param("v5e", marks=[needs_tpu, once])]
)
def test_it_takes_less_than_batch_norm_and_repeats_no_convolution(target):
    ours, theirs = _plan("ours:mimicnorm", target), _plan("batchnorm", target)
    assert ours.temporary_bytes <= MOST_OF_BATCHNORM[target] * theirs.temporary_bytes
    assert ours.total_moved < 0.75 * theirs.total_moved
    assert ours.flops == theirs.flops
    if target == "h100":
        assert theirs.fused["activation"] == 0


@needs_cuda
def test_every_relu_behind_a_convolution_is_in_its_kernel():
    """The stem's, four inner ones and four behind sums, whose residual the kernel takes as well."""
    fused = _plan("ours:mimicnorm", "h100").fused
    assert (fused["activation"], fused["residual"]) == (9, 4)
