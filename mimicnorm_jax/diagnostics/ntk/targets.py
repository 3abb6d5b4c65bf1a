"""Where blocks of a kernel are put: into arrays, or into one file that is there when it is whole.

Beside a file in progress stands a journal of its finished blocks. A run that was killed is taken up by the next one
with the same job: a digest of the very programs, parameters and inputs that the blocks come of.
"""

import hashlib
import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mimicnorm_jax.diagnostics.tracing.jaxprs import closed
from mimicnorm_jax.utils.files import write_text

Place = tuple[slice, slice]
"""The examples of a block, on each side."""


class ArrayTarget:
    """Kernels in memory, by name."""

    def __init__(self, examples: tuple[int, int]) -> None:
        self.examples = examples
        self.kernels: dict[str, np.ndarray] = {}

    def put(self, name: str, place: Place, value: np.ndarray) -> None:
        """Puts a block into its place."""
        if name not in self.kernels:
            self.kernels[name] = np.empty((*self.examples, *value.shape[2:]), value.dtype)
        self.kernels[name][place] = value

    def finish(self) -> dict[str, Any]:
        """The kernels."""
        return dict(self.kernels)


class FileTarget:
    """One kernel in a .npy file.

    Args:
      examples: on each side.
      out: the file; until `finish` there are `out.partial` and the journal `out.partial.blocks`.
      job: what tells this kernel from any other.

    Attributes:
      finished: blocks of an earlier run of the same job, by their first example on each side; each was read again and
        has the checksum that it was written with.
    """

    def __init__(self, examples: tuple[int, int], out: Path, job: str) -> None:
        self.examples, self.out, self.job = examples, out, job
        self.partial, self.journal = (out.with_name(f"{out.name}.partial{end}") for end in ("", ".blocks"))
        self.kernel: np.memmap | None = None
        self.finished: set[tuple[int, int]] = set()
        self._take_up()

    def _take_up(self) -> None:
        if not self.journal.exists() or not self.partial.exists():
            return
        lines = self.journal.read_text().split("\n")[:-1]  # of a line that was being written the end is missing
        if not lines or lines[0] != self.job:
            return
        try:
            kernel: Any = np.lib.format.open_memmap(self.partial, "r+")
        except ValueError:
            return
        if kernel.shape[:2] != self.examples:
            return
        self.kernel = kernel
        kept = [line for line in lines[1:] if self._is_whole(kernel, line)]
        # Written again, so that nothing is ever appended to half a line.
        write_text(self.journal, "".join(f"{line}\n" for line in (self.job, *kept)))

    def _is_whole(self, kernel: np.ndarray, line: str) -> bool:
        try:
            first, last, second, end, checksum = json.loads(line)
        except ValueError:
            return False
        whole = zlib.crc32(_bytes(kernel[first:last, second:end])) == checksum
        if whole:
            self.finished.add((first, second))
        return whole

    def put(self, place: Place, value: np.ndarray, mirrored: np.ndarray | None) -> None:
        """Puts a block into its place, and its mirror image into the other half of a symmetric kernel."""
        if self.kernel is None:
            self.journal.unlink(missing_ok=True)
            shape = (*self.examples, *value.shape[2:])
            self.kernel = np.lib.format.open_memmap(self.partial, "w+", value.dtype, shape)
            self.journal.write_text(f"{self.job}\n")
        self.kernel[place] = value
        if mirrored is not None:
            self.kernel[place[1], place[0]] = mirrored
        # Only now: a process that is killed leaves its pages, and a machine that stops shows in the checksum.
        entry = [*((s.start, s.stop) for s in place)]
        checksum = zlib.crc32(_bytes(value))
        with self.journal.open("a") as file:
            file.write(json.dumps([*entry[0], *entry[1], checksum]) + "\n")

    def discard(self) -> None:
        """Leaves nothing behind."""
        self.kernel = None
        self.partial.unlink(missing_ok=True)
        self.journal.unlink(missing_ok=True)

    def finish(self) -> np.ndarray:
        """The file's memory map; journal and partial file are gone."""
        assert self.kernel is not None
        self.kernel.flush()
        self.partial.replace(self.out)
        self.journal.unlink(missing_ok=True)
        return np.load(self.out, mmap_mode="r")


def digest_of(programs: list[core.ClosedJaxpr], arrays: Any, *others: Any) -> str:
    """A digest of programs, with the arrays that they close over, of their arguments and of what else counts."""
    about = others, jax.__version__, jax.local_devices()[0].device_kind, os.environ.get("XLA_FLAGS")
    digest = hashlib.sha256(repr(about).encode())
    for program in programs:
        digest.update(re.sub(r"0x[0-9a-f]+", "", str(program)).encode())
        for constant in _constants(program):
            _add(digest, constant)
    for leaf in jax.tree.leaves(arrays):
        _add(digest, leaf)
    return digest.hexdigest()


def _add(digest: Any, array: Any) -> None:
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    host = np.asarray(array)
    digest.update(f"{host.shape}{host.dtype}".encode())
    digest.update(_bytes(host))


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _constants(program: core.ClosedJaxpr) -> list[Any]:
    found = list(program.consts)
    for equation in program.jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
                    found += _constants(closed(inner))
    return found
