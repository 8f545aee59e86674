"""Following a feed: the one way in which anything here is told of what others did, at three levels.

    change stream   a replica set or a sharded cluster says what was inserted
    tailable cursor where there are no change streams (one server alone), on a capped collection
    poll            where there is neither: it is looked every few milliseconds, then more and more seldom

The best level that the server has is found by trying, and left when it turns out not to work; ``Watch.degraded`` says
why. After some minutes it is tried again.

What our own code raises in the thread (a bug) is said in the log with where it was raised, counts as trouble, and
following begins anew: whoever waits is told by ``Watch.trouble``, and nobody waits for a thread that is dead.

A watch has a thread only while somebody wants to be told, and for ``LINGER_SECONDS`` afterwards, so that who waits
again and again opens nothing again. One request of the thread lasts up to ``AWAIT_SECONDS``; whoever ends it does so by
having the server kill the cursor.

What was inserted while nobody wanted to be told need not be told. Each time that following begins, ``opened`` is
called: what happens after it is told, so what was to be known of the time before is to be asked for then.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from random import random
from typing import Any, Protocol

import pymongo
from ekiden.errors import EkidenError
from ekiden.locks import Flag, start_thread
from ekiden.loggers import safe_logger
from pymongo import CursorType
from pymongo.collection import Collection
from pymongo.command_cursor import CommandCursor
from pymongo.cursor import Cursor
from pymongo.errors import ConnectionFailure, OperationFailure, PyMongoError
from pymongo.read_concern import ReadConcern

from ekiden_mongodb.feeds import Document, Feed, Position

logger = safe_logger(__name__)

AWAIT_SECONDS = 5.0
"""The longest that a server is asked to wait for news in one request."""

FIRST_AWAIT_SECONDS = 0.25
"""The first such request on a tailable cursor; the next ones are twice as long."""

LINGER_SECONDS = 3.0

SHORTEST_POLL_SECONDS, LONGEST_POLL_SECONDS = 0.005, 0.5

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.05, 1.0
"""After trouble, before following begins again."""

TRIED_AGAIN_SECONDS = 300.0
"""After so long at a lower level the higher ones are tried again."""

_KILLED_WITHIN_SECONDS = 1.0
_CLOSED_WITHIN_SECONDS = 5.0
_LATE_SHARE = 0.9
_MOST_LATE, _MOST_IN_VAIN = 2, 10

_TEMPORARY = frozenset({6, 7, 11, 18, 43, 50, 63, 89, 91, 133, 136, 175, 189, 202, 237, 262, 286, 462, 9001})
_TEMPORARY |= frozenset({10107, 11600, 11602, 13388, 13435, 13436})
"""A server that refuses to open a cursor with one of these may do it later; with another one it never will."""


class _Stream(Protocol):
    """One level, opened."""

    def next(self) -> list[Document]:
        """What has come, or nothing after some seconds. Raises what pymongo raises, and _Ended."""
        ...

    def interrupt(self) -> None:
        """Have ``next`` return or fail soon. Called by another thread."""
        ...

    def close(self) -> None:
        """Tell the server that it is over."""
        ...


class _Ended(Exception):
    """A cursor is over: what it was on is gone, or somebody killed it."""


class _Unsuitable(Exception):
    """This level does not work here; the text says why."""


class _ChangeStream:
    """The insertions into a collection, as a change stream tells them once a majority has them."""

    def __init__(self, position: Position, collection: Collection[Document], await_seconds: float) -> None:
        matching = {f"fullDocument.{name}": value for name, value in position.matching.items()}
        stages: list[Mapping[str, Any]] = [
            {"$changeStream": {}},
            {"$match": {"operationType": "insert", **matching}},
            {"$project": {"fullDocument": 1}},
        ]
        self._collection = collection
        self._missed: list[Document] | None = None
        self._position = position
        self._await_seconds = await_seconds
        self._in_vain = 0
        self._interrupted = Flag()
        # Change streams read what a majority has, and servers take no other word for it.
        self._cursor: CommandCursor[Document] = collection.with_options(read_concern=ReadConcern()).aggregate(
            stages, maxAwaitTimeMS=round(await_seconds * 1000), batchSize=1000
        )

    def next(self) -> list[Document]:
        if self._missed is None:  # since it was opened nothing is missed; before, something may have been
            self._missed = self._position.unseen()
            return self._missed
        asked = time.monotonic()
        change = self._cursor.try_next()
        if change is not None:
            self._in_vain = 0
            return self._position.passed([change["fullDocument"]])
        if not self._cursor.alive:
            raise _Ended
        # Some that work alike answer with nothing whenever anybody writes anything, and would be asked without a pause.
        self._in_vain = self._in_vain + 1 if time.monotonic() - asked < self._await_seconds / 2 else 0
        if self._in_vain > _MOST_IN_VAIN:
            self._interrupted.wait(SHORTEST_POLL_SECONDS)
        return []

    def interrupt(self) -> None:
        self._interrupted.set()
        _kill(self._collection, self._cursor)

    def close(self) -> None:
        self._cursor.close()


class _Tail:
    """A tailable cursor that waits at the end of a capped collection.

    Its first requests are short, until it is seen that this server wakes it: not all that take such cursors do.
    """

    def __init__(self, position: Position, collection: Collection[Document], await_seconds: float) -> None:
        self._collection = collection
        self._position = position
        self._longest_await = await_seconds
        self._await_seconds = min(FIRST_AWAIT_SECONDS, await_seconds)
        self._late = 0
        self._open()

    def _open(self) -> None:
        self._cursor: Cursor[Document] = self._collection.find(
            self._position.query, cursor_type=CursorType.TAILABLE_AWAIT
        ).max_await_time_ms(round(self._await_seconds * 1000))
        self._first: Document | None = next(self._cursor, None)

    def next(self) -> list[Document]:
        asked = time.monotonic()
        found, self._first = self._first or next(self._cursor, None), None
        waited = time.monotonic() - asked
        if found is not None:
            self._check_it_wakes(waited)
            return self._position.passed([found])
        if not self._cursor.alive:
            raise _Ended
        if self._await_seconds < self._longest_await and waited >= self._await_seconds / 2:
            self._cursor.close()
            self._await_seconds = min(self._await_seconds * 2, self._longest_await)
            self._open()
        return []

    def _check_it_wakes(self, waited: float) -> None:
        """A server that says what has come only when it would have said that nothing has does not wake anybody."""
        if waited >= _LATE_SHARE * self._await_seconds:
            self._late += 1
            if self._late >= _MOST_LATE:
                raise _Unsuitable("its tailable cursors do not wake when something is inserted")
        elif waited > SHORTEST_POLL_SECONDS:
            self._late = 0

    def interrupt(self) -> None:
        _kill(self._collection, self._cursor)

    def close(self) -> None:
        self._cursor.close()


class _Poll:
    """Looks again and again, the more seldom the longer nothing has come."""

    def __init__(self, position: Position, collection: Collection[Document], longest_pause: float) -> None:
        self._position = position
        self._longest_pause = longest_pause
        self._pause = 0.0
        self._woken = Flag()

    def next(self) -> list[Document]:
        if self._woken.wait(self._pause):
            self._woken.clear()
            self._pause = 0.0
        found = self._position.unseen()
        self._pause = (
            SHORTEST_POLL_SECONDS if found else min(max(self._pause * 1.5, SHORTEST_POLL_SECONDS), self._longest_pause)
        )
        return found

    def interrupt(self) -> None:
        self._woken.set()

    def close(self) -> None:
        return


Level = type[_ChangeStream] | type[_Tail] | type[_Poll]

LEVELS: tuple[Level, ...] = (_ChangeStream, _Tail, _Poll)
LEVEL_NAMES: dict[Level, str] = {_ChangeStream: "change stream", _Tail: "tailable cursor", _Poll: "poll"}


class Watch:
    """Tells what is inserted into a feed, in a thread of its own, while somebody wants to be told.

    ``told`` gets new documents in order, and none when none came for some seconds. ``opened`` is called each time that
    following begins, ``stopped`` each time that it has ended or could not begin. All are called by the thread, which
    they must not hold up for long; the first two may raise what the client raises: then following begins anew.
    With a ``position`` each document is told once, also what was inserted between two times of following; without, what
    was inserted shortly before following began is told as well, perhaps again.
    ``_lock`` guards all that the thread and others share.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        thread_name: str,
        told: Callable[[Sequence[Document]], None],
        opened: Callable[[], None] = lambda: None,
        stopped: Callable[[], None] = lambda: None,
        position: Position | None = None,
        longest_poll: float = LONGEST_POLL_SECONDS,
        levels: Sequence[Level] = LEVELS,
    ) -> None:
        self._feed = feed
        self._thread_name = thread_name
        self._told = told
        self._opened = opened
        self._stopped = stopped
        self._position = position
        self._levels = tuple(levels)
        self._longest_poll = longest_poll
        self._await_seconds = min(AWAIT_SECONDS, feed.client.options.timeout / 2)
        self._degraded: list[str] = []
        self._degraded_at = 0.0
        self._trouble: EkidenError | None = None
        self._trouble_since = 0.0
        self._start_anew()

    def _start_anew(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stream: _Stream | None = None
        self._matching: Mapping[str, Any] = {}
        self._wanting = 0
        self._wanted_until = 0.0
        self._is_closed = False
        self._called = Flag()  # the thread pauses: it is to go on

    @property
    def level(self) -> str:
        """How it follows, or would: "change stream", "tailable cursor" or "poll"."""
        return LEVEL_NAMES[self._level()]

    @property
    def degraded(self) -> list[str]:
        """Why it does not follow by the levels above: one reason for each."""
        return list(self._degraded)

    def trouble(self, for_seconds: float) -> EkidenError | None:
        """Why nothing could be followed for so long now; None when something is, or might be."""
        trouble = self._trouble
        return trouble if trouble is not None and time.monotonic() - self._trouble_since >= for_seconds else None

    def want(self, matching: Mapping[str, Any]) -> None:
        """From now on be told of documents that match, until ``leave`` is called as often as this was."""
        with self._lock:
            if self._is_closed:
                return
            self._wanting += 1
            stream = None
            if matching != self._matching:
                self._matching = matching
                stream = self._stream
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._thread_name, daemon=True)
                start_thread(thread)
                self._thread = thread
            elif isinstance(self._stream, _Poll):
                self._stream.interrupt()
        if stream is not None:
            stream.interrupt()

    def leave(self) -> None:
        """Somebody who wanted to be told does so no more."""
        with self._lock:
            self._wanting -= 1
            self._wanted_until = time.monotonic() + LINGER_SECONDS

    def close(self) -> None:
        """End the thread. May be called again."""
        with self._lock:
            self._is_closed = True
            thread, stream = self._thread, self._stream
            self._called.set()
        if stream is not None:
            stream.interrupt()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSED_WITHIN_SECONDS)

    def abandon(self) -> None:
        """In a forked child: the thread and its cursor are the parent's."""
        self._start_anew()

    # What the thread does.

    def _run(self) -> None:
        tries = 0
        self._trouble = None
        while self._goes_on():
            try:
                self._follow()
                tries = 0
            except EkidenError as error:
                tries = self._pause_after(error, tries)
            except BaseException as bug:  # whatever it is, nobody would follow any more
                logger.critical("the thread %s has failed and begins anew: %r", self._thread_name, bug, exc_info=bug)
                tries = self._pause_after(self._feed.client.errors.crashed(self._thread_name, bug), tries)

    def _pause_after(self, error: EkidenError, tries: int) -> int:
        """Note trouble, and wait before the next try; how many there were."""
        if self._trouble is None:
            self._trouble_since = time.monotonic()
        self._trouble = error
        try:
            self._stopped()
        except Exception as bug:
            logger.critical("the thread %s has failed and goes on: %r", self._thread_name, bug, exc_info=bug)
        pause = min(FIRST_PAUSE_SECONDS * 2.0 ** min(tries, 10), LONGEST_PAUSE_SECONDS)
        self._called.wait(pause * (0.5 + random() / 2))
        return tries + 1

    def _goes_on(self) -> bool:
        """Whether to follow at all; when not, the thread is over."""
        with self._lock:
            if self._is_wanted():
                return True
            self._thread = None
            return False

    def _is_wanted(self) -> bool:
        return not self._is_closed and (self._wanting > 0 or time.monotonic() < self._wanted_until)

    def _follow(self) -> None:
        """Until it is over, fails, or something else is wanted."""
        client = self._feed.client
        level, matching = self._level(), self._matching
        position = self._position or Position(self._feed, matching)
        try:
            with client.asking():
                self._feed.make()
                stream = _opened(level, position, self._longest_poll if level is _Poll else self._await_seconds)
        except _Unsuitable as reason:
            self._degrade(level, reason)
            return
        try:
            with self._lock:
                self._stream = stream
            self._opened()
            self._trouble = None
            while matching == self._matching and self._is_wanted():
                with client.asking():
                    found = stream.next()
                self._told(found)
        except _Unsuitable as reason:
            self._degrade(level, reason)
        except _Ended:
            self._feed.make_again()
            self._called.wait(FIRST_PAUSE_SECONDS)
        finally:
            self._stopped()
            with self._lock:
                self._stream = None
            with contextlib.suppress(PyMongoError), pymongo.timeout(_KILLED_WITHIN_SECONDS):
                stream.close()

    def _level(self) -> Level:
        if self._degraded and time.monotonic() - self._degraded_at >= TRIED_AGAIN_SECONDS:
            self._degraded = []
        return self._levels[min(len(self._degraded), len(self._levels) - 1)]

    def _degrade(self, level: Level, reason: _Unsuitable) -> None:
        self._degraded.append(f"{LEVEL_NAMES[level]}: {reason}")
        self._degraded_at = time.monotonic()


