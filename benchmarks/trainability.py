"""Trainability at initialization, on CIFAR-100 test images: condition of the tangent kernel, growth of perturbations.

For VGG-16, ResNet-18 and ResNet-50 under each method, by seed: kappa of one output's kernel, kappa of that kernel
scaled to a unit diagonal, growth of a perturbation's mean square against the signal's from the first layer to the last
and per layer (chi). BatchNorm networks are taken in training mode, over the batch of all images; the others before the
last BatchNorm. Runs what results/trainability.jsonl does not hold yet, then writes trainability.md and .png.

  python -m benchmarks.trainability --data_dir=DIR
  python -m benchmarks.trainability --render
"""

import dataclasses
import sys
from pathlib import Path

import jax

from benchmarks import _results
from benchmarks._results import Record, Store
from mimicnorm_jax import plots
from mimicnorm_jax.diagnostics import RegimeMeter
from mimicnorm_jax.models import methods_of
from mimicnorm_jax.monitoring import images, initialized
from mimicnorm_jax.training import base, validate
from mimicnorm_jax.utils import log_line

NETS = ("vgg16", "resnet18", "resnet50")
METHODS = ("batchnorm", "mimicnorm", "none", "fixup")
QUANTITIES = {
    "kappa": "kappa",
    "kappa_unit_diagonal": "kappa, unit diagonal",
    "growth": "growth, first to last layer",
    "chi": "growth per layer",
}


def measure(net: str, method: str, seed: int, count: int, data_dir: str) -> Record:
    """One record."""
    fields = base(dataset="cifar100", data_dir=data_dir, model=net, method=method, seed=seed)
    checked = validate(fields)
    subject = initialized(checked, "float32")
    meter = RegimeMeter(subject.apply_fn, batch_coupled=subject.batch_coupled, memory=12 * 2**30)
    found = meter(subject.params, images(checked, count, "real", "float32"), jax.random.key(seed))
    about = {"net": net, "method": method, "seed": seed, "images": count, **dataclasses.asdict(found)}
    return about | {"machine": _results.machine()}


STORE = Store("trainability", lambda record: tuple(record[name] for name in ("net", "method", "seed", "images")))


def runs_of(records: list[Record], net: str, method: str) -> list[Record]:
    """A network's records under a method, one a seed."""
    return [record for record in records if (record["net"], record["method"]) == (net, method)]


def spread(runs: list[Record], quantity: str) -> str:
    """Mean and standard deviation over seeds."""
    return _results.mean_and_deviation([run[quantity] for run in runs], ".3g", ".2g")


def page(records: list[Record]) -> str:
    """The tables, one for each number of images, and the figure."""
    text = "# Trainability at initialization\n"
    for count, block in _results.grouped(records, lambda record: record["images"]).items():
        runs = {(net, method): runs_of(block, net, method) for net in NETS for method in METHODS}
        rows = [
            (*case, len(found), *(spread(found, quantity) for quantity in QUANTITIES))
            for case, found in runs.items()
            if found
        ]
        text += f"""
{count} CIFAR-100 test images, float32, published initialization, full width; mean and standard
deviation over the seeds {sorted({record["seed"] for record in block})}. kappa is that of the first logit's tangent
kernel over all parameters, before the last BatchNorm. BatchNorm: training mode over the batch of these images, dropout
off, growth from the second layer on. Fixup starts its classifier at zero: its kernel is then that of the classifier
alone, the Gram matrix of the last features, and growth ends before it.

{_results.table(["network", "method", "seeds", *QUANTITIES.values()], rows)}
"""
    return f"""{text}
![figure](trainability.png)

Command: `python -m benchmarks.trainability --data_dir=DIR`. Machine: {_results.machines(records)}.
"""


def draw(records: list[Record], path: Path) -> None:
    """Bars of condition number and growth, for the most images."""
    most = max(record["images"] for record in records)
    block = [record for record in records if record["images"] == most]
    runs = {(net, method): runs_of(block, net, method) for net in NETS for method in METHODS}
    plots.bars(
        {case: {q: [run[q] for run in found] for q in QUANTITIES} for case, found in runs.items() if found},
        {"kappa": "condition number of the tangent kernel", "growth": "growth of a perturbation, first to last layer"},
        path,
        f"at initialization, {most} CIFAR-100 images",
    )


def main() -> None:
    parser = _results.make_parser("trainability", __doc__)
    parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=16)
    arguments = parser.parse_args()
    wanted = [
        (net, method, seed)
        for seed in arguments.seeds
        for net in arguments.nets
        for method in arguments.methods
        if method in methods_of(net)
    ]
    done = STORE.read(arguments.results)
    for net, method, seed in [] if arguments.render else wanted:
        if (net, method, seed, arguments.images) in done:
            continue
        record = measure(net, method, seed, arguments.images, arguments.data_dir)
        log_line(f"{net}, {method}, seed {seed}: " + ", ".join(f"{name} {record[name]:.4g}" for name in QUANTITIES))
        STORE.add(arguments.results, record)
    records = list(STORE.read(arguments.results).values())
    if not records:
        sys.exit(f"{arguments.results} holds no results yet")
    draw(records, arguments.results / "trainability.png")
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
