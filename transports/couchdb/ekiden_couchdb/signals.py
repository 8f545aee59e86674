"""Wakes consumers: one feed for each process, of a database in which those who publish ring.

    publisher   publishes, then rings: ``ringing``
    thread      while anybody waits in this process: follows ``{prefix}-signals``, and wakes those whose queues rang
    consumer    waits; a ring that comes between two waits ends the second at once

All this is a hint. When the feed begins, or has missed something, everybody is woken; while there is none, everybody
is woken each second, which is all the polling there is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

import msgspec
from ekiden.locks import Flag
from ekiden.loggers import safe_logger

from ekiden_couchdb.changes import Change, Changes
from ekiden_couchdb.client import Client
from ekiden_couchdb.ringing import Ringer

logger = safe_logger(__name__)

WITHOUT_FEED_SECONDS = 1.0
"""While there is no feed, so much time lies between two looks of a consumer."""

LONGEST_WAIT_SECONDS = 3600.0


class _Rings(msgspec.Struct, frozen=True):
    """A document of ``ringing``."""

    by: str = ""
    rung: dict[str, int] = {}


_decode_rings = msgspec.json.Decoder(_Rings).decode
_NONE = _Rings()


class Signals:
    """One process's. Every method may be called by any thread; ``_lock`` guards all."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._database = client.database("signals")
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._ringer = Ringer(self._client, self._database)
        self._waiters: set[Waiter] = set()
        self._changes: Changes | None = None
        self._heard_of: dict[str, _Rings] = {}
        self._follow_at = 0.0
        self._closed = False

    def ring(self, queues: Iterable[str]) -> None:
        """Wake those who wait for one of ``queues``, wherever they are. Raises nothing."""
        self._ringer.ring(queues)

    def waiter(self, queues: Sequence[str]) -> Waiter:
        """Somebody who waits for ``queues``, and is woken by every ring from now on."""
        waiter = Waiter(self, queues)
        with self._lock:
            self._waiters.add(waiter)
        self.follow()
        return waiter

    def follow(self) -> None:
        """Have the feed begin, if there is none. Raises nothing: while there is none, everybody looks."""
        with self._lock:
            now = time.monotonic()
            if self._changes is not None or self._closed or not self._waiters or now < self._follow_at:
                return
            self._follow_at = now + WITHOUT_FEED_SECONDS
            self._heard_of = {}
            changes = Changes(
                self._client,
                self._database,
                thread_name="ekiden-couchdb-signals",
                heard=self._hear,
                began=self._wake_all,
                failed=self._wake_all,
                with_documents=True,
            )
            try:
                changes.start()
            except self._client.errors.unavailable as error:
                logger.warning("%s", error)
            else:
                self._changes = changes
                self._follow_at = 0.0

    @property
    def is_live(self) -> bool:
        """Whether rings are heard now."""
        changes = self._changes
        return changes is not None and changes.is_live

    def close(self) -> None:
        """Wake everybody, and end the threads. May be called again."""
        with self._lock:
            self._closed = True
            changes, self._changes = self._changes, None
        self._ringer.close()
        self._wake_all()
        if changes is not None:
            changes.close()

    def forget(self) -> None:
        """In a forked child: the threads, the feed and those who wait are the parent's."""
        self._begin()

    def leave(self, waiter: Waiter) -> None:
        """``waiter`` waits no more; without anybody who waits there is no feed."""
        with self._lock:
            self._waiters.discard(waiter)
            changes = None
            if not self._waiters:
                changes, self._changes = self._changes, None
        if changes is not None:
            changes.close()

    def _hear(self, change: Change) -> None:
        """A document of ``ringing`` was written: wake those for whose queues it says something new."""
        try:
            rings = _decode_rings(change.doc)
        except (ValueError, RecursionError):
            return  # not one of ours
        known = self._heard_of.get(change.id, _NONE)
        before = known.rung if known.by == rings.by else {}
        self._heard_of[change.id] = rings
        rung = {queue for queue, number in rings.rung.items() if before.get(queue) != number}
        with self._lock:
            woken = [waiter for waiter in self._waiters if not rung.isdisjoint(waiter.queues)]
        for waiter in woken:
            waiter.wake()

    def _wake_all(self) -> None:
        with self._lock:
            waiters = list(self._waiters)
        for waiter in waiters:
            waiter.wake()


class Waiter:
    """Waits for something in ``queues``. ``wait`` is called by one thread, ``wake`` and ``close`` by any."""

    def __init__(self, signals: Signals, queues: Sequence[str]) -> None:
        self.queues = frozenset(queues)
        self._signals = signals
        self._woken = Flag()

    def wait(self, seconds: float) -> bool:
        """Until there is a reason to look, at most ``seconds``; whether there is one, also since the last wait.

        While no rings can be heard, a second is a reason.
        """
        give_up = time.monotonic() + seconds
        self._signals.follow()
        while True:
            left = give_up - time.monotonic()
            is_live = self._signals.is_live
            longest = LONGEST_WAIT_SECONDS if is_live else WITHOUT_FEED_SECONDS
            if self._woken.wait(max(0.0, min(left, longest))):
                self._woken.clear()
                return True
            if left <= longest:
                return False
            if not is_live:
                return True

    def wake(self) -> None:
        """End the wait in progress, or else the next one."""
        self._woken.set()

    def close(self) -> None:
        """Wait no more. May be called again."""
        self.wake()
        self._signals.leave(self)
