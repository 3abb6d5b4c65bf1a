"""What tangent kernels predict: ridge regression on the digits, and alignment with the labels along the default run.

The kernel of all 1,797 digits is computed once for each network at initialization; a split is a part of it. The ridge
is chosen by generalized cross-validation on the training part alone.

  python -m benchmarks.ntk.digits            # the regressions
  python -m benchmarks.ntk.digits --along    # the default run, with diagnostics
"""

import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _results, quickstart
from benchmarks._results import ROOT, Record, Store
from mimicnorm_jax import plots
from mimicnorm_jax.data import load, normalize
from mimicnorm_jax.diagnostics import EmpiricalNTK
from mimicnorm_jax.diagnostics.regression import class_targets, ridge_regression
from mimicnorm_jax.monitoring import initialized
from mimicnorm_jax.theory import PLAIN, WEIGHT_MEAN
from mimicnorm_jax.training import base, validate
from mimicnorm_jax.utils import log_line

SPLITS = 5
DEPTH = 4
"""Weight layers of the infinitely wide stacks."""
EPOCHS = 1.0
"""Between two measurements of the default run."""
STORE = Store("ntk_digits", lambda record: (record["what"], record["name"], record.get("split", record.get("step"))))


def _digits() -> tuple[jax.Array, np.ndarray]:
    """All images, normalized as in training, and their labels."""
    known = load("digits")
    images = np.concatenate([known.train.images, known.test.images])
    labels = np.concatenate([known.train.labels, known.test.labels])
    return jnp.asarray(normalize(jnp.asarray(images), known.mean, known.std, jnp.float32)), labels


def _splits(labels: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Training and test examples, 4 to 1, each class by its share."""
    from sklearn.model_selection import train_test_split

    for seed in range(SPLITS):
        train, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
        yield seed, np.asarray(train), np.asarray(test)


def _kernels(x: jax.Array) -> Iterator[tuple[str, np.ndarray]]:
    """By name, the kernels of all examples."""
    with jax.enable_x64(True):
        flat = jnp.asarray(np.asarray(x, np.float64).reshape(len(x), -1))
        for name, mlp in (("plain", PLAIN), ("weight mean", WEIGHT_MEAN)):
            yield f"infinitely wide MLP, {name}, depth {DEPTH}", np.asarray(mlp.kernels_between(flat, flat, DEPTH)[1])
    found = initialized(validate(base()), "float32")
    kernel = EmpiricalNTK(found.apply_fn, output="pseudo")
    log_line(str(kernel.plan(found.params, x)))
    yield "resnet8 at initialization, pseudo-kernel", np.asarray(kernel(found.params, x))


def regressions() -> Iterator[Record]:
    """A record a split and method."""
    x, labels = _digits()
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    targets = class_targets(labels, 10)
    about = {"what": "regression", "machine": _results.machine()}
    for split, train, test in _splits(labels):
        yield about | {"name": "logistic regression", "split": split, "accuracy": _logistic(flat, labels, train, test)}
    for name, kernel in _kernels(x):
        for split, train, test in _splits(labels):
            fit = ridge_regression(kernel[np.ix_(train, train)], targets[train])
            assert fit.gcv is not None
            accuracy = float((fit.classify(kernel[np.ix_(test, train)]) == labels[test]).mean())
            share = fit.ridge / float(np.trace(kernel[np.ix_(train, train)]) / len(train))
            yield about | {
                "name": name, "split": split, "accuracy": accuracy, "ridge_over_mean_diagonal": share,
                "ridge_at_end": fit.gcv.at_end,
            }  # fmt: skip


def _logistic(x: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray) -> float:
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one that has not converged is no comparison
        model = LogisticRegression(max_iter=2000).fit(x[train], labels[train])
    return float(model.score(x[test], labels[test]))


def along_run() -> list[Record]:
    """A record a measurement of the default run with seed 0, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--config.diagnostics_epochs={EPOCHS}", f"--workdir={folder}"]
        subprocess.run([sys.executable, "train.py", *options], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        lines = [json.loads(line) for line in (Path(folder) / "diagnostics.jsonl").read_text().splitlines()]
    about = {"what": "along", "name": "default run, seed 0", "machine": _results.machine()}
    return [about | line for line in lines]


def page(records: list[Record]) -> str:
    """Accuracies by method, and what became of the alignment."""
    sets = _results.grouped([r for r in records if r["what"] == "regression"], lambda record: record["name"])
    rows = [_row(name, found) for name, found in sets.items()]
    trained = [100 * run["final_accuracy"] for run in quickstart.STORE.read(_results.RESULTS).values()]
    rows.append(("resnet8 trained (the default run)", _results.mean_and_deviation(trained), "", "3 seeds, one split"))
    table = _results.table(["method", "test accuracy, %", "ridge over the kernel's mean diagonal", "over"], rows)
    run = [record for record in records if record["what"] == "along"]
    return f"""# Regression with tangent kernels on the digits

{table}

Mean and standard deviation. {SPLITS} random splits of 1,797 digits, 4 to 1, by class; the first is the data set's own,
on which the trained networks are measured. Ridge by generalized cross-validation on the training part; no other choice
was made or tried. The kernel of `resnet8` is that of one initialization.

{_alignment(run)}Commands: `python -m benchmarks.ntk.digits` and `python -m benchmarks.ntk.digits --along`.
Machine: {_results.machines(records)}.
"""


def _alignment(run: list[Record]) -> str:
    if not run:
        return ""
    rows = [
        (f"{r['epoch']:g}", f"{r['alignment']:.3f}", f"{r['alignment_centered']:.3f}")
        for r in run
        if r["epoch"] in (0, 1, 2, 5, 10) or r is run[-1]
    ]
    return f"""## Alignment along the default run

Pseudo-kernel of 32 test images with their labels, plain and centered:

{_results.table(["epoch", "alignment", "centered"], rows)}

![Diagnostics along the default run](ntk_digits.png)

"""


def _row(name: str, found: list[Record]) -> tuple[Any, ...]:
    ridges = [r["ridge_over_mean_diagonal"] for r in found if "ridge_over_mean_diagonal" in r]
    shown = f"{min(ridges):.1g} to {max(ridges):.1g}" if ridges else ""
    shown += " (the end of the search)" if any(r.get("ridge_at_end") for r in found) else ""
    accuracy = _results.mean_and_deviation([100 * r["accuracy"] for r in found])
    return name, accuracy, shown, f"{len(found)} splits"


def main() -> None:
    parser = _results.make_parser("ntk.digits", __doc__)
    parser.add_argument("--along", action="store_true", help="the default run instead of the regressions")
    arguments = parser.parse_args()
    if arguments.along and not arguments.render:
        rows = along_run()
        STORE.add(arguments.results, *rows)
        if plots.available():
            plots.along_run(rows, arguments.results / "ntk_digits.png", "the default run, seed 0")
    elif not arguments.render:
        for record in regressions():
            log_line(f"{record['name']}, split {record['split']}: {record['accuracy']:.4f}")
            STORE.add(arguments.results, record)
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
