"""What the study of search by the scale measures: scales of a supernet, networks trained from scratch."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._results import Record
from mimicnorm_jax import search
from mimicnorm_jax.data import Augmentation, augment, load, normalize

METHODS = ("batchnorm", "mimicnorm")
NETWORKS = 30


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
