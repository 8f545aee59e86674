"""One connection to one server: redis-py opens it, and what is said over it afterwards goes the short way.

redis-py does the handshake (HELLO, AUTH, SELECT) over a socket that is made here. Commands are then packed and
replies parsed by hiredis, directly: redis-py's client takes four times the processor time for each command, does not
end a call at one deadline, and tries again by itself where that is not harmless.
"""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import hiredis
import msgspec
from redis.connection import AbstractConnection

from ekiden_redis.errors import NoTLS, NotSaid, Overdue

Part = bytes | str | int | float
"""What a command consists of."""

pack_command: Callable[[tuple[Part, ...]], bytes] = cast(Any, hiredis.pack_command)
"""A command as it is sent."""

Reply = Any
"""What a server answered: bytes, int, None, a list of such, or a hiredis.ReplyError, which is returned, not raised."""

FIRST_WITH_SHARD_CHANNELS = 7

_READ_AT_ONCE = 65536
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_NOT_ALL_THERE = object()
_NOT_NOW = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Address(msgspec.Struct, frozen=True):
    """One server: a host and port, or the path of a UNIX socket."""

    host: str = ""
    port: int = 0
    path: str | None = None

    def __str__(self) -> str:
        return f"Redis at {self.path or f'{self.host}:{self.port}'}"


class Access(msgspec.Struct, frozen=True):
    """Who we are for a server, and how we talk to it. Never show its fields."""

    username: str | None = None
    password: str | None = None
    database: int = 0
    context: ssl.SSLContext | None = None
    server_hostname: str | None = None

    def __repr__(self) -> str:
        return "<Access>"


class Connection:
    """A connection that is ready for commands. One thread uses it at a time.

    Deadlines are on the monotonic clock. What it raises (OSError, NotSaid, hiredis.ProtocolError, redis.RedisError)
    is explained by ``errors.Errors``; after that it must be closed.
    """

    def __init__(self, address: Address, access: Access, deadline: float, *, protocol: int = 2) -> None:
        self.address = address
        self._socket = _open(address, access, deadline)
        try:
            handshake = _Handshake(self._socket, address, access, seconds=_left(deadline), protocol=protocol)
            # It is kept because it closes the socket when it is deleted. Its type hints are not complete.
            self._handshake = cast(Any, handshake)
            self._handshake.connect()
        except BaseException:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self._tls = self._socket if isinstance(self._socket, ssl.SSLSocket) else None
        self._descriptor = self._socket.fileno()
        self._reader: Any = hiredis.Reader(notEnoughData=_NOT_ALL_THERE)
        self._buffer = bytearray(_READ_AT_ONCE)
        self.used_at = time.monotonic()

    def send(self, packed: bytes, deadline: float) -> None:
        """Send one or more packed commands."""
        sent = 0
        while sent < len(packed):
            try:
                sent += self._socket.send(memoryview(packed)[sent:] if sent else packed)
            except _NOT_NOW as trouble:
                self._wait(deadline, sending=not isinstance(trouble, ssl.SSLWantReadError))

    def read(self, deadline: float) -> Reply:
        """The next reply."""
        reader = self._reader
        reply = reader.gets()
        while reply is _NOT_ALL_THERE:
            if not self._has_pending():
                self._wait(deadline)
            self._receive(deadline)
            reply = reader.gets()
        return reply

    def read_arrived(self) -> list[Reply]:
        """Every reply that has arrived, without waiting for one. Call it when the file descriptor is readable."""
        replies = []
        size = _READ_AT_ONCE
        while size == _READ_AT_ONCE or self._has_pending():  # a buffer that is not full has everything
            size = self._receive()
            while (reply := self._reader.gets()) is not _NOT_ALL_THERE:
                replies.append(reply)
        return replies

    def last_words(self) -> list[Reply]:
        """What a server said before it hung up: it does so while it is still sent a message that is too large."""
        try:
            return self.read_arrived()
        except (OSError, NotSaid, hiredis.HiredisError):
            return []

    def call(self, *command: Part, deadline: float) -> Reply:
        """Send one command and return what is answered."""
        self.send(pack_command(command), deadline)
        return self.read(deadline)

    def has_shard_channels(self) -> bool:
        """Whether the server is one of a cluster and knows SSUBSCRIBE. Only RESP3 tells: ``protocol=3``."""
        hello = self._handshake.handshake_metadata or {}
        major, _, _ = hello.get(b"version", b"0").partition(b".")
        return hello.get(b"mode") == b"cluster" and int(major) >= FIRST_WITH_SHARD_CHANNELS

    def is_stale(self) -> bool:
        """Whether the server has closed it, or has said something that nobody asked for."""
        return self._has_pending() or _is_ready(self._descriptor, 0.0)

    def fileno(self) -> int:
        """The socket's file descriptor, to wait for several at once."""
        return self._descriptor

    def close(self) -> None:
        """Close it. May be called again, and by a forked child: the parent's is not touched."""
        self._handshake.disconnect()

    def _receive(self, deadline: float | None = None) -> int:
        """Take what has arrived; returns how many bytes. TLS may have to send something first, until ``deadline``."""
        try:
            size = self._socket.recv_into(self._buffer)
        except ssl.SSLWantWriteError:
            if deadline is not None:
                self._wait(deadline, sending=True)
            return 0
        except _NOT_NOW:
            return 0
        if not size:
            raise NotSaid
        self._reader.feed(self._buffer, 0, size)
        return size

    def _wait(self, deadline: float, *, sending: bool = False) -> None:
        """Wait until the socket may be read, or written to."""
        if not _is_ready(self._descriptor, _left(deadline), sending=sending):
            raise Overdue

    def _has_pending(self) -> bool:
        """Whether TLS has something for us that the socket does not show."""
        return self._tls is not None and self._tls.pending() > 0


