r"""Does it help to hold the norms of kernels? LAWN and Hyperball beside the plain optimizer, at two sizes of batches.

resnet8 of a quarter of the width on 512 digits, under mimicnorm and batchnorm, by heavy ball and Adam, batches of 64
images and of all 512, as many epochs: the optimizer by itself, with weight decay, under `optim.lawn` and under
`optim.hyperball`. Every arm at six learning rates; the rate is chosen by accuracy on held-out training images, the mean
over seeds, and what is reported is accuracy on others. One record an arm and seed, all its rates.

Runs what results/fixed_norm.jsonl does not hold yet, whole seeds one after another, then writes fixed_norm.md.

  python -m benchmarks.fixed_norm
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import _results
from benchmarks._results import Record, Store, mean_and_deviation
from benchmarks.paper.paired import Paired, paired
from mimicnorm_jax import models, optim
from mimicnorm_jax.data import load, normalize

METHODS = ("mimicnorm", "batchnorm")
OPTIMIZERS = ("sgd", "adam")
ARMS = ("none", "weight decay", "lawn", "hyperball")
"""What holds the kernels: nothing, weight decay, or one of the two constraints."""
HELD = ("lawn", "hyperball")
TRAINED, HELD_OUT = 512, 325
"""Training images, the first ones, to train and to choose the rate; all others of the data set are tested on."""
BATCHES = (64, TRAINED)
WIDTH, EPOCHS, MOMENTUM, DECAY = 0.25, 30, 0.9, 5e-4
FREE_EPOCHS = 6
"""Of LAWN."""
CASE = ("method", "optimizer", "batch")
NAMES = (*CASE, "arm", "seed")
STORE = Store("fixed_norm", lambda record: tuple(record[name] for name in NAMES))


def rates(optimizer: str, arm: str) -> tuple[float, ...]:
    """Those that an arm tries, by factors of the root of 10; Hyperball's are angles of a step."""
    lowest = -2.0 if optimizer == "sgd" and arm != "hyperball" else -2.5
    return tuple(float(f"{10 ** (lowest + step / 2):.2g}") for step in range(6))


class Digits(NamedTuple):
    """Normalized images `(N, 8, 8, 1)` and labels `(N,)`: to train, to choose and to test, in this order."""

    images: jax.Array
    labels: jax.Array


PARTS = {
    "train": slice(TRAINED),
    "held_out": slice(TRAINED, TRAINED + HELD_OUT),
    "test": slice(TRAINED + HELD_OUT, None),
}
"""Where each part stands in `Digits`."""


@functools.cache
def digits() -> Digits:
    """The data set."""
    data = load("digits", "")
    images = np.concatenate([data.train.images, data.test.images])
    labels = np.concatenate([data.train.labels, data.test.labels])
    return Digits(normalize(jnp.asarray(images), data.mean, data.std, jnp.float32), jnp.asarray(labels))


def make_optimizer(optimizer: str, arm: str, rate: jax.Array | float, steps: int) -> optax.GradientTransformation:
    """Of an arm: linear warm-up for a tenth of the steps, then a cosine to 0.

    Args:
      optimizer: one of `OPTIMIZERS`.
      arm: one of `ARMS`.
      rate: after the warm-up; traced, so that all rates of an arm share one program.
      steps: of training.
    """
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    schedule = lambda count: rate * shape(count)  # noqa: E731
    direction = optax.trace(MOMENTUM) if optimizer == "sgd" else optax.scale_by_adam()
    if arm == "hyperball":
        return optim.hyperball(direction, schedule)
    plain = optax.chain(direction, optax.scale_by_learning_rate(schedule))
    if arm == "lawn":
        return optim.lawn(plain, steps * FREE_EPOCHS // EPOCHS)
    return optax.chain(optax.add_decayed_weights(DECAY), plain) if arm == "weight decay" else plain


@functools.cache
def _network(method: str) -> tuple[Any, Any]:
    model = models.create("resnet8", method=method, num_classes=10, width=WIDTH)
    return model, jax.jit(lambda variables, images: model.apply(variables, images))


@functools.cache
def _start(method: str, seed: int) -> Any:
    """Variables at initialization, the same for every arm."""
    model, _ = _network(method)
    return jax.jit(model.init)(jax.random.key(seed), digits().images[:1])


@functools.cache
def _step(method: str, optimizer: str, batch: int, arm: str) -> Callable[..., Any]:
    """From state, rate and the places of a batch's images to the next state, compiled once an arm."""
    model, steps = _network(method)[0], EPOCHS * TRAINED // batch
    images, labels = digits()

    def step(state: Any, rate: jax.Array, chosen: jax.Array) -> Any:
        variables, optimizer_state = state
        stats = {name: leaves for name, leaves in variables.items() if name != "params"}

        def loss(params: Any) -> Any:
            logits, new = model.apply({"params": params, **stats}, images[chosen], train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[chosen]).mean(), new

        grads, stats = jax.grad(loss, has_aux=True)(variables["params"])
        tx = make_optimizer(optimizer, arm, rate, steps)
        updates, optimizer_state = tx.update(grads, optimizer_state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], updates), **stats}, optimizer_state

    return jax.jit(step)


