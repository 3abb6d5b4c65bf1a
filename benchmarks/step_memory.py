"""Memory and traffic of a training step, as the compilers for an H100, a TPU v5e and others plan them.

For every network, variant (see rivals.py), dtype and target: what the compiler plans (temporaries, peak, bytes that
its kernels move, operations, fused convolutions, what is alive at the peak) and, beside it, what autodiff keeps for
the backward pass. No device is needed. Keeps what benchmarks/results/memory.jsonl already holds for the same
compiler, then writes memory.md.

  python benchmarks/memory.py
  python benchmarks/memory.py --targets v5e --nets resnet50_imagenet --variants batchnorm ours:mimicnorm
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

from mimicnorm_jax.planning import plan
from mimicnorm_jax.utils.console import log_line
from mimicnorm_jax.utils.files import write_text

RESULTS = Path(__file__).parent / "results"
NETS = ("resnet50_imagenet", "resnet18", "resnet50", "vgg16", "squeezenet", "shufflenetv2_x1", "mobilenetv2")
VARIANTS = (*rivals.VARIANTS, "ours:mimicnorm+cheap", "ours:mimicnorm+stage")
DTYPES = ("bfloat16", "float32")
TARGETS = ("h100", "v5e")
LARGEST_SHOWN = 8


def measure(net: str, variant: str, dtype: str, batch: int, target: str) -> dict[str, Any]:
    """One line."""
    subject = rivals.subject(net, variant, batch, jnp.dtype(dtype))
    planned = plan(subject.step, subject.state, subject.images, subject.labels, target=target, donate=(0,))
    fields = ("argument_bytes", "temporary_bytes", "aliased_bytes", "peak_bytes", "flops", "bytes_moved")
    return {
        "target": target,
        "net": net,
        "variant": variant,
        "dtype": dtype,
        "batch": batch,
        "saved_bytes": subject.saved(),
        **{field: getattr(planned, field) for field in (*fields, "bytes_accessed", "bound_seconds", "fused")},
        "live_by_role": planned.live_by_role,
        "live": [[buffer.nbytes, buffer.shape, buffer.role, buffer.layer] for buffer in planned.live[:LARGEST_SHOWN]],
        "versions": planned.versions,
    }


def traffic(line: dict[str, Any]) -> float:
    """Bytes that a step moves: the compiler's own figure for a TPU, the sum over kernels for a GPU."""
    return line["bytes_accessed"] or sum(line["bytes_moved"].values())


def _in_fresh_process(case: tuple[str, ...]) -> dict[str, Any] | None:
    command = [sys.executable, __file__, "--measure", *case]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        log_line(f"failed: {' '.join(case)}")
        return None
    return json.loads(done.stdout.splitlines()[-1])


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["target"], line["dtype"], line["batch"], line["versions"]["jax"], line["net"], line["variant"]


def read(path: Path = RESULTS / "memory.jsonl") -> dict[tuple[Any, ...], dict[str, Any]]:
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return {key(line): line for line in lines}


def write(lines: dict[tuple[Any, ...], dict[str, Any]]) -> None:
    """Both files, in one order however the lines came."""
    ordered = sorted(lines.values(), key=lambda line: (*key(line)[:4], NETS.index(line["net"])))
    write_text(RESULTS / "memory.jsonl", "".join(json.dumps(line) + "\n" for line in ordered))
    write_text(RESULTS / "memory.md", render(ordered))


def _cell(value: float, reference: float | None, unit: float, digits: int = 0) -> str:
    ratio = f" ({value / reference:.3f})" if reference else ""
    return f"{value / unit:,.{digits}f}{ratio}"


def _row(line: dict[str, Any], reference: dict[str, Any] | None) -> str:
    other = reference or {}
    fused = line["fused"]
    cells = [
        line["net"],
        line["variant"],
        _cell(line["saved_bytes"], other.get("saved_bytes"), 2**20),
        _cell(line["temporary_bytes"], other.get("temporary_bytes"), 2**20),
        _cell(traffic(line), traffic(reference) if reference else None, 1e9, 2),
        _cell(line["flops"], other.get("flops"), 1e9),
        f"{fused['activation']} of {fused['forward']}" if fused["forward"] else "-",
        f"{1e3 * line['bound_seconds']:,.1f}" if line["bound_seconds"] else "-",
    ]
    return "| " + " | ".join(cells) + " |"


def render(lines: list[dict[str, Any]]) -> str:
    """The table, one block for each target, dtype, batch and compiler."""
    text = [
        "# Memory and traffic of a training step, planned by the compiler",
        "",
        "`python benchmarks/memory.py`. In brackets the ratio to the same network with Flax's BatchNorm, ReLU and",
        "max-pooling. Kept: MiB that autodiff keeps for the backward pass, before any compiler, each array once.",
        "Temporaries: MiB that the compiler plans for the step (SGD with momentum, state donated) besides arguments.",
        "Moved: GB that the compiled kernels read and write (for a TPU the compiler's `bytes accessed`). GFLOP: of",
        "convolutions and products, repeated ones counted again. ReLU fused: forward convolutions with an activation",
        "in their kernel. Bound: ms, the larger of GFLOP over the device's peak and bytes over its bandwidth; it is no",
        "prediction. `batchnorm_remat` keeps what convolutions return and recomputes normalization and ReLU. No seed",
        "enters, and no device: all is a property of the compiled program. What a device did is in confirm_plan.md.",
    ]
    blocks: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        blocks.setdefault(key(line)[:4], []).append(line)
    for (target, dtype, batch, _), block in blocks.items():
        about = ", ".join(f"{name} {number}" for name, number in block[0]["versions"].items())
        text += ["", f"## {target}, {dtype}, batch {batch} ({about})", ""]
        text += ["| net | variant | kept | temporaries | moved | GFLOP | ReLU fused | bound |", "|---" * 8 + "|"]
        references = {line["net"]: line for line in block if line["variant"] == "batchnorm"}
        order = {variant: i for i, variant in enumerate(VARIANTS)}
        for line in sorted(block, key=lambda line: (NETS.index(line["net"]), order.get(line["variant"], len(order)))):
            text.append(_row(line, references.get(line["net"])))
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=TARGETS, metavar="TARGET")
    parser.add_argument("--nets", nargs="+", default=NETS, choices=NETS, metavar="NET")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--render", action="store_true", help="only write the table again")
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
        if rivals.makes_sense(net, variant)
    ]
    for case in tqdm([] if arguments.render else [case for case in cases if case not in read()], "memory"):
        target, dtype, batch, _, net, variant = case
        if line := _in_fresh_process((net, variant, dtype, str(batch), target)):
            # Read again: another process may have added lines for another target.
            write(read() | {key(line): line})
    write(read())
    log_line(f"wrote {RESULTS / 'memory.md'}")


if __name__ == "__main__":
    main()
