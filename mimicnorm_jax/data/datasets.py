"""The data sets by name, and reading one into memory."""

from functools import lru_cache

import numpy as np

from mimicnorm_jax.data.digits import DIGITS
from mimicnorm_jax.data.specs import Dataset, DatasetSpec, Split
from mimicnorm_jax.data.tfds import CIFAR10, CIFAR100
from mimicnorm_jax.errors import DataError, unknown

__all__ = ["DATASETS", "Dataset", "DatasetSpec", "Split", "get_spec", "load", "require_prepared"]

DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in (DIGITS, CIFAR10, CIFAR100)}
"""Every data set by name. One of your own is one more entry."""


def get_spec(name: str) -> DatasetSpec:
    """What is known of a data set before it is read.

    Raises:
      DataError: if it is unknown.
    """
    if name not in DATASETS:
        raise DataError(unknown("dataset", name, DATASETS))
    return DATASETS[name]


def require_prepared(name: str, data_dir: str = "") -> None:
    """Raises DataError at once if the data set is unknown or not prepared; reads no images."""
    spec = get_spec(name)
    spec.require_prepared(spec, data_dir)


@lru_cache(maxsize=1)
def load(name: str, data_dir: str = "") -> Dataset:
    """Reads and decodes a data set; the last one stays in memory.

    Args:
      name: one of `DATASETS`.
      data_dir: of those that are not bundled, see `tfds.tfds_dir`.

    Raises:
      DataError: if it is unknown, not prepared, prepared in a format that only TensorFlow reads, or damaged.
    """
    require_prepared(name, data_dir)
    spec = get_spec(name)
    train, test = spec.read(spec, data_dir)
    mean, std = _moments(train.images)
    return Dataset(spec, train, test, mean, std)


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    levels = np.arange(256) / 255
    counts = [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    means = [float(np.average(levels, weights=count)) for count in counts]
    variances = [np.average((levels - m) ** 2, weights=count) for m, count in zip(means, counts, strict=True)]
    return tuple(means), tuple(float(np.sqrt(v)) for v in variances)
