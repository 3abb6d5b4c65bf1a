"""The systems beside MimicNorm in one table: claims, what is run here, and what came out, from the records."""

import itertools
import json
import statistics
from pathlib import Path

from benchmarks import binary, fixed_norm, large_steps, search, sharpness
from benchmarks._results import Key, Record, mean_and_deviation, table
from benchmarks.paper import comparison, reproduce

NOT_RUN = "not run yet"
BASELINES = {
    "nf": ("NFNets (Brock et al. 2021)", "without BatchNorm as accurate as with it, by scaled weight standardization"),
    "ws_gn": ("WS+GN (Qiao et al. 2019)", "small batches as accurate as large ones with BatchNorm"),
    "groupnorm": ("GroupNorm (Wu & He 2018)", "accuracy that does not depend on the batch"),
    "dyt": ("DyT (Zhu et al. 2025)", "replaces LayerNorm in transformers; its author: loses accuracy in CNNs"),
}
"""Methods, with the name of each system and its claim."""


def neighbors_table(results: Path) -> str:
    """One row a system; a study without records says that it was not run."""
    rows = [
        (
            "LAWN (Gupta et al. 2021)",
            "weight norms held after a free phase help, Adam most, and every optimizer at large batches",
            "`optim.lawn`, `optim.hyperball`, `--config.constraint`, `benchmarks.fixed_norm`",
            _held_norms(results),
            "batches of thousands, ImageNet",
        ),
        (
            "Mean field of BatchNorm (Wei et al. 2019)",
            "BatchNorm of small scale lowers the largest eigenvalue, which bounds the learning rate",
            "`theory.fisher_bound`, `theory.verify`, `benchmarks.sharpness`",
            _sharpness(results),
            _left(sharpness.STORE.read(results), "the paper's width of 1,000; ") + "its data",
        ),
        (
            "Understanding BatchNorm (Bjorck et al. 2018)",
            "without BatchNorm large steps make activations explode; BatchNorm on the last layer is most of the gain",
            "`diagnostics.updates`, `benchmarks.large_steps`",
            _large_steps(results),
            "ResNet-110 on CIFAR-10",
        ),
        (
            "BNN without BN (Chen et al. 2021)",
            "binary networks train without BatchNorm at a small loss",
            "`reactnet18`, methods `bnn_nobn` and `bnn_mimic`, `benchmarks.binary`",
            _binary(results),
            _left(binary.STORE.read(results), "ReActNet-18 for 256 epochs; ") + "ImageNet",
        ),
        (
            "BN-NAS (Chen et al. 2021)",
            "the scale of a block's last BatchNorm, alone trained, tells good architectures",
            "`search`, `benchmarks.search`",
            _search(results),
            _left(search.STORE.read(results), "the published space; ") + "ImageNet",
        ),
    ]
    for method, (name, claim) in BASELINES.items():
        run = f"method `{method}`, `benchmarks.paper.reproduce`, `convergence` and `baselines`"
        rows.append((name, claim, run, _baseline(results, method), "ResNet-18 for 150 epochs; ImageNet"))
    return table(["system", "claims", "run here", "came out", "not run"], rows)


def _left(records: dict[Key, Record], text: str) -> str:
    """The text, until the full form of a study has records."""
    return "" if any(record.get("form") == "full" for record in records.values()) else text


def _link(text: str, page: str) -> str:
    return f"[{text}](benchmarks/results/{page}.md)" if text else NOT_RUN


def _held_norms(results: Path) -> str:
    apart = fixed_norm.differences(list(fixed_norm.STORE.read(results).values()))
    parts = []
    for arm in fixed_norm.HELD:
        found = {case: arms[arm] for case, arms in apart.items() if arm in arms}
        ends = [difference.interval or (0, 0) for difference in found.values()]
        means = [
            f"{optimizer}, batch {batch} {statistics.mean(here):+.2f}"
            for optimizer, batch in itertools.product(fixed_norm.OPTIMIZERS, fixed_norm.BATCHES)
            if (here := [one.mean for case, one in found.items() if case[1:] == (optimizer, batch)])
        ]
        parts += [
            f"{arm}: {', '.join(means)}; intervals above 0 in {sum(low > 0 for low, _ in ends)} of {len(ends)} cases, "
            f"below in {sum(high < 0 for _, high in ends)}"
        ] * bool(found)
    return _link("; ".join(["digits, points over the plain optimizer", *parts]) if parts else "", "fixed_norm")


def _sharpness(results: Path) -> str:
    parts, verified = [], results / "verify" / "verify.json"
    if verified.exists():
        seeds = [part for name, part in json.loads(verified.read_text()).items() if name.startswith("seed")]
        bounds = [row["passed"] for rows in seeds for row in rows if "Fisher" in row["name"]]
        parts.append(f"{sum(bounds)} of {len(bounds)} checks of the bound hold")
    maps = [record for record in sharpness.STORE.read(results).values() if record["part"] == "map"]
    if stack := [r for r in maps if (r["net"], r["method"]) == ("stack", "batchnorm")]:
        ratios = [sharpness.stable_rate(record) / sharpness.predicted(record) for record in stack]
        parts.append(
            "dense stack with BatchNorm: largest stable rate over the predicted one "
            f"{min(ratios):.2f} to {max(ratios):.2f} (grid of factor {sharpness.RATES[1] / sharpness.RATES[0]:.2f})"
        )
    return _link("; ".join(parts), "sharpness") if maps else "; ".join(parts) or NOT_RUN


def _large_steps(results: Path) -> str:
    found = large_steps.groups(list(large_steps.STORE.read(results).values()))
    parts = []
    for (net, stage, method), records in found.items():
        if net == "resnet18" and method in ("batchnorm", "mimicnorm", "none"):
            rates = mean_and_deviation([large_steps.best_rate(record) for record in records], ".2g", ".1g")
            parts.append(f"{net}, {stage}, {method}: best step {rates}")
    return _link("; ".join(parts) if parts or not found else "other networks", "large_steps")


def _binary(results: Path) -> str:
    records = [record for record in binary.STORE.read(results).values() if record["step"] == 2]
    parts = []
    for form in binary.FORMS:
        for arm in binary.ARMS:
            final = [comparison.final(r) for r in records if (r["form"], r["arm"]) == (form, arm)]
            parts += [f"{form}, {arm} {mean_and_deviation(final)} %"] if final else []
    return _link("; ".join(parts), "binary")


def _search(results: Path) -> str:
    records = list(search.STORE.read(results).values())
    parts = []
    for form in search.FORMS:
        for method in search.METHODS:
            for name, predictor in search.predictors(records, form, method).items():
                low, high = predictor.interval
                parts.append(f"{form}, {method}, {name}: tau {predictor.tau:.2f} [{low:.2f}, {high:.2f}]")
    return _link("; ".join(parts) if parts or not records else "too few networks so far", "search")


def _baseline(results: Path, method: str) -> str:
    """What came out in the longest study of rivals that has a run of it."""
    for name, small in (("baselines", False), ("convergence", False), ("baselines", True)):
        study = reproduce.make_study(name, small, None, "float32")
        arms = study.runs(list(study.store.read(results).values()))
        runs = {arm.method: found for arm, found in reversed(arms)}  # of several learning rates the first
        if runs[method]:
            ours, plain = (mean_and_deviation([*map(comparison.final, runs[name])]) for name in (method, "batchnorm"))
            net, epochs = study.experiment.arms[0].net, study.experiment.epochs
            return _link(f"{net}, {epochs} epochs: {ours} % (batchnorm {plain or NOT_RUN})", study.name)
    return NOT_RUN
