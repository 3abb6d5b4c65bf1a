"""Named devices that programs are compiled for, whether they are attached or not."""

import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from mimicnorm_jax.errors import PlanError, unknown
from mimicnorm_jax.planning.facts import GPUS, MIB, TPUS

NAMES = ("cpu", *GPUS, *TPUS)
"""Every target; a TPU's may be followed by a grid of chips, `v5e:2x4`."""
INSTALL = "pip install 'mimicnorm_jax[plan]'"
GPU_FRACTION = 0.75
"""Share of a GPU's memory that JAX gives a process, by its documentation on GPU memory allocation."""
_FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
TPU_RESERVED = 256 * MIB
"""What libtpu keeps of a v5e chip's 16 GiB: it refuses programs by `15.75G hbm`."""
_NO_NETWORK = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_LOG_DIR": "disabled",
}


@dataclass(frozen=True)
class Target:
    """Devices that a program is compiled for.

    Attributes:
      name: as the user gave it.
      platform: `cpu`, `cuda` or `tpu`.
      devices: of a grid that was asked for; else 1.
      memory: bytes of one device; None for a CPU, which has what the machine has.
      bandwidth: of one device's memory, in bytes a second; None for a CPU.
      peak: FLOP/s of one device by the arrays' element type, dense, at JAX's default precision (TF32 for float32 on
        a GPU, one bfloat16 pass on a TPU); empty for a CPU.
      description: of a GPU, a text `GpuTargetConfigProto`.
      source: of these facts.
    """

    name: str
    platform: str
    devices: int
    memory: int | None
    bandwidth: float | None
    peak: dict[str, float]
    description: str
    source: str

    @property
    def usable(self) -> int | None:
        """Bytes that one program can have.

        A GPU's share is JAX's default, `GPU_FRACTION`, or what $XLA_CLIENT_MEM_FRACTION says, as for the run, or
        $XLA_PYTHON_CLIENT_MEM_FRACTION, its old name.

        Raises:
          PlanError: if that is no number.
        """
        if self.memory is None:
            return None
        if self.platform == "tpu":
            return self.memory - TPU_RESERVED
        given = [(name, text) for name in _FRACTION_VARIABLES if (text := os.environ.get(name))]
        if not given:
            return int(self.memory * GPU_FRACTION)
        name, text = given[0]
        try:
            return int(self.memory * float(text))
        except (ValueError, OverflowError) as error:
            raise PlanError(f"${name} must be a number, and is {text!r}") from error

    def jax_devices(self, count: int | None = None) -> tuple[Any, ...]:
        """The target's devices, to give shardings.

        Args:
          count: how many; default: as many as the target's name says.

        Raises:
          PlanError: if the plugin is missing, or refuses so many.
        """
        count = self.devices if count is None else count
        if self.platform == "tpu":
            return _tpu_devices(self.name, count)
        if self.platform == "cuda":
            return _cuda_devices(self.description, count)
        attached = jax.devices("cpu")
        if count > len(attached):
            raise PlanError(
                f"{count} devices were asked for, and this process has {len(attached)} CPU devices: set "
                f"JAX_NUM_CPU_DEVICES={count}, or name another target than cpu"
            )
        return tuple(attached[:count])


