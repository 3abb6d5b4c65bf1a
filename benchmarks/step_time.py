"""Time of a training step beside its rivals: every variant in every round, medians, ratios to BatchNorm.

For every network and dtype: wall time of a step (SGD with momentum, see rivals.py) of each variant in
interleaved rounds after one step to warm up, images per second, FLOPs of the compiled program and the
share of the rate that a large matrix product reaches in the same run. Adds its lines to
benchmarks/results/step_time.jsonl in place of older ones of the same device, then writes step_time.md.

  python benchmarks/step_time.py
  python benchmarks/step_time.py --nets resnet50_imagenet --batch=256 --dtypes bfloat16
  python benchmarks/step_time.py --render
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rivals
from tqdm import tqdm

from mimicnorm_jax.utils import environment
from mimicnorm_jax.utils.console import log_line
from mimicnorm_jax.utils.files import write_text

RESULTS = Path(__file__).parent / "results"
NETS = ("resnet50", "resnet18", "vgg16", "squeezenet", "shufflenetv2_x1", "mobilenetv2")
VARIANTS = ("batchnorm", "batchnorm_remat", "groupnorm_ws", "ours:mimicnorm")


def _seconds(function: Any, *args: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - started, result


def peak_rate(dtype: Any) -> float:
    """FLOP/s of a large matrix product, the best of five."""
    side = 8192 if jax.default_backend() != "cpu" else 2048
    square = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    return 2 * side**3 / min(_seconds(product, square, square)[0] for _ in range(5))


def measure(net: str, variants: list[str], dtype: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    """One line for each variant."""
    steps, states, flops = {}, {}, {}
    images = labels = None
    for variant in variants:
        subject = rivals.subject(net, variant, batch, jnp.dtype(dtype))
        steps[variant] = subject.compiled()
        flops[variant] = (steps[variant].cost_analysis() or {}).get("flops", 0.0)
        states[variant], images, labels = subject.start()
        states[variant] = steps[variant](states[variant], images, labels)
    rate = peak_rate(jnp.dtype(dtype))
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for i in tqdm(range(rounds), f"{net} {dtype}", leave=False):
        # Another order each round, so that no variant always follows the same one.
        for variant in variants[i % len(variants) :] + variants[: i % len(variants)]:
            seconds, states[variant] = _seconds(steps[variant], states[variant], images, labels)
            times[variant].append(seconds)
    about = {"net": net, "dtype": dtype, "batch": batch, "peak_flops": rate, "machine": environment.describe()}
    return [about | {"variant": v, "seconds": times[v], "flops": flops[v]} for v in variants]


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return line["machine"]["device"], line["dtype"], line["batch"], line["net"], line["variant"]


def _row(line: dict[str, Any], reference: dict[str, Any]) -> str:
    seconds = statistics.median(line["seconds"])
    quartiles = statistics.quantiles(line["seconds"], n=4)
    ratios = [a / b for a, b in zip(line["seconds"], reference["seconds"], strict=False)]
    cells = [
        line["net"],
        line["variant"],
        f"{1e3 * seconds:,.1f} [{1e3 * quartiles[0]:,.1f}, {1e3 * quartiles[2]:,.1f}]",
        f"{statistics.median(ratios):.3f}",
        f"{line['batch'] / seconds:,.0f}",
        f"{line['flops'] / 1e9:,.0f}",
        f"{line['flops'] / seconds / line['peak_flops']:.0%}",
    ]
    return "| " + " | ".join(cells) + " |"


def render(lines: dict[tuple[Any, ...], dict[str, Any]]) -> str:
    """The table, one block for each device, dtype and batch."""
    text = [
        "# Time of a training step",
        "",
        "`python benchmarks/step_time.py`. Medians of interleaved rounds, quartiles in brackets; ratio: median over",
        "rounds of the time against that of Flax's BatchNorm, ReLU and max-pooling in the same round. GFLOP as the",
        "compiler counts them; share: of the rate that a large matrix product of the same dtype reached in the same",
        "run. Seed 0; random images.",
    ]
    blocks: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines.values():
        blocks.setdefault(_key(line)[:3], []).append(line)
    for (device, dtype, batch), block in blocks.items():
        about = block[0]["machine"]
        versions = f"{about['cores']} cores, jax {about['jax']}, flax {about['flax']}"
        text += ["", f"## {device}, {dtype}, batch {batch} ({versions})", ""]
        text += ["| net | variant | ms | ratio | images/s | GFLOP | share |", "|---|---|---|---|---|---|---|"]
        for line in block:
            text.append(_row(line, lines[(*_key(line)[:4], "batchnorm")]))
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=NETS, metavar="NET")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="VARIANT", help="besides batchnorm")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--render", action="store_true", help="only write the table again")
    arguments = parser.parse_args()
    path = RESULTS / "step_time.jsonl"
    lines = {_key(line): line for line in map(json.loads, path.read_text().splitlines())} if path.exists() else {}
    variants = ["batchnorm", *(v for v in arguments.variants if v != "batchnorm")]
    for dtype in arguments.dtypes:
        for net in () if arguments.render else arguments.nets:
            for line in measure(net, variants, dtype, arguments.batch, arguments.rounds):
                lines[_key(line)] = line
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines.values()))
    write_text(RESULTS / "step_time.md", render(lines))
    log_line(f"wrote {RESULTS / 'step_time.md'}")


if __name__ == "__main__":
    main()
