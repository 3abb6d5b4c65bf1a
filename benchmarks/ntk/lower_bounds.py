"""What a tangent kernel costs at least, and what share of that time is reached on one core.

The bound counts products by the best order known here: one forward pass; one backward sweep an output, from the outputs
to the first layer's product; and each layer's contraction in its cheapest order (derivatives written out, left as
factors, or one map for all outputs where a layer is pooled), the symmetric half once. Multiplications are ordinary
ones (no Strassen, no Winograd). Bytes: inputs and parameters read once, the kernel written once. Peak: the fastest of
several 1024 x 1024 products in float32, which go in turn with the kernel. Each case is a process of its own, with one
thread on one core.

  python -m benchmarks.ntk.lower_bounds
  python -m benchmarks.ntk.lower_bounds --cases "a full" c --rounds 9
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _process, _results
from benchmarks._results import Record, Store
from benchmarks.ntk.cases import CASES
from benchmarks.ntk.compare import ABOUT, MAIN, ONE_THREAD
from mimicnorm_jax.diagnostics import EmpiricalNTK
from mimicnorm_jax.utils import log_line

STORE = Store("ntk_lower_bounds", lambda record: (record["case"],))


def least_macs(implementation: Any) -> float:
    """Multiply-accumulates that the symmetric kernel takes at least.

    Args:
      implementation: of the kernel of all examples with themselves.
    """
    request, groups = implementation.request, implementation.counts[0]
    pooled = getattr(implementation, "pooled", ())
    macs = [float(np.prod(layer.product.sizes)) for layer in request.network.layers]
    total = groups * (sum(macs) + request.rows * sum(macs[1:]))
    for layer in request.network.layers:
        s, g, f, c = layer.product.sizes
        pairs = groups**2 / 2 * request.examples**2 * request.outputs
        pairs *= request.outputs if request.output == "full" else 1
        written = groups * request.rows * s * g * f * c + pairs * g * f * c
        if s == 1:  # products of inputs, once for all outputs
            factored = groups**2 * g * f + pairs * g * c
        else:
            factored = groups**2 / 2 * g * s * s * (f + request.rows * c) + pairs * g * s * c
        one_map = groups * s * f * c + (groups**2 / 2 * f * c + pairs * c) if layer.index in pooled else float("inf")
        total += min(written, factored, one_map)
    return total


def _cpu(function: Callable[[], Any]) -> float:
    start = time.process_time()
    jax.block_until_ready(function())
    return time.process_time() - start


def measure(name: str, rounds: int) -> Record:
    """The record of one case."""
    case = CASES[name]()
    params = jax.tree.map(jnp.asarray, case.network[0])
    x = jnp.asarray(np.random.default_rng(1).standard_normal(case.shape), jnp.float32)
    output: Any = case.output
    kernel = EmpiricalNTK(case.network[1], output=output, batch_coupled=case.coupled)
    _, blocked = kernel.prepare(params, x)
    square, multiply = jnp.ones((1024, 1024)), jax.jit(jnp.matmul)
    leaves = jax.tree.leaves(params)
    compiled = blocked.whole.lower(leaves, x, None).compile()
    found = compiled(leaves, x, None)
    jax.block_until_ready(multiply(square, square))
    seconds, peaks = [], []
    for _ in range(rounds):
        peaks.append(_cpu(lambda: multiply(square, square)))
        seconds.append(_cpu(lambda: compiled(leaves, x, None)))
    gflop = 2 * least_macs(blocked.implementation) / 1e9
    peak = 2 * 1024**3 / min(peaks) / 1e9  # a slower one was disturbed
    return {
        "least_gflop": gflop,
        "least_mb": sum(leaf.nbytes for leaf in (*leaves, x, *jax.tree.leaves(found))) / 1e6,
        "compiled_gflop": compiled.cost_analysis()["flops"] / 1e9,
        "compiled_mb": compiled.cost_analysis()["bytes accessed"] / 1e6,
        "peak_gflop_s": peak,
        "median_seconds": statistics.median(seconds),
        "seconds": seconds,
        "share": gflop / peak / statistics.median(seconds),
    }


def page(records: list[Record]) -> str:
    """The table of what has been run."""
    by_case = {record["case"]: record for record in records}
    rows = [
        [
            f"{case}: {ABOUT[case]}",
            f"{record['least_gflop']:.2f}",
            f"{record['least_mb']:.1f}",
            f"{record['compiled_gflop']:.2f}",
            f"{record['compiled_mb']:,.0f}",
            f"{record['peak_gflop_s']:.0f}",
            f"{record['least_gflop'] / record['peak_gflop_s']:.3f}",
            f"{record['median_seconds']:.3f}",
            f"{100 * record['share']:.0f} %",
        ]
        for case in MAIN
        if (record := by_case.get(case))
    ]
    header = [
        "case",
        "lower bound, GFLOP",
        "lower bound, MB",
        "compiled, GFLOP",
        "compiled, MB",
        "peak, GFLOP/s",
        "lower bound, s",
    ]
    return f"""# What a tangent kernel takes at least on one core

*lower bound*: one forward pass, one backward sweep an output to the first layer's product, each layer's contraction in
its cheapest order with the symmetric half once, by ordinary multiplication (no Strassen, no Winograd); bytes of inputs,
parameters and kernel, each once. *compiled*: as XLA counts its program, which counts a loop's body once, so that cases
with loops (convolutions, BatchNorm over the batch) show less than is done. *peak*: the fastest product of 1024 x
1024 matrices in the same run, in turn with the kernel. *share*: of the lower bound's time in the median of the measured
CPU time.

{_results.table([*header, "measured, s", "share"], rows)}

Command: `python -m benchmarks.ntk.lower_bounds`. Machine: {_results.machines(records)}.
"""


def main() -> None:
    parser = _results.make_parser("ntk.lower_bounds", __doc__)
    parser.add_argument("--cases", nargs="+", choices=MAIN, default=list(MAIN))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "ROUNDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        case, rounds = arguments.measure
        print(json.dumps(measure(case, int(rounds))))
        return
    if not arguments.render:
        os.sched_setaffinity(0, {arguments.core})
        for case in arguments.cases:
            record = _process.measure("ntk.lower_bounds", case, str(arguments.rounds), **ONE_THREAD)
            if isinstance(record, int):
                sys.exit(f"error: {case} ended with exit code {record}")
            STORE.add(arguments.results, {"case": case} | record | {"machine": _results.machine()})
            log_line(f"{case}: {100 * record['share']:.0f} % of the lower bound's rate")
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
