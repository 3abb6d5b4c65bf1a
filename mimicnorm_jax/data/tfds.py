"""Data sets of TensorFlow Datasets, read without TensorFlow."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mimicnorm_jax import distributed
from mimicnorm_jax.data.specs import DatasetSpec, Split
from mimicnorm_jax.errors import DataError


def tfds_dir(data_dir: str = "") -> Path:
    """The folder of prepared data sets: `data_dir`, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR", "") or "~/tensorflow_datasets").expanduser()


def _require_prepared(spec: DatasetSpec, data_dir: str) -> None:
    _prepared(spec.name, tfds_dir(data_dir))


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


CIFAR10 = DatasetSpec("cifar10", (32, 32, 3), 10, 50_000, 10_000, _read, _require_prepared)
CIFAR100 = DatasetSpec("cifar100", (32, 32, 3), 100, 50_000, 10_000, _read, _require_prepared)
