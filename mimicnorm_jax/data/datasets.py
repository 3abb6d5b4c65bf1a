"""Datasets as arrays in memory: the bundled digits, and CIFAR through TensorFlow Datasets without TensorFlow."""

import json
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mimicnorm_jax import distributed
from mimicnorm_jax.errors import DataError, unknown

TFDS_NAMES = ("cifar10", "cifar100")
NAMES = ("digits", *TFDS_NAMES)
"""Every dataset that `load` knows."""
SHAPES: dict[str, tuple[int, int, int]] = {"digits": (8, 8, 1), "cifar10": (32, 32, 3), "cifar100": (32, 32, 3)}
"""Images' (H, W, C), known before anything is read."""
COUNTS: dict[str, tuple[int, int]] = {"digits": (1437, 360), "cifar10": (50000, 10000), "cifar100": (50000, 10000)}
"""Numbers of training and test images."""
NUM_CLASSES: dict[str, int] = {"digits": 10, "cifar10": 10, "cifar100": 100}


@dataclass(frozen=True)
class Split:
    """Images `(N, H, W, C)` of uint8 and labels `(N,)` of int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, and the training images' mean and standard deviation per channel in [0, 1]."""

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def tfds_dir(data_dir: str = "") -> Path:
    """The folder of prepared datasets: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR", "") or "~/tensorflow_datasets").expanduser()


def require_prepared(name: str, data_dir: str = "") -> None:
    """Raises DataError at once if the dataset is unknown or not prepared; reads no images."""
    if name not in NAMES:
        raise DataError(unknown("dataset", name, NAMES))
    if name in TFDS_NAMES:
        _prepared(name, tfds_dir(data_dir))


def _prepared(name: str, folder: Path) -> Path:
    """The newest prepared version's folder."""
    infos = list((folder / name).glob("*/dataset_info.json"))
    if not infos:
        raise DataError(
            f"{name} is not prepared under {folder}: there is no {name}/VERSION/dataset_info.json. Either point "
            f"--config.data_dir or $TFDS_DATA_DIR to a folder that has it, or download and prepare it once with "
            f"`pip install tensorflow-cpu && python -m mimicnorm_jax prepare-data {name} --data_dir={folder}`"
        )
    newest = max(infos, key=lambda path: [int(n) if n.isdigit() else -1 for n in path.parent.name.split(".")])
    try:
        file_format = json.loads(newest.read_text()).get("fileFormat", "tfrecord")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {newest}: {error}. Prepare {name} again") from error
    if file_format != "array_record":
        raise DataError(
            f"{newest.parent} holds {file_format} files, which only TensorFlow reads. Prepare {name} as array_record "
            f"in another folder with `python -m mimicnorm_jax prepare-data {name} --data_dir=FOLDER`"
        )
    return newest.parent


@lru_cache(maxsize=1)
def load(name: str, data_dir: str = "") -> Dataset:
    """Reads and decodes a dataset; the last one stays in memory. Of several processes each decodes its share.

    Args:
      name: one of `NAMES`.
      data_dir: for TFDS's, see `tfds_dir`.

    Raises:
      DataError: if it is unknown, not prepared, prepared in a format that only TensorFlow reads, or
        damaged.
    """
    require_prepared(name, data_dir)
    train, test = _digits() if name == "digits" else _tfds(name, tfds_dir(data_dir))
    mean, std = _moments(train.images)
    return Dataset(name, train, test, NUM_CLASSES[name], mean, std)


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    levels = np.arange(256) / 255
    counts = [np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])]
    means = [float(np.average(levels, weights=count)) for count in counts]
    variances = [np.average((levels - m) ** 2, weights=count) for m, count in zip(means, counts, strict=True)]
    return tuple(means), tuple(float(np.sqrt(v)) for v in variances)


def _digits() -> tuple[Split, Split]:
    """The 1,797 digits of 8 x 8 pixels that scikit-learn carries: 1,437 to train, 360 to test, by class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    images = (bunch.images * 255 / 16).round().astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    parts: Any = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return Split(parts[0], parts[2]), Split(parts[1], parts[3])


def _tfds(name: str, folder: Path) -> tuple[Split, Split]:
    import tensorflow_datasets as tfds

    version = _prepared(name, folder).name

    def read(split: str) -> Split:
        try:
            source: Any = tfds.data_source(f"{name}:{version}", data_dir=folder, split=split, download=False)
            mine = distributed.process_slice(len(source))
            images = np.empty((len(mine), *SHAPES[name]), np.uint8)
            labels = np.empty(len(mine), np.int32)
            quiet = not sys.stderr.isatty()
            for i, place in enumerate(tqdm(mine, f"decoding {name} {split}", disable=quiet, leave=False)):
                example = source[place]
                images[i], labels[i] = example["image"], example["label"]
        except Exception as error:  # array_record and pillow raise whatever they like on damaged files
            raise DataError(
                f"cannot read the {split} split of {name} in {folder / name / version}: {error}. The files are "
                f"damaged or incomplete: delete that folder and prepare it again with "
                f"`python -m mimicnorm_jax prepare-data {name} --data_dir={folder}`"
            ) from error
        return Split(distributed.allgather_rows(images, len(source)), distributed.allgather_rows(labels, len(source)))

    return read("train"), read("test")
