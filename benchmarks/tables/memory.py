"""Memory and time of a training step, as compilers plan them and as devices take them."""

import statistics
from pathlib import Path

from benchmarks import (
    confirm_plan,
    largest_batch,
    step_memory,
)
from benchmarks._results import Record, grouped, table
from benchmarks.tables.registry import NETS, named

STEPS = {
    "batchnorm": "BatchNorm",
    "batchnorm_remat": "BatchNorm, recomputing",
    "ours:mimicnorm": "MimicNorm",
    "ours:mimicnorm+cheap": "MimicNorm, `cheap`",
    "ours:mimicnorm+stage": "MimicNorm, `stage`",
}
OURS = "ours:mimicnorm"


def _bfloat16(record: Record) -> bool:
    return record["dtype"] == "bfloat16" and record["batch"] == 256 and "failed" not in record


def _planned(results: Path, target: str, net: str) -> dict[str, Record]:
    """Plans of a network by variant, all by one compiler: the newest that planned BatchNorm and MimicNorm."""
    records = filter(_bfloat16, step_memory.STORE.read(results).values())
    mine = [record for record in records if (record["target"], record["net"]) == (target, net)]
    by_version = {
        version: {record["variant"]: record for record in found}
        for version, found in grouped(mine, lambda record: record["versions"]["jax"]).items()
    }
    whole = [version for version, found in by_version.items() if {"batchnorm", OURS} <= found.keys()]
    newest = max(whole, key=lambda version: [int(part) for part in version.split(".")], default=None)
    return by_version[newest] if newest else {}


def _temporaries(plans: dict[str, Record], variant: str, otherwise: str = "-") -> str:
    if variant not in plans:
        return otherwise
    return f"{plans[variant]['temporary_bytes'] / plans['batchnorm']['temporary_bytes']:.3f}"


@named("planned_memory")
def _planned_memory(results: Path) -> str:
    """Temporaries of a step as the compilers plan them, beside BatchNorm's."""
    rows = []
    for net, name in NETS.items():
        plans = _planned(results, "h100", net)
        if not plans:
            continue
        plain, ours = plans["batchnorm"], plans[OURS]
        rows.append(
            (
                name,
                f"{plain['temporary_bytes'] / 2**20:,.0f}",
                _temporaries(plans, "batchnorm_remat"),
                f"{ours['temporary_bytes'] / 2**20:,.0f} ({_temporaries(plans, OURS)})",
                _temporaries(plans, f"{OURS}+cheap"),
                _temporaries(plans, f"{OURS}+stage"),
                f"{step_memory.traffic(ours) / step_memory.traffic(plain):.3f}",
                _temporaries(_planned(results, "v5e", net), OURS, "not run"),
            )
        )
    header = ["network", "BatchNorm", "recomputing", "MimicNorm", "`cheap`", "`stage`", "bytes moved", "v5e"]
    return table(header, rows)


def measured(results: Path) -> dict[tuple[str, str], dict[tuple[str, str], Record]]:
    """What ran on devices, by device and version of jax, then by network and variant."""
    records = filter(_bfloat16, confirm_plan.STORE.read(results).values())
    where = grouped(records, lambda record: (record["machine"]["device"], record["machine"]["jax"]))
    return {device: {(record["net"], record["variant"]): record for record in found} for device, found in where.items()}


def peak_and_time(record: Record, plain: Record) -> tuple[float, float]:
    """Ratios to BatchNorm's."""
    peak = record["peak_device_bytes"] / plain["peak_device_bytes"]
    return peak, statistics.median(record["seconds"]) / statistics.median(plain["seconds"])


@named("measured_memory")
def _measured_memory(results: Path) -> str:
    """Memory and time of a step on a device, beside BatchNorm's; networks that ran under both."""
    parts = []
    for (device, version), records in measured(results).items():
        rows = []
        for (net, variant), record in records.items():
            if {(net, "batchnorm"), (net, OURS)} <= records.keys():
                peak, time = peak_and_time(record, records[net, "batchnorm"])
                milliseconds = 1e3 * statistics.median(record["seconds"])
                rows.append(
                    (
                        NETS[net],
                        STEPS[variant],
                        f"{record['planned_peak_bytes'] / 2**20:,.0f}",
                        f"{record['peak_device_bytes'] / 2**20:,.0f} ({peak:.3f})",
                        f"{milliseconds:.2f} ({time:.3f})",
                    )
                )
        header = ["network", "step", "peak planned, MiB", "in use, MiB", "time, ms"]
        parts.append(f"{device}, jax {version}:\n\n{table(header, rows)}")
    return "\n\n".join(parts)


@named("largest_batch")
def _largest_batch(results: Path) -> str:
    """The largest batch that a plan fits into a device, beside BatchNorm's by the same compiler."""
    rows = []
    same = grouped(largest_batch.STORE.read(results).values(), lambda r: (*largest_batch.STORE.key(r)[:3], r["net"]))
    for (target, dtype, _, net), block in same.items():
        plain = [record["batch"] for record in block if record["variant"] == "batchnorm"]
        for record in block:
            ratio = f"{record['batch'] / plain[0]:.2f}" if plain else "-"
            step = f"{STEPS[record['variant']]}, {dtype}"
            rows.append((NETS[net], step, target, f"{record['batch']:,}", ratio))
    return table(["network", "step", "device", "largest batch", "times BatchNorm's"], rows) if rows else "Not run yet."
