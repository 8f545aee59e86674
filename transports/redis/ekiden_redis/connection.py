"""One connection to one server: a socket, over which hiredis packs the commands and parses the replies.

A client library is not in between: redis-py takes four times the processor time for each command, does not end a call
at one deadline, tries again by itself where that is not harmless, and puts words of its own around what a server said.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import hiredis
import msgspec
from ekiden.sockets import open_tcp

from ekiden_redis.errors import NotAdmitted, NoTLS, NotSaid, Overdue

if TYPE_CHECKING:
    import ssl  # where a connection has TLS: it takes 5 ms to import, and 3 MiB of memory

Part = bytes | str
"""What a command consists of. No numbers: hiredis crashes where a signal's handler raises while it asks for their
text."""

pack_command: Callable[[tuple[Part, ...]], bytes] = cast(Any, hiredis.pack_command)
"""A command as it is sent."""

Reply = Any
"""What a server answered: bytes, int, None, a list of such, or a hiredis.ReplyError, which is returned, not raised."""

FIRST_WITH_SHARD_CHANNELS = 7

_FIRST_PROTOCOL = 2
"""RESP2, which a server speaks until HELLO says otherwise."""

_READ_AT_ONCE = 65536
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_NOT_ALL_THERE = object()


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

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return []  # msgspec's own names every field to rich


class Connection:
    """A connection that is ready for commands. One thread uses it at a time.

    Deadlines are on the monotonic clock. What it raises (``errors.TROUBLE``) is explained by ``errors.Errors``; after
    that it must be closed.
    """

    def __init__(self, address: Address, access: Access, deadline: float, *, protocol: int = 2) -> None:
        self.address = address
        self._process = os.getpid()
        self._socket = _open(address, access, deadline)
        self._socket.setblocking(False)
        self._tls: ssl.SSLSocket | None = None
        self._wants_to_read: tuple[type[OSError], ...] = ()
        self._wants_to_write: tuple[type[OSError], ...] = ()
        if access.context is not None:
            self._expect_tls()
        self._not_now = (BlockingIOError, *self._wants_to_read, *self._wants_to_write)
        self._descriptor = self._socket.fileno()
        self._reader: Any = hiredis.Reader(notEnoughData=_NOT_ALL_THERE)
        self._buffer = bytearray(_READ_AT_ONCE)
        try:
            self._hello = self._introduce(access, deadline, protocol)
        except BaseException:
            self.close()
            raise
        self.used_at = time.monotonic()

    def _expect_tls(self) -> None:
        import ssl

        assert isinstance(self._socket, ssl.SSLSocket)
        self._tls = self._socket
        self._wants_to_read, self._wants_to_write = (ssl.SSLWantReadError,), (ssl.SSLWantWriteError,)

    def __del__(self) -> None:
        # One of the parent's that a forked child has dropped. Whoever failed to connect has no socket.
        with contextlib.suppress(AttributeError):
            self._socket.close()

    def _introduce(self, access: Access, deadline: float, protocol: int) -> Reply:
        """Say who we are, and which database we want; returns what the server says of itself, in RESP3."""
        commands: list[tuple[Part, ...]] = []
        username, password = access.username, access.password or ""
        if protocol > _FIRST_PROTOCOL:
            who = ("AUTH", username or "default", password) if username or password else ()
            commands.append(("HELLO", str(protocol), *who))
        elif username:
            commands.append(("AUTH", username, password))
        elif password:
            commands.append(("AUTH", password))
        if access.database:
            commands.append(("SELECT", str(access.database)))
        hello: Reply = None
        if commands:
            self.send(pack(commands), deadline)
        for command in commands:
            reply = self.read(deadline)
            if isinstance(reply, hiredis.ReplyError):
                raise NotAdmitted(str(command[0]), reply)
            if command[0] == "HELLO":
                hello = reply
        return hello

    def send(self, packed: bytes, deadline: float) -> None:
        """Send one or more packed commands."""
        sent = 0
        while sent < len(packed):
            try:
                sent += self._socket.send(memoryview(packed)[sent:] if sent else packed)
            except self._not_now as trouble:
                self._wait(deadline, sending=not isinstance(trouble, self._wants_to_read))

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
        hello = self._hello or {}
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
        if self._process == os.getpid():
            with contextlib.suppress(OSError):  # the server has closed it
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # not TLS's own, which would wait
        self._socket.close()

    def _receive(self, deadline: float | None = None) -> int:
        """Take what has arrived; returns how many bytes. TLS may have to send something first, until ``deadline``."""
        try:
            size = self._socket.recv_into(self._buffer)
        except self._wants_to_write:
            if deadline is not None:
                self._wait(deadline, sending=True)
            return 0
        except self._not_now:
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


def _open(address: Address, access: Access, deadline: float) -> socket.socket:
    opened = _open_plain(address, deadline)
    if access.context is None:
        return opened
    try:
        opened.settimeout(_left(deadline))
        return access.context.wrap_socket(opened, server_hostname=access.server_hostname or address.host)
    except TimeoutError as error:
        opened.close()
        raise NoTLS from error
    except BaseException:
        opened.close()
        raise


def _open_plain(address: Address, deadline: float) -> socket.socket:
    if address.path is not None:
        opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            opened.settimeout(_left(deadline))
            opened.connect(address.path)
        except BaseException:
            opened.close()
            raise
        return opened
    opened = open_tcp(address.host, address.port, deadline)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE.items():
        if hasattr(socket, name):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return opened


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise Overdue
    return left
