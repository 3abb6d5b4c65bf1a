"""Signals that ask a run to stop: the first is noted, so that the run can save; the second acts at once."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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


@contextmanager
def noted_signals() -> Iterator[Callable[[], int]]:
    """While the context lasts, notes the first SIGINT (Ctrl-C) or SIGTERM (preemption) instead of obeying it.

    Outside of the main thread, which alone may do so, signals stay as they are.

    Yields:
      A function that gives the number of the signal noted, 0 if there was none.
    """
    noted, before = [0], {}

    def note(number: int, frame: Any) -> None:
        del frame
        noted[0] = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        before |= {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: noted[0]
    finally:
        restore()
