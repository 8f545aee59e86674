"""``rpc://``: results as replies, for those whose broker stores none and who have no other store.

    the caller's process                                   a worker
      expect(ids)  opens reply.<random>, once
      publishes the call, with ekiden-reply-to  ------->   runs it
      the thread ekiden-replies  <-------  reply.<random>  publishes the reply before or while it settles the call
      keeps it in memory, wakes who waits

One reply queue for each process (and each app in it). It vanishes with its process, and the replies in it. A result is
therefore known only where its call was sent, and only while that process lives: everything else is refused in words.

What this process sent and knows of is in one of three: ``_waiting`` (``_told`` has the last that was told of these),
``_answered``, and ``_fetched`` once somebody here has got the answer. Where they become too many, what was fetched goes
first, then what is oldest: calls whose replies never come drive out no answers. Replies that nobody here waits for are
dropped. ``_mutex`` guards all that, and what is counted. The thread alone opens the consumer, receives from it and
settles.

Where the thread fails, those who wait at that moment are told; whoever sends or waits next starts another one.

Replies may come late, twice or in another order than they were sent: a state never moves back, as with every backend.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Annotated, NoReturn

import msgspec
from msgspec import Meta

from ekiden.errors import (
    TRANSPORT_IS_GONE,
    BackendError,
    BrokerUnavailable,
    ConfigurationError,
    EkidenError,
    MessageError,
    TransportClosed,
    TransportError,
    UnknownResult,
)
from ekiden.locks import Flag, start_thread
from ekiden.loggers import safe_logger
from ekiden.message import REPLY_PREFIX, Delivery, Ending
from ekiden.replies import read_reply
from ekiden.results import Backend, Begun, Joined, Record, Start, StoredResult
from ekiden.states import is_final, may_follow
from ekiden.transport import Consumer, Transport
from ekiden.urls import BrokerURL

logger = safe_logger(__name__)

_AT_MOST = 500
_PREFETCH = 1000
_LEASE_SECONDS = 60.0
_RECEIVE_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_CLOSE_SECONDS = 2.0
_INSTEAD = "set result_backend to one that stores, such as redis://localhost:6379/0"


class RpcOptions(msgspec.Struct, frozen=True):
    """What may stand behind the ``?`` of an ``rpc://`` URL.

    ``max_results``: of how many tasks results are awaited or kept in one process; those that were fetched go first,
    then the oldest. ``max_bytes``: how many bytes the kept ones may have together.
    """

    max_results: Annotated[int, Meta(ge=1)] = 100_000
    max_bytes: Annotated[int, Meta(ge=1)] = 256 * 1024 * 1024


class _Answer(msgspec.Struct, frozen=True):
    """A final result, when it came, and when it is dropped, on the monotonic clock."""

    result: StoredResult
    came: float
    ends: float


class _Wait:
    """Somebody waits for one of ``ids``; ``called`` gets an item when one is final, or the wait is to end."""

    __slots__ = ("called", "error", "ids")

    def __init__(self, ids: set[str]) -> None:
        self.ids = ids
        self.called: SimpleQueue[None] = SimpleQueue()
        self.error: BaseException | None = None

    def end(self, error: BaseException | None = None) -> None:
        self.error = error
        self.called.put(None)


class _Opening:
    """The thread that opens the reply queue and then receives, and those who wait until it has opened it."""

    def __init__(self, run: Callable[[_Opening], None]) -> None:
        self._error: BaseException | None = None
        self._opened = Flag()
        self._starting = threading.Lock()
        self._thread = threading.Thread(target=run, args=(self,), name="ekiden-replies", daemon=True)

    @property
    def is_done(self) -> bool:
        """Whether the queue is open."""
        return self._opened.is_set()

    def wait(self, url: BrokerURL, deadline: float | None) -> None:
        """Start the thread, once, and wait until it has opened the queue. Raises why it could not."""
        with self._starting:
            if self._thread.ident is None:
                start_thread(self._thread)
        if not self._opened.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
            raise BrokerUnavailable(f"{url}: no reply queue could be opened in time; the broker does not answer.")
        error = self._error
        if isinstance(error, EkidenError):
            raise type(error)(*error.args) from error  # several may be told at once
        if error is not None:
            raise error

    def done(self) -> None:
        """It is open."""
        self._opened.set()

    def failed(self, error: BaseException) -> None:
        """It cannot be opened."""
        self._error = error
        self._opened.set()

    def end(self, within: float | None) -> None:
        """Wait until the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join(within)


