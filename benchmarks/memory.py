"""Memory of a training step: what autodiff keeps, what the compiler plans, what a device really uses.

For every network, variant (see rivals.py) and dtype, in a fresh process each: bytes kept for the
backward pass (exact, machine-independent), temporary bytes of the compiled step at two batch sizes and
the largest batch that fits 16 GiB by them, and, on a device that counts them, peak bytes in use over
three real steps with preallocation off. Keeps what benchmarks/results/memory.jsonl already holds for
the same device, then writes memory.md.

  python benchmarks/memory.py
  python benchmarks/memory.py --nets resnet50_imagenet --batch=256
  python benchmarks/memory.py --render
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rivals
from tqdm import tqdm

from mimicnorm_jax.training import machine
from mimicnorm_jax.training.logs import say
from mimicnorm_jax.training.workdir import write_text

RESULTS = Path(__file__).parent / "results"
NETS = ("resnet50", "resnet18", "vgg16", "squeezenet", "shufflenetv2_x1", "mobilenetv2")
DTYPES = ("float32", "bfloat16")
BUDGET = 16 * 2**30


def measure(net: str, variant: str, dtype: str, batch: int) -> dict[str, Any]:
    """One line; to be called in a fresh process."""
    subject = rivals.subject(net, variant, batch, jnp.dtype(dtype))
    memory = subject.compiled().memory_analysis()
    half = rivals.subject(net, variant, batch // 2, jnp.dtype(dtype)).compiled().memory_analysis()
    # Both are measured to the byte; from batch to batch the plan grows all but linearly.
    each = (memory.temp_size_in_bytes - half.temp_size_in_bytes) / (batch - batch // 2)
    fixed = memory.temp_size_in_bytes - each * batch + memory.argument_size_in_bytes
    line = {
        "net": net,
        "variant": variant,
        "dtype": dtype,
        "batch": batch,
        "saved_bytes": subject.saved(),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "largest_batch": int((BUDGET - fixed) / each),
        "machine": machine.describe(),
    }
    if (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use") is None:
        return line
    step = jax.jit(subject.step, donate_argnums=0)
    state, images, labels = subject.start()
    for _ in range(3):
        state = step(state, images, labels)
    jax.block_until_ready(state)
    return line | machine.peak_memory()


def _in_fresh_process(case: tuple[str, str, str, int]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", *map(str, case)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        # Out of memory is a result too; the reason is on stderr.
        net, variant, dtype, batch = case
        failed = {"net": net, "variant": variant, "dtype": dtype, "batch": batch}
        return failed | {"failed": done.returncode, "machine": machine.describe()}
    return json.loads(done.stdout.splitlines()[-1])


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["machine"]["device"], line["net"], line["variant"], line["dtype"], line["batch"]


def read(path: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return {_key(line): line for line in lines}


def _cell(line: dict[str, Any], reference: dict[str, Any], quantity: str, unit: int = 2**20) -> str:
    if quantity not in line:
        return "-"
    ratio = f" ({line[quantity] / reference[quantity]:.3f})" if reference.get(quantity) else ""
    return f"{line[quantity] / unit:,.0f}{ratio}"


def render(lines: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    """The table, one block for each device, dtype and batch."""
    text = [
        "# Memory of a training step",
        "",
        "`python benchmarks/memory.py`. MiB, and in brackets the ratio to the same network with Flax's BatchNorm, ReLU",
        "and max-pooling. Kept: what autodiff keeps for the backward pass, each array once, parameters and images not",
        "counted. Temporaries: what the compiler plans for the step (SGD with momentum) besides its arguments. Peak:",
        "bytes in use on the device over three steps in a fresh process. Largest batch: by the plan, in 16 GiB.",
        "`batchnorm_remat` keeps what convolutions return and recomputes normalisation and ReLU. No seed enters: all",
        "but the peak is a property of the program.",
    ]
    blocks: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines.values():
        blocks.setdefault((line["machine"]["device"], line["dtype"], line["batch"]), []).append(line)
    for (device, dtype, batch), block in blocks.items():
        versions = {name: block[0]["machine"][name] for name in ("jax", "flax")}
        about = ", ".join(f"{name} {number}" for name, number in versions.items())
        text += ["", f"## {device}, {dtype}, batch {batch} ({about})", ""]
        text += [
            "| net | variant | kept | temporaries | peak on the device | largest batch |",
            "|---|---|---|---|---|---|",
        ]
        for line in block:
            reference = next((b for b in block if (b["net"], b["variant"]) == (line["net"], "batchnorm")), {})
            cells = [_cell(line, reference, name) for name in ("saved_bytes", "temp_bytes", "peak_device_bytes")]
            cells.append(_cell(line, reference, "largest_batch", 1) if "failed" not in line else "failed")
            text.append("| " + " | ".join([line["net"], line["variant"], *cells]) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=NETS, metavar="NET")
    parser.add_argument("--variants", nargs="+", default=rivals.VARIANTS, metavar="VARIANT")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--render", action="store_true", help="only write the table again")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        net, variant, dtype, batch = arguments.measure
        print(json.dumps(measure(net, variant, dtype, int(batch))))
        return
    path = RESULTS / "memory.jsonl"
    lines = read(path)
    cases = [(n, v, d, arguments.batch) for d in arguments.dtypes for n in arguments.nets for v in arguments.variants]
    device = machine.describe()["device"]
    missing = [case for case in cases if (device, *case) not in lines and not arguments.render]
    for case in tqdm(missing, "memory"):
        line = _in_fresh_process(case)
        lines[_key(line)] = line
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines.values()))
    write_text(RESULTS / "memory.md", render(lines))
    say(f"wrote {RESULTS / 'memory.md'}")


if __name__ == "__main__":
    main()
