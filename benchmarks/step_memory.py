"""Memory and traffic of a training step, as the compilers for an H100, a TPU v5e and others plan them.

For every network, variant (see baselines.py), dtype and target: what the compiler plans (temporaries, peak, bytes that
its kernels move, operations, fused convolutions, what is alive at the peak) and, beside it, what autodiff keeps for
the backward pass. No device is needed. Keeps what results/step_memory.jsonl already holds for the same
compiler, then writes step_memory.md.

  python -m benchmarks.step_memory
  python -m benchmarks.step_memory --targets v5e --nets resnet50_imagenet --variants batchnorm ours:mimicnorm
  python -m benchmarks.step_memory --render
"""

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks import _process, _results, baselines
from benchmarks._results import Record, Store
from mimicnorm_jax import models, plots
from mimicnorm_jax.planning import plan
from mimicnorm_jax.utils import log_line

NETS = ("resnet50_imagenet", "resnet18", "resnet50", "vgg16", "squeezenet", "shufflenetv2_x1", "mobilenetv2")
VARIANTS = (*baselines.VARIANTS, "ours:mimicnorm+cheap", "ours:mimicnorm+stage")
DTYPES = ("bfloat16", "float32")
TARGETS = ("h100", "v5e")
LARGEST_SHOWN = 8


def measure(net: str, variant: str, dtype: str, batch: int, target: str) -> Record:
    """One record."""
    case = baselines.training_step(net, variant, batch, jnp.dtype(dtype))
    planned = plan(case.step, case.state, case.images, case.labels, target=target, donate=(0,))
    fields = ("argument_bytes", "temporary_bytes", "aliased_bytes", "peak_bytes", "flops", "bytes_moved")
    return {
        "target": target,
        "net": net,
        "variant": variant,
        "dtype": dtype,
        "batch": batch,
        "saved_bytes": case.saved_bytes(),
        **{field: getattr(planned, field) for field in (*fields, "bytes_accessed", "bound_seconds", "fused")},
        "live_by_role": planned.live_by_role,
        "live": [[buffer.nbytes, buffer.shape, buffer.role, buffer.layer] for buffer in planned.live[:LARGEST_SHOWN]],
        "versions": planned.versions,
    }


def traffic(record: Record) -> float:
    """Bytes that a step moves: the compiler's own figure for a TPU, the sum over kernels for a GPU."""
    return record["bytes_accessed"] or sum(record["bytes_moved"].values())


def key(record: Record) -> _results.Key:
    names = ("target", "dtype", "batch")
    return (*(record[name] for name in names), record["versions"]["jax"], record["net"], record["variant"])


def _rank(name: str, known: tuple[str, ...]) -> int:
    return known.index(name) if name in known else len(known)


# One order however the records came.
STORE = Store("step_memory", key, lambda record: (*key(record)[:4], _rank(record["net"], NETS)))


def _cell(value: float, reference: float | None, unit: float, digits: int = 0) -> str:
    ratio = f" ({value / reference:.3f})" if reference else ""
    return f"{value / unit:,.{digits}f}{ratio}"


def _row(record: Record, reference: Record | None) -> list[str]:
    other = reference or {}
    fused = record["fused"]
    return [
        record["net"],
        record["variant"],
        _cell(record["saved_bytes"], other.get("saved_bytes"), 2**20),
        _cell(record["temporary_bytes"], other.get("temporary_bytes"), 2**20),
        _cell(traffic(record), traffic(reference) if reference else None, 1e9, 2),
        _cell(record["flops"], other.get("flops"), 1e9),
        f"{fused['activation']} of {fused['forward']}" if fused["forward"] else "-",
        f"{1e3 * record['bound_seconds']:,.1f}" if record["bound_seconds"] else "-",
    ]