class RpcBackend(Backend):
    """Knows the results of the calls that this process has sent. Workers send them here; nothing is stored."""

    stores = False

    def __init__(self, url: BrokerURL) -> None:
        self._url = url
        self._options = url.options_as(RpcOptions)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._queue = f"{REPLY_PREFIX}{os.urandom(16).hex()}"
        self._mutex = threading.Lock()
        self._waiting: OrderedDict[str, float] = OrderedDict()  # and since when
        self._told: OrderedDict[str, StoredResult] = OrderedDict()
        self._answered: OrderedDict[str, _Answer] = OrderedDict()
        self._fetched: OrderedDict[str, _Answer] = OrderedDict()
        self._bytes = 0
        self._dropped = 0
        self._has_warned = False
        self._waits: set[_Wait] = set()
        self._consumer: Consumer | None = None
        self._opening: _Opening | None = None
        self._closed = Flag()
        self._opened_transport: Callable[[], Transport] | None = None

    # The caller's side.

    def expect(self, ids: Sequence[str], transport: Callable[[], Transport], *, deadline: float | None = None) -> str:
        """Await the results of ``ids`` from now on; returns the queue for replies, which is there by then.

        Raises BrokerUnavailable when it cannot be opened, or not by ``deadline``.
        """
        opening = self._opening
        if opening is None or not opening.is_done:
            self._opened_transport = transport
            self._open(transport, deadline)
        with self._mutex:
            self._check_usable()
            now = time.monotonic()
            for task_id in ids:
                self._discard(task_id)
                self._waiting[task_id] = now
            self._make_room()
        return self._queue

    def get(self, ids: Sequence[str]) -> list[StoredResult | None]:
        """What has been told of each; None for those of which nothing has. Raises UnknownResult for others."""
        with self._mutex:
            self._check_usable()
            self._check_known(ids)
            return [self._fetch(task_id) for task_id in ids]

    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        """Block until one of ``ids`` is final. Raises UnknownResult at once for one whose result cannot come here."""
        if self._opening is None and self._opened_transport is not None and not self._closed.is_set():
            self._open_anew(self._opened_transport, time.monotonic() + max(timeout, 0.0))
        wait = _Wait(set(ids))
        try:
            with self._mutex:
                self._check_usable()
                self._check_known(ids)
                final = self._final(ids)
                if final or timeout <= 0:
                    return final
                if self._opening is None:
                    raise BackendError("The thread that receives replies has just failed; ask again.")
                self._waits.add(wait)
            with suppress(Empty):
                wait.called.get(timeout=min(timeout, threading.TIMEOUT_MAX))
        finally:
            self._waits.discard(wait)
        with self._mutex:
            final = self._final(ids)
        if wait.error is not None and not final:
            raise BackendError(
                f"The thread that receives replies has failed: {wait.error!r}. Ask again: another one receives them; "
                "those that came meanwhile may be lost."
            ) from wait.error
        return final

    def wake(self) -> None:
        """Make every ``wait`` return."""
        for wait in list(self._waits):
            wait.end()

    def forget(self, ids: Sequence[str], *, deadline: float | None = None) -> None:
        """Await these no longer, and drop what is here of them."""
        with self._mutex:
            for task_id in ids:
                self._discard(task_id)
            self._call(set(ids))

    # What needs storage.

    def put(self, results: Sequence[StoredResult]) -> list[bool]:
        """Refused."""
        self._refuse("storing a result")

    def begin(self, starts: Sequence[Start]) -> list[Begun]:
        """Refused."""
        self._refuse("the fence")

    def join(self, join_id: str, member: str, outcome: bytes, *, size: int, expires: float | None) -> Joined:
        """Refused."""
        self._refuse("a join of several tasks")

    def read(self, keys: Sequence[str]) -> list[Record | None]:
        """Refused."""
        self._refuse("reading a record")

    def write(
        self, key: str, value: bytes | None, *, expected_version: int | None = None, expires: float | None = None
    ) -> int | None:
        """Refused."""
        self._refuse("writing a record")

    def scan(self, prefix: str) -> list[Record]:
        """Refused."""
        self._refuse("listing records")

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigurationError(
            f"{what} needs a result backend that stores, and {self._url} stores nothing: {_INSTEAD}."
        )

    # Opening and closing.

    def close(self) -> None:
        """End the thread and the reply queue, and wake whoever waits. May be called again."""
        self._closed.set()
        with self._mutex:
            opening, consumer = self._opening, self._consumer
        if consumer is not None:
            with suppress(*TRANSPORT_IS_GONE):
                consumer.stop()
        if opening is not None:
            # While the broker does not answer, the thread may not have come to know that; it ends by itself then.
            opening.end(_CLOSE_SECONDS if consumer is None else None)
        if consumer is not None:
            consumer.close()
        self.wake()

    def forget_connections(self) -> None:
        """In a forked child: a reply queue of its own, and nothing awaited. What the parent sent is the parent's."""
        self._begin_anew()

    def _open(self, opened_transport: Callable[[], Transport], deadline: float | None) -> None:
        """Have the thread open the reply queue, and wait until that is done, or ``deadline`` is over."""
        with self._mutex:
            self._check_usable()
            opening = self._opening
            if opening is None:
                opening = self._opening = _Opening(lambda own: self._run(own, opened_transport))
        opening.wait(self._url, deadline)

    def _open_anew(self, opened_transport: Callable[[], Transport], deadline: float) -> None:
        try:
            self._open(opened_transport, deadline)
        except TransportError as error:
            raise BackendError(f"Replies cannot be received: {error}") from error

    # The thread.

    def _run(self, opening: _Opening, opened_transport: Callable[[], Transport]) -> None:
        try:
            consumer = self._consumer or self._open_consumer(opened_transport())
        except BaseException as error:  # noqa: BLE001 - it is raised where somebody sends a call
            self._has_ended(opening)
            opening.failed(error)
            return
        self._consumer = consumer
        opening.done()
        if self._closed.is_set():
            consumer.close()
            return
        try:
            self._receive(consumer)
        except BaseException as error:
            logger.critical("the thread that receives replies has failed: %r", error, exc_info=error)
            is_gone = isinstance(error, TRANSPORT_IS_GONE)
            if is_gone:
                consumer.close()
                self._consumer = None
            self._has_ended(opening)
            for wait in list(self._waits):
                wait.end(error)

    def _open_consumer(self, transport: Transport) -> Consumer:
        lease = max(_LEASE_SECONDS, transport.description.shortest_lease)
        return transport.consumer([self._queue], lease=lease, prefetch=_PREFETCH, name=self._queue)

    def _has_ended(self, opening: _Opening) -> None:
        with self._mutex:
            if self._opening is opening:
                self._opening = None

    def _receive(self, consumer: Consumer) -> None:
        pause = 0.0
        while not self._closed.is_set():
            try:
                deliveries = consumer.receive(_AT_MOST, _RECEIVE_SECONDS)
                if deliveries:
                    self._take(deliveries)
                    # One that cannot be settled comes again, and is known already.
                    consumer.settle([Ending(delivery) for delivery in deliveries])
                pause = 0.0
            except TransportClosed:
                if self._closed.is_set():
                    return
                raise
            except TransportError as error:
                pause = min(pause * 2 or _FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
                logger.warning("no replies can be received; tried again in %.1f s: %s", pause, error)
                self._closed.wait(pause)

    def _take(self, deliveries: Sequence[Delivery]) -> None:
        now = time.monotonic()
        final: set[str] = set()
        with self._mutex:
            for delivery in deliveries:
                final.update(result.task_id for result in _results_in(delivery) if self._keep(result, now))
            self._drop_expired(now)
            self._make_room()
            self._call(final)

    # What is kept. These expect the mutex held.

    def _keep(self, result: StoredResult, now: float) -> bool:
        # True when it is final, and is news.
        task_id = result.task_id
        if task_id not in self._waiting:
            return False  # answered, or nobody here waits for it
        before = self._told.get(task_id)
        if before is not None and not may_follow(before.state, before.step, result.state, result.step):
            return False
        self._bytes += len(result.body) - (0 if before is None else len(before.body))
        if not is_final(result.state):
            self._told[task_id] = result
            return False
        del self._waiting[task_id]
        self._told.pop(task_id, None)
        self._answered[task_id] = _Answer(result, now, math.inf if result.expires is None else now + result.expires)
        return True

    def _answer(self, task_id: str) -> _Answer | None:
        return self._answered.get(task_id) or self._fetched.get(task_id)

    def _known(self, task_id: str) -> StoredResult | None:
        answer = self._answer(task_id)
        return self._told.get(task_id) if answer is None else answer.result

    def _fetch(self, task_id: str) -> StoredResult | None:
        # What is known, for somebody who gets it now.
        answer = self._answered.get(task_id)
        if answer is not None:
            self._fetched[task_id] = answer
            del self._answered[task_id]
        return self._known(task_id)

    def _final(self, ids: Iterable[str]) -> list[StoredResult]:
        found = [task_id for task_id in ids if task_id in self._answered or task_id in self._fetched]
        return [result for task_id in found if (result := self._fetch(task_id)) is not None]

    def _discard(self, task_id: str) -> None:
        known = self._known(task_id)
        if known is not None:
            self._bytes -= len(known.body)
        self._waiting.pop(task_id, None)
        self._told.pop(task_id, None)
        self._answered.pop(task_id, None)
        self._fetched.pop(task_id, None)

    def _drop_expired(self, now: float) -> None:
        # Most are kept equally long, so the first one to come is the first one to go. One behind it may stay too long
        # here, but is not told any more.
        for kept in (self._answered, self._fetched):
            while kept and next(iter(kept.values())).ends <= now:
                self._discard(next(iter(kept)))

    def _make_room(self) -> None:
        most, most_bytes = self._options.max_results, self._options.max_bytes
        dropped: set[str] = set()
        fetched = len(self._fetched)
        while len(self._waiting) + len(self._answered) + len(self._fetched) > most:
            dropped.add(self._drop_oldest())
        while self._bytes > most_bytes and len(self._answered) + len(self._fetched) > 1:
            oldest = next(iter(self._fetched or self._answered))
            self._discard(oldest)
            dropped.add(oldest)
        was_fetched = len(dropped) == fetched - len(self._fetched)
        while self._bytes > most_bytes and self._told:
            # How far a task had come: it is awaited as before, and told again when it has come further.
            _, told = self._told.popitem(last=False)
            self._bytes -= len(told.body)
        if not dropped:
            return
        if not self._has_warned and not was_fetched:
            self._has_warned = True
            logger.warning(
                "results are dropped before anybody fetched them: %s awaits or keeps %d, and %d bytes, at most. Send "
                "with ignore_result=True what you do not fetch, or raise its options max_results and max_bytes",
                self._url,
                most,
                most_bytes,
            )
        self._dropped += len(dropped)
        self._call(dropped)

    def _drop_oldest(self) -> str:
        # What was fetched first; else what was sent, or answered, before all others.
        if self._fetched:
            oldest = next(iter(self._fetched))
        else:
            sent, since = next(iter(self._waiting.items()), ("", math.inf))
            answered, answer = next(iter(self._answered.items()), ("", None))
            oldest = sent if answer is None or since < answer.came else answered
        self._discard(oldest)
        return oldest

    def _call(self, ids: set[str]) -> None:
        if ids:
            for wait in list(self._waits):
                if not wait.ids.isdisjoint(ids):
                    wait.end()

    def _check_known(self, ids: Sequence[str]) -> None:
        now = time.monotonic()
        for task_id in ids:
            answer = self._answer(task_id)
            if answer is not None and answer.ends <= now:
                self._discard(task_id)
        unknown = [task_id for task_id in ids if task_id not in self._waiting and self._answer(task_id) is None]
        if not unknown:
            return
        dropped = f", or dropped it to make room as it did with {self._dropped}" if self._dropped else ""
        raise UnknownResult(
            f"no result of task {', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''} can come to this process: "
            f"{self._url} passes results on to the process that sent the call, and to no other. This one did not send "
            f"it, sent it with ignore_result, or has forgotten it because it was told to or it expired{dropped}. To "
            f"ask in any process, {_INSTEAD}.",
            task_ids=unknown,
        )

    def _check_usable(self) -> None:
        if self._closed.is_set():
            raise BackendError(f"The result backend {self._url} was closed here; open it again.")


def _results_in(delivery: Delivery) -> list[StoredResult]:
    try:
        return read_reply(delivery.message.body)
    except MessageError as error:
        logger.warning("reply %s is dropped: %s", delivery.message.id, error)
        return []
