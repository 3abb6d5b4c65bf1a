"""The page of networks that were trained to the end: methods in pairs by seed, calibration, rates, conclusion."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import _results
from benchmarks._results import Record, mean_and_deviation, table
from benchmarks.paper import comparison, why
from benchmarks.paper.calibration import BINS, expected_calibration_error, overconfidence
from benchmarks.paper.comparison import Study, best, final
from benchmarks.paper.experiments import Arm, Comparison
from benchmarks.paper.paired import Paired, paired
from mimicnorm_jax import plots

Runs = Sequence[tuple[Arm, list[Record]]]
"""Arms of one comparison with their finished runs."""
NETS = {"resnet8": "ResNet-8 (16, 32 and 64 channels)", "squeezenet": "SqueezeNet"}

HALVES = {"weightmean": "weight centering alone", "lastbn": "the last BatchNorm alone"}
"""What MimicNorm consists of, by the method that is only one half."""

_SETTING = (
    "All of CIFAR-100's 50,000 training images, the paper's augmentation, batch 128; learning rate 0.05 (the paper's "
    "0.1 at batch 256, in proportion) unless said, one epoch of warm-up, divided by ten at 0.53, 0.73 and 0.9 of the "
    "run. Methods with one seed share the random numbers of their kernels and the order of images, so differences are "
    "taken by seed; brackets are 95 % intervals of their mean by Student's t, and what stands behind ± is the standard "
    "deviation over seeds. `best` is the best test epoch, which the "
    "paper reports and which is chosen on the test images; all else is of the final epoch. A run that did not survive "
    f"counts as chance ({comparison.CHANCE:g} %) and is not in the figures. Calibration error: {BINS} bins of equal "
    "width of the most probable class's probability; confidence - accuracy: over all test images, the last BatchNorm "
    "having no scale by which logits could grow as a network becomes sure. `ws_gn` has 8, 16 and 32 groups "
    "in the three stages, of two channels each."
)

_TEMPERATURE = (
    "Logits divided by a temperature (Guo et al. 2017) that is fitted on half of the test images, and what the other "
    "half says before and then. The first runs were not measured so."
)


def _compared(study: Study, records: Sequence[Record]) -> Runs:
    """The runs of all arms but those of `why`."""
    return [(arm, of_arm) for arm, of_arm in study.runs(records) if not arm.against]


def home_groups(study: Study, records: Sequence[Record]) -> dict[str, Runs]:
    """By network, all that was compared at its first learning rate."""
    homes: dict[str, Comparison] = {}
    found: dict[str, list[tuple[Arm, list[Record]]]] = {}
    for arm, of_arm in _compared(study, records):
        if homes.setdefault(arm.net, arm.comparison) == arm.comparison:
            found.setdefault(arm.net, []).append((arm, of_arm))
    return dict(found)


def _of(runs: Runs, method: str) -> list[Record]:
    return next((found for arm, found in runs if arm.method == method), [])


def best_none(runs: Runs) -> tuple[str, str, list[Record]] | None:
    """The better of the two initializations of `none` by mean final accuracy over the seeds that both have run.

    Returns:
      Its name, those seeds, and all its records.
    """
    found = {arm.method: records for arm, records in runs if arm.method.partition(",")[0] == "none"}
    if len(found) < 2:
        return None
    one, other = found
    apart = paired(found[one], found[other], final)
    if apart is None:
        return None
    chosen = one if apart.mean >= 0 else other
    return chosen, apart.seeds, found[chosen]


def difference(runs: Runs, method: str) -> Paired | None:
    """Final accuracy of a method minus BatchNorm's, in points, by seed."""
    return paired(_of(runs, method), _of(runs, "batchnorm"), final)


def accuracies(runs: Runs, apart: Paired) -> tuple[str, str]:
    """Final accuracies of MimicNorm and of BatchNorm, over the seeds of their difference."""
    ours, theirs = (
        mean_and_deviation([final(record) for record in _of(runs, method) if record["seed"] in apart.by_seed])
        for method in ("mimicnorm", "batchnorm")
    )
    return ours, theirs


def _against(apart: Paired, other: str) -> str:
    """A paired difference in words."""
    words = f"{abs(apart.mean):.2f} points {'above' if apart.mean >= 0 else 'below'} {other}"
    if apart.interval is None:
        return f"{words} ({apart.no_interval}: no interval)"
    low, high = apart.interval
    verdict = "which includes 0" if low <= 0 <= high else "which excludes 0"
    return f"{words} (paired over {apart.seeds}; 95 % interval {low:+.2f} to {high:+.2f}, {verdict})"


