"""Where blocks of a kernel are put: into arrays, or into files that become one file when all of them are there.

Any number of processes may fill one folder of blocks, each of which is a file that appears in one step. Nobody waits
for anybody, and no block is claimed: one that two processes compute has the same bits.
"""

import contextlib
import json
import shutil
import uuid
import zlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mimicnorm_jax.diagnostics.ntk.job import bytes_of
from mimicnorm_jax.utils.files import lock

Place = tuple[slice, slice]
"""The examples of a block, on each side."""
CHECKSUM = 4
"""Bytes of a block's checksum, which stands before it."""


class Target(Protocol):
    """What takes the blocks of a kernel, of several by name, in any order."""

    def finish(self) -> Any:
        """The kernels by name; None until every block is there."""
        ...

    def has(self, place: Place) -> bool:
        """Whether a block need not be computed."""
        ...

    def put(self, place: Place, values: dict[str, np.ndarray]) -> None:
        """Puts a block into its place."""
        ...

    def count(self) -> int:
        """The blocks that are there."""
        ...

    def discard(self) -> None:
        """Leaves no block behind."""
        ...


class ArrayTarget:
    """Kernels in memory.

    Args:
      examples: on each side.
      places: of the blocks; of a symmetric kernel's upper half, whose mirror images are the lower one.
      symmetric: whether it is.
    """

    def __init__(self, examples: tuple[int, int], places: list[Place], symmetric: bool) -> None:
        self.examples, self.places, self.symmetric = examples, places, symmetric
        self._kernels: dict[str, np.ndarray] = {}
        self._put = 0

    def finish(self) -> dict[str, np.ndarray] | None:
        """See `Target`."""
        return dict(self._kernels) if self._put == len(self.places) else None

    def has(self, place: Place) -> bool:
        """See `Target`."""
        return False

    def put(self, place: Place, values: dict[str, np.ndarray]) -> None:
        """See `Target`."""
        for name, value in values.items():
            if name not in self._kernels:
                self._kernels[name] = np.empty((*self.examples, *value.shape[2:]), value.dtype)
            _place(self._kernels[name], place, value, self.symmetric)
        self._put += 1

    def count(self) -> int:
        """See `Target`."""
        return self._put

    def discard(self) -> None:
        """See `Target`."""
        self._kernels = {}


class FileTarget(ArrayTarget):
    """One kernel, by the name of "", in a .npy file.

    Until it is whole there is a folder `out.blocks`, then beside it a note `out.job` of whose result it is, by which
    the same job finds it again.

    Args:
      examples, places, symmetric: see `ArrayTarget`.
      out: the file.
      job: what tells this kernel from any other.
      alone: whether another job's blocks are an earlier one's, and in the way.

    Raises:
      ValueError: if they may be those of a process that is at work.
    """

    def __init__(
        self, examples: tuple[int, int], places: list[Place], symmetric: bool, *, out: Path, job: str, alone: bool
    ) -> None:
        super().__init__(examples, places, symmetric)
        self.out, self.job = out, job
        self.note, self.above = (out.with_name(f"{out.name}.{end}") for end in ("job", "blocks"))
        self.folder, self._me = self.above / job[:16], uuid.uuid4().hex
        if self._is_whole():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for other in self.above.iterdir():
            if other == self.folder:
                continue
            if not alone and "." not in other.name:  # with one, it is being removed
                with contextlib.suppress(OSError):  # has blocks of an earlier call
                    self.folder.rmdir()
                raise ValueError(
                    f"{other} holds blocks of another kernel: if one of these processes writes them, it was started "
                    "with another network, other parameters, inputs, XLA_FLAGS, devices or another jax; if they are an "
                    "earlier call's, remove that folder, or take another `out`"
                )
            shutil.rmtree(other, ignore_errors=True)

    def finish(self) -> dict[str, np.ndarray] | None:
        """See `Target`; the file's memory map."""
        try:
            if not all(self._file(place).exists() for place in self.places):
                raise FileNotFoundError
            with (self.folder / "lock").open("a") as file:
                lock(file, wait=True)  # else several may put the kernel together, and take that much more space
                if not self._assemble():
                    return None
        except FileNotFoundError:
            if self.folder.exists():
                return None
            if not self._is_whole():
                raise ValueError(
                    f"the blocks in {self.folder} were removed while they were computed: by another process, which "
                    "says why it refused this kernel, or by hand"
                ) from None
        return {"": np.load(self.out, mmap_mode="r")}

    def has(self, place: Place) -> bool:
        """See `Target`."""
        return self._file(place).exists() or not self.folder.exists()

    def put(self, place: Place, values: dict[str, np.ndarray]) -> None:
        """See `Target`."""
        partial = self.folder / f"{self._me}.block"
        try:
            with partial.open("wb") as file:
                file.write(_checksum(values[""]))
                np.save(file, values[""])
            partial.replace(self._file(place))
        except FileNotFoundError:
            if self.folder.exists():
                raise
            # another process had it too, and all others

    def count(self) -> int:
        """See `Target`."""
        return sum(self._file(place).exists() for place in self.places)

    def discard(self) -> None:
        """See `Target`."""
        gone = self.above / f"{self.folder.name}.{self._me}"
        try:
            self.folder.rename(gone)  # in one step: to others, all of it is there or none
        except FileNotFoundError:
            return
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process is about to do the same
            self.above.rmdir()

    def _file(self, place: Place) -> Path:
        return self.folder / f"{place[0].start}-{place[1].start}"

    def _is_whole(self) -> bool:
        """Whether the file is this job's, with the bytes that were written."""
        if not self.note.exists() or not self.out.exists():
            return False
        try:
            known = json.loads(self.note.read_text())
        except ValueError:
            return False
        return known == {"job": self.job, "crc32": zlib.crc32(np.memmap(self.out, np.uint8, "r").data)}

    def _assemble(self) -> bool:
        """Puts the blocks together; not if one is damaged, which is removed then."""
        whole, note = (self.folder / f"{self._me}.{end}" for end in ("whole", "note"))
        kernel: Any = None
        damaged = []
        for place in self.places:
            value = self._read(place)
            if value is None:
                damaged.append(self._file(place))
            elif not damaged:
                if kernel is None:
                    shape = (*self.examples, *value.shape[2:])
                    kernel = np.lib.format.open_memmap(whole, "w+", value.dtype, shape)
                _place(kernel, place, value, self.symmetric)
        for path in damaged:
            path.unlink(missing_ok=True)
        if damaged:
            whole.unlink(missing_ok=True)
            return False
        kernel.flush()
        note.write_text(json.dumps({"job": self.job, "crc32": zlib.crc32(np.memmap(whole, np.uint8, "r").data)}))
        whole.replace(self.out)
        note.replace(self.note)
        self.discard()
        return True

    def _read(self, place: Place) -> np.ndarray | None:
        """A block; None if it is not what was written, as after a machine that stopped."""
        with self._file(place).open("rb") as file:
            checksum = file.read(CHECKSUM)
            try:
                value = np.load(file)
            except (ValueError, EOFError):
                return None
        shape = tuple(side.stop - side.start for side in place)
        return value if value.shape[:2] == shape and _checksum(value) == checksum else None


def _place(kernel: np.ndarray, place: Place, value: np.ndarray, symmetric: bool) -> None:
    kernel[place] = value
    if symmetric:  # in the documented order of axes, with its sides swapped
        kernel[place[1], place[0]] = value.transpose(1, 0, *range(value.ndim - 1, 1, -1))


def _checksum(value: np.ndarray) -> bytes:
    return zlib.crc32(bytes_of(value)).to_bytes(CHECKSUM, "little")
