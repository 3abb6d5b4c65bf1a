"""Time of a training step beside the baselines: every variant in every round, medians, ratios to BatchNorm.

For every network and dtype: wall time of a step (SGD with momentum, see baselines.py) of each variant in
interleaved rounds after one step to warm up, images per second, FLOPs of the compiled program and the
share of the rate that a large matrix product reaches in the same run. Adds its records to
results/step_time.jsonl in place of older ones of the same device, then writes step_time.md.

  python -m benchmarks.step_time
  python -m benchmarks.step_time --nets resnet50_imagenet --batch=256 --dtypes bfloat16
  python -m benchmarks.step_time --render
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks import _results, baselines
from benchmarks._results import Record, Store

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


def measure(net: str, variants: list[str], dtype: str, batch: int, rounds: int) -> list[Record]:
    """One record for each variant."""
    steps, states, flops = {}, {}, {}
    images = labels = None
    for variant in variants:
        case = baselines.training_step(net, variant, batch, jnp.dtype(dtype))
        steps[variant] = case.compile()
        flops[variant] = (steps[variant].cost_analysis() or {}).get("flops", 0.0)
        states[variant], images, labels = case.init()
        states[variant] = steps[variant](states[variant], images, labels)
    rate = peak_rate(jnp.dtype(dtype))
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for i in tqdm(range(rounds), f"{net} {dtype}", leave=False):
        # Another order each round, so that no variant always follows the same one.
        for variant in variants[i % len(variants) :] + variants[: i % len(variants)]:
            seconds, states[variant] = _seconds(steps[variant], states[variant], images, labels)
            times[variant].append(seconds)
    about = {"net": net, "dtype": dtype, "batch": batch, "peak_flops": rate, "machine": _results.machine()}
    return [about | {"variant": v, "seconds": times[v], "flops": flops[v]} for v in variants]


def key(record: Record) -> _results.Key:
    return record["machine"]["device"], record["dtype"], record["batch"], record["net"], record["variant"]


STORE = Store("step_time", key)


def _row(record: Record, reference: Record) -> list[str]:
    seconds = statistics.median(record["seconds"])
    ratios = [a / b for a, b in zip(record["seconds"], reference["seconds"], strict=False)]
    return [
        record["net"],
        record["variant"],
        _results.milliseconds(record["seconds"], 1),
        f"{statistics.median(ratios):.3f}",
        f"{record['batch'] / seconds:,.0f}",
        f"{record['flops'] / 1e9:,.0f}",
        f"{record['flops'] / seconds / record['peak_flops']:.0%}",
    ]


def page(records: list[Record]) -> str:
    """The tables, one for each device, dtype and batch."""
    text = """# Time of a training step

`python -m benchmarks.step_time`. Medians of interleaved rounds, quartiles in brackets; ratio: median over
rounds of the time against that of Flax's BatchNorm, ReLU and max-pooling in the same round. GFLOP as the
compiler counts them; share: of the rate that a large matrix product of the same dtype reached in the same
run. Seed 0; random images.
"""
    header = ["net", "variant", "ms", "ratio", "images/s", "GFLOP", "share"]
    for (device, dtype, batch), block in _results.grouped(records, lambda record: key(record)[:3]).items():
        about = block[0]["machine"]
        where = f"{about['cores']} cores, jax {about['jax']}, flax {about['flax']}"
        references = {record["net"]: record for record in block if record["variant"] == "batchnorm"}
        rows = [_row(record, references[record["net"]]) for record in block]
        text += f"\n## {device}, {dtype}, batch {batch} ({where})\n\n{_results.table(header, rows)}\n"
    return text


def main() -> None:
    parser = _results.make_parser("step_time", __doc__)
    parser.add_argument("--nets", nargs="+", default=NETS, metavar="NET")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, metavar="VARIANT", help="besides batchnorm")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    variants = ["batchnorm", *(v for v in arguments.variants if v != "batchnorm")]
    for dtype in arguments.dtypes:
        for net in () if arguments.render else arguments.nets:
            STORE.add(arguments.results, *measure(net, variants, dtype, arguments.batch, arguments.rounds))
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
