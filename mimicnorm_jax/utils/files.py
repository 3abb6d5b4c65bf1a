"""Files that are never half-written, and locks on them."""

import json
import os
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in one step; what could not be written whole is not left behind."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in one step: readers see the old file or the whole new one.

    Args:
      path: of the file.
      text: encoded as UTF-8.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one step: readers see the old file or the whole new one."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def lock(file: IO[Any] | int, *, wait: bool) -> None:
    """Locks a file until it is closed or the process dies, however it does; not where the file system knows no locks.

    Args:
      file: open for writing, or an open file's or folder's descriptor.
      wait: for another process that holds it.

    Raises:
      BlockingIOError: if another process holds it, unless `wait`.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks
        pass
