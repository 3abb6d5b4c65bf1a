"""The pseudo-kernel of ResNet-18 at full width on CIFAR-100: time of an entry, or the plan of a device's programs.

The kernel of N test images with themselves, in blocks that fit --memory; evaluation mode, published initialization. It
is computed twice in a process of its own: the first time compiles, the second is measured. With --target nothing is
computed: the programs of a block are compiled for that device, which need not be there.

  python -m benchmarks.ntk.pseudo_kernel --data_dir=DIR --core=0
  python -m benchmarks.ntk.pseudo_kernel --target=h100 --images=1000 --memory=40
  python -m benchmarks.ntk.pseudo_kernel --render

Without --data_dir the images are standard normal noise, which takes the same time.
"""

import argparse
import json
import math
import os
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _process, _results
from benchmarks._results import Record, Store
from benchmarks.ntk.compare import ONE_THREAD
from mimicnorm_jax import models
from mimicnorm_jax.diagnostics import EmpiricalNTK, from_linen
from mimicnorm_jax.planning import plan
from mimicnorm_jax.utils import environment, log_line

METHODS = ("mimicnorm", "batchnorm")
PUBLISHED = "0.86 µs an entry on four A100 (60,000 x 50,000 entries in 43 minutes)"


def _where(record: Record) -> str:
    return record.get("target") or record["machine"]["device"]


STORE = Store("ntk_pseudo_kernel", lambda r: ("target" in r, _where(r), r["method"], r["images"], r["block"]))


def _images(method: str, count: int, data_dir: str) -> jax.Array:
    if not data_dir:
        return jnp.asarray(np.random.default_rng(0).standard_normal((count, 32, 32, 3)), jnp.float32)
    from mimicnorm_jax.monitoring import images  # an environment that only plans need not read images
    from mimicnorm_jax.training import base, validate

    fields = base(dataset="cifar100", data_dir=data_dir, model="resnet18", method=method)
    return images(validate(fields), count, "real", "float32")


def _variables(module: Any, x: jax.Array, *, shapes_only: bool) -> Any:
    if not shapes_only:
        return jax.jit(module.init)(jax.random.key(0), x[:1])
    shapes = jax.eval_shape(module.init, jax.random.key(0), x[:1])
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


def _subject(method: str, count: int, data_dir: str, *, shapes_only: bool) -> tuple[Any, Any, jax.Array]:
    """The network, its parameters (zeros, where their shapes are enough) and images."""
    x = _images(method, count, data_dir)
    module = models.create("resnet18", method=method, num_classes=100)
    return *from_linen(module, _variables(module, x, shapes_only=shapes_only), train=False), x


def measure(method: str, count: int, gib: float, data_dir: str) -> Record:
    """The record of a kernel that is computed."""
    apply_fn, params, x = _subject(method, count, data_dir, shapes_only=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kernel_of = EmpiricalNTK(apply_fn, output="pseudo", memory=int(gib * 2**30))
    planned = kernel_of.plan(params, x)
    seconds, found = [], np.empty(0)
    for _ in range(2):
        wall, cpu = time.perf_counter(), time.process_time()
        found = np.asarray(kernel_of(params, x))
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    statistics = jax.local_devices()[0].memory_stats() or {}
    return {
        "method": method,
        "images": count,
        "inputs": "CIFAR-100 test images" if data_dir else "standard normal noise",
        "block": planned.block[0],
        "seconds": seconds[1][0],
        "cpu_seconds": seconds[1][1],
        "first_seconds": seconds[0][0],
        "planned_bytes": planned.bytes,
        "rss_bytes": 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before),
        "device_peak_bytes": statistics.get("peak_bytes_in_use"),
        "chosen": str(planned),
        "mean_diagonal": float(np.diagonal(found).mean()),
        "least_eigenvalue": float(np.linalg.eigvalsh(found.astype(np.float64))[0]),
        "used_cores": environment.usable_cores(),
        "machine": _results.machine(),
    }


def planned(method: str, count: int, gib: float, target: str) -> Record:
    """The record of a kernel whose programs are compiled for a device."""
    apply_fn, params, x = _subject(method, count, "", shapes_only=True)
    kernel_of = EmpiricalNTK(apply_fn, output="pseudo", memory=int(gib * 2**30))
    chosen, blocked = kernel_of.prepare(params, x)
    block, leaves = chosen.block[0], jax.tree.leaves(params)
    blocks = math.ceil(count / block)
    if blocks == 1:
        programs = {"whole": (1, plan(lambda p, x: blocked.whole(p, x, None), leaves, x, target=target))}
    else:
        pairs = blocks * (blocks - 1) // 2
        side = jax.eval_shape(blocked.features, leaves, x[:block])
        programs = {
            "features of a block": (blocks + pairs, plan(blocked.features, leaves, x[:block], target=target)),
            "a block with itself": (
                blocks,
                plan(lambda p, left: blocked.contracted(p, left, left, True), leaves, side, target=target),
            ),
            "two blocks": (
                pairs,
                plan(
                    lambda p, left, right: blocked.contracted(p, left, right, False),
                    *(leaves, side, side),
                    target=target,
                ),
            ),
        }
    fields = ("argument_bytes", "output_bytes", "temporary_bytes", "flops", "bytes_moved", "bound_seconds", "bound_by")
    return {
        "target": target,
        "method": method,
        "images": count,
        "block": block,
        "planned_bytes": chosen.bytes,
        "programs": {
            name: {"times": times, "unknown_loops": made.unknown_loops}
            | {field: getattr(made, field) for field in fields}
            for name, (times, made) in programs.items()
        },
        "versions": next(iter(programs.values()))[1].versions,
    }