def probe(feed: Feed) -> list[str]:
    """Why this server cannot be followed by the best levels: one reason for each, none where the first one works.

    That a tailable cursor is taken does not say that it wakes. Raises what pymongo and the client raise.
    """
    reasons: list[str] = []
    feed.make()
    position = Position(feed, {})
    for level in LEVELS:
        try:
            _opened(level, position, FIRST_AWAIT_SECONDS).close()
        except _Unsuitable as reason:
            reasons.append(f"{LEVEL_NAMES[level]}: {reason}")
        else:
            break
    return reasons


def _opened(level: Level, position: Position, seconds: float) -> _Stream:
    """Raises _Unsuitable where a server will never take this."""
    try:
        return level(position, position.feed.collection, seconds)
    except OperationFailure as error:
        if level is _Poll or error.code in _TEMPORARY or _is_passing(error):
            raise
        said = str((error.details or {}).get("errmsg") or error).rstrip(".")
        raise _Unsuitable(said) from error


def _is_passing(error: OperationFailure) -> bool:
    return isinstance(error, ConnectionFailure) or any(
        error.has_error_label(label)
        for label in ("ResumableChangeStreamError", "RetryableWriteError", "RetryableError")
    )


def _kill(collection: Collection[Document], cursor: CommandCursor[Document] | Cursor[Document]) -> None:
    """End the request that another thread makes with a cursor. Where that fails, the request ends by itself."""
    if cursor.cursor_id:
        with contextlib.suppress(PyMongoError), pymongo.timeout(_KILLED_WITHIN_SECONDS):
            collection.database.command("killCursors", collection.name, cursors=[cursor.cursor_id])
