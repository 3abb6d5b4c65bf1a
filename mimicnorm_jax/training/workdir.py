"""A run's folder: which config it belongs to, and files that are never half-written."""

import dataclasses
import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mimicnorm_jax.errors import WorkdirError
from mimicnorm_jax.training import config as config_lib
from mimicnorm_jax.training.config import TrainConfig
from mimicnorm_jax.training.data_record import DATA
from mimicnorm_jax.training.writers import METRICS
from mimicnorm_jax.utils import files
from mimicnorm_jax.utils.files import write_json

CONFIG = "config.json"
LOCK = "lock"
MUTABLE_ON_RESUME = (
    "data_dir",
    "keep_checkpoints",
    "checkpoint_epochs",
    "parallelism",
    "decoding_threads",
    "max_bad_images",
)
"""Fields that do not change a run's numbers, so a resumed run may change them."""


def as_json(config: TrainConfig) -> dict[str, Any]:
    """The config as JSON's types."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def prepare(workdir: Path, config: TrainConfig) -> None:
    """Creates the folder for a run, or checks that it holds this very run.

    Raises:
      WorkdirError: if it cannot be written, or holds a run with another config.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not _has_begun(workdir):
            (workdir / DATA).unlink(missing_ok=True)  # of another config, perhaps
        elif (workdir / CONFIG).exists():
            _compare(workdir, config)
        write_json(workdir / CONFIG, as_json(config))
    except OSError as error:
        raise WorkdirError(f"cannot write to the workdir {workdir}: {error}. Choose another with --workdir") from error


def _has_begun(workdir: Path) -> bool:
    """Whether there is anything of a run: one that ended before its first checkpoint leaves its folder to another."""
    metrics = workdir / METRICS
    return any((workdir / "checkpoints").glob("*")) or (metrics.exists() and metrics.stat().st_size > 0)


@contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Keeps a folder to this process until the context ends or the process dies, however it does.

    Where the file system knows no locks, two runs in one folder go unnoticed.

    Args:
      workdir: created if it is not there.

    Raises:
      WorkdirError: if another process holds it, which is named; or if it cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    except OSError as error:
        raise WorkdirError(f"cannot write to the workdir {workdir}: {error}. Choose another with --workdir") from error
    with file:
        try:
            files.lock(file, wait=False)
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise WorkdirError(
                f"{workdir} is in use by {owner}: wait until that run ends or stop it, or choose another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


@contextmanager
def raise_on_full_disk(workdir: Path) -> Iterator[None]:
    """Turns a write that found no space into an error for the user.

    Raises:
      WorkdirError: in place of the failed write's error; what was complete before stays.
    """
    try:
        yield
    except Exception as error:
        if not _no_space(error):
            raise
        raise WorkdirError(
            f"no space left to write to {workdir}: {' '.join(str(error).split())[:200]}. The checkpoints that were "
            f"complete are intact: free space, and the same command goes on from the newest"
        ) from error


def _no_space(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that of a full disk, a quota or a limit on files."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # Tensorstore tells the system's error in words only.
    said = any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    return said or _no_space(error.__cause__ or error.__context__)


def read_config(workdir: Path) -> TrainConfig:
    """The config of the run in a folder, as data; fields that are newer than the run have their defaults.

    Raises:
      WorkdirError: if there is none or it is damaged.
      ConfigError: if it is not a valid config.
    """
    path = workdir / CONFIG
    try:
        saved = _read_object(path)
    except OSError as error:
        raise WorkdirError(f"{workdir} holds no run: cannot read {path}: {error}") from error
    except ValueError as error:
        raise WorkdirError(f"{path} is damaged: {error}. Restore it or use another --workdir") from error
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    return config_lib.validate(ConfigDict(config_lib.base().to_dict() | tuples))


def _read_object(path: Path) -> dict[str, Any]:
    saved = json.loads(path.read_text())
    if not isinstance(saved, dict) or not saved:
        raise ValueError("it does not hold a JSON object with fields")
    return saved


def _compare(workdir: Path, config: TrainConfig) -> None:
    saved, new = as_json(read_config(workdir)), as_json(config)
    differing = [
        f"{name} is {saved.get(name)!r} there and {new.get(name)!r} here"
        for name in config_lib.FIELDS
        if name not in MUTABLE_ON_RESUME and saved.get(name) != new.get(name)
    ]
    if differing:
        raise WorkdirError(
            f"{workdir} holds a run with another config: {'; '.join(differing)}. Choose another --workdir, or give "
            f"the config that it was started with"
        )
