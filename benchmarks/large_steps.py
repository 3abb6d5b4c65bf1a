r"""What large steps do, with BatchNorm and without (after Bjorck et al. 2018, Understanding Batch Normalization).

ResNet-18 and VGG-16 of an eighth of the width on CIFAR-100, at initialization and after an epoch (heavy ball, rate
0.02, half an epoch of warm-up, no augmentation), under each method, in training mode on one batch of 128 images: the
loss after one step along the gradient by step size, channel means and variances by depth after such steps, how much the
terms of each kernel's gradient cancel, and the share of one class in the gradient by the logits. Runs what
results/large_steps.jsonl does not hold yet, all networks at initialization first, then writes large_steps.md and .png.

  python -m benchmarks.large_steps --data_dir=DIR
  python -m benchmarks.large_steps --data_dir=DIR --width=1 --seeds 0 1 2    # for a GPU
  python -m benchmarks.large_steps --render
"""

import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import _results
from benchmarks._results import Record, Store
from mimicnorm_jax import plots
from mimicnorm_jax.diagnostics import updates
from mimicnorm_jax.monitoring import from_checkpoint, initialized, training_batch
from mimicnorm_jax.training import base, run, validate

NETS = ("resnet18", "vgg16")
METHODS = ("batchnorm", "mimicnorm", "lastbn", "weightmean", "none")
STAGES = ("at initialization", "after an epoch")
RATES = tuple(float(rate) for rate in 10 ** np.arange(-4, 1.01, 0.25))
STEPS = (0.0, 0.01, 0.1, 1.0)
"""Rates after which channels are looked at."""
WIDTH, IMAGES = 0.125, 128


def _key(record: Record) -> _results.Key:
    return *(record[name] for name in ("net", "method", "stage", "seed")), record.get("width", WIDTH)


STORE = Store("large_steps", _key)


@functools.cache
def _batch(checked: Any) -> Any:
    return training_batch(checked, IMAGES, "real", "float32")