def page(records: list[Record]) -> str:
    """The tables, one for each target, dtype, batch and compiler."""
    text = """# Memory and traffic of a training step, planned by the compiler

`python -m benchmarks.step_memory`. In brackets the ratio to the same network with Flax's BatchNorm, ReLU and
max-pooling. Kept: MiB that autodiff keeps for the backward pass, before any compiler, each array once.
Temporaries: MiB that the compiler plans for the step (SGD with momentum, state donated) besides arguments.
Moved: GB that the compiled kernels read and write (for a TPU the compiler's `bytes accessed`). GFLOP: of
convolutions and products, repeated ones counted again. ReLU fused: forward convolutions with an activation
in their kernel. Bound: ms, the larger of GFLOP over the device's peak and bytes over its bandwidth; it is no
prediction. `batchnorm_remat` keeps what convolutions return and recomputes normalization and ReLU. No seed
enters, and no device: all is a property of the compiled program. What a device did is in confirm_plan.md.
"""
    header = ["net", "variant", "kept", "temporaries", "moved", "GFLOP", "ReLU fused", "bound"]
    for (target, dtype, batch, _), block in _results.grouped(records, lambda record: key(record)[:4]).items():
        versions = _results.versions(block[0]["versions"])
        references = {record["net"]: record for record in block if record["variant"] == "batchnorm"}
        block.sort(key=lambda record: (_rank(record["net"], NETS), _rank(record["variant"], VARIANTS)))
        rows = [_row(record, references.get(record["net"])) for record in block]
        text += f"\n## {target}, {dtype}, batch {batch} ({versions})\n\n{_results.table(header, rows)}\n"
    return text


def draw(records: list[Record], path: Path) -> None:
    """The README's figure: an H100's plans in bfloat16, by network and variant."""
    shown = {"batchnorm": "BatchNorm", "batchnorm_remat": "BatchNorm, recomputing", "ours:mimicnorm": "MimicNorm"}
    shown["ours:mimicnorm+stage"] = "MimicNorm, remat=stage"
    found = {
        (record["net"], label): {
            "temporaries": [record["temporary_bytes"] / 2**20],
            "moved": [traffic(record) / 1e9],
        }
        for variant, label in shown.items()
        for net in NETS
        for record in records
        if (record["target"], record["dtype"], record["batch"]) == ("h100", "bfloat16", 256)
        and (record["net"], record["variant"]) == (net, variant)
    }
    if found and plots.available():
        labels = {"temporaries": "temporaries planned, MiB", "moved": "bytes moved, GB"}
        plots.bars(found, labels, path, "A training step as planned for an H100, bfloat16, batch 256")


def main() -> None:
    parser = _results.make_parser("step_memory", __doc__)
    parser.add_argument("--targets", nargs="+", default=TARGETS, metavar="TARGET")
    parser.add_argument("--nets", nargs="+", default=NETS, choices=models.ARCHITECTURES, metavar="NET")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        net, variant, dtype, batch, target = arguments.measure
        print(json.dumps(measure(net, variant, dtype, int(batch), target)))
        return
    cases = [
        (target, dtype, arguments.batch, jax.__version__, net, variant)
        for target in arguments.targets
        for dtype in arguments.dtypes
        for net in arguments.nets
        for variant in arguments.variants
        if baselines.has_variant(net, variant)
    ]
    done = STORE.read(arguments.results)
    for case in tqdm([] if arguments.render else [case for case in cases if case not in done], "step memory"):
        target, dtype, batch, _, net, variant = case
        found = _process.measure("step_memory", net, variant, dtype, str(batch), target, JAX_PLATFORMS="cpu")
        if isinstance(found, int):
            log_line(f"failed: {net}, {variant}, {dtype}, batch {batch}, {target}")
            continue
        STORE.add(arguments.results, found)
        STORE.write_page(arguments.results, page)
    STORE.write_page(arguments.results, page)
    draw(list(STORE.read(arguments.results).values()), arguments.results / "step_memory.png")


if __name__ == "__main__":
    main()
