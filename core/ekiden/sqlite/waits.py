"""Everybody in this process who waits for results, and the one thread that tells them.

    wait()      asks the file once for ids that are new here, notes them as pending, then sleeps
    the thread  is rung when anybody has stored a final result, reads which tasks changed since it last looked
                (``result.number`` only rises), and wakes those who wait for one of them

An id stays pending here for a while after a wait for it has ended: who waits for ten thousand tasks and is told of
a hundred comes back with the rest, and the file is not asked for them again. The thread's place in the file is noted
before any id is, so a result is found either by the first question or by the thread.

``_lock`` guards everything. The thread runs from the first wait until ``close``; where it fails, those who wait at that
moment are told, and the next wait starts another one.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence

import msgspec

from ekiden.errors import BackendError
from ekiden.loggers import safe_logger
from ekiden.results import StoredResult
from ekiden.sqlite import statements
from ekiden.sqlite.bell import RESULTS, Bell, Bells
from ekiden.sqlite.database import Database
from ekiden.states import is_final

logger = safe_logger(__name__)

LOOK_AGAIN_SECONDS = 0.5
PENDING_KEPT_SECONDS = 60.0
THREAD_ENDS_WITHIN_SECONDS = 5.0


class Waits:
    """The waits of one backend in this process."""

    def __init__(self, database: Database, bells: Bells) -> None:
        self._database = database
        self._bells = bells
        self._lock = threading.Lock()
        self._pending: dict[str, float] = {}
        self._waiting: set[_Wait] = set()
        self._seen_up_to = 0
        self._forget_at = math.inf
        self._bell: Bell | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        """What of ``ids`` is final: at once when something is, else when something is, else after ``timeout``."""
        if timeout <= 0:
            return self._final(ids)
        wait = _Wait(frozenset(ids))
        with self._lock:
            if self._closed:
                return []
            if self._thread is None:
                self._start()
            now = time.monotonic()
            new = [task_id for task_id in wait.ids if task_id not in self._pending]
            self._pending.update(dict.fromkeys(wait.ids, now))
            self._waiting.add(wait)
        try:
            final = self._final(new)
            if final:
                self._deliver(final)
            wait.woken.wait(min(timeout, threading.TIMEOUT_MAX))
        finally:
            with self._lock:
                self._waiting.discard(wait)
        if wait.error is not None:
            raise wait.error
        return list(wait.found.values())

    def wake(self) -> None:
        """End every wait in progress."""
        with self._lock:
            for wait in self._waiting:
                wait.woken.set()

    def close(self) -> None:
        """End every wait, and the thread."""
        with self._lock:
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
        return [StoredResult(*row) for row in rows if is_final(row[1])]

    # The thread.

    def _start(self) -> None:
        """The caller holds the lock."""
        newest = self._database.read(statements.NEWEST_RESULT)
        self._seen_up_to = newest[0][0] if newest else 0
        bell = self._bells.bell((RESULTS,))
        thread = threading.Thread(target=self._run, args=(bell,), name="ekiden-sqlite-results", daemon=True)
        self._forget_at = time.monotonic() + PENDING_KEPT_SECONDS
        try:
            thread.start()
        except BaseException:
            bell.close()
            raise
        self._thread, self._bell = thread, bell

    def _run(self, bell: Bell) -> None:
        try:
            self._tell_until_closed(bell)
        except BaseException as error:
            logger.critical("the thread that waits for results has failed: %r", error, exc_info=error)
            failed = BackendError(f"The thread that waits for results has failed: {error!r}; ask again.")
            failed.__cause__ = error
            with self._lock:
                self._thread = self._bell = None
                self._pending.clear()  # of what was pending the next thread knows nothing
                self._fail(failed)
        finally:
            bell.close()

    def _tell_until_closed(self, bell: Bell) -> None:
        while not self._closed:
            bell.wait(LOOK_AGAIN_SECONDS)
            try:
                self._tell()
            except BackendError as error:
                with self._lock:
                    self._fail(error)
                time.sleep(LOOK_AGAIN_SECONDS)

    def _tell(self) -> None:
        """Wake those who wait for what has become final since the last time."""
        changed = self._database.read(statements.CHANGED_RESULTS, (self._seen_up_to,))
        now = time.monotonic()
        if changed:
            with self._lock:
                wanted = [task_id for _, task_id in changed if task_id in self._pending]
            self._deliver(self._final(wanted))
            self._seen_up_to = changed[-1][0]
        if now >= self._forget_at:
            self._forget(now)

    def _deliver(self, results: Sequence[StoredResult]) -> None:
        """Give final results to everybody who waits for them."""
        final = {result.task_id: result for result in results}
        with self._lock:
            for wait in self._waiting:
                mine = final.keys() & wait.ids
                if mine:
                    wait.found.update((task_id, final[task_id]) for task_id in mine)
                    wait.woken.set()
            for task_id in final:
                self._pending.pop(task_id, None)

    def _forget(self, now: float) -> None:
        """Stop following what nobody has waited for lately."""
        self._forget_at = now + PENDING_KEPT_SECONDS
        with self._lock:
            waited_for = frozenset[str]().union(*(wait.ids for wait in self._waiting))
            self._pending = {
                task_id: asked
                for task_id, asked in self._pending.items()
                if task_id in waited_for or asked > now - PENDING_KEPT_SECONDS
            }

    def _fail(self, error: BackendError) -> None:
        """Tell everybody who waits. The caller holds the lock."""
        for wait in self._waiting:
            wait.error = error
            wait.woken.set()


class _Wait:
    """Somebody waits for one of ``ids``."""

    __slots__ = ("error", "found", "ids", "woken")

    def __init__(self, ids: frozenset[str]) -> None:
        self.ids = ids
        self.found: dict[str, StoredResult] = {}
        self.error: BackendError | None = None
        self.woken = threading.Event()
