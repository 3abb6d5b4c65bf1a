"""The tables of results in README.md and docs/: each a function of the folder of records, registered under a name."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import (
    confirm_plan,
    fault_injection,
    folded_inference,
    input_pipeline,
    large_steps,
    largest_batch,
    neighbors,
    networks,
    quickstart,
    search,
    sharpness,
    step_memory,
    streaming,
    trainability,
)
from benchmarks._results import Record, grouped, mean_and_deviation, table
from benchmarks.ntk import compare
from benchmarks.paper import comparison, convergence, reproduce

Table = Callable[[Path], str]
TABLES: dict[str, Table] = {}
"""Every table by name."""
NETS = {
    "resnet50_imagenet": "ResNet-50, 224 x 224",
    "resnet50": "ResNet-50",
    "resnet18": "ResNet-18",
    "vgg16": "VGG-16",
    "squeezenet": "SqueezeNet",
    "shufflenetv2_x1": "ShuffleNetV2",
    "mobilenetv2": "MobileNetV2",
}
STEPS = {
    "batchnorm": "BatchNorm",
    "batchnorm_remat": "BatchNorm, recomputing",
    "ours:mimicnorm": "MimicNorm",
    "ours:mimicnorm+cheap": "MimicNorm, `cheap`",
    "ours:mimicnorm+stage": "MimicNorm, `stage`",
}
OURS = "ours:mimicnorm"


def named(name: str) -> Callable[[Table], Table]:
    """Registers a table."""

    def register(function: Table) -> Table:
        TABLES[name] = function
        return function

    return register


def _bfloat16(record: Record) -> bool:
    return record["dtype"] == "bfloat16" and record["batch"] == 256 and "failed" not in record


@named("networks")
def _networks(results: Path) -> str:
    """Parameters by network and method."""
    return networks.table(list(networks.STORE.read(results).values()))


@named("quickstart")
def _quickstart(results: Path) -> str:
    """What the README's first command costs and gives."""
    runs = list(quickstart.STORE.read(results).values())
    seconds = [run["wall_seconds"] for run in runs]
    row = (
        f"{min(seconds):.0f} to {max(seconds):.0f} s",
        f"{max(run['peak_host_bytes'] for run in runs) / 2**30:.1f} GiB",
        f"{mean_and_deviation([100 * run['final_accuracy'] for run in runs])} %",
        f"{len(runs)}",
        f"{runs[0]['machine']['cores']} CPU cores",
    )
    return table(["wall time, compilation included", "peak memory", "test accuracy", "seeds", "on"], [row])


def _faults(results: Path) -> list[tuple[str, str]]:
    rows = []
    for record in fault_injection.STORE.read(results).values():
        signals = f"{record['SIGKILL']} by SIGKILL, {record['SIGTERM obeyed']} by SIGTERM"
        count = record["SIGKILL"] + record["SIGTERM obeyed"]
        same = all(record[f"{part}_identical"] for part in ("state", "record", "metrics"))
        outcome = "final state and metrics bit-identical" if same else "final state or metrics DIFFER"
        rows.append((f"{count} interruptions: {signals}; {record['in a save']} during a save", outcome))
        ends = [end for _, end in record["damages"]]
        counts = "; ".join(f"{ends.count(end)} {end}" for end in sorted(set(ends)))
        rows.append((f"{len(ends)} corruptions of the newest checkpoint's files", counts))
    return rows


@named("fault_injection")
def _fault_injection(results: Path) -> str:
    """What was injected into a run, and how it ended."""
    return table(["injected", "outcome"], _faults(results))


@named("ablation")
def _ablation(results: Path) -> str:
    """Accuracy and loss by method in the small form of figure 6."""
    study, half = (reproduce.make_study("figure6", True, None, dtype) for dtype in reproduce.DTYPES)
    runs = study.runs(list(study.store.read(results).values()))
    runs_half = half.runs(list(half.store.read(results).values()))
    rows = [
        ("test accuracy, %", *(_final(found, "test_accuracy", 100) for _, found in runs)),
        ("test loss", *(_final(found, "test_loss") for _, found in runs)),
        ("test accuracy with bfloat16, %", *(_final(found, "test_accuracy", 100) or "-" for _, found in runs_half)),
    ]
    return table(["", *(arm.method for arm, _ in runs)], rows)


def _final(runs: Sequence[Record], quantity: str, unit: float = 1) -> str:
    values = [unit * run["curve"][-1][quantity] for run in runs]
    return mean_and_deviation(values) + (f" ({len(runs)} seeds)" if len(runs) == 2 else "")


@named("convergence")
def _convergence(results: Path) -> str:
    """What small networks that were trained to the end show, and what they do not."""
    study = reproduce.make_study("convergence", False, None, "float32")
    return convergence.conclusion(study, list(study.store.read(results).values()))


