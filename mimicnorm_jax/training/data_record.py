"""What a run keeps of its data, whatever becomes of the files: their shape, what images are normalized by, and what
labels mean."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from mimicnorm_jax import distributed
from mimicnorm_jax.data import Dataset, DatasetSpec, StreamedDataset, datasets
from mimicnorm_jax.data.specs import ImageSource
from mimicnorm_jax.errors import DataError, WorkdirError
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.dataset import dataset_of
from mimicnorm_jax.utils.files import write_json

DATA = "data.json"


@dataclass(frozen=True)
class DataRecord:
    """The data of a run.

    Attributes:
      mean, std: of the training images, per channel in [0, 1]: the config's, or as the run measured them.
      classes: names in the order of labels; none where only numbers are known.
      image_shape, num_classes, num_train, num_test: of the `DatasetSpec`; 0 in a run of an earlier version.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()
    image_shape: tuple[int, int, int] = (0, 0, 0)
    num_classes: int = 0
    num_train: int = 0
    num_test: int = 0

    @property
    def complete(self) -> bool:
        """Whether it says enough to build the run's network by."""
        return self.num_classes > 0

    def require_same_classes(self, folder: Path, found: DatasetSpec) -> None:
        """Raises WorkdirError where labels of a data set mean something else than in the run of a folder."""
        if not self.classes or not found.classes or self.classes == found.classes:
            return
        places = [i for i, pair in enumerate(zip(self.classes, found.classes, strict=False)) if pair[0] != pair[1]]
        place = min([*places, len(self.classes), len(found.classes)])
        there, here = (repr(names[place]) if place < len(names) else "none" for names in (self.classes, found.classes))
        raise WorkdirError(
            f"{folder} holds a run on {len(self.classes)} classes, and {found.name} has {len(found.classes)} now, of "
            f"which number {place} is {here} and was {there}: its labels would be others. Put back the folders' names"
        )


def read(folder: Path) -> DataRecord | None:
    """The data of the run in a folder; None if it has not begun.

    Raises:
      WorkdirError: if the file is damaged.
    """
    path = folder / DATA
    try:
        saved = json.loads(path.read_text())
        mean, std = (tuple(map(float, saved[name])) for name in ("mean", "std"))
        if len(mean) != len(std):
            raise ValueError(f"it has {len(mean)} means and {len(std)} deviations")
        height, width, channels = map(int, saved.get("image_shape", (0, 0, 0)))
        counts = (int(saved.get(name, 0)) for name in ("num_classes", "num_train", "num_test"))
        return DataRecord(mean, std, tuple(map(str, saved["classes"])), (height, width, channels), *counts)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkdirError(
            f"{path}, by which images are normalized, cannot be read ({type(error).__name__}: {error}): restore it, or "
            "remove it to have mean and deviation measured again"
        ) from error


def recorded(config: TrainConfig, folder: Path, found: DatasetSpec) -> TrainConfig:
    """The config of a run, with what its folder says of its data filled in; as it is where that says nothing.

    Args:
      config: of the run.
      folder: of the run.
      found: the data set as it is now.

    Raises:
      WorkdirError: as `read` and `DataRecord.require_same_classes`.
    """
    return _filled(config, folder, read(folder), found)


def _filled(config: TrainConfig, folder: Path, record: DataRecord | None, found: DatasetSpec) -> TrainConfig:
    if record is None:
        return config
    record.require_same_classes(folder, found)
    return replace(config, mean=record.mean, std=record.std)


def known(config: TrainConfig, folder: Path) -> tuple[TrainConfig, DatasetSpec]:
    """The config as `recorded` fills it, and the data set as the run's folder describes it, whatever is in its place.

    Args:
      config: of the run.
      folder: of the run.

    Returns:
      Both; of a run that did not record its data set, this as it is now.

    Raises:
      DataError: if the run did not record it and it is gone.
      WorkdirError: as `recorded`.
    """
    record = read(folder)
    if record is None or not record.complete or config.dataset.partition(":")[0] not in datasets.KINDS:
        found = dataset_of(config)
    else:
        counts = (record.num_classes, record.num_train, record.num_test)
        found = DatasetSpec(config.dataset, record.image_shape, *counts, open=_only_described, classes=record.classes)
    return _filled(config, folder, record, found), found


def _only_described(spec: DatasetSpec, data_dir: str) -> tuple[ImageSource, ImageSource]:
    raise DataError(f"{spec.name} as a run describes it holds no images: open it by `data.get_spec`, with {data_dir=}")


def write(folder: Path, dataset: Dataset | StreamedDataset) -> None:
    """Keeps what a run trains on, in its folder."""
    spec = dataset.spec
    counts = (spec.num_classes, spec.num_train, spec.num_test)
    write_json(folder / DATA, asdict(DataRecord(dataset.mean, dataset.std, spec.classes, spec.image_shape, *counts)))


def shared(config: TrainConfig, record: DataRecord | None, channels: int) -> TrainConfig:
    """The config with the first process's record filled in, on every process; as it is if there is none.

    Args:
      config: of the run.
      record: in the first process.
      channels: of images.
    """
    moments = np.full((2, channels), np.nan)
    if record is not None:
        moments[:] = record.mean, record.std
    # As bits: JAX would round the numbers.
    moments = np.asarray(distributed.broadcast_from_first(moments.view(np.uint32))).view(np.float64)
    mean, std = (tuple(row) for row in moments.tolist())
    return config if np.isnan(moments).any() else replace(config, mean=mean, std=std)
