"""Everybody in this process who waits for results: one subscription for all, and no thread of its own.

    wait()      follows its tasks, then waits until one of them is final
    the reader  is one of the threads that wait. It reads what the server tells all of them, wakes those whom it
                concerns, and when its own wait is over it leaves the role to another. A thread that did nothing but
                read would have to be woken, and then wake the one that waits: a tenth to a fifth of a round trip more

A task is *followed* from when it was first waited for until it is final. It stays followed when a wait ends without
it: who waits for ten thousand tasks and is told of a hundred comes back with the others, and the server is not asked
again. Nobody reads while nobody waits; so when nobody has come back for some seconds, a timer hangs up.

When anything goes wrong with a subscription, all are given up, and everything that is waited for is followed anew.
Telling is a hint: every ``LOOK_AGAIN_SECONDS`` the reader looks at what is stored, and finds out that way when a
server has vanished without a word.

``_lock`` guards what is known of tasks and waits, ``_io`` the subscriptions and their sockets, ``_reading`` is the
reader's role. They are taken in this order: ``_reading``, ``_io``, ``_lock``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from random import random

from ekiden.errors import BackendError, EkidenError
from ekiden.locks import Flag, call_holding, start_thread
from ekiden.loggers import safe_logger
from ekiden.results import StoredResult

from ekiden_redis.client import Client
from ekiden_redis.errors import TROUBLE, Overdue
from ekiden_redis.lines import Lines
from ekiden_redis.servers import Server
from ekiden_redis.store_keys import StoreKeys
from ekiden_redis.stored_results import decoded, is_final
from ekiden_redis.subscription import Subscription, Told

logger = safe_logger(__name__)

LOOK_AGAIN_SECONDS = 5.0
LOOKED_AT_PER_SECOND = 1000
"""Where so many wait that this would be exceeded, the reader looks less often."""

FOLLOWED_SECONDS = 30.0
"""So long a task is followed that nobody waits for any more."""

HANG_UP_SECONDS = 5.0
"""So long after the last wait nobody reads and what is told piles up; then the subscriptions are given up."""

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, MOST_DOUBLINGS = 0.05, 1.0, 10
"""Between two tries to follow everything anew; the first is made at once."""

CLOSED_WITHIN_SECONDS = 5.0
_LOOK_FOR_A_READER_SECONDS = 0.5
"""Who left the reader's role may have been interrupted before it called another one."""


