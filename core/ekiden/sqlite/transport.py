"""The transport: publishes into one SQLite file, opens its consumers, and carries its topics."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from sqlite3 import Connection
from typing import Any

from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportClosed
from ekiden.locks import release_if_held
from ekiden.message import DUPLICATE, STORED, Condition, Depth, Message, Published, PublishOutcome, Seen
from ekiden.sqlite import statements
from ekiden.sqlite.bell import Bells, of_queue, of_topic
from ekiden.sqlite.consumer import LOOK_AGAIN_SECONDS, SQLiteConsumer
from ekiden.sqlite.database import Database
from ekiden.sqlite.location import SQLiteOptions, name_in, options_in, path_in
from ekiden.sqlite.rows import MESSAGE_COLUMNS, NotAll, Row, Unreadable, existing_only, insert, message_in, row_of
from ekiden.transport import Consumer, Listener, Transport, TransportDescription
from ekiden.urls import BrokerURL

PURGED_AT_ONCE = 1000
HEARD_AT_ONCE = 1000

EVENTS_KEPT, EVENTS_KEPT_SECONDS = 10_000, 600.0
"""Broadcasts that a listener may still be behind."""

EVENTS_TRIMMED_EVERY_SECONDS = 5.0


class SQLiteTransport(Transport):
    """A broker in a file, for the processes of one machine."""

    description = TransportDescription(
        summary="a broker in one file, for all processes of one machine",
        durability="survives kill -9 of any process; with synchronous=full also power loss",
        hand_over="follow-ups are stored and the delivery is settled in one transaction",
        wake_up="a UNIX socket per waiter beside the file; with wake=poll a look at the file 50 times a second",
        shortest_lease=0.1,
        dead_consumer_noticed_within=1.0,
        wakes_within=1.0,
        url_example="sqlite:///tasks.db",
        options=SQLiteOptions,
    )

    def __init__(self, url: BrokerURL) -> None:
        options = options_in(url)
        self._url = str(url)
        self._database = Database(
            path_in(url),
            name=name_in(url),
            synchronous=options.synchronous,
            busy_timeout=options.busy_timeout,
            unavailable=BrokerUnavailable,
            refused=BrokerRefused,
            too_large=BrokerRefused,
        )
        self._bells = Bells(self._database.path, sockets=options.wake == "socket", changes=self._database.data_version)
        self._max_message_bytes = options.max_message_bytes
        self._open: set[SQLiteConsumer | SQLiteListener] = set()
        self._closed = False
        self._trim_at = 0.0

    def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
        self._check_open()
        answers: list[Published] = [STORED] * len(messages)
        rows: list[tuple[int, Row]] = []
        now = time.time()
        for index, message in enumerate(messages):
            row = row_of(message, now, max_body_bytes=self._max_message_bytes)
            if isinstance(row, BrokerRefused):
                answers[index] = Published(PublishOutcome.FAILED, row)
            else:
                rows.append((index, row))
        if rows:
            for index in self._store([row for _, row in rows], now, deadline):
                answers[rows[index][0]] = DUPLICATE
            self._bells.ring(map(of_queue, {row[0] for _, row in rows}))
        return answers

    def consumer(
        self, queues: Sequence[str], *, lease: float, prefetch: int, name: str, strict: bool = False
    ) -> Consumer:
        self._check_open()
        consumer = SQLiteConsumer(
            self._database,
            self._bells,
            queues,
            max_message_bytes=self._max_message_bytes,
            left=self._open.discard,
            lease=lease,
            prefetch=prefetch,
            name=name,
            strict=strict,
        )
        self._open.add(consumer)
        return consumer

    def browse(self, queue: str, *, after: str | None = None, limit: int = 100) -> list[Seen]:
        self._check_open()
        now = time.time()
        found: list[Seen] = []
        last = int(after) if after else -1  # the first one beside rows that are set aside, below zero, has 0
        while len(found) < limit:
            rows = self._database.read(statements.BROWSE, (queue, last, limit - len(found)))
            for row in rows:
                last, attempt, state, until = row[MESSAGE_COLUMNS:]
                condition = _condition(state, until, now)
                with contextlib.suppress(Unreadable):  # a consumer sets it aside, and says so
                    message = message_in(queue, row)
                    if condition is not None and type(attempt) is int:
                        found.append(Seen(message, condition, attempt, str(last)))
            if not rows:
                break
        return found

    def depth(self, queue: str) -> Depth:
        self._check_open()
        ((ready, delayed, leased),) = self._database.read(statements.DEPTH, (queue, time.time()))
        return Depth(ready, delayed, leased)

    def purge(self, queue: str) -> int:
        self._check_open()
        purged = 0
        for statement in statements.PURGE:
            more = True
            while more:  # others get their turn between the slices
                deleted = self._database.write(partial(_purge_some, statement, queue))
                purged += deleted
                more = deleted == PURGED_AT_ONCE
        return purged

    def broadcast(self, topic: str, payloads: Sequence[bytes]) -> None:
        self._check_open()
        if not payloads:
            return
        now = time.time()
        events = [(topic, now, payload) for payload in payloads]
        trims = time.monotonic() >= self._trim_at
        if trims:
            self._trim_at = time.monotonic() + EVENTS_TRIMMED_EVERY_SECONDS

        def store(connection: Connection) -> None:
            connection.executemany(statements.BROADCAST, events)
            if trims:
                connection.execute(statements.TRIM_EVENTS, (now - EVENTS_KEPT_SECONDS, EVENTS_KEPT))

        self._database.write(store)
        self._bells.ring((of_topic(topic),))

    def listen(self, topic: str) -> Listener:
        self._check_open()
        listener = SQLiteListener(self._database, self._bells, topic, left=self._open.discard)
        self._open.add(listener)
        return listener

    def warnings(self, queues: Sequence[str]) -> list[str]:
        self._check_open()
        return [
            f"{count} messages of queue {queue!r} could not be read and were set aside; purging the queue deletes them"
            for queue, count in self._database.read(statements.COUNT_SET_ASIDE)
            if queue in queues
        ]

    def close(self) -> None:
        self._closed = True
        for one in list(self._open):
            one.close()
        self._bells.close()
        self._database.close()

    def forget(self) -> None:
        for one in self._open:
            one.abandon()
        self._open = set()
        self._bells.forget()
        self._database.forget()

    def _store(self, rows: list[Row], now: float, deadline: float | None) -> list[int]:
        """Store ``rows`` in one transaction; returns which of them were held already."""

        def store_all(connection: Connection) -> None:
            wanted = existing_only(connection, rows, now)
            if insert(connection, wanted) != len(wanted):
                raise NotAll

        def store_each(connection: Connection) -> set[int]:
            return {id(row) for row in existing_only(connection, rows, now) if not insert(connection, [row])}

        try:
            self._database.write(store_all, deadline)
        except NotAll:
            held = self._database.write(store_each, deadline)  # one by one, to learn which
            return [index for index, row in enumerate(rows) if id(row) in held]
        return []

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"{self._url} was closed here; open it again.")


class SQLiteListener(Listener):
    """Reads the events of one topic from the moment it was made."""

    def __init__(self, database: Database, bells: Bells, topic: str, *, left: Callable[[SQLiteListener], None]) -> None:
        self._left = left
        self._database = database
        self._topic = topic
        self._receiving = threading.RLock()
        self._closed = False
        newest = database.read(statements.NEWEST_EVENT)
        self._heard_up_to = newest[0][0] if newest else 0
        self._heard_at = time.time()
        self._reopened = database.reopened
        self._bells = bells
        self._bell = bells.bell((of_topic(topic),))

    def receive(self, timeout: float) -> list[bytes]:
        give_up = time.monotonic() + timeout
        if self._closed:
            raise TransportClosed(f"The listener to topic {self._topic!r} was closed.")
        try:
            with self._receiving:
                return self._receive(give_up)
        except BaseException:
            release_if_held(self._receiving)
            raise

    def _receive(self, give_up: float) -> list[bytes]:
        while not self._closed:
            payloads = self._hear()
            if payloads:
                return payloads
            remaining = give_up - time.monotonic()
            if remaining <= 0:
                break
            self._bell.wait(min(remaining, LOOK_AGAIN_SECONDS))
        return []

    def _hear(self) -> list[bytes]:
        now = time.time()
        events = self._database.read(statements.HEAR, (self._topic, self._heard_up_to, HEARD_AT_ONCE))
        if self._reopened != self._database.reopened:
            # The file is another one than before, and counts from elsewhere.
            self._reopened = self._database.reopened
            ((self._heard_up_to,),) = self._database.read(statements.NEWEST_EVENT_BEFORE, (self._heard_at,))
            self._bells.path = self._database.path
            before, self._bell = self._bell, self._bells.bell((of_topic(self._topic),))
            before.close()
            return self._hear()
        self._heard_at = now
        if events:
            self._heard_up_to = events[-1][0]
        return [payload for _, payload in events if type(payload) is bytes]  # else another program has written it

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._bell.ring()
        try:
            with self._receiving:
                self._bell.close()
        except BaseException:
            release_if_held(self._receiving)
            raise
        self._left(self)

    def abandon(self) -> None:
        """In a forked child: the bell is the parent's."""
        self._closed = True
        self._bell.abandon()


def _purge_some(statement: str, queue: str, connection: Connection) -> int:
    return connection.execute(statement, (queue, time.time(), PURGED_AT_ONCE)).rowcount


def _condition(state: Any, until: Any, now: float) -> Condition | None:
    """None for what is in no state that a message can be in."""
    if state == statements.READY or (until is not None and type(until) is float and until <= now):
        return Condition.READY
    return {statements.DELAYED: Condition.DELAYED, statements.LEASED: Condition.LEASED}.get(state)
