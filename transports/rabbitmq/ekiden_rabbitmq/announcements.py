"""What the transports of one prefix tell each other, and which bands there are. On the I/O thread.

Every transport that consumes or looks has an exclusive queue on the fanout exchange of announcements, and hears:

    BandMade         a publisher has made the queue of a priority: whoever consumes the queue consumes it, too
    ConsumerOpened   a consumer has this name now: an earlier one of that name gives back what it holds

Which bands a queue has is looked up once per connection; from then on the announcements tell. An announcement may be
lost (the server that held our queue died), so it is looked up again now and then.

An announcement may also be forged, or late, and nothing is given up for its word alone. A consumer that opens first
makes a queue that is its connection's own, named after it (``topology.mark``); who hears of it looks whether that queue
is there, and locked. The server vouches for that: nobody can publish its answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import msgspec
import pika.exceptions
from ekiden.loggers import safe_logger
from ekiden.message import DEFAULT_PRIORITY, HIGHEST_PRIORITY, LOWEST_PRIORITY

from ekiden_rabbitmq.connection import Channel, Connection
from ekiden_rabbitmq.declaring import Declarer
from ekiden_rabbitmq.io_thread import Reply
from ekiden_rabbitmq.topology import RESOURCE_LOCKED, BindQueue, is_temporary, queue_name

logger = safe_logger("ekiden_rabbitmq")

LOOK_AGAIN_SECONDS = 300.0

PRIORITIES = range(LOWEST_PRIORITY, HIGHEST_PRIORITY + 1)


class BandMade(msgspec.Struct, frozen=True, tag="band"):
    """Messages of this priority have a queue of their own now."""

    queue: str
    priority: Annotated[int, msgspec.Meta(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)]


class ConsumerOpened(msgspec.Struct, frozen=True, tag="consumer"):
    """``name`` is this consumer's from now on; ``instance`` tells it from others of the name."""

    name: str
    instance: str


Announcement = BandMade | ConsumerOpened

_decoder = msgspec.json.Decoder(Announcement)


def encoded(announcement: Announcement) -> bytes:
    """As it is broadcast."""
    return msgspec.json.encode(announcement)


class Announcements:
    """Hears, on one connection, and calls ``heard``. Await ``ready`` before relying on it: it may have been lost.

    ``deaf`` is called when it is lost while the connection is not.
    """

    def __init__(
        self,
        connection: Connection,
        declarer: Declarer,
        *,
        heard: Callable[[Announcement], None],
        deaf: Callable[[], None],
    ) -> None:
        self._connection = connection
        self._declarer = declarer
        self._heard = heard
        self._deaf = deaf
        self._channel: Channel | None = None
        self._subscribing: Reply[None] | None = None

    async def ready(self) -> None:
        """Return when everything that is announced from now on is heard."""
        while self._channel is None or not self._channel.is_open:
            if self._subscribing is not None:
                await self._subscribing
                continue
            self._subscribing = Reply()
            try:
                self._channel = await self._subscribe()
            finally:
                subscribing, self._subscribing = self._subscribing, None
                subscribing.set(None)

    async def of_consumer(self, name: str, instance: str) -> ConsumerOpened:
        """What to announce of a consumer of this connection, once the server can vouch for it."""
        opened = ConsumerOpened(name.encode(errors="replace").decode(), instance)  # half a surrogate pair has no bytes
        topology = await self._declarer.topology()
        try:
            await self._declarer.alone(lambda channel: channel.declare_queue(topology.mark(opened.name, instance)))
        except pika.exceptions.ChannelClosedByBroker as error:
            logger.warning("what an earlier consumer named %r holds does not come back before its end: %s", name, error)
        return opened

    async def is_true(self, announcement: ConsumerOpened) -> bool:
        """Whether such a consumer has opened, and lives."""
        topology = await self._declarer.topology()
        mark = topology.mark(announcement.name, announcement.instance)
        try:
            await self._declarer.alone(lambda channel: channel.declare_queue(mark, passive=True))
        except pika.exceptions.ChannelClosedByBroker as error:
            return bool(error.reply_code == RESOURCE_LOCKED)
        return True  # a consumer of this very connection

    async def _subscribe(self) -> Channel:
        topology = await self._declarer.topology()
        await self._declarer.exchange(topology.announcements)
        channel = await self._connection.channel()
        name, _ = await channel.declare_queue(topology.listener_queue())
        await channel.bind(BindQueue(name, topology.announcements.name))
        await channel.consume(name, "announcements", self._arrived, no_ack=True)
        channel.on_closed = self._closed
        return channel

    def _closed(self, _error: BaseException) -> None:
        if self._connection.is_open:
            self._deaf()

    def _arrived(self, _number: int, _redelivered: bool, _properties: bytes, body: bytes) -> None:
        try:
            announcement = _decoder.decode(body)
        except (msgspec.MsgspecError, RecursionError):
            return  # of another version of ekiden: it is a hint, and this one does not know it
        self._heard(announcement)


class Bands:
    """The priorities of which a queue has messages of its own, at the server."""

    def __init__(self, declarer: Declarer, announcements: Announcements, prefix: str, connection: Connection) -> None:
        self._declarer = declarer
        self._announcements = announcements
        self._prefix = prefix
        self._connection = connection
        self._generation = 0
        self._known: dict[str, dict[int, None]] = {}
        self._looked: dict[str, float] = {}

    async def of(self, queue: str) -> list[int]:
        """The priorities whose queue exists, the most urgent first; the default one is always among them."""
        if is_temporary(queue):
            return [DEFAULT_PRIORITY]
        await self._announcements.ready()
        if self._generation != self._connection.generation:
            self._generation = self._connection.generation
            self._looked.clear()
        known = self._known.setdefault(queue, {DEFAULT_PRIORITY: None})
        if self._looked.get(queue, 0.0) < time.monotonic() - LOOK_AGAIN_SECONDS:
            looked = time.monotonic()
            others = [priority for priority in PRIORITIES if priority not in known]
            counts = await self._declarer.look([queue_name(self._prefix, queue, other) for other in others])
            known.update((other, None) for other, count in zip(others, counts, strict=True) if count is not None)
            self._looked[queue] = looked
        return sorted(known, reverse=True)

    def look_again(self) -> None:
        """What was announced may not have been heard."""
        self._looked.clear()

    def made(self, queue: str, priority: int) -> None:
        """It was announced. Of a queue that nobody here has asked for, it is looked up when somebody does."""
        if queue in self._known:
            self._known[queue][priority] = None

    def gone(self, queue: str, priority: int) -> None:
        """It was deleted."""
        if priority != DEFAULT_PRIORITY:
            self._known.get(queue, {}).pop(priority, None)
