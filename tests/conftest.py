"""Strict switches for every test: several devices, no silent broadcasting, a cache of compiled programs."""

import dataclasses
import gc
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

from mimicnorm_jax import models
from mimicnorm_jax.models import mobilenet, shufflenet

ROOT = Path(__file__).parents[1]
# Most of the time of these tests is the compiler's. `XLA_FLAGS= pytest` has it work as for users.
QUICKLY = "XLA_FLAGS" not in os.environ

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
# A folder for each process of pytest-xdist: JAX reads what another process has half written.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache" / os.environ.get("PYTEST_XDIST_WORKER", "")))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_disable_most_optimizations", QUICKLY)
if QUICKLY and jax.__version_info__ < (0, 11):  # later ones end at the flag, which they do not know
    with pytest.MonkeyPatch.context() as patch:  # read once, at the first compilation; libtpu ends at unknown flags
        patch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")
        jax.jit(lambda x: x + 1).lower(1).compile()


SHALLOW = dict.fromkeys(("resnet18", "resnet50", "seresnet18", "seresnet50"), ("stages", 2))
SHALLOW |= {"resnet18_imagenet": ("stages", 8), "resnet50_imagenet": ("stages", 8)}
SHALLOW |= {"vgg11": ("stages", 4), "densenet121": ("blocks", 2)}
"""Networks of which two stages say all, with what holds these and by how much they shrink an image."""


in_processes = pytest.mark.xdist_group("processes")
"""Of slow tests that start several processes: with `--dist loadgroup` one after another."""


def also(*case: Any) -> Any:
    """A case that is left to the slow tier."""
    return pytest.param(*case, marks=pytest.mark.slow)


def pytest_configure(config: pytest.Config) -> None:
    """Whole files in the order of their names: the package's doctests come last, of which none takes long.

    pytest-xdist would begin with the files of many tests, and at the end wait for a few long ones.
    """
    if getattr(config.option, "dist", "") == "loadfile":
        config.option.loadscopereorder = False


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage need look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles as for users in files marked `optimized`, and frees programs when there are many.

    A program for CPUs takes memory maps, of which Linux gives a process 65,530.
    """
    optimized = request.node.get_closest_marker("optimized") is not None
    if optimized:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", QUICKLY)
    maps = Path("/proc/self/maps")
    if optimized or not maps.exists() or maps.read_bytes().count(b"\n") > 12_000:
        jax.clear_caches()
    gc.collect()  # what a file leaves behind is warned of in the file, which may expect it


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision in one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def short() -> Iterator[None]:
    """A ResNet of one block by the name `short`, for what does not depend on a network's depth.

    A quarter as wide, its block's kernels are centered by the published rule.
    """
    known = models.ARCHITECTURES["resnet8"]
    known = dataclasses.replace(known, build=partial(known.build, stages=(1,), channels=32), stride=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.ARCHITECTURES, "short", known)
        yield


@pytest.fixture(scope="module")
def one_block(short: None) -> Iterator[None]:
    """`resnet8`, which runs have by default, is `short`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.ARCHITECTURES, "resnet8", models.ARCHITECTURES["short"])
        yield


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks with fewer of the blocks that are alike; `resnet8` stays whole."""
    monkeypatch.setattr(mobilenet, "STAGES", ((1, 16, 1, 1), (6, 24, 2, 2)))
    monkeypatch.setattr(shufflenet, "REPEATS", (2, 0, 0))
    for name, (option, stride) in SHALLOW.items():
        known = models.ARCHITECTURES[name]
        known = dataclasses.replace(known, build=partial(known.build, **{option: (1, 2)}), stride=stride)
        monkeypatch.setitem(models.ARCHITECTURES, name, known)


@pytest.fixture(scope="session")
def cifar100_dir() -> str:
    """A folder with CIFAR-100 prepared by TFDS; the smallest, if there are several beside the project."""
    named = os.environ.get("MIMICNORM_TEST_DATA", "")
    folders = [Path(named)] if named else ROOT.parent.glob("*/tensorflow_datasets*")
    sizes = {
        folder: sum(path.stat().st_size for path in folder.glob("cifar100/*/*"))
        for folder in folders
        if any(folder.glob("cifar100/*/dataset_info.json"))
    }
    if not sizes:
        pytest.skip("no CIFAR-100: set MIMICNORM_TEST_DATA to a folder of TFDS datasets")
    return str(min(sizes, key=lambda folder: sizes[folder]))
