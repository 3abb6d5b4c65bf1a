"""The README's sentence and its table of all that was found."""

from pathlib import Path

from benchmarks._results import table
from benchmarks.ntk import compare
from benchmarks.paper import convergence, reproduce
from benchmarks.paper.convergence import NETS
from benchmarks.tables.memory import OURS, STEPS, measured, peak_and_time
from benchmarks.tables.registry import named
from benchmarks.tables.training import faults


@named("headline")
def _headline(results: Path) -> str:
    """A sentence on the step of a ResNet-50, for each device that ran it."""
    net, sentences = "resnet50_imagenet", []
    for (device, _), records in measured(results).items():
        steps = [(net, variant) for variant in ("batchnorm", OURS, f"{OURS}+stage")]
        if set(steps) <= records.keys():
            plain, ours, stage = (records[step] for step in steps)
            peak, time = (f"{ratio:.3f}" for ratio in peak_and_time(ours, plain))
            less, longer = (f"{ratio:.3f}" for ratio in peak_and_time(stage, plain))
            what = "A ResNet-50 step at 224 x 224 (bfloat16, batch 256)"
            sentences.append(
                f"{what} takes {peak} of BatchNorm's memory and {time} of its time on an {device},\n"
                f"and {less} of the memory at {longer} of the time where each stage is recomputed."
            )
    return "\n".join(sentences)


def _at_the_end(results: Path) -> list[tuple[str, str, str]]:
    """Accuracy at convergence of each network that both MimicNorm and BatchNorm have trained."""
    study, rows = reproduce.make_study("convergence", False, None, "float32"), []
    groups = convergence.home_groups(study, list(study.store.read(results).values()))
    for net, runs in groups.items():
        if apart := convergence.difference(runs, "mimicnorm"):
            ours, theirs = convergence.accuracies(runs, apart)
            what = f"final test accuracy after {runs[0][0].fields['epochs']} epochs of CIFAR-100, {NETS[net]}, %"
            rows.append((what, f"mimicnorm {ours}, batchnorm {theirs}; by seed {apart}", study.name))
    return rows


@named("summary")
def _summary(results: Path) -> str:
    """One row a result, with links."""
    rows = []
    net = "resnet50_imagenet"
    for (device, _), records in measured(results).items():
        for variant in (OURS, f"{OURS}+stage"):
            if {(net, "batchnorm"), (net, variant)} <= records.keys():
                peak, time = peak_and_time(records[net, variant], records[net, "batchnorm"])
                what = f"ResNet-50 step at 224 x 224, bfloat16, batch 256, {device}: {STEPS[variant]}"
                rows.append((what, f"{peak:.3f} of BatchNorm's memory, {time:.3f} of its time", "confirm_plan"))
    rows += _at_the_end(results)
    cases = compare.STORE.read(results).values()
    speedups = {record["case"]: record["speedup"] for record in cases if record["case"] in compare.MAIN}
    many = f"tangent kernels on one CPU core, {len(speedups)} cases"
    alone = speedups.pop("d centered")  # where theirs takes another way
    usual = f"{min(speedups.values()):.2f} to {max(speedups.values()):.2f} times as fast as neural_tangents"
    rows.append((many, f"{usual} (on its JAX 0.4.38); {alone:.0f} times with centered dense layers", "ntk"))
    rows += [(*row, "fault_injection") for row in faults(results)]
    return table(["what", "result", "more"], [(*row, f"[{m}](benchmarks/results/{m}.md)") for *row, m in rows])
