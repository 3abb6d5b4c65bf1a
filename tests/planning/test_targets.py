"""Targets: every one compiles, what is wrong is said."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding
from jaxlib.xla_client import generate_pjrt_gpu_plugin_options

from mimicnorm_jax.errors import PlanError
from mimicnorm_jax.planning import facts, plan, target
from mimicnorm_jax.planning.compile import no_compilation_cache
from tests.conftest import ROOT, in_processes
from tests.planning.programs import needs_cuda, needs_tpu, shape

pytestmark = pytest.mark.optimized


@needs_cuda
@pytest.mark.parametrize("name", facts.GPUS)
def test_every_gpu_compiles(name):
    found = plan(lambda a: a @ a, shape(128, 128, dtype=jnp.bfloat16), target=name)
    gpu = facts.GPUS[name]
    assert found.bound_seconds == pytest.approx(
        max(2 * 128**3 / gpu.bfloat16, found.total_moved / gpu.bandwidth), rel=1e-12
    )


@needs_tpu
@pytest.mark.parametrize("name", facts.TPUS)
def test_every_tpu_has_one_chip_and_grids(name):
    (device,) = target(name).jax_devices()
    assert device.platform == "tpu"
    chips = 8 * facts.TPUS[name].cores
    grid = "2x4" if facts.TPUS[name].axes == 2 else "2x2x2"
    assert target(f"{name}:{grid}").devices == chips
    assert len(target(f"{name}:{grid}").jax_devices()) == chips
    assert len(set(target(name).jax_devices(4))) == 4


def test_float32_is_bound_by_its_own_rate():
    """At the same time a program with bfloat16 in it has the faster rate, or the bound would be none."""
    h100 = target("h100")
    assert h100.peak["bfloat16"] == 2 * h100.peak["float32"]


@needs_cuda
def test_a_description_that_xla_wrote_makes_the_same_plan(tmp_path):
    arguments = shape(256, 256)
    (device,) = target("h200").jax_devices()
    placed = jax.ShapeDtypeStruct(arguments.shape, arguments.dtype, sharding=SingleDeviceSharding(device))
    with no_compilation_cache():  # of an earlier run, which cannot be read for a device that is not there
        jax.jit(jnp.sin).lower(placed).compile({"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True})
    (written,) = tmp_path.glob("*gpu_target_config.pbtxt")
    described = target("h100", written)
    h200 = target("h200")
    assert (described.memory, described.bandwidth) == (h200.memory, h200.bandwidth)
    assert "H200" in described.description
    ours, theirs = (plan(jnp.sin, arguments, target=each) for each in (h200, described))
    assert ours.bound_seconds == theirs.bound_seconds
    assert ours.bytes_moved == theirs.bytes_moved


def test_the_share_of_a_gpu_is_jaxs(monkeypatch):
    """JAX takes an empty variable for none, and knows two names, of which the first is the new one."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name in names:
        monkeypatch.setenv(name, "")
    h100 = target("h100")
    assert h100.usable == int(0.75 * h100.memory)
    for name in names:
        monkeypatch.setenv(name, "0.95")
        assert h100.usable == int(0.95 * h100.memory)
        assert generate_pjrt_gpu_plugin_options()["memory_fraction"] == 0.95
        for wrong in ("lots", "inf"):
            monkeypatch.setenv(name, wrong)
            with pytest.raises(PlanError, match=rf"\${name} must be a number, and is '{wrong}'"):
                _ = h100.usable
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10", "did you mean h100"),
        ("v5", "did you mean v5p or v5e"),
        ("h100:2x2", "unknown target 'h100:2x2'"),
        ("v5e:8", "2 numbers of at least 1, as in v5e:2x2"),
        ("v5e:0x1", "2 numbers of at least 1"),
        ("v5p:2x2", "3 numbers of at least 1, as in v5p:2x2x1"),
        ("v5e:two", "2 numbers"),
    ],
)
def test_unknown_targets(name, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        target(name)


@pytest.mark.parametrize(("name", "module"), [("h100", "jax_cuda13_plugin"), ("v5e", "libtpu")])
def test_a_missing_plugin_names_the_command(name, module, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanError, match=rf"{module} must be installed.*pip install 'mimicnorm_jax\[plan\]'"):
        target(name).jax_devices(3)  # which no other test asks for: what was found once is kept


@needs_cuda
@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="a GPU is attached")
def test_a_gpu_without_jax_platforms_is_compiled_for_or_the_way_out_named():
    code = "from mimicnorm_jax.planning import target; target('h100').jax_devices()"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or "JAX_PLATFORMS=cpu" in done.stderr


@needs_tpu
def test_a_grid_that_the_plugin_refuses():
    with pytest.raises(PlanError, match=r"the tpu plugin refuses v5e:3x3: .*not divisible"):
        target("v5e:3x3").jax_devices()
    with pytest.raises(PlanError, match="5 devices of v5e make no grid"):
        target("v5e").jax_devices(5)
    with pytest.raises(PlanError, match="has 4 devices, and 8 were asked for"):
        target("v5e:2x2").jax_devices(8)


@needs_tpu
def test_the_environment_is_left_as_it_was():
    before = dict(os.environ)
    target("v5e").jax_devices(16)  # which no other test asks for
    assert dict(os.environ) == before


def test_too_many_cpu_devices():
    with pytest.raises(PlanError, match="100 devices were asked for, and this process has 4 CPU devices"):
        target("cpu").jax_devices(100)


def test_a_file_that_describes_no_gpu(tmp_path):
    path = tmp_path / "target.pbtxt"
    with pytest.raises(PlanError, match="cannot read the target config"):
        target("h100", path)
    path.write_text("hello")
    with pytest.raises(PlanError, match="lacks device_memory_size or memory_bandwidth"):
        target("h100", path)
    with pytest.raises(PlanError, match="describes a GPU, and the target is 'v5e'"):
        target("v5e", path)


@needs_tpu
@in_processes
@pytest.mark.slow
def test_two_processes_compile_for_a_tpu_at_once():
    """libtpu's lock keeps the second one out where it is heeded; the first holds it until both are through."""
    code = "from mimicnorm_jax.planning import target; target('v5e').jax_devices(); print('done', flush=True); input()"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for _ in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in both] == ["done\n", "done\n"]
    finally:
        for process in both:
            process.communicate("\n")
