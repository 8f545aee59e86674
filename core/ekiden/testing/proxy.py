"""A proxy between a transport and its broker, for what goes wrong on a wire.

    with Proxy("127.0.0.1", 6379) as proxy:
        url = proxy.through("redis://127.0.0.1:6379/0")
        with proxy.frozen():
            ...  # connections stay open, and nothing comes through

It passes on bytes and knows no protocol, so it serves every broker that speaks over TCP.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 65_536
_THREADS_END_WITHIN = 5.0

REPLY_SECONDS = 0.2
"""A connection whose reply is to be lost is cut after so long if no reply comes: not every request has one."""


class Proxy:
    """Listens on a port of this host and passes on everything to ``host:port`` and back, until told otherwise.

    Each connection has two threads, one for each direction, which end with it. All methods may be called by any thread.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._flows = threading.Event()
        self._flows.set()
        self._lock = threading.Lock()  # guards what follows
        self._connections: list[_Connection] = []
        self._replies_to_lose = 0
        self._replies_lost = 0
        self._piece_bytes: int | None = None
        self._piece_seconds = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._accepting = threading.Thread(target=self._accept, name="ekiden-proxy-accepts", daemon=True)
        self._accepting.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        port: int = self._listener.getsockname()[1]
        return port

    @property
    def replies_lost(self) -> int:
        """How many replies have been lost as ``lose_next_reply`` wanted."""
        return self._replies_lost

    def through(self, url: str) -> str:
        """``url`` with this proxy for its host or hosts."""
        scheme, separator, rest = url.partition("://")
        end = min((rest.find(mark) for mark in "/?" if mark in rest), default=len(rest))
        credentials, at, _ = rest[:end].rpartition("@")
        return f"{scheme}{separator}{credentials}{at}127.0.0.1:{self.port}{rest[end:]}"

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing is passed on inside the ``with`` block, and nothing is closed; what was sent comes through later."""
        self._flows.clear()
        try:
            yield
        finally:
            self._flows.set()

    @contextmanager
    def slow(self, *, piece_bytes: int, piece_seconds: float) -> Iterator[None]:
        """Inside the ``with`` block, bytes are passed on in small pieces, with a pause after each."""
        self._piece_bytes, self._piece_seconds = piece_bytes, piece_seconds
        try:
            yield
        finally:
            self._piece_bytes = None

    def cut(self) -> None:
        """Reset every connection there is now. New ones are accepted."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.cut()

    def say(self, data: bytes) -> None:
        """Send ``data`` to every client, as if the broker had said it: while that is silent, or in its middle."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.say(data)

    def lose_next_reply(self) -> None:
        """Pass on what comes next from a client, and cut its connection before the answer."""
        with self._lock:
            self._replies_to_lose = 1

    def lose_no_reply(self) -> None:
        """Take ``lose_next_reply`` back."""
        with self._lock:
            self._replies_to_lose = 0

    def close(self) -> None:
        """Close every connection, and end every thread."""
        self._flows.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self._listener.close()
        self._accepting.join(_THREADS_END_WITHIN)
        self.cut()
        for connection in self._connections:
            connection.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # For its connections.

    def takes_the_reply(self) -> bool:
        """Whether the connection that asks has to lose the reply to what it passes on now."""
        with self._lock:
            if not self._replies_to_lose:
                return False
            self._replies_to_lose = 0
            self._replies_lost += 1
            return True

    def pass_on(self, data: bytes, receiver: socket.socket) -> None:
        """Send ``data`` when it may flow, as fast as it may."""
        self._flows.wait()
        start = 0
        while start < len(data):
            piece = self._piece_bytes or len(data)
            receiver.sendall(data[start : start + piece])
            start += piece
            if self._piece_bytes:
                time.sleep(self._piece_seconds)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                server = socket.create_connection(self._target, timeout=5.0)
            except OSError:
                _reset(client)
                continue
            server.settimeout(None)
            connection = _Connection(self, client, server)
            with self._lock:
                self._connections = [each for each in self._connections if each.is_alive]
                self._connections.append(connection)
            connection.start()


class _Connection:
    """A client's connection, and the one to the server that belongs to it."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._doomed = threading.Event()
        self._passing_on = threading.Lock()  # held while a request is passed on whose reply is to be lost
        self._threads = [
            threading.Thread(target=self._requests, name="ekiden-proxy-requests", daemon=True),
            threading.Thread(target=self._replies, name="ekiden-proxy-replies", daemon=True),
        ]
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @property
    def is_alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def start(self) -> None:
        for thread in reversed(self._threads):  # the one that passes on requests waits for the other
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(_THREADS_END_WITHIN)

    def cut(self) -> None:
        """End both sides. Each thread notices, and the last of them closes."""
        for each in (self._client, self._server):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def say(self, data: bytes) -> None:
        """Send ``data`` to the client."""
        with suppress(OSError):
            self._client.sendall(data)

    def _requests(self) -> None:
        with suppress(OSError):
            while data := self._client.recv(_CHUNK_BYTES):
                if not self._proxy.takes_the_reply():
                    self._proxy.pass_on(data, self._server)
                    continue
                with self._passing_on:
                    self._doomed.set()
                    self._proxy.pass_on(data, self._server)
                self._threads[1].join(REPLY_SECONDS)
                break
        self.cut()
        self._threads[1].join()
        _reset(self._client)
        self._server.close()

    def _replies(self) -> None:
        with suppress(OSError):
            while (data := self._server.recv(_CHUNK_BYTES)) and not self._doomed.is_set():
                self._proxy.pass_on(data, self._client)
        with self._passing_on:
            self.cut()


def _reset(connection: socket.socket) -> None:
    """Close it so that the other side is told of an error, not of an end."""
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
