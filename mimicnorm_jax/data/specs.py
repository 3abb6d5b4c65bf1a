"""What a data set is: what is known before anything is read, and what reading gives."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np


@dataclass(frozen=True)
class Split:
    """Images `(N, H, W, C)` of uint8 and labels `(N,)` of int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


class Encoded(NamedTuple):
    """An image as it is stored: the bytes of its file, its label, and a name to find it by."""

    data: bytes
    label: int
    name: str


class ImageSource(Protocol):
    """Random access to the stored images of a split, from any thread."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Encoded:
        """The image at a place; raises what it likes where that cannot be read."""
        ...


def _nothing_to_prepare(spec: "DatasetSpec", data_dir: str) -> None:
    del spec, data_dir


@dataclass(frozen=True)
class DatasetSpec:
    """All that the library knows of one data set; `datasets.DATASETS` holds them by name.

    Attributes:
      name: of the data set.
      image_shape: `(H, W, C)`.
      num_classes: labels are 0 to this minus 1.
      num_train: number of training images.
      num_test: number of test images.
      read: reads the training and the test split into memory, given the spec and the config's `data_dir`. Of several
        processes each returns the whole. None for what is only streamed.
      require_prepared: raises DataError if `read` and `open` could not start, and reads no images.
      open: gives both splits as sources to stream from, given the same; None for what is only read.
      classes: names in the order of labels, where they are known.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    num_train: int
    num_test: int
    read: Callable[["DatasetSpec", str], tuple[Split, Split]] | None = None
    require_prepared: Callable[["DatasetSpec", str], None] = _nothing_to_prepare
    open: Callable[["DatasetSpec", str], tuple[ImageSource, ImageSource]] | None = None
    classes: tuple[str, ...] = ()


def folder_of(name: str) -> Path:
    """The folder in the name of a data set that is described when it is asked for, such as `folder:DIR`."""
    # What is kept of it in this process must not be taken for another one's after a change of directory.
    return Path(name.split(":", 1)[1]).expanduser().absolute()


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, and the training images' mean and standard deviation per channel in [0, 1]."""

    spec: DatasetSpec
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class StreamedDataset:
    """The same of a data set whose images are read and decoded as they are needed."""

    spec: DatasetSpec
    train: ImageSource
    test: ImageSource
    mean: tuple[float, ...]
    std: tuple[float, ...]
