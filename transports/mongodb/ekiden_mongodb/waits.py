"""Everybody in this process who waits for results: one thread is told for all of which tasks have ended.

    <prefix>.ended      a feed: {ids: the ids of tasks of which a final result was stored}

A task is *followed* from when it was looked for in vain until it is told that it has ended; while it is, nobody looks
for it. It stays followed when a wait ends without it: who waits for ten thousand tasks and is told of a hundred comes
back with the others, and the server is not asked again. When following was interrupted all is looked for anew.

Telling is a hint: every ``LOOK_AGAIN_SECONDS`` it is looked for all that is waited for.
``_lock`` guards what is known of tasks and waits. No request is made while it is held.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from ekiden.errors import EkidenError
from ekiden.locks import Flag
from ekiden.results import StoredResult

from ekiden_mongodb.client import Client
from ekiden_mongodb.expiring import AT_ONCE
from ekiden_mongodb.feeds import Document, Feed
from ekiden_mongodb.watching import Watch

KEPT_BYTES = 4 * 1024 * 1024
"""The ids of some fifty thousand tasks."""

TOLD_AT_ONCE = 500
LOOK_AGAIN_SECONDS = 5.0
LOOKED_AT_PER_SECOND = 1000
"""Where so many are waited for that this would be exceeded, it is looked less often."""

FOLLOWED_SECONDS = 30.0
"""So long a task is followed that nobody waits for any more."""


class Waits:
    """The waits of one backend. ``look`` says which of some tasks are final, and raises what the client raises."""

    def __init__(self, client: Client, look: Callable[[Sequence[str]], list[StoredResult]]) -> None:
        self._client = client
        self._look = look
        self._feed = Feed(client, "ended", max_bytes=KEPT_BYTES)
        self._lock = threading.Lock()
        self._is_following = False
        self._followed: dict[str, float] = {}  # when each was waited for last
        self._waiting: set[_Wait] = set()
        self._look_at = 0.0
        self._closed = False
        self.watch = Watch(
            self._feed,
            thread_name="ekiden-mongodb-results",
            told=self._hear,
            opened=self._begin,
            stopped=self._end,
        )

    def tell(self, task_ids: Sequence[str]) -> None:
        """Tell everybody, everywhere, that these have ended. Never raises: who is not told looks."""
        some = [task_ids[start : start + TOLD_AT_ONCE] for start in range(0, len(task_ids), TOLD_AT_ONCE)]
        with contextlib.suppress(EkidenError):
            self._feed.append([{"ids": list(ids)} for ids in some], acknowledged=False)

    def wait(self, task_ids: Sequence[str], timeout: float) -> list[StoredResult]:
        """What of ``task_ids`` is final: at once when something is, else when something is, else after ``timeout``.

        Raises what the client raises when it could not be found out.
        """
        until = time.monotonic() + timeout
        wait = _Wait(frozenset(task_ids))
        with self._lock:
            if self._closed:
                return []
            self._waiting.add(wait)
            unknown = [task_id for task_id in wait.task_ids if task_id not in self._followed]
            is_following = self._is_following
            if is_following:
                self._followed.update(dict.fromkeys(wait.task_ids, time.monotonic()))
        self.watch.want({})
        try:
            # Many are looked for once only: as soon as they are followed.
            if unknown and (is_following or len(unknown) <= AT_ONCE):
                self._look_for(unknown)
            while not wait.is_over and (left := until - time.monotonic()) > 0:
                wait.called.wait(min(left, threading.TIMEOUT_MAX))
        finally:
            self.watch.leave()
            with self._lock:
                self._waiting.discard(wait)
        return wait.answer()

    def wake(self) -> None:
        """End every wait in progress."""
        with self._lock:
            for wait in self._waiting:
                wait.end()

    def close(self) -> None:
        """End every wait, and the thread. May be called again."""
        with self._lock:
            self._closed = True
        self.wake()
        self.watch.close()

    def abandon(self) -> None:
        """In a forked child: the thread and those who wait are the parent's."""
        self._feed.abandon()
        self.watch.abandon()
        self._lock = threading.Lock()
        self._waiting = set()
        self._end_following()

    # What waiting threads do, and the one that is told.

    def _look_for(self, task_ids: Sequence[str]) -> None:
        """Give everybody what is final of these."""
        try:
            found = self._look(task_ids)
        except BaseException:
            with self._lock:  # nobody knows of them
                for task_id in task_ids:
                    self._followed.pop(task_id, None)
            raise
        if found:
            final = {result.task_id: result for result in found}
            with self._lock:
                for task_id in final:
                    self._followed.pop(task_id, None)
                for wait in self._waiting:
                    wait.take(final)

    # What the thread does that is told.

    def _begin(self) -> None:
        """From now on nothing is missed, so it is looked for what was missed before."""
        with self._lock:
            self._is_following = True
        self._look_for_all()

    def _hear(self, news: Sequence[Document]) -> None:
        told = [each.get("ids") for each in news]
        ended = {task_id for ids in told if isinstance(ids, list) for task_id in ids if isinstance(task_id, str)}
        with self._lock:
            for task_id in ended:
                self._followed.pop(task_id, None)
            wanted = [task_id for task_id in self._wanted(ended) if task_id in ended]
        if wanted:
            self._look_for(wanted)
        if time.monotonic() >= self._look_at:
            self._look_for_all()

    def _end(self) -> None:
        """Nothing is told any more. When that lasts, everybody who waits has to know."""
        with self._lock:
            self._end_following()
            trouble = self.watch.trouble(self._client.options.timeout)
            if trouble is not None:
                for wait in self._waiting:
                    wait.fail(trouble)

    def _end_following(self) -> None:
        self._is_following = False
        self._followed = {}

    def _look_for_all(self) -> None:
        """Look for everything that is waited for, and follow it; and no longer what nobody waits for."""
        now = time.monotonic()
        with self._lock:
            wanted = frozenset[str]().union(*(wait.task_ids for wait in self._waiting))
            kept = {task_id: at for task_id, at in self._followed.items() if at > now - FOLLOWED_SECONDS}
            self._followed = kept | dict.fromkeys(wanted, now)
        self._look_at = now + max(LOOK_AGAIN_SECONDS, len(wanted) / LOOKED_AT_PER_SECOND)
        if wanted:
            self._look_for(list(wanted))

    def _wanted(self, task_ids: Iterable[str]) -> set[str]:
        """Which of these somebody waits for. The caller holds ``_lock``."""
        return {task_id for task_id in task_ids if any(task_id in wait.task_ids for wait in self._waiting)}


class _Wait:
    """Somebody waits for one of ``task_ids``. Guarded by ``Waits._lock``."""

    __slots__ = ("called", "error", "found", "is_ended", "task_ids")

    def __init__(self, task_ids: frozenset[str]) -> None:
        self.task_ids = task_ids
        self.found: dict[str, StoredResult] = {}
        self.is_ended = False
        self.error: EkidenError | None = None
        self.called = Flag()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to wait for."""
        return self.is_ended or bool(self.found)

    def take(self, final: dict[str, StoredResult]) -> None:
        """Note what of ``final`` it waits for."""
        self.found.update((task_id, final[task_id]) for task_id in final.keys() & self.task_ids)
        if self.is_over:
            self.called.set()

    def end(self) -> None:
        """It is over, whatever was found."""
        self.is_ended = True
        self.called.set()

    def fail(self, error: EkidenError) -> None:
        """It is over with an error."""
        self.error = error
        self.end()

    def answer(self) -> list[StoredResult]:
        """What it has found. Raises what went wrong instead, if something did."""
        if self.error is not None and not self.found:
            raise self.error
        return list(self.found.values())
