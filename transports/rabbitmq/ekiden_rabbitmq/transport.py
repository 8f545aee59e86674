"""The transport: two connections in one I/O thread, and what is asked of a RabbitMQ server over them.

    publishing    messages, broadcasts, announcements, and the queues and exchanges that they need. An alarm at the
                  server (memory, disk) blocks it
    consuming     consumers, listeners, and all that is asked: it publishes nothing, so the server never blocks it, and
                  a full server can be looked at, purged and drained

Both are opened when they are first needed. To read on: ``io_thread`` and ``connection``, then ``publishing``, then
``consumer``, ``intake`` and ``subscribing``.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from ekiden.errors import TransportClosed, TransportError
from ekiden.loggers import safe_logger
from ekiden.message import (
    STORED,
    Depth,
    Message,
    Published,
    PublishOutcome,
    Seen,
    new_id,
)
from ekiden.transport import Consumer, Listener, Transport, TransportDescription
from ekiden.urls import BrokerURL

from ekiden_rabbitmq import refusals
from ekiden_rabbitmq.announcements import Announcement, Announcements, BandMade, Bands, ConsumerOpened, encoded
from ekiden_rabbitmq.browsing import Cursors, browse
from ekiden_rabbitmq.connection import BROKER_ERRORS, Connection
from ekiden_rabbitmq.consumer import CLOSES_WITHIN_SECONDS, RabbitMQConsumer
from ekiden_rabbitmq.declaring import Declarer
from ekiden_rabbitmq.intake import Intake
from ekiden_rabbitmq.io_thread import IOThread, Work, start
from ekiden_rabbitmq.listener import RabbitMQListener
from ekiden_rabbitmq.options import RabbitMQOptions, connection_parameters, options_in
from ekiden_rabbitmq.publishing import Batch, Parcel, Publisher, ToQueue, ToTopic, ToTransports
from ekiden_rabbitmq.sources import Sources
from ekiden_rabbitmq.topology import queue_name
from ekiden_rabbitmq.warnings import delivery_limits, warnings_about

logger = safe_logger("ekiden_rabbitmq")

T = TypeVar("T")

GOODBYE_WITHIN_SECONDS = 2.0

ANY_RIGHT = "configure, write or read"
"""One of them is enough to look at a queue, where looking takes a right at all (4.3)."""


class RabbitMQTransport(Transport):
    """A virtual host of a RabbitMQ server or cluster."""

    description = TransportDescription(
        summary="a RabbitMQ server or cluster, 3.10 and newer",
        durability="confirmed by the server: with quorum queues by a majority of its cluster, on disk",
        hand_over="follow-ups are confirmed, then the delivery is settled: a crash in between repeats it",
        wake_up="the server pushes",
        shortest_lease=1.0,
        dead_consumer_noticed_within=60.0,
        wakes_within=0.5,
        connection_is_lease=True,
        names_duplicates=False,
        browsing_counts=True,
        purges_delayed=False,
        browses_delayed=False,
        browses_leased=False,
        counts_delayed=False,
        counts_leased=False,
        url_example="amqp://guest:guest@localhost:5672/%2F",
        options=RabbitMQOptions,
    )

    def __init__(self, url: BrokerURL) -> None:
        self._url = url
        self._server = str(url)
        self._options = options_in(url)
        self._closed = False
        connection_parameters(url, self._options, purpose="publishing")
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._begin_io()

    def _begin_io(self) -> None:
        """An I/O thread, and what belongs to it: at first, in a forked child, and after the last one has crashed."""
        options = self._options
        self._open: dict[RabbitMQConsumer | RabbitMQListener, None] = {}
        self._intakes: dict[tuple[str, str], Intake] = {}
        self._io = io = IOThread()
        self._publishing = self._connection("publishing")
        self._consuming = self._connection("consuming")
        self._publisher = Publisher(io, self._publishing, options, server=self._server)
        self._declarer = Declarer(self._consuming, options)
        self._announcements = Announcements(self._consuming, self._declarer, heard=self._heard, deaf=self._deaf)
        self._bands = Bands(self._declarer, self._announcements, options.prefix, self._consuming)
        self._cursors = Cursors()
        for connection in (self._publishing, self._consuming):
            io.at_crash(lambda _error, connection=connection: connection.drop())  # type: ignore[misc]

    def _connection(self, purpose: str) -> Connection:
        # When it connects, not now: after a fork this runs where every millisecond counts.
        parameters = functools.partial(connection_parameters, self._url, self._options, purpose=purpose)
        return Connection(self._io, parameters, name=purpose)

    def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
        self._check_open()
        errors = self._publisher.publish([Parcel(ToQueue(message)) for message in messages], deadline=deadline)
        return [STORED if error is None else Published(PublishOutcome.FAILED, error) for error in errors]

    def consumer(
        self, queues: Sequence[str], *, lease: float, prefetch: int, name: str, strict: bool = False
    ) -> Consumer:
        self._check_open()
        lock = threading.RLock()
        intake = Intake(
            self._io,
            self._consuming,
            self._declarer,
            self._bands,
            self._publisher,
            sources=Sources(queues, strict=strict),
            prefix=self._options.prefix,
            prefetch=prefetch,
            lock=lock,
        )
        instance = new_id()
        try:
            self._ask(lambda: self._open_consumer(intake, name, instance), doing=f"consuming {', '.join(queues)}")
        except TransportError:
            self._io.post(intake.abandon)  # its opening may go on
            raise
        consumer = RabbitMQConsumer(
            self._io,
            intake,
            self._publisher,
            lock=lock,
            server=self._server,
            name=name,
            prefetch=prefetch,
            timeout=self._options.timeout,
            left=lambda consumer: self._left(consumer, (name, instance)),
        )
        self._open[consumer] = None
        return consumer

    def browse(self, queue: str, *, after: str | None = None, limit: int = 100) -> list[Seen]:
        self._check_open()
        doing = f"browsing the queue {queue}"
        return self._ask(lambda: self._browse(queue, after, limit), doing=doing, right="read")

    def depth(self, queue: str) -> Depth:
        self._check_open()
        return self._ask(lambda: self._depth(queue), doing=f"looking at the queue {queue}", right=ANY_RIGHT)

    def purge(self, queue: str) -> int:
        self._check_open()
        return self._ask(lambda: self._purge(queue), doing=f"purging the queue {queue}", right="read")

    def broadcast(self, topic: str, payloads: Sequence[bytes]) -> None:
        self._check_open()
        for error in self._publisher.publish([Parcel(ToTopic(topic, payload)) for payload in payloads]):
            if error is not None:
                raise error

    def listen(self, topic: str) -> Listener:
        self._check_open()
        listener = RabbitMQListener(
            self._io, self._consuming, self._declarer, topic, server=self._server, left=self._left
        )
        try:
            self._ask(listener.open, doing=f"listening to the topic {topic}", right="read")
        except TransportError:
            listener.abandon()  # its opening may go on
            raise
        self._open[listener] = None
        return listener

    def warnings(self, queues: Sequence[str]) -> list[str]:
        self._check_open()
        return self._ask(lambda: self._warnings(queues), doing="looking at how the server is set up", right=ANY_RIGHT)

    def delivery_limits(self, queues: Sequence[str]) -> dict[str, int]:
        self._check_open()
        doing = "looking at how queues were declared"
        return self._ask(
            lambda: self._look(lambda declarer: delivery_limits(queues, declarer, self._options)),
            doing=doing,
            right=ANY_RIGHT,
        )

    @property
    def longest_hold(self) -> float | None:
        server = self._consuming.server or self._publishing.server
        classic = self._options.queue_type == "classic"
        if classic and server is not None and not server.differences.classic_consumer_timeout:
            return None
        return self._options.consumer_timeout

    def stalled(self) -> str | None:
        seconds = self._io.stalled()
        return None if seconds is None else f"{self._server}: the I/O thread has not moved for {seconds:.0f} s"

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        ending = [one for one in list(self._open) if one.end()]
        self._open.clear()
        with contextlib.suppress(TransportError):  # it is silent, or our loop has failed: both were told to who asked
            self._io.ask(lambda: self._end_all(ending), CLOSES_WITHIN_SECONDS, what="closing")
        with contextlib.suppress(TransportError):
            self._io.ask(self._close_connections, 2 * GOODBYE_WITHIN_SECONDS, what="closing")
        self._io.stop()

    def forget(self) -> None:
        for one in self._open:
            one.abandon()
        # The parent's sockets and its loop are left alone: nothing of them is closed, written to, or even collected,
        # because a coroutine that is collected runs to its end.
        self._left_behind = dict(vars(self))
        self._begin()

    # On the I/O thread.

    async def _open_consumer(self, intake: Intake, name: str, instance: str) -> None:
        await intake.open()
        if intake.is_closing:
            return
        self._intakes[name, instance] = intake
        announcement = await self._announcements.of_consumer(name, instance)
        # Not waited for: while the server blocks publishers, consumers can be opened.
        self._publisher.begin(Batch([Parcel(ToTransports(encoded(announcement)))]))

    def _heard(self, announcement: Announcement) -> None:
        match announcement:
            case BandMade(queue, priority):
                self._bands.made(queue, priority)
                for intake in self._intakes.values():
                    intake.band_made(queue)
            case ConsumerOpened(name, instance):
                earlier = [key for key in self._intakes if key[0] == name and key[1] != instance]
                if earlier:
                    self._io.spawn(self._give_way(announcement, earlier))

    def _deaf(self) -> None:
        self._bands.look_again()
        for intake in self._intakes.values():
            intake.look_again()

    async def _give_way(self, to: ConsumerOpened, earlier: Sequence[tuple[str, str]]) -> None:
        try:
            is_true = await self._announcements.is_true(to)
        except BROKER_ERRORS:
            return  # the connection is lost, and what was held on it
        if not is_true:
            logger.warning("a consumer named %r is announced that there is not", to.name)
            return
        for key in earlier:
            if key in self._intakes:
                self._intakes[key].give_up_what_is_held()

    async def _names(self, queue: str) -> dict[str, int]:
        """The names at the server of a queue's bands, by their priority, the most urgent first."""
        return {queue_name(self._options.prefix, queue, priority): priority for priority in await self._bands.of(queue)}

    async def _depth(self, queue: str) -> Depth:
        counts = await self._declarer.look(list(await self._names(queue)))
        return Depth(sum(count or 0 for count in counts), None, None)

    async def _purge(self, queue: str) -> int:
        names = await self._names(queue)
        counts = await self._declarer.look(list(names))
        purged = 0
        for name, count in zip(names, counts, strict=True):
            if count is not None:
                purged += await self._declarer.alone(lambda channel, name=name: channel.purge(name))  # type: ignore[misc]
        return purged

    async def _browse(self, queue: str, after: str | None, limit: int) -> list[Seen]:
        names = await self._names(queue)
        counts = await self._declarer.look(list(names))
        there = {name: names[name] for name, count in zip(names, counts, strict=True) if count}
        return await browse(self._consuming, self._cursors, queue, there, after=after, limit=limit)

    async def _warnings(self, queues: Sequence[str]) -> list[str]:
        def ask(declarer: Declarer) -> Work[list[str]]:
            return warnings_about(queues, declarer, self._options, publishing=self._publishing, url=self._server)

        return await self._look(ask)

    async def _look(self, ask: Callable[[Declarer], Work[T]]) -> T:
        """Ask on a connection of its own, where an answer that ends the connection harms nobody."""
        connection = self._connection("looking")
        try:
            return await ask(Declarer(connection, self._options))
        finally:
            await connection.close(GOODBYE_WITHIN_SECONDS)

    async def _end_all(self, ending: Sequence[RabbitMQConsumer | RabbitMQListener]) -> None:
        for one in [start(one.ended()) for one in ending]:
            await one

    async def _close_connections(self) -> None:
        closing = [start(one.close(GOODBYE_WITHIN_SECONDS)) for one in (self._publishing, self._consuming)]
        for one in closing:
            await one

    # Any thread.

    def _ask(self, make: Callable[[], Work[T]], *, doing: str, right: str = "") -> T:
        try:
            return self._io.ask(make, self._options.timeout, what=f"{self._server}: {doing}")
        except TransportError:
            raise
        except BROKER_ERRORS as error:
            raise refusals.refusal(error, self._server, doing=doing, right=right) from error

    def _left(self, one: RabbitMQConsumer | RabbitMQListener, key: tuple[str, str] | None = None) -> None:
        self._open.pop(one, None)
        if key is not None:
            self._intakes.pop(key, None)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed(f"{self._server} was closed here; open it again.")
        if self._io.has_crashed:
            with self._lock:
                if self._io.has_crashed:
                    self._begin_io()