class Waits:
    """The waits of one backend in this process."""

    def __init__(self, client: Client, keys: StoreKeys) -> None:
        self._client = client
        self._keys = keys
        self._lock = threading.Lock()
        self._io = threading.Lock()
        self._reading = threading.RLock()
        self._is_read = False
        self._followed: dict[str, float] = {}  # when each was waited for last
        self._waiting: set[_Wait] = set()
        self._subscriptions: dict[Server, Subscription[_Wait]] = {}
        self._lines: Lines[Server] | None = None
        self._look_at = 0.0
        self._trouble: _Trouble | None = None
        self._timer: threading.Thread | None = None
        self._left_at = 0.0
        self._closed = Flag()

    def wait(self, task_ids: Sequence[str], timeout: float) -> list[StoredResult]:
        """What of ``task_ids`` is final: at once when something is, else when something is, else after ``timeout``.

        Raises BackendError when it could not be told, or found out, whether something is.
        """
        now = time.monotonic()
        wait = _Wait(frozenset(task_ids), now + timeout)
        try:
            with self._lock:
                if self._closed.is_set():
                    return []
                lines = self._lines = self._lines or Lines()
                new = [task_id for task_id in wait.task_ids if task_id not in self._followed]
                self._followed.update(dict.fromkeys(wait.task_ids, now))
                self._waiting.add(wait)
            if new:
                self._follow(new, wait, lines)
            self._wait(wait, lines)
        except BaseException:
            # Interrupted: nobody can say between which two steps, and others may wait for what was being read.
            with self._io:
                self._fail(BackendError("Whoever read the results was interrupted."), None)
            raise
        finally:
            with self._lock:
                self._waiting.discard(wait)  # first, so that it is nobody who is called, whatever interrupts the rest
            trouble = self._leave(wait)
        return wait.answer(trouble)

    def wake(self) -> None:
        """End every wait in progress."""
        with self._lock:
            for wait in self._waiting:
                wait.end()
            if self._waiting and self._lines is not None:
                self._lines.ring()

    def close(self) -> None:
        """End every wait, the timer and the subscriptions. May be called again."""
        with self._lock:
            self._closed.set()
            timer = self._timer
        self.wake()
        if timer is not None:
            timer.join(CLOSED_WITHIN_SECONDS)
        with self._reading, self._io, self._lock:
            self.abandon()

    def abandon(self) -> None:
        """In a forked child: close the descriptors that came along; the parent's sockets stay as they are."""
        for subscription in self._subscriptions.values():
            subscription.close()
        self._subscriptions.clear()
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    # What every waiting thread does.

    def _wait(self, wait: _Wait, lines: Lines[Server]) -> None:
        """Until it is over: read for everybody, or else wait until called."""
        while not wait.is_over and (left := wait.until - time.monotonic()) > 0:
            if not call_holding(self._reading, lambda: self._read(wait, lines)):
                wait.called.wait(min(left, _LOOK_FOR_A_READER_SECONDS))
                wait.called.clear()

    def _follow(self, task_ids: Sequence[str], wait: _Wait | None, lines: Lines[Server]) -> None:
        """Have the servers tell us of these. In trouble it is the reader who does that, when it is time."""
        server: Server | None = None
        with self._io:
            if self._closed.is_set() or (self._trouble is not None and self._trouble.is_new):
                return
            try:
                for server, some in self._by_server(task_ids):
                    subscription = self._subscriptions.get(server) or self._subscribe(server, lines)
                    parts = subscription.follow(some, wait, self._client.deadline())
                    if wait is not None:
                        wait.looks += parts
            except (*TROUBLE, EkidenError) as error:
                self._fail(error, server)

    def _by_server(self, task_ids: Sequence[str]) -> Iterable[tuple[Server, Sequence[str]]]:
        client, deadline = self._client, self._client.deadline()
        if not client.is_cluster:
            return [(client.server(b"", deadline), task_ids)]
        found: dict[Server, list[str]] = {}
        for task_id in task_ids:
            found.setdefault(client.server(self._keys.result(task_id), deadline), []).append(task_id)
        return found.items()

    def _subscribe(self, server: Server, lines: Lines[Server]) -> Subscription[_Wait]:
        connection = server.connect(self._client.deadline(), protocol=3)
        subscription: Subscription[_Wait] = Subscription(connection, self._keys, one_by_one=self._client.is_cluster)
        self._subscriptions[server] = subscription
        self._look_at = time.monotonic() + LOOK_AGAIN_SECONDS
        lines.add(subscription, server)
        return subscription

    def _leave(self, wait: _Wait) -> _Trouble | None:
        """Wait no longer; returns the trouble that there is at this moment."""
        with self._lock:
            trouble = self._trouble
            self._waiting.discard(wait)
            if self._waiting:
                self._call_a_reader()
                return trouble
            if trouble is not None:  # whoever comes next begins anew
                self._trouble = None
                self._followed.clear()
            self._left_at = time.monotonic()
            if self._followed and self._timer is None and not self._closed.is_set():
                timer = threading.Thread(target=self._time, name="ekiden-redis-hang-up", daemon=True)
                with suppress(RuntimeError):  # no more threads now: the next one who leaves tries again
                    start_thread(timer)
                    self._timer = timer
            return trouble

    def _call_a_reader(self) -> None:
        """Whoever has left the reader's role calls this. The caller holds ``_lock``."""
        if self._waiting and not self._is_read:
            next(iter(self._waiting)).called.set()

    # What the reader does.

    def _read(self, wait: _Wait, lines: Lines[Server]) -> None:
        """Read for everybody until ``wait`` is over."""
        self._is_read = True
        try:
            self._read_until_over(wait, lines)
        finally:
            self._is_read = False

    def _read_until_over(self, wait: _Wait, lines: Lines[Server]) -> None:
        while not wait.is_over and (left := wait.until - time.monotonic()) > 0:
            trouble = self._trouble
            if trouble is not None and trouble.is_new:
                self._follow_all_anew(trouble, left, lines)
                continue
            for server in lines.wait(min(left, self._look_at - time.monotonic())):
                self._deliver(*self._told_by(server))
            if time.monotonic() >= self._look_at:
                self._look_again()

    def _told_by(self, server: Server) -> tuple[list[Told[_Wait]], dict[str, StoredResult]]:
        """What has arrived from ``server``, and the final results in it: of these tasks nothing more is told."""
        with self._io:
            subscription = self._subscriptions.get(server)
            if subscription is None:  # given up by another thread
                return [], {}
            try:
                told = subscription.receive()
                final, too_long = _final(told)
                subscription.leave(final)
                if too_long:
                    subscription.look(too_long, self._client.deadline())
            except (*TROUBLE, EkidenError) as error:
                self._fail(error, server)
                return [], {}
            return told, final

    def _deliver(self, told: list[Told[_Wait]], final: dict[str, StoredResult]) -> None:
        """Give it to everybody who waits for it."""
        with self._lock:
            if told and self._trouble is not None and not self._trouble.is_new:
                self._trouble = None
            for task_id in final:
                self._followed.pop(task_id, None)
            for each in told:
                if each.asker is not None:
                    each.asker.looks -= 1
            for wait in self._waiting:
                wait.take(final)

    def _look_again(self) -> None:
        """Look at what is stored of everything that is waited for, and leave what nobody waits for any more."""
        now = time.monotonic()
        with self._lock:
            wanted = self._wanted()
            old = [i for i, asked in self._followed.items() if asked < now - FOLLOWED_SECONDS and i not in wanted]
            for task_id in old:
                del self._followed[task_id]
        self._look_at = now + max(LOOK_AGAIN_SECONDS, len(wanted) / LOOKED_AT_PER_SECOND)
        server: Server | None = None
        with self._io:
            try:
                for server in self._subscriptions:
                    if self._subscriptions[server].unanswered_since() < now - LOOK_AGAIN_SECONDS:
                        raise Overdue
                for server, some in self._by_server(list(wanted)):
                    if server in self._subscriptions:
                        self._subscriptions[server].look(some, self._client.deadline())
                for server, some in self._by_server(old):
                    if server in self._subscriptions:
                        self._subscriptions[server].leave(some)
            except (*TROUBLE, EkidenError) as error:
                self._fail(error, server)

    def _follow_all_anew(self, trouble: _Trouble, left: float, lines: Lines[Server]) -> None:
        """After ``trouble``: at once, then again and again after a pause, until it is time to tell who waits."""
        now = time.monotonic()
        is_refused = isinstance(trouble.error, self._client.errors.refused)
        if is_refused or now - trouble.since >= self._client.options.timeout:
            self._give_up(trouble)
        elif now < trouble.try_at:
            lines.wait(min(left, trouble.try_at - now))
        else:
            with self._lock:
                wanted = self._wanted()
                self._followed = dict.fromkeys(wanted, now)
                for wait in self._waiting:
                    wait.looks = 0
                trouble.is_tried(now)
            self._follow(list(wanted), None, lines)

    def _give_up(self, trouble: _Trouble) -> None:
        """Tell everybody who waits."""
        with self._lock:
            self._trouble = None
            self._followed.clear()
            for wait in self._waiting:
                wait.fail(trouble.error)

    # What any of them does.

    def _fail(self, error: Exception, server: Server | None) -> None:
        """Give up every subscription: the reader follows everything anew. The caller holds ``_io``."""
        self._hang_up()
        explained = error if isinstance(error, EkidenError) else self._client.failed(error, server)
        with self._lock:
            if self._trouble is None:
                self._trouble = _Trouble(explained, time.monotonic())
            self._trouble.error = explained
            self._trouble.is_new = True
            if self._lines is not None:
                self._lines.ring()

    def _hang_up(self) -> None:
        """Close every subscription. The caller holds ``_io``."""
        for subscription in self._subscriptions.values():
            if self._lines is not None:
                self._lines.remove(subscription)
            subscription.close()
        self._subscriptions.clear()

    def _wanted(self) -> frozenset[str]:
        """Every task that is waited for. The caller holds ``_lock``."""
        return frozenset[str]().union(*(wait.task_ids for wait in self._waiting))

    # The timer.

    def _time(self) -> None:
        try:
            self._hang_up_later()
        except BaseException as bug:
            logger.critical("the thread that hangs up has failed; the next wait starts another: %r", bug, exc_info=bug)
            with self._lock:
                self._timer = None
                self._call_a_reader()

    def _hang_up_later(self) -> None:
        """Give up the subscriptions once nobody has waited for some time: nobody reads what is told."""
        is_idle = False
        while not is_idle and not self._closed.wait(HANG_UP_SECONDS):
            if not self._reading.acquire(blocking=False):
                continue
            try:
                with self._io, self._lock:
                    is_idle = not self._waiting and time.monotonic() - self._left_at >= HANG_UP_SECONDS
                    if is_idle:
                        self._hang_up()
                        self._followed.clear()
                        self._timer = None
            finally:
                self._reading.release()
            with self._lock:
                self._call_a_reader()


