"""A listener: hears one topic through an exclusive queue, which the server deletes with the connection.

The I/O thread subscribes, again after each reconnection, and appends what comes; whoever receives is woken once for
everything that came together. What is broadcast while the connection is away is not heard.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from ekiden.errors import TransportClosed, TransportCrashed, TransportError
from ekiden.locks import Flag
from ekiden.transport import Listener

from ekiden_rabbitmq import refusals
from ekiden_rabbitmq.connection import BROKER_ERRORS, Channel, Connection
from ekiden_rabbitmq.declaring import Declarer
from ekiden_rabbitmq.io_thread import Bell, IOThread, Reply
from ekiden_rabbitmq.topology import BindQueue, topic_key

CLOSES_WITHIN_SECONDS = 5.0
PAUSE_SECONDS = 0.5


class RabbitMQListener(Listener):
    """The condition guards what was heard; the channel belongs to the I/O thread."""

    def __init__(
        self,
        io: IOThread,
        connection: Connection,
        declarer: Declarer,
        topic: str,
        *,
        server: str,
        left: Callable[[RabbitMQListener], None],
    ) -> None:
        self._io = io
        self._connection = connection
        self._declarer = declarer
        self._topic = topic
        self._server = server
        self._left = left
        self._lock = threading.Lock()  # guards who closes
        self._called = Flag()
        self._heard: list[bytes] = []
        self._closed = False
        self._error: BaseException | None = None
        self._channel: Channel | None = None
        self._bell = Bell()
        self._ended: Reply[None] = Reply()
        io.at_crash(self._crashed)

    def receive(self, timeout: float) -> list[bytes]:
        give_up = time.monotonic() + timeout
        if self._closed:
            raise TransportClosed(f"The listener to topic {self._topic!r} was closed.")
        while True:
            self._called.clear()
            heard = self._heard.copy()
            del self._heard[: len(heard)]  # the I/O thread may append meanwhile
            if heard or self._closed:
                return heard
            self._io.check()
            left = give_up - time.monotonic()
            if left <= 0:
                if self._error is not None:
                    doing = f"listening to the topic {self._topic}"
                    raise refusals.refusal(self._error, self._server, doing=doing, right="read") from self._error
                return []
            self._called.wait(left)

    def close(self) -> None:
        if self.end():
            with contextlib.suppress(TransportError):  # the server is silent, and ends it with the connection
                self._io.ask(self.ended, CLOSES_WITHIN_SECONDS, what=f"{self._server}: closing a listener")
            self._left(self)

    def end(self) -> bool:
        """Hear no more; False if it was closed before. ``ended`` follows."""
        with self._lock:
            if self._closed:
                return False
            self._closed = True
        self._called.set()
        self._io.not_at_crash(self._crashed)
        return True

    async def ended(self) -> None:
        """On the I/O thread: unsubscribe."""
        self._bell.ring()
        await self._ended

    def abandon(self) -> None:
        """In a forked child: the queue is the parent's."""
        self._closed = True

    # On the I/O thread.

    def _crashed(self, _error: TransportCrashed) -> None:
        self._called.set()

    async def open(self) -> None:
        """Subscribe, and from then on whenever the connection is there again."""
        await self._subscribe()
        self._connection.add(self)
        self._io.spawn(self._keep())

    def connection_opened(self) -> None:
        """See ``connection.Member``."""
        self._bell.ring()

    def connection_lost(self, error: BaseException) -> None:
        """See ``connection.Member``."""
        self._error = error

    async def _keep(self) -> None:
        while not self._closed:
            await self._bell.wait()
            if self._must_subscribe():
                try:
                    await self._subscribe()
                except BROKER_ERRORS as error:
                    self._error = error
                    self._io.call_later(PAUSE_SECONDS, self._bell.ring)
                except Exception as error:  # noqa: BLE001 - a bug of ours: it begins anew
                    self._io.survived(error, doing=f"listening to the topic {self._topic}")
                    self._io.call_later(PAUSE_SECONDS, self._bell.ring)
        self._connection.discard(self)
        try:
            if self._channel is not None:
                await self._channel.close()
        except BROKER_ERRORS as error:
            self._error = error
        finally:
            self._ended.set(None)

    def _must_subscribe(self) -> bool:
        hears = self._channel is not None and self._channel.is_open
        return self._connection.is_open and not self._closed and not hears

    async def _subscribe(self) -> None:
        topology = await self._declarer.topology()
        await self._declarer.exchange(topology.topics)
        channel = await self._connection.channel()
        channel.on_burst = self._called.set
        channel.on_closed = lambda _error: self._bell.ring()
        name, _ = await channel.declare_queue(topology.listener_queue())
        await channel.bind(BindQueue(name, topology.topics.name, topic_key(self._topic)))
        await channel.consume(name, "listener", self._hear, no_ack=True)
        self._channel = channel
        self._error = None

    def _hear(self, _number: int, _redelivered: bool, _properties: bytes, body: bytes) -> None:
        self._heard.append(body)