def measure(net: str, method: str, stage: str, seed: int, width: float, data_dir: str) -> Record:
    """One record."""
    start = time.process_time()
    fields = base(dataset="cifar100", data_dir=data_dir, model=net, method=method, seed=seed)
    fields.update(width_multiplier=width, epochs=1, warmup_epochs=0.5, learning_rate=0.02, batch_size=128)
    checked = validate(fields)
    if stage == STAGES[0]:
        found, accuracy = initialized(checked, "float32", training=True), None
    else:
        with tempfile.TemporaryDirectory() as folder:
            accuracy = run(checked, Path(folder) / "run")["final_accuracy"]
            _, found = from_checkpoint(Path(folder) / "run", "latest", "float32", data_dir, training=True)
    # The same images for every network, read once.
    x, labels = _batch(validate(base(dataset="cifar100", data_dir=data_dir, seed=seed)))
    network = found.apply_fn, found.params, updates.Batch(x, labels)
    losses = updates.relative_losses(*network, RATES)
    moments = updates.channel_moments(*network, STEPS)
    ratios = updates.cancellation(*network)
    logits, products = (updates.logit_gradient(*network, before_last_norm=before) for before in (False, True))
    return {
        "rates": RATES,
        "relative_losses": _finite(losses),
        "steps": STEPS,
        "layers": list(moments),
        "abs_means": [_finite(abs(channels.means).mean(1)) for channels in moments.values()],
        "variances": [_finite(channels.variances.mean(1)) for channels in moments.values()],
        "cancellation": _finite(np.array(list(ratios.values()))),
        "dominance": updates.dominance(logits),
        "dominance_before_norm": updates.dominance(products),
        "test_accuracy": accuracy,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def _finite(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def missing(done: set[Any], seeds: list[int], width: float) -> Iterator[tuple[str, str, str, int, float]]:
    """What is to be measured, the cheap stage first."""
    for stage in STAGES:
        for seed in seeds:
            for net in NETS:
                for method in METHODS:
                    if (net, method, stage, seed, width) not in done:
                        yield net, method, stage, seed, width


def best_rate(record: Record) -> float:
    """The rate of the least loss after one step."""
    losses = [np.inf if loss is None else loss for loss in record["relative_losses"]]
    return record["rates"][int(np.argmin(losses))]


def least_loss(record: Record) -> float:
    """The least relative loss after one step."""
    return min(loss for loss in record["relative_losses"] if loss is not None)


def diverging_rate(record: Record) -> float:
    """The least rate at which the loss grows a thousandfold; infinite if there is none."""
    pairs = zip(record["rates"], record["relative_losses"], strict=True)
    return min((rate for rate, loss in pairs if loss is None or loss > updates.DIVERGED), default=np.inf)


def cancellation(record: Record) -> float:
    """Median over the layers."""
    return float(np.median([ratio for ratio in record["cancellation"] if ratio is not None]))


def _net(record: Record) -> str:
    width = record.get("width", WIDTH)
    return record["net"] if width == WIDTH else f"{record['net']}, width {width:g}"


def groups(records: list[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """Records by network (with its width where that is not `WIDTH`), stage and method, in that order."""
    found = _results.grouped(records, lambda r: (_net(r), r["stage"], r["method"]))
    labels = sorted({_net(record) for record in records}, key=lambda label: NETS.index(label.partition(",")[0]))
    order = [(net, stage, method) for net in labels for stage in STAGES for method in METHODS]
    return {case: found[case] for case in order if case in found}


def _spread(records: list[Record], of: Any) -> str:
    values = [of(record) for record in records]
    if not all(map(np.isfinite, values)):
        return f"above {RATES[-1]:g}" if not any(map(np.isfinite, values)) else "some above " + f"{RATES[-1]:g}"
    return _results.mean_and_deviation(values, ".3g", ".2g")


def steps_table(records: list[Record]) -> str:
    """One row a network, stage and method."""
    rows = []
    for case, found in groups(records).items():
        depth = len(found[0]["layers"]) - 1
        cells = [_spread(found, of) for of in (best_rate, least_loss, diverging_rate, cancellation)]
        cells += [_spread(found, lambda r, name=name: r[name]) for name in ("dominance", "dominance_before_norm")]
        means = [[record["abs_means"][depth][STEPS.index(step)] for record in found] for step in (0.0, 0.1)]
        cells += [_results.mean_and_deviation([m for m in each if m is not None], ".3g", ".2g") for each in means]
        rows.append((*case, len(found), *cells))
    header = [
        "network",
        "stage",
        "method",
        "seeds",
        "best rate",
        "least loss",
        "thousandfold loss from",
        "cancellation",
    ]
    header += ["share of one class", "before a norm", "last layer's channel mean", "after a step of 0.1"]
    return _results.table(header, rows)


def page(records: list[Record]) -> str:
    """The table and the figures."""
    seconds = sum(record["cpu_seconds"] for record in records)
    accuracies = [
        (*case, _results.mean_and_deviation([100 * record["test_accuracy"] for record in found]))
        for case, found in groups(records).items()
        if found[0]["test_accuracy"] is not None
    ]
    trained = (
        _results.table(["network", "stage", "method", "test accuracy, %"], accuracies) if accuracies else "None yet."
    )
    return f"""# What large steps do

CIFAR-100, width {WIDTH:g} unless said, float32, published initialization, training mode on {IMAGES} training images;
mean and standard deviation over seeds. One step of plain gradient descent at {len(RATES)} rates from {RATES[0]:g} to
{RATES[-1]:g}: the rate of the least loss, that loss over the loss before, and the least rate at which it grows a
thousandfold. Cancellation: sum of absolute values of a kernel's gradient's terms over that of their sums, median over
layers. Share of one class: of the largest column in the sum of absolute values of the gradient by the logits, image by
class (0.01 if all classes are alike), and by what the classifier's kernel gives, before a norm. Channel means: mean
absolute value over the classifier's outputs.

{steps_table(records)}

![losses](large_steps.png)

![means by depth](large_steps-means.png)

After the epoch (heavy ball 0.9, rate 0.02 after half an epoch of warm-up, batch 128, weight decay 5e-4):

{trained}

Command: `python -m benchmarks.large_steps --data_dir=DIR`; {seconds:,.0f} CPU seconds in all. Machine:
{_results.machines(records)}.
"""


def draw(records: list[Record], folder: Path) -> None:
    """Losses by rate, and channel means by depth after a step of 0.1."""
    losses: dict[str, dict[str, plots.Series]] = {}
    means: dict[str, dict[str, plots.Series]] = {}
    for (net, stage, method), found in groups(records).items():
        values = np.mean([[np.nan if v is None else v for v in record["relative_losses"]] for record in found], 0)
        losses.setdefault(f"{net}, {stage}", {})[method] = plots.Series(np.array(RATES), np.minimum(values, 1e6))
        place = STEPS.index(0.1)
        by_depth = [[layer[place] for layer in record["abs_means"]] for record in found]
        depth = np.mean([[np.nan if v is None else v for v in layers] for layers in by_depth], 0)
        means.setdefault(f"{net}, {stage}", {})[method] = plots.Series(np.arange(1, len(depth) + 1), depth)
    axes = plots.Axes("learning rate of one step", "loss after it, relative", "log", "log")
    plots.line_panels(losses, folder / "large_steps.png", "CIFAR-100, one step along the gradient", axes)
    axes = plots.Axes("layer", "channel |mean|", "linear", "log")
    plots.line_panels(means, folder / "large_steps-means.png", "channel means after one step of rate 0.1", axes)


def main() -> None:
    parser = _results.study_parser("large_steps", __doc__, (0,))
    parser.add_argument("--width", type=float, default=WIDTH, help="factor on the networks' channels")
    arguments = parser.parse_args()
    names = ("net", "method", "stage", "seed", "width")
    cases = missing(set(STORE.read(arguments.results)), arguments.seeds, arguments.width)
    todo = ((case, functools.partial(measure, *case, arguments.data_dir)) for case in cases)
    records = _results.go_on(STORE, arguments, names, todo, lambda record: f"best rate {best_rate(record):.3g}")
    draw(records, arguments.results)
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