def _is_ready(descriptor: int, seconds: float, *, sending: bool = False) -> bool:
    """Whether a socket can be read, or written to, within ``seconds``."""
    if not hasattr(select, "poll"):  # Windows
        wanted = [descriptor]
        readable, writable, _ = select.select([] if sending else wanted, wanted if sending else [], [], seconds)
        return bool(readable or writable)
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT if sending else select.POLLIN)
    return bool(poll.poll(seconds * 1000))


def pack(commands: Iterable[Sequence[Part]]) -> bytes:
    """Several commands as they are sent."""
    return b"".join([pack_command(tuple(command)) for command in commands])


class _Handshake(AbstractConnection):
    """redis-py's connection over a socket that is open. In a forked child it closes its descriptor, no more."""

    host = property(lambda self: str(self._address))
    port = None

    def __init__(
        self, opened: socket.socket, address: Address, access: Access, *, seconds: float, protocol: int
    ) -> None:
        self._opened = opened
        self._address = address
        super().__init__(
            username=access.username,
            password=access.password,
            db=access.database,
            socket_timeout=seconds,
            protocol=protocol,
        )

    def _connect(self) -> socket.socket:
        return self._opened

    def _host_error(self) -> str:
        return str(self._address)

    def repr_pieces(self) -> list[tuple[str, object]]:
        return [("address", str(self._address))]


def _open(address: Address, access: Access, deadline: float) -> socket.socket:
    opened = _open_plain(address, deadline)
    try:
        if access.context is not None:
            opened.settimeout(_left(deadline))
            opened = access.context.wrap_socket(opened, server_hostname=access.server_hostname or address.host)
        opened.settimeout(_left(deadline))
    except TimeoutError as error:
        opened.close()
        raise NoTLS from error
    except BaseException:
        opened.close()
        raise
    return opened


def _open_plain(address: Address, deadline: float) -> socket.socket:
    if address.path is not None:
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        return _connected(opened, address.path, deadline)
    error: OSError | None = None
    for family, kind, protocol, _, where in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
        try:
            opened = socket.socket(family, kind, protocol)
        except OSError as trouble:  # no IPv6 here
            error = error or trouble
            continue
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        try:
            return _connected(opened, where, deadline)
        except OSError as trouble:
            error = trouble
    raise error or OSError(f"{address.host} has no address")


def _connected(opened: socket.socket, where: Any, deadline: float) -> socket.socket:
    try:
        opened.settimeout(_left(deadline))
        opened.connect(where)
    except BaseException:
        opened.close()
        raise
    return opened


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise Overdue
    return left
