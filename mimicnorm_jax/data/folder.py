"""A folder of image files, `train/CLASS/FILE` and `val/CLASS/FILE`."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mimicnorm_jax.data.specs import DatasetSpec, Encoded, ImageSource, folder_of
from mimicnorm_jax.errors import DataError
from mimicnorm_jax.utils.console import log_line

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
TEST_NAMES = ("val", "validation", "test")


@dataclass(frozen=True)
class FolderSource:
    """Images of a split, sorted by class and name.

    Attributes:
      folder: of the split.
      files: paths below it.
      labels: of the files: places of their classes in sorted order.
    """

    folder: Path
    files: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Encoded:
        path = self.folder / self.files[index]
        return Encoded(path.read_bytes(), self.labels[index], str(path))


@lru_cache(maxsize=4)
def sources(root: Path) -> tuple[FolderSource, FolderSource, tuple[str, ...]]:
    """Training and test images of a folder, and the names of its classes: the folders in `train`, sorted.

    Listed once in a run, which begins with `datasets.require_prepared`.
    Files in deeper folders count to the class above them; names that begin with a dot are left out. Of files that are
    no images by their names, as `.heic` or none, a line says how many are left out.

    Raises:
      DataError: if there is no such folder, no class, no test image, a class without a training image, or one that only
        the test images have; if it cannot be read.
    """
    try:
        return _sources(root)
    except OSError as error:
        raise DataError(f"cannot list {root}: {error}. Mend that, or name another folder") from error


def _sources(root: Path) -> tuple[FolderSource, FolderSource, tuple[str, ...]]:
    train = root / "train"
    test = next((root / name for name in TEST_NAMES if (root / name).is_dir()), root / TEST_NAMES[0])
    for folder in (train, test):
        if not folder.is_dir():
            raise DataError(
                f"{folder} is not there: a folder of images is {root}/train/CLASS/FILE and "
                f"{root}/{TEST_NAMES[0]}/CLASS/FILE"
            )
    classes = tuple(_classes(train))
    foreign = sorted(set(_classes(test)) - set(classes))
    if foreign:
        raise DataError(f"{test} has a class {foreign[0]!r} that {train} lacks: its images could never be learned")
    if len(classes) < 2:
        raise DataError(f"{train} holds {len(classes)} folders of classes: classification needs at least 2")
    return _source(train, classes, every_class=True), _source(test, classes), classes


def _classes(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _source(folder: Path, classes: Sequence[str], every_class: bool = False) -> FolderSource:
    files: list[str] = []
    labels: list[int] = []
    others: Counter[str] = Counter()
    for label, name in enumerate(classes):
        found = sorted(
            os.path.relpath(os.path.join(place, file), folder)
            for place, _, names in os.walk(folder / name)
            for file in names
            if not file.startswith(".")
        )
        images = [file for file in found if _suffix(file) in SUFFIXES]
        others.update(_suffix(file) or "no suffix" for file in found if _suffix(file) not in SUFFIXES)
        if every_class and not images:
            raise DataError(f"{folder / name}{_no_image(others)}: convert its files, or remove it if it is no class")
        files += images
        labels += [label] * len(images)
    if not files:
        raise DataError(f"{folder}{_no_image(others)}")
    if others:
        log_line(f"{folder}: {sum(others.values()):,} files are left out, no images by their names ({_counts(others)})")
    return FolderSource(folder, tuple(files), tuple(labels))


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _no_image(others: Counter[str]) -> str:
    found = f", but files of {_counts(others)}" if others else ""
    return f" holds no image ({', '.join(sorted(SUFFIXES))}){found}"


def _counts(others: Counter[str]) -> str:
    return ", ".join(f"{suffix}: {count:,}" for suffix, count in others.most_common(5))


def _open(spec: DatasetSpec, data_dir: str) -> tuple[ImageSource, ImageSource]:
    del data_dir
    return sources(folder_of(spec.name))[:2]


def describe(name: str, data_dir: str, image_size: int) -> DatasetSpec:
    """What is known of `folder:DIR`, after listing it.

    Args:
      name: with its prefix.
      data_dir: not asked.
      image_size: side of the squares that images are cut to.

    Raises:
      DataError: as `sources`.
    """
    del data_dir
    train, test, classes = sources(folder_of(name))
    shape, counts = (image_size, image_size, 3), (len(train), len(test))
    return DatasetSpec(name, shape, len(classes), *counts, open=_open, classes=classes)
