"""What a GPU really takes and how long a step lasts, beside what its compiler planned: the same programs.

For every case the plan of the step as this device's compiler makes it, then, in a fresh process without preallocation
that takes the compiled program from a cache, real steps on random images: peak bytes in use (arguments, temporaries,
and what the plan does not know: workspaces and the allocator's rounding), the median time of a step and its quartiles.
Keeps what results/confirm_plan.jsonl already holds for the same device and versions, then writes confirm_plan.md.

  python -m benchmarks.confirm_plan
  python -m benchmarks.confirm_plan --nets resnet50_imagenet --variants batchnorm ours:mimicnorm --batch=512
  python -m benchmarks.confirm_plan --render
"""

import argparse
import json
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks import _process, _results, baselines
from benchmarks._results import Record, Store
from benchmarks.step_memory import NETS
from mimicnorm_jax import models
from mimicnorm_jax.utils import environment

VARIANTS = ("batchnorm", "batchnorm_remat", "ours:mimicnorm", "ours:mimicnorm+cheap", "ours:mimicnorm+stage")
STEPS = 20
SECONDS = 4.0
"""At most STEPS steps are timed, and none is begun after so long."""


def compile_only(net: str, variant: str, dtype: str, batch: int) -> Record:
    """The plan; fills the compilation cache, so that the autotuner's trials do not count as the step's memory."""
    started = time.perf_counter()
    planned = baselines.training_step(net, variant, batch, jnp.dtype(dtype)).compile().memory_analysis()
    kept = planned.output_size_in_bytes - planned.alias_size_in_bytes
    return {
        "temporary_bytes": planned.temp_size_in_bytes,
        "argument_bytes": planned.argument_size_in_bytes,
        "planned_peak_bytes": planned.argument_size_in_bytes + kept + planned.temp_size_in_bytes,
        "compile_seconds": time.perf_counter() - started,
    }


def run(net: str, variant: str, dtype: str, batch: int) -> Record:
    """Real steps of the program that the cache holds."""
    case = baselines.training_step(net, variant, batch, jnp.dtype(dtype))
    started = time.perf_counter()
    step = case.compile()
    loading = time.perf_counter() - started
    state, images, labels = case.init()
    for _ in range(2):
        state = jax.block_until_ready(step(state, images, labels))
    times, begun = [], time.perf_counter()
    while len(times) < STEPS and time.perf_counter() - begun < SECONDS:
        started = time.perf_counter()
        state = jax.block_until_ready(step(state, images, labels))
        times.append(time.perf_counter() - started)
    return {"load_seconds": loading, "seconds": times, "machine": _results.machine(), **environment.peak_memory()}


PHASES = {"compile": compile_only, "run": run}


def _measure(net: str, variant: str, dtype: str, batch: int) -> Record:
    """One record: both phases, each in a fresh process."""
    record: Record = {"net": net, "variant": variant, "dtype": dtype, "batch": batch}
    with tempfile.TemporaryDirectory() as cache:
        variables = {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_RAISE_PERSISTENT_CACHE_ERRORS": "true",
        }
        for phase in PHASES:
            found = _process.measure("confirm_plan", phase, net, variant, dtype, str(batch), **variables)
            if isinstance(found, int):
                # Out of memory is a result too; the reason is on stderr.
                return record | {"failed": f"{phase}, code {found}", "machine": _results.machine()}
            record |= found
    return record


def key(record: Record) -> _results.Key:
    about = record["machine"]
    return about["device"], about["jax"], record["dtype"], record["batch"], record["net"], record["variant"]


STORE = Store("confirm_plan", key)


def _row(record: Record, reference: Record) -> list[str]:
    if "failed" in record:
        return [record["net"], record["variant"], "-", "-", f"failed ({record['failed']})", "-", "-"]
    ratio = statistics.median(record["seconds"]) / statistics.median(reference["seconds"])
    peak, plan = record["peak_device_bytes"], record["planned_peak_bytes"]
    return [
        record["net"],
        record["variant"],
        f"{record['temporary_bytes'] / 2**20:,.0f} ({record['temporary_bytes'] / reference['temporary_bytes']:.3f})",
        f"{plan / 2**20:,.0f}",
        f"{peak / 2**20:,.0f} ({peak / reference['peak_device_bytes']:.3f})",
        f"{peak / plan:.3f}",
        f"{_results.milliseconds(record['seconds'], 2)} ({ratio:.3f})",
    ]


def page(records: list[Record]) -> str:
    """The tables, one for each device, dtype and batch."""
    text = f"""# The plan of a training step beside a device

`python -m benchmarks.confirm_plan`. MiB, ms, and in brackets the ratio to the same network with Flax's
BatchNorm, ReLU and max-pooling. Temporaries and peak as this device's compiler planned them; in use: the
most bytes in use on the device in a fresh process without preallocation; time: median and quartiles of
{STEPS} steps (SGD with momentum, state donated, random images, seed 0), or of as many as began within
{SECONDS:.0f} s, after two to warm up.
"""
    header = ["net", "variant", "temporaries", "peak, planned", "in use", "in use / planned", "time"]
    for (device, jax_version, dtype, batch), block in _results.grouped(records, lambda r: key(r)[:4]).items():
        where = f"jax {jax_version}, flax {block[0]['machine']['flax']}"
        plain = {r["net"]: r for r in block if r["variant"] == "batchnorm" and "failed" not in r}
        rows = [_row(record, plain.get(record["net"], record)) for record in block]
        text += f"\n## {device}, {dtype}, batch {batch} ({where})\n\n{_results.table(header, rows)}\n"
    return text


def main() -> None:
    parser = _results.make_parser("confirm_plan", __doc__)
    variants = ", ".join(baselines.VARIANTS)
    parser.add_argument("--nets", nargs="+", default=NETS, choices=models.ARCHITECTURES, metavar="NET")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="VARIANT", help=variants)
    parser.add_argument("--dtypes", nargs="+", default=("bfloat16",), choices=("bfloat16", "float32"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        phase, net, variant, dtype, batch = arguments.measure
        print(json.dumps(PHASES[phase](net, variant, dtype, int(batch))))
        return
    if not arguments.render:
        about = _results.machine()
        if "cpu" in about["device"].lower():
            parser.error("there is no GPU or TPU here, and a CPU does not count its bytes: --render writes the table")
        cases = [
            (about["device"], about["jax"], dtype, arguments.batch, net, variant)
            for dtype in arguments.dtypes
            for net in arguments.nets
            for variant in arguments.variants
            if baselines.has_variant(net, variant)
        ]
        done = STORE.read(arguments.results)
        for case in tqdm([case for case in cases if case not in done], "confirm"):
            *_, dtype, batch, net, variant = case
            STORE.add(arguments.results, _measure(net, variant, dtype, batch))
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