def conclusion(study: Study, records: Sequence[Record]) -> str:
    """What one may conclude, and what not: of every network that both have trained, then of the first one's others."""
    homes = home_groups(study, records)
    apart = {net: difference(runs, "mimicnorm") for net, runs in homes.items()}
    text = [
        f"After {_epochs(homes[net])} epochs of CIFAR-100 a {NETS.get(net, net)} ends with MimicNorm "
        f"{_against(pairs, 'BatchNorm')}: final test accuracies {' and '.join(accuracies(homes[net], pairs))} %."
        for net, pairs in apart.items()
        if pairs is not None
    ]
    if not text:
        return "Nothing yet: BatchNorm and MimicNorm have not both been run."
    net, runs = next(iter(homes.items()))
    found = _others(study, records, runs)
    if said := "; ".join(f"{where} {', '.join(methods)}" for where, methods in found.items() if methods):
        text.append(f"Others minus MimicNorm in the {NETS.get(net, net).partition(' (')[0]}, in points: {said}.")
    text.append(
        "Behind ± stands the standard deviation over seeds. "
        "These are small networks on one data set, in a fifth of the paper's epochs or less, at the paper's learning "
        "rate and not each method's best: they say nothing of larger networks or longer runs, and the intervals are "
        "about seeds alone, each by itself; one of two seeds says little more than that both agree."
    )
    return " ".join(text)


def _others(study: Study, records: Sequence[Record], runs: Runs) -> dict[str, list[str]]:
    """By where they end beside MimicNorm, the other methods of a comparison with their differences in points."""
    none = best_none(runs)
    compared = {arm.method: found for arm, found in runs if arm.method.partition(",")[0] != "none"}
    compared |= {none[0]: none[2]} if none else {}
    compared |= {arm.method: found for arm, found in study.runs(records) if arm.against and len(arm.seeds) > 1}
    remarks = HALVES | ({none[0]: f"the better of two initializations by test accuracy, {none[1]}"} if none else {})
    above, below, open_ = "above it (95 % interval without 0)", "below it", "not told from it by these seeds"
    alone = "by one seed alone"
    groups: dict[str, list[tuple[float, str]]] = {above: [], below: [], open_: [], alone: []}
    for method, found in compared.items():
        if method not in ("mimicnorm", "batchnorm") and (gain := paired(found, _of(runs, "mimicnorm"), final)):
            remark = f" ({remarks[method]})" if method in remarks else ""
            said = f"`{method}`{remark} {gain.mean:+.2f}" + (f" ({gain.no_interval})" if gain.no_interval else "")
            low, high = gain.interval or (0.0, 0.0)
            where = above if low > 0 else below if high < 0 else open_ if gain.interval else alone
            groups[where].append((gain.mean, said))
    return {where: [said for _, said in sorted(found, reverse=True)] for where, found in groups.items()}


def _epochs(runs: Runs) -> int:
    return runs[0][0].fields["epochs"]


def page(study: Study, folder: Path, records: Sequence[Record]) -> str:
    """The page; what has not been run says so.

    Args:
      study: whose page it is.
      folder: in which the figures lie that it shows.
      records: of finished runs.
    """
    planned = sum(len(arm.seeds) for arm in study.experiment.arms)
    done = sum(len([r for r in found if r["seed"] in arm.seeds]) for arm, found in study.runs(records))
    text = [
        f"# {study.name}: {study.experiment.summary}",
        "",
        conclusion(study, records),
        "",
        f"{done} of {planned} runs are finished. {_SETTING}",
    ]
    for net, runs in home_groups(study, records).items():
        rate = runs[0][0].fields["learning_rate"]
        text += ["", f"## {NETS.get(net, net)}, {_epochs(runs)} epochs, learning rate {rate:g}", "", methods(runs)]
        text += _pictures(study, folder, records, f"{study.name}-{net}")
    text += ["", "## Learning rates", "", rates(study, records)]
    text += _pictures(study, folder, records, f"{study.name}_rates")
    text += ["", "## Confidence", "", _TEMPERATURE, "", confidence(study, records)]
    text += ["", "## Why", "", why.ABOUT, "", why.table(study, records)]
    text += [
        "",
        f"Records: {study.name}.jsonl, each with its config, seed, command and machine. Command: `{study.command}`; it "
        "goes on where it stopped. The runs shared their machine with other work, so their times say nothing. "
        f"Machine: {_results.machines(records)}.",
        "",
    ]
    return "\n".join(text)


def _pictures(study: Study, folder: Path, records: Sequence[Record], prefix: str) -> list[str]:
    names = [name for name in figures(study, records) if name.startswith(prefix) and (folder / name).exists()]
    return [line for name in names for line in ("", f"![{name}]({name})")]


