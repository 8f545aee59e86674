"""How a thread that waits in memory is woken.

Not by a condition variable: an exception out of a signal handler can come while that gives its lock back or takes it
again, and then the lock is released twice, or not at all. Here nobody holds a lock while waiting.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from queue import Empty, SimpleQueue


class Wakeup:
    """Wakes one thread; a ring that comes before the wait ends it at once."""

    __slots__ = ("_rung",)

    def __init__(self) -> None:
        self._rung: SimpleQueue[None] = SimpleQueue()

    def ring(self) -> None:
        """Any thread: end the wait in progress, or the next one."""
        if self._rung.empty():
            self._rung.put(None)

    def wait(self, seconds: float) -> None:
        """Return when rung, or after so many seconds."""
        with suppress(Empty):
            self._rung.get(timeout=min(max(seconds, 0.0), threading.TIMEOUT_MAX))
