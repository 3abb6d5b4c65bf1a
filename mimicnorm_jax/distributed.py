"""Several processes, usually one a host, as one run."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mimicnorm_jax.errors import ConfigError, PeerError

Tree = TypeVar("Tree")
HEARTBEAT_TIMEOUT_S = 60
"""Seconds without a sign of life after which a process counts as dead, and JAX ends all others with a message."""
STALL_TIMEOUT_S = 1800
"""Seconds without a step after which a process gives up on the others: longer than compiling or evaluating takes."""
INIT_TIMEOUT_S = 300
"""Seconds in which all processes have to come."""


def connect(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    """Joins the other processes; before anything else touches a device.

    If they do not come in time, JAX ends this process with a message.

    Args:
      coordinator: `HOST:PORT` of the first process.
      processes: how many there are.
      process_id: which of them this is, from 0. What is None comes from the environment, on TPU pods, under
        SLURM and under Open MPI.

    Raises:
      ConfigError: if the environment does not say what is missing, or what is given makes no sense.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            cluster_detection_method="deactivate" if None not in (coordinator, processes, process_id) else None,
            initialization_timeout=INIT_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"cannot join the other processes of the run: {' '.join(str(error).split())[:300]}. Give every process "
            f"the same --coordinator=HOST:PORT and --processes=N, and --process_id=0 to N-1; where TPU pods, SLURM or "
            f"Open MPI start them, --distributed is enough"
        ) from error


def is_connected() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this is process 0, which writes the workdir and logs."""
    return jax.process_index() == 0


def broadcast_from_first(tree: Tree) -> Tree:
    """The first process's values, on every one; the leaves must have the same shapes and dtypes on all."""
    return multihost_utils.broadcast_one_to_all(tree) if jax.process_count() > 1 else tree


def process_slice(count: int) -> range:
    """Which of `count` things this process reads: equal parts in the order of processes, the last ones shorter."""
    size = -(-count // jax.process_count())
    start = min(jax.process_index() * size, count)
    return range(start, min(start + size, count))


def allgather_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """All `count` rows from every process's `process_slice` of them.

    Args:
      rows: this process's, `(n, ...)`.
      count: of the rows of all processes.
    """
    if jax.process_count() == 1:
        return rows
    size = -(-count // jax.process_count())
    padded = np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
    parts = np.asarray(multihost_utils.process_allgather(padded))
    return parts.reshape(-1, *rows.shape[1:])[:count]


@contextmanager
def stall_watchdog(limit: float = STALL_TIMEOUT_S) -> Iterator[Callable[[], None]]:
    """Ends this process with a message and code 4 when nothing is done for `limit` seconds.

    For processes that wait for one that lives, and so is not counted as dead, but does not come.

    Yields:
      A function to call whenever something is done.
    """
    last, over = [time.monotonic()], threading.Event()

    def progress() -> None:
        last[0] = time.monotonic()

    def watch() -> None:
        while not over.wait(limit / 10):
            if time.monotonic() - last[0] > limit:
                who = f"process {jax.process_index()} of {jax.process_count()}"
                print(
                    f"error: {who} has not done a step for {limit:g} s: another one is late, or the network. Start all "
                    f"of them again with the same command: the run goes on from its newest checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(4)  # the main thread waits where no exception reaches it

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield progress
    finally:
        over.set()


@contextmanager
def translate_peer_errors() -> Iterator[None]:
    """Turns the failure of a step that several processes do together into an error for the user.

    Raises:
      PeerError: in place of JAX's error, if there are several processes.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise PeerError(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on with the others: "
            f"{' '.join(str(error).split())[:300]}. If one of them ended, start all of them again with the same "
            f"command: the run goes on from its newest checkpoint"
        ) from error
