"""What the transports of one prefix tell each other, and which bands there are. On the I/O thread.

Every transport that consumes or looks has an exclusive queue on the fanout exchange of announcements, and hears:

    BandMade         a publisher has made the queue of a priority: whoever consumes the queue consumes it, too
    ConsumerOpened   a consumer has this name now: an earlier one of that name gives back what it holds

Which bands a queue has is looked up once per connection; from then on the announcements tell. An announcement may be
lost (the server that held our queue died), so it is looked up again now and then.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
from ekiden.message import DEFAULT_PRIORITY, HIGHEST_PRIORITY, LOWEST_PRIORITY

from ekiden_rabbitmq.connection import Channel, Connection
from ekiden_rabbitmq.declaring import Declarer
from ekiden_rabbitmq.io_thread import Reply
from ekiden_rabbitmq.topology import BindQueue, is_temporary, queue_name

LOOK_AGAIN_SECONDS = 300.0

PRIORITIES = range(LOWEST_PRIORITY, HIGHEST_PRIORITY + 1)


class BandMade(msgspec.Struct, frozen=True, tag="band"):
    """Messages of this priority have a queue of their own now."""

    queue: str
    priority: int


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
    """Hears, on one connection, and calls ``heard``. Await ``ready`` before relying on it: it may have been lost."""

    def __init__(self, connection: Connection, declarer: Declarer, heard: Callable[[Announcement], None]) -> None:
        self._connection = connection
        self._declarer = declarer
        self._heard = heard
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

    async def _subscribe(self) -> Channel:
        topology = await self._declarer.topology()
        await self._declarer.exchange(topology.announcements)
        channel = await self._connection.channel()
        name, _ = await channel.declare_queue(topology.listener_queue())
        await channel.bind(BindQueue(name, topology.announcements.name))
        await channel.consume(name, "announcements", self._arrived, no_ack=True)
        return channel

    def _arrived(self, _number: int, _redelivered: bool, _properties: bytes, body: bytes) -> None:
        try:
            announcement = _decoder.decode(body)
        except msgspec.MsgspecError:
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

    def made(self, queue: str, priority: int) -> None:
        """It was announced, or made here."""
        if not is_temporary(queue):
            self._known.setdefault(queue, {DEFAULT_PRIORITY: None})[priority] = None

    def gone(self, queue: str, priority: int) -> None:
        """It was deleted."""
        if priority != DEFAULT_PRIORITY:
            self._known.get(queue, {}).pop(priority, None)
