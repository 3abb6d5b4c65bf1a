"""What a GPU really takes and how long a step lasts, beside what its compiler planned: the same programs.

For every case the plan of the step as this device's compiler makes it, then, in a fresh process without preallocation
that takes the compiled program from a cache, real steps on random images: peak bytes in use (arguments, temporaries,
and what the plan does not know: workspaces and the allocator's rounding), the median time of a step and its quartiles.
Keeps what results/confirm_plan.jsonl already holds for the same device and versions, then writes confirm_plan.md.

  python benchmarks/confirm_plan.py
  python benchmarks/confirm_plan.py --nets resnet50_imagenet --variants batchnorm ours:mimicnorm --batch=512
  python benchmarks/confirm_plan.py --render
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rivals
from memory import NETS
from tqdm import tqdm

from mimicnorm_jax.utils import environment
from mimicnorm_jax.utils.console import log_line
from mimicnorm_jax.utils.files import write_text

RESULTS = Path(__file__).parent / "results"
VARIANTS = ("batchnorm", "batchnorm_remat", "ours:mimicnorm", "ours:mimicnorm+cheap", "ours:mimicnorm+stage")
STEPS = 20
SECONDS = 4.0
"""At most STEPS steps are timed, and none is begun after so long."""


def compile_only(net: str, variant: str, dtype: str, batch: int) -> dict[str, Any]:
    """The plan; fills the compilation cache, so that the autotuner's trials do not count as the step's memory."""
    started = time.perf_counter()
    planned = rivals.subject(net, variant, batch, jnp.dtype(dtype)).compiled().memory_analysis()
    kept = planned.output_size_in_bytes - planned.alias_size_in_bytes
    return {
        "temporary_bytes": planned.temp_size_in_bytes,
        "argument_bytes": planned.argument_size_in_bytes,
        "planned_peak_bytes": planned.argument_size_in_bytes + kept + planned.temp_size_in_bytes,
        "compile_seconds": time.perf_counter() - started,
    }


def run(net: str, variant: str, dtype: str, batch: int) -> dict[str, Any]:
    """Real steps of the program that the cache holds."""
    subject = rivals.subject(net, variant, batch, jnp.dtype(dtype))
    started = time.perf_counter()
    step = subject.compiled()
    loading = time.perf_counter() - started
    state, images, labels = subject.start()
    for _ in range(2):
        state = jax.block_until_ready(step(state, images, labels))
    times, begun = [], time.perf_counter()
    while len(times) < STEPS and time.perf_counter() - begun < SECONDS:
        started = time.perf_counter()
        state = jax.block_until_ready(step(state, images, labels))
        times.append(time.perf_counter() - started)
    return {"load_seconds": loading, "seconds": times, "machine": environment.describe(), **environment.peak_memory()}


PHASES = {"compile": compile_only, "run": run}


def _measure(case: tuple[str, ...]) -> dict[str, Any]:
    """One line: both phases, each in a fresh process."""
    net, variant, dtype, batch = case
    line = {"net": net, "variant": variant, "dtype": dtype, "batch": int(batch)}
    with tempfile.TemporaryDirectory() as cache:
        variables = os.environ | {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_RAISE_PERSISTENT_CACHE_ERRORS": "true",
        }
        for phase in PHASES:
            command = [sys.executable, __file__, "--measure", phase, *case]
            done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                # Out of memory is a result too; the reason is on stderr.
                return line | {"failed": f"{phase}, code {done.returncode}", "machine": environment.describe()}
            line |= json.loads(done.stdout.splitlines()[-1])
    return line


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    about = line["machine"]
    return about["device"], about["jax"], line["dtype"], line["batch"], line["net"], line["variant"]


def read(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return {key(line): line for line in lines}


def _row(line: dict[str, Any], reference: dict[str, Any]) -> str:
    if "failed" in line:
        return f"| {line['net']} | {line['variant']} | - | - | failed ({line['failed']}) | - | - |"
    seconds, other = statistics.median(line["seconds"]), statistics.median(reference["seconds"])
    quartiles = statistics.quantiles(line["seconds"], n=4)
    peak, plan = line["peak_device_bytes"], line["planned_peak_bytes"]
    cells = [
        line["net"],
        line["variant"],
        f"{line['temporary_bytes'] / 2**20:,.0f} ({line['temporary_bytes'] / reference['temporary_bytes']:.3f})",
        f"{plan / 2**20:,.0f}",
        f"{peak / 2**20:,.0f} ({peak / reference['peak_device_bytes']:.3f})",
        f"{peak / plan:.3f}",
        f"{1e3 * seconds:,.2f} [{1e3 * quartiles[0]:,.2f}, {1e3 * quartiles[2]:,.2f}] ({seconds / other:.3f})",
    ]
    return "| " + " | ".join(cells) + " |"


def render(lines: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    """The table, one block for each device, dtype and batch."""
    text = [
        "# The plan of a training step beside a device",
        "",
        "`python benchmarks/confirm_plan.py`. MiB, ms, and in brackets the ratio to the same network with Flax's",
        "BatchNorm, ReLU and max-pooling. Temporaries and peak as this device's compiler planned them; in use: the",
        "most bytes in use on the device in a fresh process without preallocation; time: median and quartiles of",
        f"{STEPS} steps (SGD with momentum, state donated, random images, seed 0), or of as many as began within",
        f"{SECONDS:.0f} s, after two to warm up.",
    ]
    blocks: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines.values():
        blocks.setdefault(key(line)[:4], []).append(line)
    for (device, version, dtype, batch), block in blocks.items():
        flax = block[0]["machine"]["flax"]
        text += ["", f"## {device}, {dtype}, batch {batch} (jax {version}, flax {flax})", ""]
        text += ["| net | variant | temporaries | peak, planned | in use | in use / planned | time |", "|---" * 7 + "|"]
        for line in block:
            reference = lines.get((*key(line)[:5], "batchnorm"), line)
            text.append(_row(line, line if "failed" in reference else reference))
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=NETS, choices=NETS, metavar="NET")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="VARIANT", help=", ".join(rivals.VARIANTS))
    parser.add_argument("--dtypes", nargs="+", default=("bfloat16",), choices=("bfloat16", "float32"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--render", action="store_true", help="only write the table again")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        phase, net, variant, dtype, batch = arguments.measure
        print(json.dumps(PHASES[phase](net, variant, dtype, int(batch))))
        return
    path = RESULTS / "confirm_plan.jsonl"
    lines = read(path)
    if not arguments.render:
        about = environment.describe()
        if "cpu" in about["device"].lower():
            parser.error("there is no GPU or TPU here, and a CPU does not count its bytes: --render writes the table")
        cases = [
            (about["device"], about["jax"], dtype, arguments.batch, net, variant)
            for dtype in arguments.dtypes
            for net in arguments.nets
            for variant in arguments.variants
            if rivals.makes_sense(net, variant)
        ]
        for case in tqdm([case for case in cases if case not in lines], "confirm"):
            *_, dtype, batch, net, variant = case
            line = _measure((net, variant, dtype, str(batch)))
            lines[key(line)] = line
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines.values()))
    write_text(RESULTS / "confirm_plan.md", render(lines))
    log_line(f"wrote {RESULTS / 'confirm_plan.md'}")


if __name__ == "__main__":
    main()