@named("accuracy_by_rate")
def _accuracy_by_rate(results: Path) -> str:
    """Best accuracy by learning rate and method in the small form of table 2."""
    study = reproduce.make_study("table2", True, None, "float32")
    cells: dict[float, dict[str, str]] = {}
    for arm, found in study.runs(list(study.store.read(results).values())):
        accuracy = mean_and_deviation([comparison.best(record) for record in found])
        cells.setdefault(arm.fields["learning_rate"], {})[arm.method] = accuracy
    methods = list(next(iter(cells.values())))
    return table(["rate", *methods], [(f"{rate:g}", *row.values()) for rate, row in cells.items()])


@named("last_bn_variance")
def _last_bn_variance(results: Path) -> str:
    """The running variance of the last BatchNorm along the small form of appendix B.2."""
    study = reproduce.make_study("appendix_b2", True, None, "float32")
    (record, *_) = study.store.read(results).values()
    curve = {round(row["epoch"], 9): row["last_bn_variance"] for row in record["diagnostics"]}
    epochs = [epoch for epoch in curve if epoch % 0.5 == 0]
    return table(["epoch", *(f"{epoch:g}" for epoch in epochs)], [("variance", *(f"{curve[e]:,.0f}" for e in epochs))])


def _planned(results: Path, target: str, net: str) -> dict[str, Record]:
    """Plans of a network by variant, all by one compiler: the newest that planned BatchNorm and MimicNorm."""
    records = filter(_bfloat16, step_memory.STORE.read(results).values())
    mine = [record for record in records if (record["target"], record["net"]) == (target, net)]
    by_version = {
        version: {record["variant"]: record for record in found}
        for version, found in grouped(mine, lambda record: record["versions"]["jax"]).items()
    }
    whole = [version for version, found in by_version.items() if {"batchnorm", OURS} <= found.keys()]
    newest = max(whole, key=lambda version: [int(part) for part in version.split(".")], default=None)
    return by_version[newest] if newest else {}


def _temporaries(plans: dict[str, Record], variant: str, otherwise: str = "-") -> str:
    if variant not in plans:
        return otherwise
    return f"{plans[variant]['temporary_bytes'] / plans['batchnorm']['temporary_bytes']:.3f}"


@named("planned_memory")
def _planned_memory(results: Path) -> str:
    """Temporaries of a step as the compilers plan them, beside BatchNorm's."""
    rows = []
    for net, name in NETS.items():
        plans = _planned(results, "h100", net)
        if not plans:
            continue
        plain, ours = plans["batchnorm"], plans[OURS]
        rows.append(
            (
                name,
                f"{plain['temporary_bytes'] / 2**20:,.0f}",
                _temporaries(plans, "batchnorm_remat"),
                f"{ours['temporary_bytes'] / 2**20:,.0f} ({_temporaries(plans, OURS)})",
                _temporaries(plans, f"{OURS}+cheap"),
                _temporaries(plans, f"{OURS}+stage"),
                f"{step_memory.traffic(ours) / step_memory.traffic(plain):.3f}",
                _temporaries(_planned(results, "v5e", net), OURS, "not run"),
            )
        )
    header = ["network", "BatchNorm", "recomputing", "MimicNorm", "`cheap`", "`stage`", "bytes moved", "v5e"]
    return table(header, rows)


def _measured(results: Path) -> dict[tuple[str, str], dict[tuple[str, str], Record]]:
    """What ran on devices, by device and version of jax, then by network and variant."""
    records = filter(_bfloat16, confirm_plan.STORE.read(results).values())
    where = grouped(records, lambda record: (record["machine"]["device"], record["machine"]["jax"]))
    return {device: {(record["net"], record["variant"]): record for record in found} for device, found in where.items()}


def _peak_and_time(record: Record, plain: Record) -> tuple[float, float]:
    """Ratios to BatchNorm's."""
    peak = record["peak_device_bytes"] / plain["peak_device_bytes"]
    return peak, statistics.median(record["seconds"]) / statistics.median(plain["seconds"])


@named("measured_memory")
def _measured_memory(results: Path) -> str:
    """Memory and time of a step on a device, beside BatchNorm's; networks that ran under both."""
    parts = []
    for (device, version), records in _measured(results).items():
        rows = []
        for (net, variant), record in records.items():
            if {(net, "batchnorm"), (net, OURS)} <= records.keys():
                peak, time = _peak_and_time(record, records[net, "batchnorm"])
                milliseconds = 1e3 * statistics.median(record["seconds"])
                rows.append(
                    (
                        NETS[net],
                        STEPS[variant],
                        f"{record['planned_peak_bytes'] / 2**20:,.0f}",
                        f"{record['peak_device_bytes'] / 2**20:,.0f} ({peak:.3f})",
                        f"{milliseconds:.2f} ({time:.3f})",
                    )
                )
        header = ["network", "step", "peak planned, MiB", "in use, MiB", "time, ms"]
        parts.append(f"{device}, jax {version}:\n\n{table(header, rows)}")
    return "\n\n".join(parts)


