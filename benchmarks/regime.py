"""Condition of the tangent kernel and growth of perturbations at initialization, on real CIFAR-100 test images.

For VGG-16, ResNet-18 and ResNet-50 under each method, by seed: kappa of one output's kernel, kappa of that kernel
scaled to a unit diagonal, growth of a perturbation's mean square against the signal's from the first layer to the last
and per layer (chi). BatchNorm networks are taken in training mode, over the batch of all images; the others before the
last BatchNorm. Runs what benchmarks/results/regime.jsonl does not hold yet, then writes regime.md and regime.png.

  python benchmarks/regime.py --data_dir=DIR
  python benchmarks/regime.py --render
"""

import argparse
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import jax

from mimicnorm_jax import plots
from mimicnorm_jax.diagnostics import RegimeMeter
from mimicnorm_jax.models import methods_of
from mimicnorm_jax.monitoring.networks import images, initialized
from mimicnorm_jax.training import config
from mimicnorm_jax.utils import environment
from mimicnorm_jax.utils.console import log_line
from mimicnorm_jax.utils.files import write_text

RESULTS = Path(__file__).parent / "results"
NETS = ("vgg16", "resnet18", "resnet50")
METHODS = ("batchnorm", "mimicnorm", "none", "fixup")
QUANTITIES = {
    "kappa": "kappa",
    "kappa_unit_diagonal": "kappa, unit diagonal",
    "growth": "growth, first to last layer",
    "chi": "growth per layer",
}


def measure(net: str, method: str, seed: int, count: int, data_dir: str) -> dict[str, Any]:
    """One line."""
    fields = config.base(dataset="cifar100", data_dir=data_dir, model=net, method=method, seed=seed)
    checked = config.validate(fields)
    subject = initialized(checked, "float32")
    meter = RegimeMeter(subject.apply_fn, batch_coupled=subject.batch_coupled, memory=12 * 2**30)
    found = meter(subject.params, images(checked, count, "real", "float32"), jax.random.key(seed))
    line = {"net": net, "method": method, "seed": seed, "images": count, **dataclasses.asdict(found)}
    return line | {"machine": environment.describe()}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.3g}"
    return f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.2g}"


def render(lines: list[dict[str, Any]]) -> None:
    """Table and figure of what has been measured."""
    rows, summary = [], {}
    for net in NETS:
        for method in METHODS:
            runs = [line for line in lines if (line["net"], line["method"]) == (net, method)]
            if runs:
                cells = [_spread([run[quantity] for run in runs]) for quantity in QUANTITIES]
                rows.append("| " + " | ".join([net, method, str(len(runs)), *cells]) + " |")
                summary[net, method] = {q: [run[q] for run in runs] for q in QUANTITIES}
    counts = sorted({line["images"] for line in lines})
    where = sorted({json.dumps(line["machine"], sort_keys=True) for line in lines})
    text = f"""# Regime at initialization

{", ".join(map(str, counts))} CIFAR-100 test images, float32, published initialization, full width; mean and standard
deviation over the seeds {sorted({line["seed"] for line in lines})}. kappa is that of the first logit's tangent
kernel over all parameters, before the last BatchNorm. BatchNorm: training mode over the batch of these images, dropout
off, growth from the second layer on. Fixup starts its classifier at zero: its kernel is then that of the classifier
alone, the Gram matrix of the last features, and growth ends before it.

| network | method | seeds | {" | ".join(QUANTITIES.values())} |
|---|---|---|{"---|" * len(QUANTITIES)}
{chr(10).join(rows)}

![figure](regime.png)

Command: `python benchmarks/regime.py --data_dir=DIR`. Machine: {"; ".join(where)}.
"""
    write_text(RESULTS / "regime.md", text)
    plots.bars(
        summary,
        {"kappa": "condition number of the tangent kernel", "growth": "growth of a perturbation, first to last layer"},
        RESULTS / "regime.png",
        f"at initialization, {counts[-1]} CIFAR-100 images",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="", help="default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--render", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    path = RESULTS / "regime.jsonl"
    wanted = [
        (net, method, seed)
        for seed in arguments.seeds
        for net in arguments.nets
        for method in arguments.methods
        if method in methods_of(net)
    ]
    for net, method, seed in [] if arguments.render else wanted:
        done = {(line["net"], line["method"], line["seed"], line["images"]) for line in read(path)}
        if (net, method, seed, arguments.images) in done:
            continue
        line = measure(net, method, seed, arguments.images, arguments.data_dir)
        log_line(f"{net}, {method}, seed {seed}: " + ", ".join(f"{name} {line[name]:.4g}" for name in QUANTITIES))
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
    if not read(path):
        sys.exit(f"{path} holds no results yet")
    render(read(path))


if __name__ == "__main__":
    main()
