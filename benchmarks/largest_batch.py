"""The largest batch of a training step whose plan fits a device, beside BatchNorm's.

From the plans of two batches a straight line says where the device is full; the batch there, rounded down to a multiple
of 8, is compiled, and moved until it fits and the next multiple does not. What can be had of a GPU is JAX's default
share of its memory, or $XLA_CLIENT_MEM_FRACTION. Keeps what results/largest_batch.jsonl already holds for the
same compiler, then writes largest_batch.md.

  python -m benchmarks.largest_batch
"""

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks import _results, baselines
from benchmarks._results import Record, Store
from mimicnorm_jax.planning import Plan, plan

VARIANTS = ("batchnorm", "batchnorm_remat", "ours:mimicnorm", "ours:mimicnorm+cheap", "ours:mimicnorm+stage")
STEP = 8


def largest(net: str, variant: str, dtype: str, target: str) -> Record:
    """The largest multiple of STEP that fits, with its plan's peak."""
    plans: dict[int, Plan] = {}

    def at(batch: int) -> Plan:
        if batch not in plans:
            case = baselines.training_step(net, variant, batch, jnp.dtype(dtype))
            plans[batch] = plan(case.step, case.state, case.images, case.labels, target=target, donate=(0,))
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
        "target": target,
        "dtype": dtype,
        "net": net,
        "variant": variant,
        "batch": batch,
        "peak_bytes": at(batch).peak_bytes,
        "next_peak_bytes": at(batch + STEP).peak_bytes,
        "usable_bytes": usable,
        "plans": len(plans),
        "versions": first.versions,
    }


def key(record: Record) -> _results.Key:
    return record["target"], record["dtype"], record["versions"]["jax"], record["net"], record["variant"]


STORE = Store("largest_batch", key)


def page(records: list[Record]) -> str:
    """The tables, one for each target, dtype and compiler."""
    text = "# The largest batch that fits\n"
    for (target, dtype, _), block in _results.grouped(records, lambda record: key(record)[:3]).items():
        plain = {record["net"]: record["batch"] for record in block if record["variant"] == "batchnorm"}
        rows = [
            (
                record["net"],
                record["variant"],
                f"{record['batch']:,} ({record['batch'] / plain[record['net']]:.2f})"
                if record["net"] in plain
                else f"{record['batch']:,}",
                f"{record['peak_bytes'] / 2**20:,.0f}",
            )
            for record in block
        ]
        versions, usable = _results.versions(block[0]["versions"]), block[0]["usable_bytes"] / 2**20
        text += f"""
`python -m benchmarks.largest_batch`. {target}, {dtype}, by the compiler's plan ({versions});
{usable:,.0f} MiB for arguments and temporaries, the share of the memory that JAX takes by default. In
brackets the ratio to Flax's BatchNorm, ReLU and max-pooling. A batch fits, and {STEP} images more do not.

{_results.table(["net", "variant", "largest batch", "its peak, MiB"], rows)}
"""
    return text


def main() -> None:
    parser = _results.make_parser("largest_batch", __doc__)
    parser.add_argument("--net", default="resnet50_imagenet")
    parser.add_argument("--target", default="h100")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    net, dtype, target = arguments.net, arguments.dtype, arguments.target
    done = STORE.read(arguments.results)
    missing = [variant for variant in VARIANTS if (target, dtype, jax.__version__, net, variant) not in done]
    for variant in tqdm([] if arguments.render else missing, "largest batch"):
        STORE.add(arguments.results, largest(net, variant, dtype, target))
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
