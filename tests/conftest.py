"""Strict switches for every test: several devices, no silent broadcasting, a cache of compiled programs."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time of these tests is the compiler's. `XLA_FLAGS= pytest` has it work as for users.
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import pytest

ROOT = Path(__file__).parents[1]
QUICKLY = "fusion_emitters" in os.environ["XLA_FLAGS"]

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(autouse=True, scope="module")
def compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles quickly, but for files marked `optimized`, and frees a file's programs after it.

    A program for CPUs takes memory maps, of which Linux gives a process 65,530.
    """
    quickly = QUICKLY and request.node.get_closest_marker("optimized") is None
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision in one test."""
    with jax.enable_x64(True):
        yield


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
