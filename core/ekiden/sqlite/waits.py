"""Everybody in this process who waits for results, and the one thread that tells them.

    wait()      notes ids that are new here as pending, asks the file for them once, then sleeps
    the thread  is rung when anybody has stored a final result, reads which tasks changed since it last looked
                (``result.number`` only rises), and wakes those who wait for one of them

An id stays pending here for a while after a wait for it has ended: who waits for ten thousand tasks and is told of
a hundred comes back with the rest, and the file is not asked for them again. The thread's place in the file is noted
before any id is, so a result is found either by the first question or by the thread.

``_lock`` guards everything. The thread runs from the first wait until ``close``; where it fails, those who wait at that
moment are told, and the next wait starts another one.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Sequence
from queue import Empty, SimpleQueue

import msgspec

from ekiden.errors import BackendError
from ekiden.locks import release_if_held, start_thread
from ekiden.loggers import safe_logger
from ekiden.results import StoredResult
from ekiden.sqlite import statements
from ekiden.sqlite.bell import RESULTS, Bell, Bells
from ekiden.sqlite.database import Database
from ekiden.sqlite.reading import Reading
from ekiden.states import is_final

logger = safe_logger(__name__)

LOOK_AGAIN_SECONDS = 0.5
PENDING_KEPT_SECONDS = 60.0
THREAD_ENDS_WITHIN_SECONDS = 5.0


class Waits:
    """The waits of one backend in this process."""

    def __init__(self, database: Database, bells: Bells, reading: Reading) -> None:
        self._database = database
        self._bells = bells
        self._reading = reading
        self._lock = threading.RLock()
        self._pending: dict[str, float] = {}
        self._asked: set[str] = set()
        self._waiting: set[_Wait] = set()
        self._seen_up_to = 0
        self._forget_at = math.inf
        self._bell: Bell | None = None
        self._thread: threading.Thread | None = None
        self._reopened = 0
        self._runs = False
        self._closed = False

    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        """What of ``ids`` is final: at once when something is, else when something is, else after ``timeout``."""
        if timeout <= 0:
            return self._final(ids)
        wait = _Wait(frozenset(ids))
        try:
            self._wait(wait, timeout)
        except BaseException:
            release_if_held(self._lock)
            raise
        finally:
            self._waiting.discard(wait)
        if wait.error is not None:
            raise wait.error
        return list(wait.found.values())

    def wake(self) -> None:
        """End every wait in progress."""
        for wait in self._waiting.copy():
            wait.woken.put(None)

    def close(self) -> None:
        """End every wait, and the thread."""
        self._closed = True
        thread, bell = self._thread, self._bell
        self.wake()
        if thread is not None and bell is not None:
            bell.ring()
            thread.join(THREAD_ENDS_WITHIN_SECONDS)

    def abandon(self) -> None:
        """In a forked child: the thread and its bell are the parent's."""
        self._closed = True
        if self._bell is not None:
            self._bell.abandon()

    def _final(self, ids: Sequence[str]) -> list[StoredResult]:
        if not ids:
            return []
        rows = self._database.read(statements.STORED_RESULTS, (msgspec.json.encode(ids).decode(), time.time()))
        return [result for result in self._reading.results(rows).values() if is_final(result.state)]

    def _wait(self, wait: _Wait, timeout: float) -> None:
        with self._lock:
            if self._is_closed():
                return
            # Not ``is_alive``: interrupted, that of Python 3.11 takes a thread that runs for one that has ended.
            if not self._runs:
                self._start()
            now = time.monotonic()
            new = wait.ids - self._asked
            self._pending.update(dict.fromkeys(wait.ids, now))
            self._waiting.add(wait)
        final = self._final(list(new))
        with self._lock:
            self._asked.update(new & self._pending.keys())
        if final:
            self._deliver(final)
        if not self._is_closed():
            with contextlib.suppress(Empty):
                wait.woken.get(timeout=min(timeout, threading.TIMEOUT_MAX))

    def _is_closed(self) -> bool:
        return self._closed

    # The thread.

    def _start(self) -> None:
        """The caller holds the lock."""
        newest = self._database.read(statements.NEWEST_RESULT)
        self._seen_up_to = newest[0][0] if newest else 0
        self._reopened = self._database.reopened
        self._bell = self._bells.bell((RESULTS,))
        self._forget_at = time.monotonic() + PENDING_KEPT_SECONDS
        # Known before it runs: whoever is interrupted in ``start`` leaves no thread behind that nobody knows.
        self._thread = threading.Thread(target=self._run, name="ekiden-sqlite-results", daemon=True)
        start_thread(self._thread)
        self._runs = True

    def _run(self) -> None:
        with self._lock:
            if threading.current_thread() is not self._thread:
                return  # whoever started it was interrupted, and another one was started before this one began
            self._runs = True
        try:
            self._tell_until_closed()
        except BaseException as error:
            logger.critical("the thread that waits for results has failed: %r", error, exc_info=error)
            failed = BackendError(f"The thread that waits for results has failed: {error!r}; ask again.")
            failed.__cause__ = error
            with self._lock:
                bell, self._bell = self._bell, None
                self._thread = None
                self._runs = False
                self._pending.clear()  # of what was pending the next thread knows nothing
                self._asked.clear()
                self._fail(failed)
        else:
            bell = self._bell
        if bell is not None:
            bell.close()

    def _tell_until_closed(self) -> None:
        while not self._closed and self._bell is not None:
            self._bell.wait(LOOK_AGAIN_SECONDS)
            try:
                self._tell()
            except BackendError as error:
                self._fail(error)
                time.sleep(LOOK_AGAIN_SECONDS)

    def _tell(self) -> None:
        """Wake those who wait for what has become final since the last time."""
        changed = self._database.read(statements.CHANGED_RESULTS, (self._seen_up_to,))
        if self._reopened != self._database.reopened:
            self._begin_anew()
            return
        now = time.monotonic()
        if changed:
            with self._lock:
                wanted = [task_id for _, task_id in changed if task_id in self._pending]
            self._deliver(self._final(wanted))
            self._seen_up_to = changed[-1][0]
        if now >= self._forget_at:
            self._forget(now)

    def _begin_anew(self) -> None:
        """The file is another one than before, and counts from elsewhere: ask it for everything that is waited for."""
        self._reopened = self._database.reopened
        newest = self._database.read(statements.NEWEST_RESULT)
        self._seen_up_to = newest[0][0] if newest else 0
        with self._lock:
            pending = list(self._pending)
        self._deliver(self._final(pending))
        self._bells.path = self._database.path
        before, self._bell = self._bell, self._bells.bell((RESULTS,))
        if before is not None:
            before.close()

    def _deliver(self, results: Sequence[StoredResult]) -> None:
        """Give final results to everybody who waits for them."""
        final = {result.task_id: result for result in results}
        with self._lock:
            for wait in self._waiting.copy():
                mine = final.keys() & wait.ids
                if mine:
                    wait.found.update((task_id, final[task_id]) for task_id in mine)
                    wait.woken.put(None)
            for task_id in final:
                self._pending.pop(task_id, None)
            self._asked -= final.keys()

    def _forget(self, now: float) -> None:
        """Stop following what nobody has waited for lately."""
        self._forget_at = now + PENDING_KEPT_SECONDS
        with self._lock:
            waited_for = frozenset[str]().union(*(wait.ids for wait in self._waiting.copy()))
            self._pending = {
                task_id: asked
                for task_id, asked in self._pending.items()
                if task_id in waited_for or asked > now - PENDING_KEPT_SECONDS
            }
            self._asked &= self._pending.keys()

    def _fail(self, error: BackendError) -> None:
        """Tell everybody who waits."""
        for wait in self._waiting.copy():
            wait.error = error
            wait.woken.put(None)


class _Wait:
    """Somebody waits for one of ``ids``."""

    __slots__ = ("error", "found", "ids", "woken")

    def __init__(self, ids: frozenset[str]) -> None:
        self.ids = ids
        self.found: dict[str, StoredResult] = {}
        self.error: BackendError | None = None
        # Not an Event, whose own lock an exception out of a signal handler can leave in disorder.
        self.woken: SimpleQueue[None] = SimpleQueue()
