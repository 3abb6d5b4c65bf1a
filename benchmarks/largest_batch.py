"""The largest batch of a training step whose plan fits a device, beside BatchNorm's.

From the plans of two batches a line says where the device is full; the batch there, rounded down to a multiple of 8,
is compiled, and moved until it fits and the next multiple does not. What can be had of a GPU is JAX's default share of
its memory, or $XLA_PYTHON_CLIENT_MEM_FRACTION. Writes benchmarks/results/largest_batch.{json,md}.

  python benchmarks/largest_batch.py
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import rivals
from tqdm import tqdm

from mimicnorm_jax.planning import Plan, plan
from mimicnorm_jax.utils.files import write_text

RESULTS = Path(__file__).parent / "results"
VARIANTS = ("batchnorm", "batchnorm_remat", "ours:mimicnorm", "ours:mimicnorm+cheap", "ours:mimicnorm+stage")
STEP = 8


def largest(net: str, variant: str, dtype: str, target: str) -> dict[str, Any]:
    """The largest multiple of STEP that fits, with its plan's peak."""
    plans: dict[int, Plan] = {}

    def at(batch: int) -> Plan:
        if batch not in plans:
            subject = rivals.subject(net, variant, batch, jnp.dtype(dtype))
            plans[batch] = plan(subject.step, subject.state, subject.images, subject.labels, target=target, donate=(0,))
        return plans[batch]

    first, second = at(256), at(512)
    usable = first.usable_bytes
    if usable is None:
        raise ValueError(f"{target} has no memory of its own: name a GPU or a TPU")
    each = (second.peak_bytes - first.peak_bytes) / 256
    batch = int(256 + (usable - first.peak_bytes) / each) // STEP * STEP
    while at(batch).fits:
        batch += STEP
    while not at(batch).fits:
        batch -= STEP
    return {
        "net": net,
        "variant": variant,
        "batch": batch,
        "peak_bytes": at(batch).peak_bytes,
        "next_peak_bytes": at(batch + STEP).peak_bytes,
        "usable_bytes": usable,
        "plans": len(plans),
        "versions": first.versions,
    }


def render(target: str, dtype: str, rows: list[dict[str, Any]]) -> str:
    """The table."""
    versions = ", ".join(f"{name} {number}" for name, number in rows[0]["versions"].items())
    usable = rows[0]["usable_bytes"] / 2**20
    text = [
        "# The largest batch that fits",
        "",
        f"`python benchmarks/largest_batch.py`. {target}, {dtype}, by the compiler's plan ({versions});",
        f"{usable:,.0f} MiB for arguments and temporaries, the share of the memory that JAX takes by default. In",
        f"brackets the ratio to Flax's BatchNorm, ReLU and max-pooling. A batch fits, and {STEP} images more do not.",
        "",
        "| net | variant | largest batch | its peak, MiB |",
        "|---|---|---|---|",
    ]
    for row in rows:
        ratio = row["batch"] / rows[0]["batch"]
        peak = row["peak_bytes"] / 2**20
        text.append(f"| {row['net']} | {row['variant']} | {row['batch']:,} ({ratio:.2f}) | {peak:,.0f} |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet50_imagenet")
    parser.add_argument("--target", default="h100")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    net, dtype, target = arguments.net, arguments.dtype, arguments.target
    rows: list[dict[str, Any]] = []
    for variant in tqdm(VARIANTS, "largest batch"):
        rows.append(largest(net, variant, dtype, target))
        write_text(RESULTS / "largest_batch.json", json.dumps({"target": target, "dtype": dtype, "rows": rows}) + "\n")
        write_text(RESULTS / "largest_batch.md", render(target, dtype, rows))


if __name__ == "__main__":
    main()
