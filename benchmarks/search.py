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

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _results
from benchmarks._results import Record, Store
from mimicnorm_jax import plots, search
from mimicnorm_jax.data import Augmentation, augment, load, normalize

METHODS = ("batchnorm", "mimicnorm")
NETWORKS, BOOTSTRAPS = 30, 2000
NAMES = ("form", "part", "method", "network", "seed")
STORE = Store("search", lambda record: tuple(record[name] for name in NAMES))


class Form(NamedTuple):
    """One size of the study.

    Attributes:
      dataset: its images.
      images: that are trained on, the first of the training split; the others are tested on too. None for all.
      space: of the networks.
      batch: images a step.
      steps: of training a network.
      scale_steps: of training scales.
      rate: of training a network: heavy ball of momentum 0.9, along a cosine to 0, after a warm-up of a tenth.
      scale_rate: of training scales, likewise; None for the published optimizer.
      augmentation: of the training images.
    """

    dataset: str
    images: int | None
    space: search.SearchSpace
    batch: int
    steps: int
    scale_steps: int
    rate: float
    scale_rate: float | None = None
    augmentation: Augmentation = Augmentation()


FORMS = {
    "small": Form(
        *("digits", 256, search.SearchSpace(((8, 1, 1), (12, 2, 2), (16, 2, 1)), stem=8, first=8, last=32)),
        *(32, 80, 120, 0.05, 0.1),
    ),
    "full": Form(
        *("cifar100", None, search.PUBLISHED, 128, 50 * 390, 10 * 390, 0.1),
        augmentation=Augmentation(crop_padding=4, flip=True),
    ),
}


class Images(NamedTuple):
    """Normalized images `(N, H, W, C)` and labels `(N,)`, to train and to test."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    augmentation: Augmentation


@functools.cache
def images_of(form: str, data_dir: str) -> Images:
    """Of a form."""
    data, count = load(FORMS[form].dataset, data_dir), FORMS[form].images
    train, test = (np.asarray(part.images) for part in (data.train, data.test))
    labels, test_labels = (np.asarray(part.labels) for part in (data.train, data.test))
    if count is not None:
        test, test_labels = np.concatenate([train[count:], test]), np.concatenate([labels[count:], test_labels])
        train, labels = train[:count], labels[:count]
    train, test = (np.asarray(normalize(jnp.asarray(x), data.mean, data.std, jnp.float32)) for x in (train, test))
    return Images((train, labels), (test, test_labels), FORMS[form].augmentation)


class Programs(NamedTuple):
    """What is compiled once for a form and method."""

    network: search.Supernet
    start: Callable[[int], Any]
    """From a seed to variables."""
    optimizers: dict[str, optax.GradientTransformation]
    steps: dict[str, Any]
    correct: Callable[..., jax.Array]
    """From variables, images, labels and path to how many are right."""


@functools.cache
def programs(form: str, method: str, data_dir: str) -> Programs:
    """Of both parts."""
    setting, shape = FORMS[form], images_of(form, data_dir).train[0].shape[1:]
    classes = 1 + int(images_of(form, data_dir).test[1].max())
    network = search.supernet(setting.space, method=method, num_classes=classes)
    first = jnp.zeros(setting.space.num_layers, jnp.int32)
    init = jax.jit(lambda key: network.init(key, jnp.zeros((1, *shape)), path=first))
    params = jax.eval_shape(init, jax.random.key(0))["params"]

    def ball(rate: float, steps: int) -> optax.GradientTransformation:
        return optax.sgd(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps), momentum=0.9)

    published = search.published_optimizer(setting.scale_steps, setting.batch)
    scales = published if setting.scale_rate is None else ball(setting.scale_rate, setting.scale_steps)
    optimizers = {"scales": search.scales_only(scales, params), "trained": ball(setting.rate, setting.steps)}
    steps = {part: search.make_step(network, optimizer) for part, optimizer in optimizers.items()}

    def correct(variables: Any, images: jax.Array, labels: jax.Array, path: jax.Array) -> jax.Array:
        logits: Any = network.apply(variables, images, path=path)
        return (logits.argmax(1) == labels).sum()

    return Programs(network, lambda seed: init(jax.random.key(seed)), optimizers, steps, jax.jit(correct))


def architectures(form: str) -> list[search.Path]:
    """The networks of the study, all different, the same for every method and seed."""
    generator, found = np.random.default_rng(0), {}
    while len(found) < NETWORKS:
        found[FORMS[form].space.sample(generator)] = None
    return list(found)


def _train(part: str, made: Programs, images: Images, form: str, seed: int, path: search.Path | None) -> Any:
    """Variables after all steps, of one path or of a random one every step."""
    setting, (pixels, labels) = FORMS[form], images.train
    generator = np.random.default_rng(seed)
    variables = made.start(seed)
    state, order = (variables, made.optimizers[part].init(variables["params"])), np.zeros(0, np.int64)
    loss = np.nan
    for number in range(setting.scale_steps if part == "scales" else setting.steps):
        if len(order) < setting.batch:
            order = generator.permutation(len(labels))
        chosen, order = order[: setting.batch], order[setting.batch :]
        drawn = jnp.asarray(path or setting.space.sample(generator), jnp.int32)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), setting.batch)
        batch = augment(keys, jnp.asarray(pixels[chosen]), images.augmentation)
        state, loss = made.steps[part](state, batch, jnp.asarray(labels[chosen]), drawn)
    return state[0], float(loss)


def measure(form: str, part: str, method: str, network: int, seed: int, data_dir: str) -> Record:
    """One supernet's scores, or one network's accuracy."""
    start, setting = time.process_time(), FORMS[form]
    made, images = programs(form, method, data_dir), images_of(form, data_dir)
    if part == "scales":
        before = search.scores(made.start(seed)["params"], setting.space)
        variables, loss = _train(part, made, images, form, seed, None)
        after = search.scores(variables["params"], setting.space)
        found: Record = {"before": before.round(6).tolist(), "after": after.round(6).tolist()}
    else:
        path = architectures(form)[network]
        variables, loss = _train(part, made, images, form, seed, path)
        pixels, labels = images.test
        right = 0
        for at in range(0, len(labels), 512):
            kept = min(512, len(labels) - at)
            batch = np.pad(pixels[at : at + kept], ((0, 512 - kept), *((0, 0),) * 3))
            answers = np.pad(labels[at : at + kept], (0, 512 - kept), constant_values=-1)
            right += int(made.correct(variables, jnp.asarray(batch), jnp.asarray(answers), jnp.asarray(path)))
        operations = search.flops(setting.space, pixels.shape[1:], made.network.num_classes)
        cost = operations.fixed + search.total(operations.table, path)
        found = {"path": path, "flops": cost, "accuracy": right / len(labels)}
    return found | {"loss": loss, "cpu_seconds": round(time.process_time() - start, 1)}


def missing(form: str, done: set[Any], seeds: list[int], data_dir: str) -> Iterator[tuple[Any, Callable[[], Record]]]:
    """What is to be measured, by key, seed after seed, the indicators first."""
    for seed in seeds:
        for part, networks in {"scales": [-1], "trained": range(NETWORKS)}.items():
            for method in METHODS:
                for key in [(form, part, method, network, seed) for network in networks]:
                    if key not in done:
                        yield key, functools.partial(measure, *key, data_dir)


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
