"""Waking whoever waits for messages: a publisher rings for its queues, and who waits for one of them hears it.

    <prefix>.signals    a feed: {q: the queues, by: the process that rang}

A ring is a hint: it is sent without waiting for an answer, and one that is lost costs latency only. Who waits in the
same process is woken without the server. A process follows the rings only while one of its consumers waits.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Sequence

from bson import ObjectId
from ekiden.errors import EkidenError
from ekiden.locks import Flag

from ekiden_mongodb.client import Client
from ekiden_mongodb.feeds import Document, Feed
from ekiden_mongodb.watching import Watch

KEPT_BYTES = 1024 * 1024
"""About ten thousand rings."""


class Signals:
    """The rings that one transport in this process sends and hears. ``_lock`` guards the waiters."""

    def __init__(self, client: Client) -> None:
        self._feed = Feed(client, "signals", max_bytes=KEPT_BYTES)
        self._us = ObjectId()
        self._lock = threading.Lock()
        self._waiters: set[Waiter] = set()
        self.watch = Watch(
            self._feed, thread_name="ekiden-mongodb-signals", told=self._hear, opened=self._wake_all, longest_poll=1.5
        )

    def ring(self, queues: Iterable[str]) -> None:
        """Tell who waits for one of ``queues`` that something may be there. Never raises."""
        rung = frozenset(queues)
        if not rung:
            return
        self._wake(rung)
        # A ring that is not heard costs its hearers some time, and a publisher nothing: its messages are stored.
        with contextlib.suppress(EkidenError):
            self._feed.append([{"q": sorted(rung), "by": self._us}], acknowledged=False)

    def waiter(self, queues: Sequence[str]) -> Waiter:
        """Whoever waits for ``queues``; it hears every ring from now on."""
        waiter = Waiter(self, queues)
        with self._lock:
            self._waiters.add(waiter)
        return waiter

    def close(self) -> None:
        """Wake everybody, and end the thread. May be called again."""
        self._wake_all()
        self.watch.close()

    def forget(self) -> None:
        """In a forked child: the waiters and the thread are the parent's."""
        self._lock = threading.Lock()
        self._waiters = set()
        self._us = ObjectId()
        self._feed.abandon()
        self.watch.abandon()

    def listen(self) -> None:
        """Somebody waits from now on, until ``leave`` is called."""
        with self._lock:
            queues = sorted({queue for waiter in self._waiters for queue in waiter.queues})
        self.watch.want({"q": {"$in": queues}})

    def leave(self) -> None:
        """Somebody waits no more."""
        self.watch.leave()

    def remove(self, waiter: Waiter) -> None:
        """It hears nothing from now on."""
        with self._lock:
            self._waiters.discard(waiter)

    def _hear(self, rings: Sequence[Document]) -> None:
        rung = [ring.get("q") for ring in rings if ring.get("by") != self._us]
        self._wake(
            frozenset(queue for some in rung if isinstance(some, list) for queue in some if isinstance(queue, str))
        )

    def _wake(self, queues: frozenset[str]) -> None:
        with self._lock:
            for waiter in self._waiters:
                if not queues.isdisjoint(waiter.queues):
                    waiter.wake()

    def _wake_all(self) -> None:
        """Nobody knows what was rung before: everybody looks."""
        with self._lock:
            for waiter in self._waiters:
                waiter.wake()


class Waiter:
    """One consumer's wait for rings; ``wait`` by one thread, the rest by any."""

    def __init__(self, signals: Signals, queues: Sequence[str]) -> None:
        self.queues = frozenset(queues)
        self._signals = signals
        self._rung = Flag()

    def wait(self, seconds: float) -> bool:
        """Wait for a ring at most so long; whether there was one, also since the last wait."""
        if not self._rung.is_set() and seconds > 0:
            self._signals.listen()
            try:
                self._rung.wait(seconds)
            finally:
                self._signals.leave()
        rang = self._rung.is_set()
        self._rung.clear()
        return rang

    def wake(self) -> None:
        """End the wait in progress, or the next one."""
        self._rung.set()

    def close(self) -> None:
        """The end: it hears nothing any more, and waits no more."""
        self._signals.remove(self)
        self._rung.set()
