"""What a data set is: what is known before anything is read, and what reading gives."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """Images `(N, H, W, C)` of uint8 and labels `(N,)` of int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


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
      read: reads the training and the test split, given the spec and the config's `data_dir`. Of several processes
        each returns the whole.
      require_prepared: raises DataError if `read` could not start, and reads no images.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_classes: int
    num_train: int
    num_test: int
    read: Callable[["DatasetSpec", str], tuple[Split, Split]]
    require_prepared: Callable[["DatasetSpec", str], None] = _nothing_to_prepare


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, and the training images' mean and standard deviation per channel in [0, 1]."""

    spec: DatasetSpec
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