def _trained(method: str, optimizer: str, batch: int, arm: str, seed: int, rate: float) -> Any:
    """Variables after all steps; the images' order depends on the seed alone."""
    step, variables, generator = _step(method, optimizer, batch, arm), _start(method, seed), np.random.default_rng(seed)
    tx = make_optimizer(optimizer, arm, rate, EPOCHS * TRAINED // batch)
    state = variables, tx.init(variables["params"])
    for _ in range(EPOCHS):
        for chosen in generator.permutation(TRAINED).reshape(-1, batch):
            state = step(state, jnp.float32(rate), jnp.asarray(chosen))
    return state[0]


def measure(method: str, optimizer: str, batch: int, arm: str, seed: int) -> Record:
    """One arm at all its rates."""
    start, (images, labels) = time.process_time(), digits()
    found: Record = {"rates": rates(optimizer, arm)}
    found |= {f"{part}_{what}": [] for part in PARTS for what in ("accuracy", "loss")}
    for rate in found["rates"]:
        logits = _network(method)[1](_trained(method, optimizer, batch, arm, seed, rate), images)
        losses = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        right = np.asarray(logits.argmax(1) == labels)
        for part, where in PARTS.items():
            found[f"{part}_accuracy"].append(float(right[where].mean()))
            loss = float(losses[where].mean())
            found[f"{part}_loss"].append(loss if np.isfinite(loss) else None)
    return found | {"ended": "", "cpu_seconds": round(time.process_time() - start, 1)}


def missing(done: set[Any], seeds: Sequence[int]) -> Iterator[tuple[Any, Callable[[], Record]]]:
    """What is to be measured, by key, seed after seed."""
    for seed in seeds:
        for case in itertools.product(METHODS, OPTIMIZERS, BATCHES, ARMS):
            if (key := (*case, seed)) not in done:
                yield key, functools.partial(measure, *key)


def chosen(records: Sequence[Record]) -> int:
    """The place of an arm's rate: of the best held-out accuracy, of equal ones the least loss; means over seeds."""
    accuracies = np.mean([record["held_out_accuracy"] for record in records], 0)
    losses = np.mean([[np.inf if x is None else x for x in record["held_out_loss"]] for record in records], 0)
    return min(range(len(accuracies)), key=lambda place: (-accuracies[place], losses[place]))


def at_rate(records: Sequence[Record], what: str = "test_accuracy") -> list[Record]:
    """What each seed of an arm has at the chosen rate, under `value`."""
    place = chosen(records)
    return [record | {"value": record[what][place]} for record in records]


def differences(records: Sequence[Record], against: str = "none") -> dict[tuple[Any, ...], dict[str, Paired]]:
    """Test accuracy of LAWN and Hyperball minus that of another arm, in points, by method, optimizer and batch."""
    found: dict[tuple[Any, ...], dict[str, Paired]] = {}
    for case, arms in _cases(records).items():
        for arm in HELD:
            if arm in arms and against in arms:
                apart = paired(at_rate(arms[arm]), at_rate(arms[against]), lambda record: 100 * record["value"])
                if apart is not None:
                    found.setdefault(case, {})[arm] = apart
    return found


def _cases(records: Sequence[Record]) -> dict[tuple[Any, ...], dict[str, list[Record]]]:
    """Records by case and arm, in the order of both."""
    grouped = _results.grouped(records, lambda record: tuple(record[name] for name in (*CASE, "arm")))
    found: dict[tuple[Any, ...], dict[str, list[Record]]] = {}
    for *case, arm in itertools.product(METHODS, OPTIMIZERS, BATCHES, ARMS):
        if (*case, arm) in grouped:
            found.setdefault(tuple(case), {})[arm] = grouped[*case, arm]
    return found


def differences_table(records: Sequence[Record]) -> str:
    """One row a method, optimizer and batch."""
    apart = {against: differences(records, against) for against in ("none", "weight decay")}
    rows = []
    for case, arms in _cases(records).items():
        accuracies = [
            mean_and_deviation([100 * r["value"] for r in at_rate(arms[arm])]) if arm in arms else "not run"
            for arm in ("none", "weight decay")
        ]
        cells = [str(apart[against].get(case, {}).get(arm, "")) for against in apart for arm in HELD]
        rows.append((*case, *accuracies, *cells))
    header = [*CASE, "none, %", "weight decay, %", "lawn - none", "hyperball - none"]
    return _results.table([*header, "lawn - weight decay", "hyperball - weight decay"], rows)


def arms_table(records: Sequence[Record]) -> str:
    """One row an arm, at its rate."""
    rows = []
    for case, arms in _cases(records).items():
        for arm, found in arms.items():
            place, tried = chosen(found), found[0]["rates"]
            rate = f"{tried[place]:g}" + (", at the grid's edge" if place in (0, len(tried) - 1) else "")
            accuracies = [
                mean_and_deviation([100 * record["value"] for record in at_rate(found, f"{part}_accuracy")])
                for part in ("held_out", "test")
            ]
            losses = [
                mean_and_deviation([record["value"] for record in at_rate(found, f"{part}_loss")], ".3g", ".2g")
                for part in ("train", "test")
            ]
            rows.append((*case, arm, len(found), rate, *accuracies, *losses))
    header = [*CASE, "arm", "seeds", "rate", "held out, %", "test, %", "training loss", "test loss"]
    return _results.table(header, rows)


def page(records: list[Record]) -> str:
    """Both tables."""
    seconds, count = sum(record["cpu_seconds"] for record in records), len(digits().labels)
    return f"""# Kernels of constant norm

LAWN (Gupta et al. 2021) claims that holding the norms of kernels after a free phase helps, Adam most, and every
optimizer where batches are large. Here: resnet8 of a quarter of the width on {TRAINED} digits, {EPOCHS} epochs whatever
the batch, so that {TRAINED} images a step make {EPOCHS} steps; a warm-up of a tenth of the steps, then a cosine to 0;
heavy ball (momentum {MOMENTUM}) or Adam. `none`: the optimizer by itself; `weight decay`: coupled, {DECAY:g}; `lawn`:
norms of all kernels held after {FREE_EPOCHS} epochs, no weight decay; `hyperball`: held from the start, its rate the
angle of a step.

Six learning rates each, by factors of the root of 10; those of Adam without Hyperball were all moved up by one factor
when held-out images showed the best at their end. The rate is that of the best accuracy on {HELD_OUT} other
training images, mean over seeds; tested are the {count - TRAINED - HELD_OUT} images that are left. Differences are in
points of test accuracy, in pairs of one seed (the same kernels at the start, the same order of images), with 95 %
intervals by Student's t; of many such intervals one in twenty misses by chance, and they do not hold what choosing the
rate adds.

{differences_table(records)}

Mean and standard deviation over seeds, at each arm's rate:

{arms_table(records)}

Command: `python -m benchmarks.fixed_norm`; {seconds:,.0f} CPU seconds in all. Machine: {_results.machines(records)}.
"""


def main() -> None:
    arguments = _results.study_parser("fixed_norm", __doc__, (0, 1, 2), data_dir=False).parse_args()
    todo = missing(set(STORE.read(arguments.results)), arguments.seeds)
    told = lambda record: f"held out {max(record['held_out_accuracy']):.4f}"  # noqa: E731
    _results.go_on(STORE, arguments, NAMES, todo, told)
    STORE.write_page(arguments.results, page)


if __name__ == "__main__":
    main()
