"""Tables of networks, pipelines, kernels, theory and curvature."""

import json
import statistics
from pathlib import Path

from benchmarks import (
    fixed_norm,
    folded_inference,
    input_pipeline,
    large_steps,
    logit_scale,
    neighbors,
    networks,
    search,
    sharpness,
    streaming,
    trainability,
)
from benchmarks._results import table
from benchmarks.ntk import compare
from benchmarks.tables.registry import NETS, named, or_nothing


@named("networks")
def _networks(results: Path) -> str:
    """Parameters by network and method."""
    return networks.table(list(networks.STORE.read(results).values()))


@named("input_pipeline")
def _input_pipeline(results: Path) -> str:
    """What stands around a step, beside the step."""
    return input_pipeline.table(list(input_pipeline.STORE.read(results).values()))


@named("streaming")
def _streaming(results: Path) -> str:
    """Images a second of the pipeline, of decoding alone and of others' loaders."""
    return streaming.table(list(streaming.STORE.read(results).values()))


@named("ntk")
def _ntk(results: Path) -> str:
    """Time and memory of the tangent kernel, beside another library."""
    records = {record["case"]: record for record in compare.STORE.read(results).values()}
    rows = []
    for case in compare.MAIN:
        record = records[case]
        seconds = [statistics.median(record[who]["seconds"]) for who in ("ours", "theirs")]
        peaks = ", ".join(f"{record[who]['peak_rss_mb']:.0f}" for who in ("ours", "theirs"))
        times = (*(f"{value:.3f}" for value in seconds), f"{seconds[1] / seconds[0]:.2f}")
        rows.append((f"{case}: {record['about']}", *times, peaks))
    return table(["case", "ours, s", "theirs, s", "times faster", "peak memory, MB, ours and theirs"], rows)


@named("logit_scale")
def _logit_scale(results: Path) -> str:
    """Losses on digits by what normalized logits are multiplied by, beside their floor."""
    return logit_scale.table(list(logit_scale.STORE.read(results).values()))


@named("trainability")
def _trainability(results: Path) -> str:
    """Condition numbers of tangent kernels and growth of perturbations, by network and method."""
    records = [record for record in trainability.STORE.read(results).values() if record["images"] == 16]
    rows = []
    for quantity, name in {"kappa": "condition number", "growth": "growth"}.items():
        for net in trainability.NETS:
            runs = (trainability.runs_of(records, net, method) for method in trainability.METHODS)
            rows.append((f"{NETS[net]}, {name}", *(trainability.spread(found, quantity) for found in runs)))
    return table(["network", *trainability.METHODS], rows)


@named("verify")
def _verify(results: Path) -> str:
    """How many statements of the theory hold numerically, by base seed."""
    report = json.loads((results / "verify" / "verify.json").read_text())
    seeds = {name: rows for name, rows in report.items() if name.startswith("seed ")}
    passed = [f"{sum(row['passed'] for row in rows)} of {len(rows)}" for rows in seeds.values()]
    return table(["", *seeds], [("checks passed", *passed)])


@named("folded_inference")
def _folded_inference(results: Path) -> str:
    """Time of folded inference, and what exported files hold."""
    return folded_inference.tables(list(folded_inference.STORE.read(results).values()), "###")


@named("sharpness_map")
def _sharpness_map(results: Path) -> str:
    """Curvature, and the rates that it allows, by network, method and gamma."""
    return or_nothing(sharpness.map_table, sharpness.STORE, results)


@named("sharpness_norms")
def _sharpness_norms(results: Path) -> str:
    """The largest eigenvalue by where BatchNorm stands."""
    return or_nothing(sharpness.norms_table, sharpness.STORE, results)


@named("large_steps")
def _large_steps(results: Path) -> str:
    """What one step along the gradient does."""
    return or_nothing(large_steps.steps_table, large_steps.STORE, results)


@named("fixed_norm")
def _fixed_norm(results: Path) -> str:
    """What holding the norms of kernels does to accuracy."""
    return or_nothing(fixed_norm.differences_table, fixed_norm.STORE, results)


@named("search")
def _search(results: Path) -> str:
    """Rank correlations between what is known before training and accuracy after."""
    return or_nothing(search.tau_table, search.STORE, results)


@named("neighbors")
def _neighbors(results: Path) -> str:
    """The systems beside this one: claims, what is run, what came out."""
    return neighbors.neighbors_table(results)
