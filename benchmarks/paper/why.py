"""Why a method does as it does: runs that differ from its own in one field, and evaluation by other statistics."""

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import _results
from benchmarks._results import Record, mean_and_deviation
from benchmarks.paper.comparison import DEFAULTS, Study, final
from benchmarks.paper.experiments import Arm
from benchmarks.paper.last_norm import AS_TRAINED, RULES
from benchmarks.paper.paired import Paired, paired
from mimicnorm_jax.methods import METHODS

ABOUT = (
    "What might be the reason where a method is behind: each row is a method's run of the table above with one thing "
    "changed, against that run with the same seed; above 0 the change is a gain. One pair of runs cannot tell a "
    "difference from what seeds do, which the deviation in a method's first row shows. `logit_scale` multiplies "
    "normalized logits, which otherwise have a variance of 1 in each class however sure the network is. "
    "`adaptive_clip` bounds the norm of a gradient by that share of its weights' norm; NF-ResNets have none, and 0.01 "
    "is what their authors chose for NFNets in batches of 4,096. On this network `exact` changes the scalars alone, to "
    "g^k / l of Theorem 3's gain g, where the published ones are 1.2^k / l; `text` has scalars 1 / sqrt(l), with the "
    "gain in the kernels. The last BatchNorm's running statistics are read by evaluation alone: those rows are other "
    "evaluations of the same trained networks. A factor common to all classes, as that of the unbiased variance is but "
    "for epsilon, changes no network's answer, only how confident it is."
)


def changed(arm: Arm, home: Arm) -> dict[str, tuple[Any, Any]]:
    """The fields in which an arm differs from another: their values there and here."""
    names = dict.fromkeys([*home.fields, *arm.fields])
    both = {name: tuple(one.fields.get(name, DEFAULTS[name]) for one in (home, arm)) for name in names}
    return {name: (there, here) for name, (there, here) in both.items() if there != here}


def pairs(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Every arm that is run to be held against one other, and that one."""
    return [
        (arm, next(a for a in arms if not a.against and (a.comparison, a.method) == (arm.comparison, arm.against)))
        for arm in arms
        if arm.against
    ]


def table(study: Study, records: Sequence[Record]) -> str:
    """A row a change, with the difference that it makes.

    Args:
      study: whose arms they are.
      records: of finished runs.
    """
    runs = study.runs(records)
    found = {(arm.comparison, arm.method): of_arm for arm, of_arm in runs}
    header = ["method", "changed", "from", "to", "seeds", "final, %", "difference, points", "difference of test loss"]
    rows: list[tuple[Any, ...]] = []
    homes = {(home.comparison, home.method): home for _, home in pairs(study.experiment.arms)}
    for key, home in homes.items():
        rows.append((home.method, "nothing", "", "", *_whole(found[key]), "", ""))
        for arm, its in pairs(study.experiment.arms):
            if its is home:
                of_arm = found[arm.comparison, arm.method]
                ((name, (there, here)),) = changed(arm, its).items()
                kinds = ((final, "+.2f"), (_test_loss, "+.4f"))
                apart = (_difference(paired(of_arm, found[key], value), digits) for value, digits in kinds)
                rows.append((home.method, f"`{name}`", there, here, *_whole(of_arm), *apart))
        if METHODS[home.fields["method"]].last_batch_norm:
            rows += ((home.method, *row) for row in _evaluations(found[key]))
    return _results.table(header, rows)


def _difference(apart: Paired | None, digits: str) -> str:
    """Of one pair of runs without the words that there is no interval: the seeds stand beside it."""
    if apart is None:
        return ""
    return f"{apart.mean:{digits}}" if apart.interval is None else apart.shown(digits)


def _whole(records: Sequence[Record]) -> tuple[str, str]:
    seeds = ", ".join(str(seed) for seed in sorted(record["seed"] for record in records))
    return seeds or "not run", mean_and_deviation([final(record) for record in records])


def _test_loss(record: Record) -> float:
    return float("nan") if record["ended"] else record["curve"][-1]["test_loss"]


def _evaluations(records: Sequence[Record]) -> Iterator[tuple[Any, ...]]:
    evaluated = {record["seed"]: record["last_norm"] for record in records if "last_norm" in record}
    for rule in RULES:
        if rule == AS_TRAINED:
            continue
        values = {name: [of[rule][name] for of in evaluated.values()] for name in ("accuracy", "loss")}
        before = {name: [of[AS_TRAINED][name] for of in evaluated.values()] for name in ("accuracy", "loss")}
        by = {name: [a - b for a, b in zip(values[name], before[name], strict=True)] for name in values}
        yield (
            *("last BatchNorm in evaluation", RULES[AS_TRAINED], RULES[rule]),
            ", ".join(map(str, sorted(evaluated))) or "not run",
            mean_and_deviation([100 * value for value in values["accuracy"]]),
            mean_and_deviation([100 * value for value in by["accuracy"]], "+.2f"),
            mean_and_deviation(by["loss"], "+.4f", ".4f"),
        )
