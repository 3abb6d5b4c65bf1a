"""Signals that ask a run to stop: the first is remembered, so that the run can save; the second acts at once."""

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

from mimicnorm_jax import distributed


class InterruptedRunError(Exception):
    """A run stopped because a signal asked it to, with a checkpoint of the step that it had reached.

    Attributes:
      step: that step, counted from the start of the run.
      signal: the signal's number.
    """

    def __init__(self, step: int, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}: the same command goes on from there")
        self.step, self.signal = step, number


def stop_requested() -> AbstractContextManager[Callable[[], int]]:
    """`local_signals`, or `synced_signals` where several processes have to stop at the same step."""
    return local_signals() if jax.process_count() == 1 else synced_signals()


@contextmanager
def synced_signals() -> Iterator[Callable[[], int]]:
    """While the context lasts, a SIGTERM or SIGINT of any process stops all of them, at the same step.

    Yields:
      A function that gives SIGTERM's number once all are to stop, 0 before; each process has to call it the same
      number of times, and at least every `distributed.STALL_TIMEOUT_S` seconds.
    """
    calls, synced = itertools.count(), [0]

    def requested() -> int:
        progress()
        if not synced[0] and multihost_utils.reached_preemption_sync_point(next(calls)):
            synced[0] = int(signal.SIGTERM)
        return synced[0]

    def forward(*_: Any) -> None:
        signal.signal(signal.SIGINT, before)
        os.kill(os.getpid(), signal.SIGTERM)  # to which JAX listens; it tells the other processes

    before = signal.getsignal(signal.SIGINT)
    if in_main := threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, forward)
    try:
        with distributed.stall_watchdog() as progress:
            yield requested
    finally:
        if in_main:
            signal.signal(signal.SIGINT, before)


@contextmanager
def local_signals() -> Iterator[Callable[[], int]]:
    """While the context lasts, remembers the first SIGINT (Ctrl-C) or SIGTERM (preemption) instead of obeying it.

    Outside of the main thread, which alone may do so, signals stay as they are.

    Yields:
      A function that gives the number of the signal received, 0 if there was none.
    """
    received, before = [0], {}

    def receive(number: int, frame: Any) -> None:
        del frame
        received[0] = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0]
    finally:
        restore()
