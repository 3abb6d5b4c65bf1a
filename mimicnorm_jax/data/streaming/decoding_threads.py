"""Threads that decode, and that no disk can keep from being left."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

LEAVE_SECONDS = 5.0
"""So long a thread is waited for that is to end; a disk that stalls may hold it up for ever."""


class DecodingThreads:
    """Threads that take up tasks in order.

    They are daemons, unlike those of `concurrent.futures`: at its end Python waits for none that a disk holds up.

    Args:
      count: how many.
    """

    def __init__(self, count: int) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = queue.SimpleQueue()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"decode_{i}", daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Callable[[], None]) -> Future[None]:
        """Hands a task over; the future holds what it raises."""
        future: Future[None] = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """Ends the threads after the task each is at; tasks that none has begun are dropped."""
        self._closed = True
        for _ in self._threads:
            self._tasks.put(None)
        deadline = time.monotonic() + LEAVE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        while (item := self._tasks.get()) is not None and not self._closed:
            future, task = item
            try:
                task()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
