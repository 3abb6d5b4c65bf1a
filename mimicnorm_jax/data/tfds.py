"""Data sets of TensorFlow Datasets, read without TensorFlow."""

import json
import os
import sys
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mimicnorm_jax import distributed
from mimicnorm_jax.data.records import require_array_record
from mimicnorm_jax.data.specs import DatasetSpec, Encoded, ImageSource, Split
from mimicnorm_jax.errors import DataError

PREFIX = "tfds:"


def tfds_dir(data_dir: str = "") -> Path:
    """The folder of prepared data sets: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR", "") or "~/tensorflow_datasets").expanduser()


def _require_prepared(spec: DatasetSpec, data_dir: str) -> None:
    require_array_record()
    _prepared(_plain_name(spec.name), tfds_dir(data_dir))


def _prepared(name: str, folder: Path) -> Path:
    """The newest prepared version's folder."""
    infos = list((folder / name).glob("*/dataset_info.json"))
    if not infos and (forms := sorted({path.parts[-3] for path in (folder / name).glob("*/*/dataset_info.json")})):
        raise DataError(
            f"{name} is prepared under {folder} in forms of their own: name one, "
            f"{' or '.join(f'{PREFIX}{name}/{form}' for form in forms)}"
        )
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


def _read(spec: DatasetSpec, data_dir: str) -> tuple[Split, Split]:
    """Decodes both splits; of several processes each decodes its share, and gets the others' shares from them."""
    import tensorflow_datasets as tfds

    name, folder = spec.name, tfds_dir(data_dir)
    version = _prepared(name, folder).name

    def read(split: str) -> Split:
        try:
            source: Any = tfds.data_source(f"{name}:{version}", data_dir=folder, split=split, download=False)
            mine = distributed.process_slice(len(source))
            images = np.empty((len(mine), *spec.image_shape), np.uint8)
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


class TfdsSource:
    """The stored images of one split of a prepared data set.

    Args:
      builder: of the prepared version.
      split: its name.
    """

    def __init__(self, builder: Any, split: str) -> None:
        import tensorflow_datasets as tfds

        self._name = f"{builder.info.name} {split}"
        self._source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Encoded:
        example = self._source[index]
        where = example.get("file_name", example.get("id", index))
        where = where.decode() if isinstance(where, bytes) else where
        if (label := int(example["label"])) < 0:
            raise ValueError(f"it has the label {label}, as TFDS has where labels are kept back: no class")
        return Encoded(example["image"], label, f"{self._name} {where}")


def _test_split(name: str, splits: Iterable[str]) -> str:
    # ImageNet's test images carry no labels.
    return "test" if "test" in splits and _plain_name(name) != IMAGENET.name else "validation"


def _plain_name(name: str) -> str:
    return name.split(":", 1)[1] if name.startswith(PREFIX) else name


def _open(spec: DatasetSpec, data_dir: str) -> tuple[ImageSource, ImageSource]:
    builder = _builder(spec.name, data_dir)
    return TfdsSource(builder, "train"), TfdsSource(builder, _test_split(spec.name, builder.info.splits))


def _builder(name: str, data_dir: str) -> Any:
    """The builder of a prepared data set."""
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(_prepared(_plain_name(name), tfds_dir(data_dir)))


@lru_cache(maxsize=4)
def describe(name: str, data_dir: str, image_size: int) -> DatasetSpec:
    """What is known of `tfds:NAME`, an image classification data set that is prepared.

    Args:
      name: with its prefix.
      data_dir: see `tfds_dir`.
      image_size: side of the squares that images are cut to.

    Raises:
      DataError: if it is not prepared, or is no image classification with a test or validation split.
    """
    import tensorflow_datasets as tfds

    info = _builder(name, data_dir).info
    features, splits = info.features, {split: about.num_examples for split, about in info.splits.items()}
    test = _test_split(name, splits)
    if not {"image", "label"} <= set(features) or not {"train", test} <= set(splits):
        raise DataError(
            f"{name} has the features {', '.join(sorted(features))} and the splits {', '.join(splits)}: "
            "image classification needs image and label, train and test or validation"
        )
    if not isinstance(features["label"], tfds.features.ClassLabel):
        raise DataError(f"the label of {name} is {features['label']}: image classification needs a ClassLabel")
    classes = features["label"].num_classes
    shape = (image_size, image_size, 3)
    counts, names = (splits["train"], splits[test]), tuple(features["label"].names)
    return DatasetSpec(name, shape, classes, *counts, None, _require_prepared, _open, names)


CIFAR10 = DatasetSpec("cifar10", (32, 32, 3), 10, 50_000, 10_000, _read, _require_prepared, _open)
CIFAR100 = DatasetSpec("cifar100", (32, 32, 3), 100, 50_000, 10_000, _read, _require_prepared, _open)
IMAGENET = DatasetSpec("imagenet2012", (224, 224, 3), 1000, 1_281_167, 50_000, None, _require_prepared, _open)
