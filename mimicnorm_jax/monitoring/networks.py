"""Networks and images for the diagnostics: any of ours at initialization, or as a run has trained it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimicnorm_jax import models
from mimicnorm_jax.data import Dataset, DatasetSpec, StreamedDataset, datasets
from mimicnorm_jax.data.augment import normalize
from mimicnorm_jax.data.streaming import BadImages
from mimicnorm_jax.diagnostics import from_linen
from mimicnorm_jax.diagnostics.tracing.parameters import ApplyFn
from mimicnorm_jax.errors import ConfigError, DataError
from mimicnorm_jax.methods import METHODS
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.dataset import dataset_of, read_dataset
from mimicnorm_jax.training.restore import read_checkpoint
from mimicnorm_jax.training.spec import make_model


@dataclass(frozen=True)
class BoundModel:
    """A network at certain parameters.

    Attributes:
      name: for a reader.
      apply_fn: the network as a function of parameters and images.
      params: its parameters.
      image_shape: `(H, W, C)` of its images.
      batch_coupled: whether its examples influence one another: BatchNorm networks are taken in training mode, as their
        running averages mean nothing at initialization.
    """

    name: str
    apply_fn: ApplyFn
    params: Any
    image_shape: tuple[int, int, int]
    batch_coupled: bool


def network(
    config: TrainConfig, dataset: DatasetSpec, variables: Any, name: str, *, training: bool = False
) -> BoundModel:
    """The network of a config with these variables, in the precision of its parameters.

    If it is `training`, every BatchNorm normalizes by the batch, the last one too. Otherwise, without intermediate
    BatchNorm a last BatchNorm takes its running averages, which are 0 and 1 at initialization: the kernel is then that
    of the logits before it, without the null directions that it has on a batch. Kernels that a run centers after each
    step are centered in the call here: the same function, and the tangent kernel of its steps.
    """
    method = METHODS[config.method]
    batch_coupled = method.batch_norm or (training and method.last_batch_norm)
    precision = jax.tree.leaves(variables["params"])[0].dtype
    model = make_model(config, dataset, dtype=precision, param_dtype=precision)
    mode: dict[str, Any] = {"train": True, "mutable": ["batch_stats"]} if batch_coupled else {"train": False}
    apply_fn, params = from_linen(model, variables, **mode)
    return BoundModel(name, apply_fn, params, dataset.image_shape, batch_coupled)


def initialized(config: TrainConfig, precision: Any, *, training: bool = False) -> BoundModel:
    """A network at initialization; `training` as in `network`.

    Args:
      config: of the run.
      precision: to compute in.
      training: as in `network`.

    Raises:
      ConfigError: names the field.
    """
    dataset = dataset_of(config)
    try:
        model = make_model(config, dataset, dtype=precision, param_dtype=precision)
        models.check_image(config.model, dataset.image_shape)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    image = jnp.zeros((1, *dataset.image_shape), precision)
    variables = jax.jit(model.init)(jax.random.key(config.seed), image)
    start = f"init {config.init_scheme}, width {config.width_multiplier:g}"
    name = f"{config.model} under {config.method} ({start}), seed {config.seed}"
    return network(config, dataset, variables, f"{name}, at initialization", training=training)


def from_checkpoint(
    folder: Path, which: str, precision: Any, data_dir: str = "", *, training: bool = False
) -> tuple[TrainConfig, BoundModel]:
    """A network from a run's checkpoint, without reading the data set; arguments and errors of `read_checkpoint`.

    Args:
      folder, which, data_dir: of `read_checkpoint`.
      precision: that parameters are cast to.
      training: as in `network`.

    Raises:
      WorkdirError: as `read_checkpoint`.
    """
    found = read_checkpoint(folder, which, data_dir)
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, precision), found.variables)
    return found.config, network(found.config, found.dataset, variables, found.name, training=training)


def images(
    config: TrainConfig, count: int, kind: str, precision: Any, image_shape: tuple[int, int, int] | None = None
) -> jax.Array:
    """Test images of the config's dataset, normalized as in training, or standard normal noise.

    Args:
      config: names dataset, folder and seed, and how many bad images are skipped.
      count: of images.
      kind: `real` or `random`.
      precision: of the images.
      image_shape: `(H, W, C)` of random ones; default: of the data set, which has to be there.

    Returns:
      `(count, H, W, C)`.

    Raises:
      DataError: if the dataset is not prepared, or has fewer images that can be used.
    """
    if kind == "random":
        shape = image_shape or dataset_of(config).image_shape
        noise = np.random.default_rng(config.seed).standard_normal((count, *shape))
        return jnp.asarray(noise, precision)
    bad = BadImages(config.max_bad_images)
    shown, _ = test_examples(read_dataset(config, bad), count, precision, bad)
    if len(shown) < count:
        raise DataError(f"{count} images were asked for, and only {len(shown)} of {config.dataset} can be used")
    return shown


def test_examples(
    dataset: Dataset | StreamedDataset, count: int, precision: Any, bad: BadImages
) -> tuple[jax.Array, np.ndarray]:
    """Test images of a data set, see `datasets.held_out_examples`, normalized as in training, and their labels.

    Args:
      dataset: that was read, or opened.
      count, bad: as in `datasets.held_out_examples`.
      precision: of the images.

    Returns:
      `(count, H, W, C)` and `(count,)`, or fewer where so many cannot be used.

    Raises:
      DataError: as `datasets.held_out_examples`.
    """
    shown, labels = datasets.held_out_examples(dataset, count, bad)
    return jnp.asarray(normalize(jnp.asarray(shown), dataset.mean, dataset.std, precision)), labels


def training_batch(config: TrainConfig, count: int, kind: str, precision: Any) -> tuple[jax.Array, jax.Array]:
    """Training images of a config's dataset, drawn by its seed, normalized and not augmented, and their labels.

    Args:
      config, count, kind, precision: as in `images`; `random` has random labels.

    Returns:
      `(count, H, W, C)` and `(count,)`.

    Raises:
      DataError: if the dataset is not prepared.
      ConfigError: if it is streamed or has fewer training images.
    """
    rng = np.random.default_rng(config.seed)
    if kind == "random":
        labels = rng.integers(0, dataset_of(config).num_classes, count)
        return images(config, count, kind, precision), jnp.asarray(labels)
    dataset = read_dataset(config)
    if not isinstance(dataset, Dataset):
        raise ConfigError(f"{config.dataset} is streamed: a training batch is taken of what is kept in memory alone")
    if count > len(dataset.train):
        raise ConfigError(f"{count} images were asked for, and {config.dataset} has {len(dataset.train)} to train on")
    chosen = rng.permutation(len(dataset.train))[:count]
    shown = normalize(jnp.asarray(dataset.train.images[chosen]), dataset.mean, dataset.std, precision)
    return jnp.asarray(shown), jnp.asarray(dataset.train.labels[chosen])
