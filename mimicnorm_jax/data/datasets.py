"""The data sets by name, reading one into memory, and opening one to be streamed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, islice

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
    """Raises DataError at once if the data set is unknown or not prepared; reads no images, but lists a folder anew.

    Args:
      name: of the data set, see `get_spec`.
      data_dir: as in `load`.
      image_size: side of the squares that images are cut to; 0 for their own.
    """
    folder.sources.cache_clear()  # of an earlier run in this process: its files may have changed
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
      DataError: if it is not prepared, or cannot be streamed; for one bad image too many, or if none can be used.
    """
    spec.require_prepared(spec, data_dir)
    if spec.open is None:
        raise DataError(f"{spec.name} cannot be streamed: leave out --config.streaming")
    train, test = spec.open(spec, data_dir)
    mean, std = (tuple(values) for values in moments)
    if not mean or not std:
        reader = Reader(train, Cut(spec.image_shape[0]), bad)
        places = np.unique(np.linspace(0, len(train) - 1, MEASURED).astype(int))
        usable = [read[0][None] for place in places if (read := reader.read(int(place))) is not None]
        if not usable:
            raise DataError(
                f"none of {len(places)} training images of {spec.name}, from which mean and deviation are measured, "
                "can be used: mend or replace the files"
            )
        found = _moments(usable)
        mean, std = mean or found[0], std or found[1]
    return StreamedDataset(spec, train, test, mean, std)


def held_out_examples(
    dataset: Dataset | StreamedDataset, count: int, bad: BadImages | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Test images that can be used, `(count, H, W, C)` uint8, and their labels, `(count,)` int32.

    The first ones of a data set in memory, which is in no order; evenly spread ones of a stream, which may be sorted by
    class.

    Args:
      dataset: kept on the devices, or streamed.
      count: of images; there are fewer of them where so many cannot be used.
      bad: counts images of a stream that cannot be used; by default the first one is an error.

    Raises:
      DataError: if there are fewer, for one bad image too many, or if none can be used.
    """
    if count > len(dataset.test):
        raise DataError(f"{count} images were asked for, and {dataset.spec.name} has {len(dataset.test)} test images")
    if isinstance(dataset, Dataset):
        return dataset.test.images[:count], dataset.test.labels[:count]
    reader = Reader(dataset.test, Cut(dataset.spec.image_shape[0]), bad or BadImages(0))
    total = len(dataset.test)
    spread = [i * total // count for i in range(count)]
    others = set(range(total)).difference(spread)  # in place of spread ones that cannot be used
    usable = (read for place in chain(spread, sorted(others)) if (read := reader.read(place)) is not None)
    if not (found := list(islice(usable, count))):
        raise DataError(f"no test image of {dataset.spec.name} can be used: mend or replace the files")
    images, labels = zip(*found, strict=True)
    return np.stack(images), np.asarray(labels, np.int32)


def _moments(parts: Sequence[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of pixels of uint8 images `(..., C)`, exactly, whatever their order."""
    levels = np.arange(256) / 255
    channels = range(parts[0].shape[-1])
    counts = [sum(np.bincount(part[..., c].ravel(), minlength=256) for part in parts) for c in channels]
    means = [float(np.average(levels, weights=count)) for count in counts]
    variances = [np.average((levels - m) ** 2, weights=count) for m, count in zip(means, counts, strict=True)]
    return tuple(means), tuple(float(np.sqrt(v)) for v in variances)
