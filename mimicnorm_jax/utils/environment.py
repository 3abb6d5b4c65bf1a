"""What a result was measured on."""

import os
import platform
import resource
import sys
from importlib.metadata import version
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax")


def describe() -> dict[str, Any]:
    """Devices, cores and versions, for a results file."""
    device = jax.local_devices()[0]
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def usable_cores() -> int:
    """How many cores this process may use, where the system says so; else all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_memory() -> dict[str, int]:
    """Peak bytes: of this process on the host, and of the first device where it counts them."""
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        peaks["peak_device_bytes"] = stats["peak_bytes_in_use"]
    return peaks


def memory_line() -> str:
    """The peaks for a reader."""
    names = {"peak_host_bytes": "host", "peak_device_bytes": "device"}
    return ", ".join(f"peak {names[name]} memory {value / 2**20:,.0f} MiB" for name, value in peak_memory().items())
