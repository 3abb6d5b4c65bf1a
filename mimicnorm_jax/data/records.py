"""Image files in array_record files: few large files in place of many small ones, with random access.

A folder holds `dataset.json` and, for both splits, `SPLIT-NNNNN-of-NNNNN.array_record`. A record is a label (4 bytes,
little-endian), the length of a name (2 bytes), the name (UTF-8, its path below the split's folder), and the image file
as it was. `dataset.json` holds `classes`, their names in the order of labels, `splits`, how many records each has, and
`files`, a digest of what they were written from. Until all are written it is `dataset.json.begun`.
"""

import hashlib
import importlib.util
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mimicnorm_jax.data import folder as folders
from mimicnorm_jax.data.specs import DatasetSpec, Encoded, ImageSource, folder_of
from mimicnorm_jax.errors import DataError
from mimicnorm_jax.utils.files import write_json

INDEX = "dataset.json"
BEGUN = "dataset.json.begun"
SPLITS = ("train", "test")
_HEADER = struct.Struct("<IH")


def require_array_record() -> None:
    """Raises DataError if the package that reads and writes array_record files is not there."""
    if importlib.util.find_spec("array_record") is None:
        raise DataError("array_record files need the package array_record: pip install 'mimicnorm_jax[imagenet]'")


def pack(encoded: Encoded) -> bytes:
    """An image as a record."""
    name = encoded.name.encode()[:0xFFFF]
    return _HEADER.pack(encoded.label, len(name)) + name + encoded.data


def unpack(record: bytes) -> Encoded:
    """The image of a record.

    Example:
      >>> unpack(pack(Encoded(b"pixels", 3, "a cat")))
      Encoded(data=b'pixels', label=3, name='a cat')
    """
    label, length = _HEADER.unpack_from(record)
    start = _HEADER.size + length
    return Encoded(record[start:], label, record[_HEADER.size : start].decode(errors="replace"))


@dataclass(frozen=True)
class RecordSource:
    """The images of array_record files one after another.

    Attributes:
      files: of a split.
      count: of images that the index speaks of.
    """

    files: Sequence[Path]
    count: int

    @cached_property
    def _reader(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource([str(path) for path in self.files])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Encoded:
        return unpack(self._reader[index])


def _shards(root: Path, split: str) -> list[Path]:
    return sorted(root.glob(f"{split}-*-of-*.array_record"))


def _read_index(root: Path) -> dict[str, Any]:
    try:
        index = json.loads((root / INDEX).read_text())
        if not _is_index(index):
            raise ValueError(f"it does not hold `classes` and, as `splits`, numbers of {' and '.join(SPLITS)} records")
        return index
    except (OSError, ValueError) as error:
        raise DataError(
            f"{root} holds no records: cannot read {root / INDEX} ({error}). Write them from a folder of images with "
            f"`python -m mimicnorm_jax prepare-data folder:DIR --out={root}`"
        ) from error


def _is_index(index: Any) -> bool:
    if not (isinstance(index, dict) and isinstance(index.get("classes"), list)):
        return False
    splits = index.get("splits")
    return isinstance(splits, dict) and all(isinstance(splits.get(split), int) for split in SPLITS)


def _require(spec: DatasetSpec, data_dir: str) -> None:
    del data_dir
    require_array_record()
    root = folder_of(spec.name)
    for split in SPLITS:
        if not (shards := _shards(root, split)) or len(shards) != int(shards[0].stem.rsplit("-", 1)[1]):
            raise DataError(
                f"{root} holds {len(shards)} files of the {split} split, not as many as their names say: write them "
                "again with the command that began it, which goes on where it stopped"
            )


def _open(spec: DatasetSpec, data_dir: str) -> tuple[ImageSource, ImageSource]:
    del data_dir
    root, counts = folder_of(spec.name), (spec.num_train, spec.num_test)
    train, test = (RecordSource(_shards(root, s), count) for s, count in zip(SPLITS, counts, strict=True))
    return train, test


def describe(name: str, data_dir: str, image_size: int) -> DatasetSpec:
    """What is known of `records:DIR`.

    Args:
      name: with its prefix.
      data_dir: not asked.
      image_size: side of the squares that images are cut to.

    Raises:
      DataError: if there is no index.
    """
    del data_dir
    index = _read_index(folder_of(name))
    counts, classes = [index["splits"][split] for split in SPLITS], tuple(map(str, index["classes"]))
    shape = (image_size, image_size, 3)
    return DatasetSpec(name, shape, len(classes), *counts, require_prepared=_require, open=_open, classes=classes)


def write(root: Path, out: Path, shard_bytes: int = 2**27) -> None:
    """Writes the records of a folder of images, with progress; files that are there are left as they are.

    Args:
      root: of `train/CLASS/FILE` and `val/CLASS/FILE`.
      out: gets the records, in an order that is random and the same every time; the index last.
      shard_bytes: size of a file, about.

    Raises:
      DataError: as `folder.sources`, for a file that cannot be read, for other records in `out`, and without the
        package array_record.
    """
    require_array_record()
    train, test, classes = folders.sources(root)
    digest = hashlib.sha256(repr(classes).encode())
    parts: dict[str, list[np.ndarray]] = {}
    for split, source in zip(SPLITS, (train, test), strict=True):
        sizes = [_size(source.folder / file) for file in source.files]
        shards = max(1, -(-sum(sizes) // shard_bytes))
        parts[split] = np.array_split(np.random.default_rng(0).permutation(len(source)), shards)
        digest.update(repr((split, shards, list(zip(source.files, sizes, strict=True)))).encode())
    index = {"classes": list(classes), "splits": {"train": len(train), "test": len(test)}, "files": digest.hexdigest()}
    _begin(out, index)
    for split, source in zip(SPLITS, (train, test), strict=True):
        for i, part in enumerate(tqdm(parts[split], f"writing {split}", leave=False)):
            _write_shard(out / f"{split}-{i:05}-of-{len(parts[split]):05}.array_record", source, part.tolist())
    if (out / BEGUN).exists():
        os.replace(out / BEGUN, out / INDEX)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {file}: {error}. Mend or remove it") from error


def _begin(out: Path, index: dict[str, Any]) -> None:
    """Creates the folder with the index of what it is to hold, or checks that what it holds is of that index."""
    found = next((out / name for name in (INDEX, BEGUN) if (out / name).exists()), None)
    if found is not None:
        if not _is(found, index):
            raise DataError(f"{out} holds records of another data set: choose another folder, or empty it")
        return
    if any(_shards(out, split) for split in SPLITS):
        # They may have the names of those to write, which would be kept.
        raise DataError(f"{out} holds records of a data set that no index names: choose another folder, or empty it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / BEGUN, index)
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error}. Choose another folder") from error


def _is(path: Path, index: dict[str, Any]) -> bool:
    try:
        return json.loads(path.read_text()) == index
    except (OSError, ValueError):
        return False


def _write_shard(path: Path, source: folders.FolderSource, places: Sequence[int]) -> None:
    if path.exists():
        return
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = path.with_suffix(".partial")
    writer: Any = ArrayRecordWriter(str(partial), "group_size:1")
    try:
        for place in places:
            writer.write(pack(source[place]._replace(name=source.files[place])))
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error}") from error
    finally:
        writer.close()
    partial.rename(path)