@named("largest_batch")
def _largest_batch(results: Path) -> str:
    """The largest batch that a plan fits into a device, beside BatchNorm's by the same compiler."""
    rows = []
    same = grouped(largest_batch.STORE.read(results).values(), lambda r: (*largest_batch.STORE.key(r)[:3], r["net"]))
    for (target, dtype, _, net), block in same.items():
        plain = [record["batch"] for record in block if record["variant"] == "batchnorm"]
        for record in block:
            ratio = f"{record['batch'] / plain[0]:.2f}" if plain else "-"
            step = f"{STEPS[record['variant']]}, {dtype}"
            rows.append((NETS[net], step, target, f"{record['batch']:,}", ratio))
    return table(["network", "step", "device", "largest batch", "times BatchNorm's"], rows) if rows else "Not run yet."


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


@named("headline")
def _headline(results: Path) -> str:
    """A sentence on the step of a ResNet-50, for each device that ran it."""
    net, sentences = "resnet50_imagenet", []
    for (device, _), records in _measured(results).items():
        steps = [(net, variant) for variant in ("batchnorm", OURS, f"{OURS}+stage")]
        if set(steps) <= records.keys():
            plain, ours, stage = (records[step] for step in steps)
            peak, time = (f"{ratio:.3f}" for ratio in _peak_and_time(ours, plain))
            less, longer = (f"{ratio:.3f}" for ratio in _peak_and_time(stage, plain))
            what = "A ResNet-50 step at 224 x 224 (bfloat16, batch 256)"
            sentences.append(
                f"{what} takes {peak} of BatchNorm's memory and {time} of its time on an {device},\n"
                f"and {less} of the memory at {longer} of the time where each stage is recomputed."
            )
    return "\n".join(sentences)


@named("summary")
def _summary(results: Path) -> str:
    """One row a result, with links."""
    rows = []
    net = "resnet50_imagenet"
    for (device, _), records in _measured(results).items():
        for variant in (OURS, f"{OURS}+stage"):
            if {(net, "batchnorm"), (net, variant)} <= records.keys():
                peak, time = _peak_and_time(records[net, variant], records[net, "batchnorm"])
                what = f"ResNet-50 step at 224 x 224, bfloat16, batch 256, {device}: {STEPS[variant]}"
                rows.append((what, f"{peak:.3f} of BatchNorm's memory, {time:.3f} of its time", "confirm_plan"))
    study = reproduce.make_study("figure6", True, None, "float32")
    runs = {arm.method: found for arm, found in study.runs(list(study.store.read(results).values()))}
    accuracies = [f"{method} {_final(runs[method], 'test_accuracy', 100)}" for method in ("mimicnorm", "batchnorm")]
    setting = f"test accuracy after {study.experiment.epochs} epochs of CIFAR-100, VGG-11 of width 0.25, %"
    rows.append((setting, ", ".join(accuracies), study.name))
    cases = compare.STORE.read(results).values()
    speedups = [record["speedup"] for record in cases if record["case"] in compare.MAIN]
    many = f"tangent kernels on one CPU core, {len(speedups)} cases"
    rows.append((many, f"{min(speedups):.2f} to {max(speedups):.0f} times as fast as neural_tangents", "ntk"))
    rows += [(*row, "fault_injection") for row in _faults(results)]
    return table(["what", "result", "more"], [(*row, f"[{m}](benchmarks/results/{m}.md)") for *row, m in rows])


@named("folded_inference")
def _folded_inference(results: Path) -> str:
    """Time of folded inference, and what exported files hold."""
    return folded_inference.tables(list(folded_inference.STORE.read(results).values()), "###")


@named("sharpness_map")
def _sharpness_map(results: Path) -> str:
    """Curvature, and the rates that it allows, by network, method and gamma."""
    return _or_nothing(sharpness.map_table, list(sharpness.STORE.read(results).values()))


@named("sharpness_norms")
def _sharpness_norms(results: Path) -> str:
    """The largest eigenvalue by where BatchNorm stands."""
    return _or_nothing(sharpness.norms_table, list(sharpness.STORE.read(results).values()))


@named("large_steps")
def _large_steps(results: Path) -> str:
    """What one step along the gradient does."""
    return _or_nothing(large_steps.steps_table, list(large_steps.STORE.read(results).values()))


@named("search")
def _search(results: Path) -> str:
    """Rank correlations between what is known before training and accuracy after."""
    return _or_nothing(search.tau_table, list(search.STORE.read(results).values()))


@named("neighbors")
def _neighbors(results: Path) -> str:
    """The systems beside this one: claims, what is run, what came out."""
    return neighbors.neighbors_table(results)


def _or_nothing(of: Callable[[list[Record]], str], records: list[Record]) -> str:
    whole = of(records)
    return whole if whole.count("\n") > 1 else "Nothing yet."
