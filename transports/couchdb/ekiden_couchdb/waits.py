"""Everybody in this process who waits for results: one feed for all of them.

    wait()      looks at its tasks once, then sleeps until the feed names one of them, and looks at that one
    the feed    of ``{prefix}-results``, without documents: the ids of tasks for which something was stored

A task is *followed* while nothing was stored for it since somebody looked. It stays followed when a wait ends without
it: who waits for ten thousand tasks and is told of a hundred comes back with the others, and the server is not asked
again. The feed begins before anybody looks, and goes on for some seconds after the last wait.

Telling is a hint: now and then a wait looks at all of its tasks. While there is no feed it does so more often, and when
the server does not answer for as long as a call may take, it says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterable, Sequence

from ekiden.errors import EkidenError
from ekiden.locks import Flag, start_thread
from ekiden.loggers import safe_logger
from ekiden.results import StoredResult
from ekiden.states import is_final

from ekiden_couchdb.changes import Change, Changes
from ekiden_couchdb.client import Client
from ekiden_couchdb.store import Store
from ekiden_couchdb.store_documents import task_document
from ekiden_couchdb.stored_results import known_task

logger = safe_logger(__name__)

LOOK_AGAIN_SECONDS = 5.0
LOOKED_AT_PER_SECOND = 500
"""Where one waits for so many tasks that this would be exceeded, it looks less often."""

WITHOUT_FEED_SECONDS = 0.5
FEED_BEGINS_WITHIN_SECONDS = 0.1
"""So long the first look waits for the feed to begin; where it begins later, another look follows."""

STALE_SECONDS = 0.2
"""In a cluster a look may come to a copy that does not have yet what the feed has told: so much later comes another."""

TROUBLE_PAUSE_SECONDS = 0.2
LINGER_SECONDS = 5.0

FOLLOWED_SECONDS = 60.0
"""So long a task is followed for which nobody waits any more."""

CLOSED_WITHIN_SECONDS = 5.0


class Waits:
    """The waits of one backend in this process. ``_lock`` guards everything."""

    def __init__(self, client: Client, store: Store) -> None:
        self._client = client
        self._store = store
        self._lock = threading.Lock()
        self._waiting: set[_Wait] = set()
        self._followed: dict[str, float] = {}  # when somebody began to wait for each last
        self._forget_at = 0.0
        self._changes: Changes | None = None
        self._began = Flag()
        self._lingering: threading.Thread | None = None
        self._left_at = 0.0
        self._closed = Flag()

    def wait(self, task_ids: Sequence[str], timeout: float) -> list[StoredResult]:
        """What of ``task_ids`` is final: at once when something is, else when something is, else after ``timeout``.

        Raises BackendError when it could not be found out for as long as a call may take.
        """
        if timeout <= 0:
            return list(self._final(task_ids).values())
        wait = _Wait({task_document(task_id): task_id for task_id in task_ids}, time.monotonic() + timeout)
        try:
            with self._lock:
                if self._closed.is_set():
                    return []
                self._waiting.add(wait)
                self._begin()
                began = self._began
            began.wait(min(timeout, FEED_BEGINS_WITHIN_SECONDS))
            return self._wait(wait)
        finally:
            self._leave(wait)

    def wake(self) -> None:
        """End every wait in progress."""
        with self._lock:
            for wait in self._waiting:
                wait.is_ended = True
                wait.called.set()

    def close(self) -> None:
        """End every wait and the threads. May be called again."""
        with self._lock:
            self._closed.set()
            changes, self._changes = self._changes, None
            lingering = self._lingering
        self.wake()
        if changes is not None:
            changes.close()
        if lingering is not None:
            lingering.join(CLOSED_WITHIN_SECONDS)

    # What a waiting thread does.

    def _wait(self, wait: _Wait) -> list[StoredResult]:
        with self._lock:
            wait.changed.update(id_ for id_ in wait.tasks if id_ not in self._followed)
        trouble_since: float | None = None
        while True:
            with self._lock:
                ids, wait.changed = wait.changed, set()
                is_ended = wait.is_ended
            try:
                found = self._look(wait, ids)
                trouble_since = None
            except EkidenError as error:
                now = time.monotonic()
                trouble_since = now if trouble_since is None else trouble_since
                with self._lock:
                    wait.changed |= ids
                over = now - trouble_since >= self._client.options.timeout or now >= wait.until
                if over or isinstance(error, self._client.errors.refused):
                    raise
                found = {}
            if found or is_ended or time.monotonic() >= wait.until:
                return list(found.values())
            self._sleep(wait, in_trouble=trouble_since is not None)

    def _look(self, wait: _Wait, ids: Collection[str]) -> dict[str, StoredResult]:
        """What is final of the documents ``ids``, by task; the others are followed from now on."""
        if not ids:
            return {}
        found = self._final([wait.tasks[id_] for id_ in ids])
        now = time.monotonic()
        with self._lock:
            for id_ in ids:
                if id_ not in wait.changed and wait.tasks[id_] not in found:
                    self._followed[id_] = now
        if wait.was_told and not found and self._client.is_cluster():
            wait.look_again_at = min(wait.look_again_at, time.monotonic() + STALE_SECONDS)
        return found

    def _sleep(self, wait: _Wait, *, in_trouble: bool) -> None:
        """Until there is something to look at."""
        changes = self._changes
        is_live = changes is not None and changes.is_live
        now = time.monotonic()
        longest = wait.look_again_at - now
        if in_trouble:
            longest = TROUBLE_PAUSE_SECONDS
            self._closed.wait(min(longest, max(0.0, wait.until - now)))  # what was told is looked at then, too
            return
        if not is_live:
            longest = min(longest, WITHOUT_FEED_SECONDS)
        if not wait.called.wait(max(0.0, min(longest, wait.until - now))) and time.monotonic() < wait.until:
            with self._lock:
                wait.changed.update(wait.tasks)
            wait.put_off_look()
            wait.was_told = False
            return
        wait.called.clear()
        wait.was_told = True

    def _final(self, task_ids: Iterable[str]) -> dict[str, StoredResult]:
        ids = {task_document(task_id): task_id for task_id in task_ids}
        found = self._store.read(ids.keys())
        now = self._store.now() if found else 0.0
        results = (known_task(self._store, document, ids[id_], now).result for id_, document in found.items())
        return {result.task_id: result for result in results if result is not None and is_final(result.state)}

    def _leave(self, wait: _Wait) -> None:
        with self._lock:
            self._waiting.discard(wait)
            self._left_at = time.monotonic()
            self._forget_the_old(self._left_at)
            if not self._waiting and self._changes is not None and self._lingering is None:
                lingering = threading.Thread(target=self._linger, name="ekiden-couchdb-results-linger", daemon=True)
                try:
                    start_thread(lingering)
                except RuntimeError as error:  # no more threads: the feed goes on until the next wait ends
                    logger.warning("no thread can be started that ends the feed of results: %s", error)
                else:
                    self._lingering = lingering

    def _forget_the_old(self, now: float) -> None:
        """Follow no longer what nobody has waited for lately. The caller holds the lock."""
        if now >= self._forget_at:
            self._forget_at = now + FOLLOWED_SECONDS
            self._followed = {id_: at for id_, at in self._followed.items() if at > now - FOLLOWED_SECONDS}

    # The feed.

    def _begin(self) -> None:
        """Have the feed begin, if there is none. The caller holds the lock."""
        if self._changes is None:
            self._began = Flag()
            self._followed.clear()
            changes = Changes(
                self._client,
                self._store.name,
                thread_name="ekiden-couchdb-results",
                heard=self._hear,
                began=self._note_beginning,
                failed=self._look_soon,
            )
            try:
                changes.start()
            except self._client.errors.unavailable as error:  # without a feed it is looked more often
                logger.warning("%s", error)
            else:
                self._changes = changes

    def _hear(self, change: Change) -> None:
        """Something was stored for a task: whoever waits for it looks, or will when he comes."""
        with self._lock:
            self._followed.pop(change.id, None)
            for wait in self._waiting:
                if change.id in wait.tasks:
                    wait.changed.add(change.id)
                    wait.called.set()

    def _note_beginning(self) -> None:
        """What was stored before may have been missed."""
        with self._lock:
            self._followed.clear()
            for wait in self._waiting:
                wait.changed.update(wait.tasks)
                wait.called.set()
        self._began.set()

    def _look_soon(self) -> None:
        """The feed broke: whoever waits finds out what that means."""
        with self._lock:
            for wait in self._waiting:
                wait.changed.update(wait.tasks)
                wait.called.set()

    def _linger(self) -> None:
        try:
            self._end_feed_later()
        except BaseException as bug:
            logger.critical("the feed of results was not ended; the next wait's end tries: %r", bug, exc_info=bug)
            with self._lock:
                self._lingering = None

    def _end_feed_later(self) -> None:
        """End the feed once nobody has waited for some time."""
        while not self._closed.wait(LINGER_SECONDS):
            with self._lock:
                if not self._waiting and time.monotonic() - self._left_at < LINGER_SECONDS:
                    continue
                changes = None
                if not self._waiting:
                    changes, self._changes = self._changes, None
                self._lingering = None
            if changes is not None:
                changes.close()
            return


class _Wait:
    """Somebody waits for one of ``tasks`` (by document) until the moment ``until``. Guarded by ``Waits._lock``.

    ``changed`` are the documents that it has to look at.
    """

    __slots__ = ("called", "changed", "is_ended", "look_again_at", "tasks", "until", "was_told")

    def __init__(self, tasks: dict[str, str], until: float) -> None:
        self.tasks = tasks
        self.until = until
        self.changed: set[str] = set()
        self.called = Flag()
        self.is_ended = False
        self.was_told = False
        self.look_again_at = 0.0
        self.put_off_look()

    def put_off_look(self) -> None:
        """It has looked at everything now."""
        self.look_again_at = time.monotonic() + max(LOOK_AGAIN_SECONDS, len(self.tasks) / LOOKED_AT_PER_SECOND)
