"""The data sets by name, reading one into memory, and opening one to be streamed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from mimicnorm_jax.data import folder, records, tfds
from mimicnorm_jax.data.digits import DIGITS
from mimicnorm_jax.data.specs import Dataset, DatasetSpec, StreamedDataset
from mimicnorm_jax.data.streaming.bad_images import BadImages
from mimicnorm_jax.data.streaming.decoding import Cut
from mimicnorm_jax.data.streaming.pipeline import Reader
from mimicnorm_jax.errors import DataError, unknown

DATASETS: dict[str, DatasetSpec] = {spec.name: spec for spec in (DIGITS, tfds.CIFAR10, tfds.CIFAR100, tfds.IMAGENET)}
"""Every data set by name. One of your own is one more entry."""
KINDS: dict[str, Callable[[str, str, int], DatasetSpec]] = {
    "folder": folder.describe,
    "records": records.describe,
    "tfds": tfds.describe,
}
"""What stands before the colon of a data set that is described when it is asked for, such as `folder:DIR`."""
MEASURED = 2048
"""Images, evenly spread over the training images, from which a stream's mean and deviation are measured."""


def get_spec(name: str, data_dir: str = "", image_size: int = 0) -> DatasetSpec:
    """What is known of a data set before it is read.

    Args:
      name: one of `DATASETS`, `folder:DIR`, `records:DIR` or `tfds:NAME`.
      data_dir: see `tfds.tfds_dir`.
      image_size: side of the squares that images are cut to; 0 for the data set's own.

    Raises:
      DataError: if it is unknown or not there, or has images of no size in common and none is given.
    """
    kind, colon, _ = name.partition(":")
    if colon and kind in KINDS:
        if not image_size:
            raise DataError(
                f"the images of {name} have no size in common: say --config.image_size=224, or what you like"
            )
        return KINDS[kind](name, data_dir, image_size)
    if name not in DATASETS:
        raise DataError(unknown("dataset", name, [*DATASETS, *(f"{kind}:..." for kind in KINDS)]))
    spec = DATASETS[name]
    shape = (image_size, image_size, 3)
    if not image_size or shape == spec.image_shape:
        return spec
    if spec.open is None:
        raise DataError(f"{name} has images of {spec.image_shape} and cannot be cut to config.image_size={image_size}")
    return replace(spec, image_shape=shape, read=None)


def require_prepared(name: str, data_dir: str = "", image_size: int = 0) -> None:
    """Raises DataError at once if the data set is unknown or not prepared; reads no images.

    Args:
      name: of the data set, see `get_spec`.
      data_dir: as in `load`.
      image_size: side of the squares that images are cut to; 0 for their own.
    """
    spec = get_spec(name, data_dir, image_size)
    spec.require_prepared(spec, data_dir)


@lru_cache(maxsize=1)
def load(name: str, data_dir: str = "") -> Dataset:
    """Reads and decodes a data set; the last one stays in memory.

    Args:
      name: one of `DATASETS` that fits into memory.
      data_dir: of those that are not bundled, see `tfds.tfds_dir`.

    Raises:
      DataError: if it is unknown, not prepared, prepared in a format that only TensorFlow reads, damaged, or only to
        be streamed.
    """
    require_prepared(name, data_dir)
    spec = get_spec(name, data_dir)
    if spec.read is None:
        raise DataError(f"{name} is not read into memory: stream it with `open_streams`")
    train, test = spec.read(spec, data_dir)
    mean, std = _moments([train.images])
    return Dataset(spec, train, test, mean, std)


def open_streams(
    spec: DatasetSpec,
    data_dir: str,
    bad: BadImages,
    moments: tuple[Sequence[float], Sequence[float]] = ((), ()),
) -> StreamedDataset:
    """Opens a data set to be streamed.

    Args:
      spec: from `get_spec`.
      data_dir: as there.
      bad: counts images that cannot be used.
      moments: mean and standard deviation per channel in [0, 1]; empty ones are measured from `MEASURED` images.

    Raises:
      DataError: if it is not prepared, or cannot be streamed.
    """
    spec.require_prepared(spec, data_dir)
    if spec.open is None:
        raise DataError(f"{spec.name} cannot be streamed: leave out --config.streaming")
    train, test = spec.open(spec, data_dir)
    mean, std = (tuple(values) for values in moments)
    if not mean or not std:
        reader = Reader(train, Cut(spec.image_shape[0]), bad)
        places = np.unique(np.linspace(0, len(train) - 1, MEASURED).astype(int))
        found = _moments([read[0][None] for place in places if (read := reader.read(int(place))) is not None])
        mean, std = mean or found[0], std or found[1]
    return StreamedDataset(spec, train, test, mean, std)


def first_test_images(dataset: Dataset | StreamedDataset, count: int) -> np.ndarray:
    """The first test images, `(count, H, W, C)` uint8.

    Args:
      dataset: kept on the devices, or streamed.
      count: of images.

    Raises:
      DataError: if there are fewer, or one of a stream cannot be decoded.
    """
    if count > len(dataset.test):
        raise DataError(f"{count} images were asked for, and {dataset.spec.name} has {len(dataset.test)} test images")
    if isinstance(dataset, Dataset):
        return dataset.test.images[:count]
    reader = Reader(dataset.test, Cut(dataset.spec.image_shape[0]), BadImages(0))
    found = [reader.read(place) for place in range(count)]
    return np.stack([read[0] for read in found if read is not None])


def _moments(parts: Sequence[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of pixels of uint8 images `(..., C)`, exactly, whatever their order."""
    levels = np.arange(256) / 255
    channels = range(parts[0].shape[-1])
    counts = [sum(np.bincount(part[..., c].ravel(), minlength=256) for part in parts) for c in channels]
    means = [float(np.average(levels, weights=count)) for count in counts]
    variances = [np.average((levels - m) ** 2, weights=count) for m, count in zip(means, counts, strict=True)]
    return tuple(means), tuple(float(np.sqrt(v)) for v in variances)


def first_test_labels(dataset: Dataset | StreamedDataset, count: int) -> np.ndarray:
    """The labels of `first_test_images`, `(count,)` int32.

    Args:
      dataset: as in `first_test_images`.
      count: of labels.
    """
    if isinstance(dataset, Dataset):
        return dataset.test.labels[:count]
    return np.asarray([dataset.test[place].label for place in range(count)], np.int32)