def methods(runs: Runs) -> str:
    """A row a method of one comparison."""
    header = ["method", "seeds", "best", "at epoch", "final", "final - batchnorm", "final - mimicnorm"]
    header += ["test loss", "calibration error, %", "confidence - accuracy, points", "training accuracy", "ended early"]
    rows = []
    for arm, unordered in runs:
        found = sorted(unordered, key=lambda record: record["seed"])
        apart = [
            "" if arm.method == other else paired(found, _of(runs, other), final) or ""
            for other in ("batchnorm", "mimicnorm")
        ]
        survived = [record for record in found if not record["ended"]]
        overconfident = [100 * overconfidence(record["calibration"]) for record in survived]
        errors = [100 * expected_calibration_error(record["calibration"]) for record in survived]
        at = (max(r["curve"], key=lambda row: (row["test_accuracy"], row["epoch"]))["epoch"] for r in survived)
        rows.append(
            (
                arm.method,
                ", ".join(str(record["seed"]) for record in found) or "not run",
                mean_and_deviation([best(record) for record in found]),
                ", ".join(map(str, at)),
                mean_and_deviation([final(record) for record in found]),
                *apart,
                mean_and_deviation([r["curve"][-1]["test_loss"] for r in survived], ".3f", ".3f"),
                mean_and_deviation(errors),
                mean_and_deviation(overconfident, "+.2f"),
                mean_and_deviation([100 * record["curve"][-1]["train_accuracy"] for record in survived]),
                "; ".join(f"seed {record['seed']}: {record['ended']}" for record in found if record["ended"]),
            )
        )
    return table(header, rows)


def confidence(study: Study, records: Sequence[Record]) -> str:
    """What one number that all logits are divided by mends, where that was measured."""
    rows = []
    for arm, found in study.runs(records):
        scalings = [s for r in found if (s := r.get("calibration", {}).get("temperature_scaling"))]
        if scalings:
            sides = [[scaling[side] for scaling in scalings] for side in ("before", "after")]
            losses = (mean_and_deviation([bins["loss"] for bins in side], ".3f", ".3f") for side in sides)
            errors = (mean_and_deviation([100 * expected_calibration_error(bins) for bins in side]) for side in sides)
            temperature = mean_and_deviation([scaling["temperature"] for scaling in scalings])
            rate = f"{arm.fields['learning_rate']:g}"
            rows.append((NETS.get(arm.net, arm.net), arm.method, rate, len(scalings), temperature, *losses, *errors))
    header = ["network", "method", "learning rate", "runs", "temperature", "test loss", "then", "calibration error, %"]
    return table([*header, "then"], rows)


def _by_rate(study: Study, records: Sequence[Record]) -> dict[str, dict[float, Record | None]]:
    """Of every method that is planned at several rates, the run of seed 0 by rate."""
    found: dict[str, dict[float, Record | None]] = {}
    first = study.experiment.arms[0].net
    for arm, runs in _compared(study, records):
        if arm.net == first:
            run = next((record for record in runs if record["seed"] == 0), None)
            found.setdefault(arm.method, {})[arm.fields["learning_rate"]] = run
    return {method: dict(sorted(by.items())) for method, by in found.items() if len(by) > 1}


def rates(study: Study, records: Sequence[Record]) -> str:
    """Final accuracy of seed 0 by learning rate."""
    found = _by_rate(study, records)
    header = ["final test accuracy, seed 0", *(f"{rate:g}" for rate in next(iter(found.values()), {}))]
    return table(
        header, [(m, *(f"{final(r):.2f}" if r else "not run" for r in by.values())) for m, by in found.items()]
    )


def figures(study: Study, records: Sequence[Record]) -> dict[str, Callable[[Path], None]]:
    """The figures by file, and what draws them: for every network its curves and differences; accuracy by rate."""
    found: dict[str, Callable[[Path], None]] = {}
    for net, runs in home_groups(study, records).items():
        title = f"{NETS.get(net, net)}, CIFAR-100"
        if any(not record["ended"] for _, of_arm in runs for record in of_arm):
            found[f"{study.name}-{net}.png"] = partial(comparison.draw_curves, title, net, runs)
        whole = [(arm, [record for record in of_arm if not record["ended"]]) for arm, of_arm in runs]
        apart = {arm.method: difference(whole, arm.method) for arm, _ in runs if arm.method != "batchnorm"}
        shown = {method: value for method, value in apart.items() if value is not None}
        if shown:
            found[f"{study.name}-{net}-differences.png"] = partial(_draw_differences, title, shown)
    by_rate = {m: {rate: r for rate, r in by.items() if r} for m, by in _by_rate(study, records).items()}
    if any(len(by) > 1 for by in by_rate.values()):
        found[f"{study.name}_rates.png"] = partial(_draw_rates, by_rate)
    return found


def _draw_differences(title: str, apart: dict[str, Paired], path: Path) -> None:
    points = {method: (list(value.by_seed.values()), value.half_width) for method, value in apart.items()}
    label = "final test accuracy minus BatchNorm's (points)"
    plots.intervals(points, path, f"{title}: by seed, mean and 95 % interval", label)


def _draw_rates(by_rate: dict[str, dict[float, Record]], path: Path) -> None:
    series = {
        method: plots.Series(np.array(list(by)), np.array([final(record) for record in by.values()]))
        for method, by in by_rate.items()
        if by
    }
    plots.lines(series, path, "seed 0", "learning rate", "final test accuracy (%)", "log")
