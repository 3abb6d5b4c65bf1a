"""Search by the scale: does what BN-NAS judges networks by order them as their accuracy after training does?

Networks drawn from a search space, each trained from scratch under batchnorm and under mimicnorm, beside three things
known before: the indicator of a supernet of which only scales were trained (BatchNorm's gamma, or the scalars of
residual branches), and as the null model the operations of a forward pass. Kendall's tau, bootstrap over networks.

scales: one supernet, kernels frozen as they start, every step another random path.
trained: one network from scratch: all parameters of its path, in the supernet's program (tests/search hold that to the
  network alone).

Runs what results/search.jsonl does not hold yet, whole seeds one after another, then writes search.md and search.png.

  python -m benchmarks.search                                # small: digits, for a CPU
  python -m benchmarks.search --form=full --data_dir=DIR     # the published space on CIFAR-100
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import _results
from benchmarks._results import Record, Store
from benchmarks._search import FORMS, METHODS, architectures, missing
from mimicnorm_jax import plots, search

BOOTSTRAPS = 2000
NAMES = ("form", "part", "method", "network", "seed")
STORE = Store("search", lambda record: tuple(record[name] for name in NAMES))


class Predictor(NamedTuple):
    """What may tell accuracies: its values and the accuracies, `(N,)` both, by network."""

    values: np.ndarray
    accuracies: np.ndarray

    @property
    def tau(self) -> float:
        """Kendall's, of all networks."""
        return float(kendall(self.values, self.accuracies, np.arange(len(self.values))[None])[0])

    @property
    def interval(self) -> tuple[float, float]:
        """95 % by bootstrap over networks; a draw of equal values only says nothing."""
        count = len(self.values)
        chosen = np.random.default_rng(0).integers(count, size=(BOOTSTRAPS, count))
        low, high = np.nanquantile(kendall(self.values, self.accuracies, chosen), [0.025, 0.975])
        return float(low), float(high)


def kendall(first: np.ndarray, second: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of many draws at once, since scipy's takes a millisecond each; NaN where all values are equal.

    Args:
      first, second: `(N,)`.
      chosen: `(D, M)`, the places of every draw.
    """
    signs = [np.sign(values[:, None] - values).astype(np.float32) for values in (first, second)]
    a, b = (of[chosen[:, :, None], chosen[:, None]] for of in signs)
    with np.errstate(invalid="ignore"):
        return (a * b).sum((1, 2)) / np.sqrt((a**2).sum((1, 2)) * (b**2).sum((1, 2)))


def _accuracies(records: list[Record]) -> dict[int, dict[int, float]]:
    """By network and seed, networks in order."""
    found: dict[int, dict[int, float]] = {}
    for record in sorted(records, key=lambda r: (r["network"], r["seed"])):
        found.setdefault(record["network"], {})[record["seed"]] = record["accuracy"]
    return found


def predictors(records: list[Record], form: str, method: str) -> dict[str, Predictor]:
    """What there is to tell accuracies of a method by, each over the networks that have been trained."""
    mine = [record for record in records if (record["form"], record["method"]) == (form, method)]
    trained = [record for record in mine if record["part"] == "trained"]
    if len({record["network"] for record in trained}) < 3:
        return {}
    by_network = _accuracies(trained)
    means = np.array([np.mean(list(of.values())) for of in by_network.values()])
    paths, found = [architectures(form)[network] for network in by_network], {}
    if tables := [record for record in mine if record["part"] == "scales"]:
        after, before = (np.mean([record[when] for record in tables], 0) for when in ("after", "before"))
        name = "gamma" if method == "batchnorm" else "scalar"
        found[f"{name}, summed"] = np.array([search.total(after, path) for path in paths])
        if not np.allclose(before, before.flat[0]):
            found[f"{name} over its start, summed"] = np.array([search.total(after / before, path) for path in paths])
    operations = {record["network"]: record["flops"] for record in trained}
    found["operations"] = np.array([operations[network] for network in by_network])
    whole = {name: Predictor(values, means) for name, values in found.items()}
    seeds = sorted({record["seed"] for record in trained})
    pairs = np.array([[of[seed] for seed in seeds[:2]] for of in by_network.values() if {*seeds[:2]} <= of.keys()])
    if len(seeds) > 1 and len(pairs) > 2:
        whole["accuracy of another seed"] = Predictor(pairs[:, 0], pairs[:, 1])
    return whole


def _count(records: list[Record], form: str, method: str, part: str) -> int:
    return len({r["seed"] for r in records if (r["form"], r["method"], r["part"]) == (form, method, part)})


def tau_table(records: list[Record]) -> str:
    """One row a form, method and predictor."""
    rows = []
    for form in FORMS:
        for method in METHODS:
            seeds = f"{_count(records, form, method, 'scales')}, {_count(records, form, method, 'trained')}"
            for name, predictor in predictors(records, form, method).items():
                low, high = predictor.interval
                spread = [f"{100 * f(predictor.accuracies):.1f}" for f in (np.min, np.median, np.max)]
                tau = f"{predictor.tau:.2f} [{low:.2f}, {high:.2f}]"
                rows.append((form, method, name, len(predictor.values), seeds, tau, " / ".join(spread)))
    header = ["form", "method", "told by", "networks", "seeds: scales, training", "Kendall's tau"]
    return _results.table([*header, "accuracy, %, least / median / most"], rows)


def page(records: list[Record]) -> str:
    """The table and the figure."""
    small, seconds = FORMS["small"], sum(record["cpu_seconds"] for record in records)
    return f"""# Search by the scale

Rank correlation between what is known of a network before it is trained and its test accuracy after training from
scratch, of networks drawn at random from a search space; 95 % intervals by {BOOTSTRAPS} bootstraps over networks.
Indicators and accuracies are means over the seeds that there are. `accuracy of another seed` is what training alone
agrees with itself, over its first two seeds: no indicator can be expected to do much better.

Small: {small.images} digits to train and the other 1,541 to test, so that accuracies differ; {small.space.num_layers}
layers of {len(small.space.choices)} choices, {small.steps} steps of {small.batch} images (heavy ball, rate
{small.rate:g}), scales alone {small.scale_steps} steps (rate {small.scale_rate:g}); label smoothing 0.1. Full:
CIFAR-100, the published space, 50 epochs, scales alone 10 by the published optimizer.

{tau_table(records)}

![tau](search.png)

Command: `python -m benchmarks.search`; {seconds:,.0f} CPU seconds in all. Machine: {_results.machines(records)}.
"""


def draw(records: list[Record], folder: Path) -> None:
    """Kendall's tau with its interval."""
    shown = {}
    for form in FORMS:
        for method in METHODS:
            for name, predictor in predictors(records, form, method).items():
                low, high = predictor.interval
                shown[f"{form}, {method}: {name}"] = ([predictor.tau], (high - low) / 2)
    if shown:
        title = "Rank correlation with accuracy; half the width of a 95 % interval on each side"
        plots.intervals(shown, folder / "search.png", title, "Kendall's tau")


def main() -> None:
    parser = _results.study_parser("search", __doc__, (0, 1))
    parser.add_argument("--form", choices=FORMS, default="small")
    arguments = parser.parse_args()
    todo = missing(arguments.form, set(STORE.read(arguments.results)), arguments.seeds, arguments.data_dir)
    told = lambda record: f"loss {record['loss']:.3f}, accuracy {record.get('accuracy', float('nan')):.4f}"  # noqa: E731
    records = _results.go_on(STORE, arguments, NAMES, todo, told)
    draw(records, arguments.results)
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