def _final(told: Iterable[Told[_Wait]]) -> tuple[dict[str, StoredResult], list[str]]:
    """The final results in what was told, by task, and the tasks whose final results were too long to be told."""
    final: dict[str, StoredResult] = {}
    too_long: list[str] = []
    for each in told:
        for task_id, stored in zip(each.task_ids, each.stored, strict=True):
            if stored == b"":
                too_long.append(task_id)
            elif stored is not None and is_final(stored) and (result := decoded(task_id, stored)) is not None:
                final[task_id] = result
    return final, too_long


class _Wait:
    """Somebody waits for one of ``task_ids`` until the moment ``until``. Guarded by ``Waits._lock``."""

    __slots__ = ("called", "error", "found", "is_ended", "looks", "task_ids", "until")

    def __init__(self, task_ids: frozenset[str], until: float) -> None:
        self.task_ids = task_ids
        self.until = until
        self.found: dict[str, StoredResult] = {}
        self.looks = 0  # so many parts of its first look are not answered yet
        self.is_ended = False
        self.error: EkidenError | None = None
        self.called = Flag()

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to wait for."""
        return self.is_ended or (bool(self.found) and self.looks <= 0)

    def take(self, final: dict[str, StoredResult]) -> None:
        """Note what of ``final`` it waits for."""
        mine = final.keys() & self.task_ids
        self.found.update((task_id, final[task_id]) for task_id in mine)
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

    def answer(self, trouble: _Trouble | None) -> list[StoredResult]:
        """What it has found. Raises what went wrong instead, if something did."""
        if self.found:
            return list(self.found.values())
        if self.error is not None:
            raise self.error
        if trouble is not None and not self.is_ended:
            raise trouble.error
        return []


class _Trouble:
    """Since a moment the servers have not told what they were asked. ``is_new``: nothing was done about it yet."""

    __slots__ = ("error", "is_new", "since", "tries", "try_at")

    def __init__(self, error: EkidenError, since: float) -> None:
        self.error = error
        self.since = since
        self.tries = 0
        self.try_at = since
        self.is_new = True

    def is_tried(self, now: float) -> None:
        """Everything is followed anew now; the next try comes after a pause that grows."""
        self.is_new = False
        self.try_at = now + min(FIRST_PAUSE_SECONDS * 2.0**self.tries, LONGEST_PAUSE_SECONDS) * (0.5 + random() / 2)
        self.tries = min(self.tries + 1, MOST_DOUBLINGS)
