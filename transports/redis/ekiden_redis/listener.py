"""Hears what is broadcast on a topic: reads its stream from where it was when the listener was made.

A stream remembers about as many events as ``EVENTS_KEPT``, so a listener that was cut off for a while misses nothing.
"""

from __future__ import annotations

import math
import selectors
import threading
import time
from collections.abc import Callable

import hiredis
from ekiden.errors import TransportClosed
from ekiden.transport import Listener

from ekiden_redis.client import Client
from ekiden_redis.connection import Connection, pack_command
from ekiden_redis.doorbell import Knocker
from ekiden_redis.errors import TROUBLE
from ekiden_redis.servers import Server

EVENTS_KEPT, EVENTS_KEPT_MS = b"10000", b"600000"
"""Broadcasts that a listener may be behind, and how long a stream lives on after the last one."""

_HEARD_AT_ONCE = 1000
_BLOCK_SECONDS = 5.0
_BEFORE_ALL = b"0-0"


class RedisListener(Listener):
    """One topic, from one thread; ``close`` by any.

    ``_last`` is the id of the last event that it has heard, or need not hear.
    """

    def __init__(self, client: Client, topic: str, key: bytes, *, left: Callable[[RedisListener], None]) -> None:
        self._client = client
        self._topic = topic
        self._key = key
        self._left = left
        self._server: Server | None = None
        self._connection: Connection | None = None
        self._receiving = threading.Lock()
        self._closed = False
        self._knocker = Knocker()
        try:
            self._last = self._newest()
        except BaseException:
            self._knocker.close()
            raise

    def receive(self, timeout: float) -> list[bytes]:
        give_up = time.monotonic() + timeout
        if self._closed:
            raise TransportClosed(f"The listener to topic {self._topic!r} was closed.")
        with self._receiving:
            heard: list[bytes] = []
            while not self._closed:
                left = give_up - time.monotonic()
                heard = self._read(min(left, _BLOCK_SECONDS))
                if heard or left <= 0:
                    break
            return heard

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._knocker.knock()
        with self._receiving:
            self._hang_up()
            self._knocker.close()
        self._left(self)

    def abandon(self) -> None:
        """In a forked child: the connections are the parent's."""
        self._closed = True
        self._receiving = threading.Lock()
        self._hang_up()
        self._knocker.close()

    def _read(self, seconds: float) -> list[bytes]:
        """The events behind the last one; waits for some if there are none, and ``seconds`` are left."""
        deadline = self._client.deadline() + max(0.0, seconds)
        command = [b"XREAD", b"COUNT", b"%d" % _HEARD_AT_ONCE]
        if seconds > 0:
            command += [b"BLOCK", b"%d" % math.ceil(seconds * 1000)]
        try:
            connection = self._connected(deadline)
            connection.send(pack_command((*command, b"STREAMS", self._key, self._last)), deadline)
            if not self._wait(connection, deadline):
                self._hang_up()
                return []
            reply = connection.read(deadline)
            if isinstance(reply, hiredis.ReplyError):
                if self._client.errors.is_wrong_type(str(reply)):
                    self._hang_up()  # connecting anew asks for the newest event, and sets aside what is there instead
                    return []
                raise reply
        except TROUBLE as error:
            self._hang_up()
            raise self._client.failed(error, self._server) from error
        if not reply:
            return []
        ((_, events),) = reply
        self._last = events[-1][0]
        return [fields[1] for _, fields in events if fields and fields[0] == b""]  # others are somebody else's

    def _wait(self, connection: Connection, deadline: float) -> bool:
        """Wait for an answer, or for ``close``; whether it is the former."""
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(self._knocker, selectors.EVENT_READ)
            selector.select(max(0.0, deadline - time.monotonic()))
        return not self._closed

    def _connected(self, deadline: float) -> Connection:
        if self._connection is None:
            # This server may know less than the one before: a replica that has become the master, or one that has
            # lost its data. What comes next may then have a lower id than what was heard last.
            self._last = min(self._last, self._newest(), key=_order)
            self._server = self._client.server(self._key, deadline)
            self._connection = self._server.connect(deadline)
        return self._connection

    def _newest(self) -> bytes:
        """The id of the newest event in the stream."""
        newest = self._client.command(b"XREVRANGE", self._key, b"+", b"-", b"COUNT", b"1", key=self._key)
        return newest[0][0] if newest else _BEFORE_ALL

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _order(event_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = event_id.partition(b"-")
    return int(milliseconds), int(number)