def target(name: str, config_file: str | Path | None = None) -> Target:
    """A target by name.

    Args:
      name: one of `NAMES`, a TPU's with a grid of chips if there is to be more than one.
      config_file: a text `GpuTargetConfigProto` that replaces our description of a GPU; `--xla_dump_to` on a machine
        with the GPU writes it as `gpu_target_config.pbtxt`.

    Raises:
      PlanError: if there is no such target.
    """
    kind, colon, grid = name.lower().partition(":")
    if kind not in NAMES or (colon and kind not in TPUS):
        raise PlanError(unknown("target", name, NAMES) + "; a TPU's name may be followed by a grid, v5e:2x4")
    if config_file is not None and kind not in GPUS:
        raise PlanError(f"a target config describes a GPU, and the target is {name!r}")
    if kind in TPUS:
        tpu = TPUS[kind]
        devices = math.prod(_grid(name)) * tpu.cores if grid else 1
        rate = tpu.bfloat16 / tpu.cores
        peak = {"bfloat16": rate, "float32": rate}
        return Target(name, "tpu", devices, tpu.memory // tpu.cores, tpu.bandwidth / tpu.cores, peak, "", tpu.source)
    if kind in GPUS:
        gpu = GPUS[kind]
        peak = {"bfloat16": gpu.bfloat16, "float32": gpu.float32}
        found = Target(name, "cuda", 1, gpu.memory, gpu.bandwidth, peak, gpu.description, gpu.source)
        return found if config_file is None else _described(found, Path(config_file))
    return Target(name, "cpu", 1, None, None, {}, "", "this machine")


def _described(known: Target, path: Path) -> Target:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the target config {path}: {error}") from error
    numbers = {name: re.search(rf"\b{name}:\s*(\d+)", text) for name in ("device_memory_size", "memory_bandwidth")}
    memory, bandwidth = (found and int(found[1]) for found in numbers.values())
    if not memory or not bandwidth:
        raise PlanError(
            f"{path} is not the text of a GpuTargetConfigProto: it lacks device_memory_size or memory_bandwidth. A "
            "machine with the GPU writes one where XLA_FLAGS=--xla_dump_to=DIR says, as *gpu_target_config.pbtxt"
        )
    source = f"{path}; peaks: {known.source}"
    return replace(known, memory=memory, bandwidth=float(bandwidth), description=text, source=source)


def _grid(name: str) -> tuple[int, ...]:
    kind, _, grid = name.lower().partition(":")
    numbers = tuple(int(n) for n in grid.split("x")) if re.fullmatch(r"\d+(x\d+)*", grid) else ()
    axes = TPUS[kind].axes
    if len(numbers) != axes or 0 in numbers:
        example = "x".join(("2", "2", "1")[:axes])
        raise PlanError(
            f"target {name!r}: a grid of {kind} chips has {axes} numbers of at least 1, as in {kind}:{example}"
        )
    return numbers


def _grid_of(kind: str, devices: int) -> tuple[int, ...]:
    """The most even grid of a power of two of chips."""
    chips, remainder = divmod(devices, TPUS[kind].cores)
    if devices == 1:
        chips, remainder = 1, 0
    if remainder or chips < 1 or chips & (chips - 1):
        raise PlanError(
            f"{devices} devices of {kind} make no grid of a power of two of chips: name the grid, as in {kind}:2x4"
        )
    grid, axis = [1] * TPUS[kind].axes, 0
    while math.prod(grid) < chips:
        grid[axis] *= 2
        axis = (axis + 1) % len(grid)
    return tuple(sorted(grid, reverse=len(grid) == 3 and chips == 4))


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _needs(platform: str, *modules: str) -> None:
    if not any(importlib.util.find_spec(module) for module in modules):
        raise PlanError(
            f"to compile for a {platform} device, attached or not, {modules[0]} must be installed (Linux on x86_64): "
            f"{INSTALL}"
        )


def _topology(name: str, platform: str, **options: Any) -> tuple[Any, ...]:
    try:
        return tuple(topologies.get_topology_desc(name, platform, **options).devices)
    except Exception as error:  # whatever a plugin raises
        text = str(error).splitlines()[0]
        if "lockfile" in text:
            text = f"another process holds the TPU or libtpu's lock file, and this process may use the TPU ({text})"
        if "not implemented" in text:
            text = "JAX leaves out the plugin of a GPU that it does not find, unless it starts with JAX_PLATFORMS=cpu"
        raise PlanError(f"the {platform} plugin refuses {name or 'the device'}: {text}") from error


@functools.cache
def _cuda_devices(description: str, count: int) -> tuple[Any, ...]:
    _needs("CUDA", "jax_cuda13_plugin", "jax_cuda12_plugin")
    return _topology("", "cuda", target_config=description, topology=f"1x1x{count}")


@functools.cache
def _tpu_devices(name: str, count: int) -> tuple[Any, ...]:
    _needs("TPU", "libtpu")
    kind, _, grid = name.lower().partition(":")
    chips = _grid(name) if grid else _grid_of(kind, count)
    options: dict[str, Any] = {"chip_config_name": TPUS[kind].config} if TPUS[kind].config else {}
    if math.prod(chips) <= 4:  # they are on one host
        options["chips_per_host_bounds"] = (*chips, 1)[:3]
    # The lock keeps two processes from one TPU. One that does not use a TPU need not heed it.
    attached = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    ours = jax.config.jax_platforms is None or "tpu" in jax.config.jax_platforms  # type: ignore[attr-defined]
    lock = {} if attached and ours else {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    with _environment(_NO_NETWORK | lock):
        devices = _topology(f"{kind}:{'x'.join(map(str, chips))}", "tpu", **options)
    if count > len(devices):
        raise PlanError(f"target {name!r} has {len(devices)} devices, and {count} were asked for")
    return devices[:count]