def _microseconds(seconds: float) -> str:
    return f"{1e6 * seconds:,.0f}" if seconds >= 1e-4 else f"{1e6 * seconds:.3g}"


def _measured_row(record: Record) -> tuple[Any, ...]:
    entries = record["images"] ** 2
    peak = record["device_peak_bytes"]
    return (
        f"{_where(record)}, {record['used_cores']} core{'s' * (record['used_cores'] > 1)}",
        *(record[name] for name in ("method", "inputs", "images", "block")),
        *(_microseconds(record[name] / entries) for name in ("cpu_seconds", "seconds")),
        f"{record['first_seconds']:.0f}",
        *(f"{record[name] / 2**20:,.0f}" for name in ("planned_bytes", "rss_bytes")),
        "" if peak is None else f"{peak / 2**20:,.0f}",
    )


def _planned_rows(record: Record) -> list[tuple[Any, ...]]:
    return [
        (
            *(record[name] for name in ("method", "images", "block")),
            f"{name}, {program['times']} times",
            *(f"{program[f'{each}_bytes'] / 2**20:,.0f}" for each in ("argument", "output", "temporary")),
            f"{program['flops'] / 1e9:,.0f}",
            f"{sum(program['bytes_moved'].values()) / 1e9:,.1f}",
            f"{1e3 * program['bound_seconds']:,.2f} by {program['bound_by']}",
        )
        for name, program in record["programs"].items()
    ]


def _total(record: Record) -> str:
    """A planned kernel's operations and bounds."""
    programs, entries = record["programs"].values(), record["images"] ** 2
    flops = sum(program["times"] * program["flops"] for program in programs)
    bound = sum(program["times"] * program["bound_seconds"] for program in programs)
    loops = sum(program["unknown_loops"] for program in programs)
    return (
        f"* {_where(record)}, {record['method']}, {record['images']:,} images in blocks of {record['block']:,}: "
        f"{flops / 1e12:,.1f} TFLOP, at least {bound:.3f} s or {1e6 * bound / entries:.3f} µs an entry"
        f"{f'; {loops} loops count as one turn' if loops else ''}. Our own estimate of a pair of blocks: "
        f"{record['planned_bytes'] / 2**20:,.0f} MiB."
    )


def page(records: list[Record]) -> str:
    """Both tables."""
    done = [record for record in records if "target" not in record]
    plans = [record for record in records if "target" in record]
    header = ["on", "method", "inputs", "images", "block", "µs an entry, CPU time", "wall time", "first call, s"]
    measured = _results.table(
        [*header, "planned, MiB", "host's peak, MiB", "device's peak, MiB"], map(_measured_row, done)
    )
    header = ["method", "images", "block", "program", "arguments, MiB", "results, MiB", "temporaries, MiB"]
    rows = [row for record in plans for row in _planned_rows(record)]
    planned = _results.table([*header, "GFLOP", "moved, GB", "bound, ms"], rows)
    versions = "; ".join(sorted({_results.versions(record["versions"]) for record in plans}))
    return f"""# The pseudo-kernel of ResNet-18 on CIFAR-100

ResNet-18 at full width, 100 outputs, evaluation mode, all parameters, float32 with products in full precision; the
kernel of the images with themselves, whose lower half is mirrored. Entries: all N x N. Published by Mohamadi, Bae and
Sutherland (2023): {PUBLISHED}.

## Measured

{measured}

Second of two calls, in blocks. CPU time is the process's; where the wall time is longer, others used the core. First
call: with compilation. Planned: our own estimate for a pair of blocks. Host's peak: growth of the process's resident
memory, compilation included.

## Planned for {", ".join(sorted({record["target"] for record in plans})) or "no device yet"}, by the compiler

{planned}

Nothing was run. The bound takes the device's published peaks at JAX's default precision (TF32 on a GPU); products in
full precision are slower than that, so it is far below what a device can reach. Compiled by
{versions or "nothing yet"}.

{chr(10).join(map(_total, plans))}

Command: `python -m benchmarks.ntk.pseudo_kernel --core=0 --data_dir=DIR`; with `--target=h100 --images=1000
--memory=40` the plans. Machine: {_results.machines(done)}.
"""


def main() -> None:
    parser = _results.make_parser("ntk.pseudo_kernel", __doc__)
    parser.add_argument("--data_dir", default="", help="folder of TFDS data sets; default: noise as images")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--memory", type=float, default=4.0, help="GiB for a pair of blocks (default: 4)")
    parser.add_argument("--core", type=int, help="the only core to run on, with one thread (default: all)")
    parser.add_argument("--target", help="a device to plan for, such as h100, instead of computing")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        method, count, gib, data_dir, target = arguments.measure
        made = planned(method, int(count), float(gib), target) if target else None
        print(json.dumps(made or measure(method, int(count), float(gib), data_dir)))
        return
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})  # which the processes inherit
    variables = {"JAX_PLATFORMS": "cpu"} if arguments.target else {} if arguments.core is None else ONE_THREAD
    for method in () if arguments.render else arguments.methods:
        case = (method, str(arguments.images), str(arguments.memory), arguments.data_dir, arguments.target or "")
        found = _process.measure("ntk.pseudo_kernel", *case, **variables)
        if isinstance(found, int):
            log_line(f"failed: {', '.join(case)}")
            continue
        STORE.add(arguments.results, found)
        log_line(f"{method}, {arguments.images} images: in blocks of {found['block']}")
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
