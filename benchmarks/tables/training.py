"""What runs give: accuracy and losses, and what interruptions do to them."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import (
    fault_injection,
    quickstart,
)
from benchmarks._results import Record, mean_and_deviation, table
from benchmarks.paper import comparison, convergence, reproduce
from benchmarks.tables.registry import named


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
    return table(
        ["wall time, compilation included", "peak memory", "test accuracy, ± standard deviation", "seeds", "on"], [row]
    )


def faults(results: Path) -> list[tuple[str, str]]:
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
    return table(["injected", "outcome"], faults(results))


@named("ablation")
def _ablation(results: Path) -> str:
    """Accuracy and loss by method in the small form of figure 6."""
    study, half = (reproduce.make_study("figure6", True, None, dtype) for dtype in reproduce.DTYPES)
    runs = study.runs(list(study.store.read(results).values()))
    runs_half = half.runs(list(half.store.read(results).values()))
    rows = [
        ("test accuracy, %", *(final(found, "test_accuracy", 100) for _, found in runs)),
        ("test loss", *(final(found, "test_loss") for _, found in runs)),
        ("test accuracy with bfloat16, %", *(final(found, "test_accuracy", 100) or "-" for _, found in runs_half)),
    ]
    return table(["", *(arm.method for arm, _ in runs)], rows)


def final(runs: Sequence[Record], quantity: str, unit: float = 1) -> str:
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
