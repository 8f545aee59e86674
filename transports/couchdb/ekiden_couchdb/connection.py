"""One connection to one server: an urllib3 connection whose every call ends by a deadline.

urllib3's timeouts hold for each receive; a server that sends a byte now and then could make a call last for ever. So
the sockets here know the deadline, and give each receive what is left.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from ekiden.sockets import open_tcp
from ekiden.urls import Host
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import NewConnectionError

from ekiden_couchdb.errors import TROUBLE, NotJSON, NoTLS, Overdue, SilentHandshake
from ekiden_couchdb.odd_json import readable

if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined]  # Python 3.12

    from urllib3.response import HTTPResponse

_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
IDLE_SECONDS = 60.0
"""A connection that was idle for longer is not used again: something on the way may have forgotten it."""
_CLOSING_EARLY_SECONDS = 1.0
"""Where the server says how long it keeps an idle connection: so much earlier we do not use it any more."""
_READ_BYTES = 65536
_HANDSHAKE_SECONDS = 3.0
"""A server that has not answered the beginning of TLS by then is asked whether it speaks plain HTTP."""
_PLAIN_SECONDS = 1.0
_REFUSED_UNREAD = frozenset({401, 403, 404, 413})
"""With these a server may close the connection before it has read a request's body."""

_decode = msgspec.json.Decoder().decode


class _PlainSocket(socket.socket):
    """A socket with a deadline, on the monotonic clock."""

    deadline = 0.0

    def recv_into(self, buffer: Buffer, nbytes: int = 0, flags: int = 0) -> int:
        self.settimeout(_left(self.deadline))
        return super().recv_into(buffer, nbytes, flags)


class _TLSSocket(ssl.SSLSocket):
    """The same with TLS."""

    deadline = 0.0

    def recv_into(self, buffer: Buffer, nbytes: int | None = None, flags: int = 0) -> int:
        self.settimeout(_left(self.deadline))
        return super().recv_into(buffer, nbytes, flags)


class _HTTP(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        opened = _opened(self)
        return _PlainSocket(opened.family, opened.type, opened.proto, fileno=opened.detach())


class _HTTPS(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _opened(self)


class Received(msgspec.Struct, frozen=True):
    """What a server answered: ``body`` is what its JSON says, ``headers`` have lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: Any


class Connection:
    """To ``host``; used by one thread at a time, except that any may ``cut`` it. ``usable_until``: while it is idle."""

    def __init__(self, host: Host, context: ssl.SSLContext | None, server_hostname: str | None) -> None:
        self.host = host
        self.usable_until = 0.0
        options: list[tuple[int, int, int | bytes]] = [
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        ]
        options += [
            (socket.IPPROTO_TCP, getattr(socket, name), value)
            for name, value in _KEEP_ALIVE.items()
            if hasattr(socket, name)
        ]
        if context is None:
            self._http: HTTPConnection = _HTTP(host.name, host.port, socket_options=options)
        else:
            self._http = _HTTPS(
                host.name,
                host.port,
                socket_options=options,
                ssl_context=context,
                server_hostname=server_hostname,
                assert_hostname=None if context.check_hostname else False,
            )

    @property
    def is_usable(self) -> bool:
        """Whether it is connected, and the server has not closed it meanwhile."""
        return time.monotonic() < self.usable_until and self._http.is_connected

    def connect(self, deadline: float) -> None:
        """Connect until ``deadline``, and begin TLS where that is wanted. Raises what is in ``TROUBLE``."""
        if not isinstance(self._http, HTTPSConnection):
            self._connect(deadline)
            return
        try:
            self._connect(time.monotonic() + min(_HANDSHAKE_SECONDS, _left(deadline) / 2))
        except TimeoutError as error:
            self._http.close()
            if not isinstance(error, SilentHandshake):
                self._connect(deadline)
                return
            # CouchDB never answers TLS on its plain port, so waiting longer would tell nothing.
            if self._speaks_plainly(time.monotonic() + min(_PLAIN_SECONDS, _left(deadline) / 2)):
                raise NoTLS from None
            try:
                self._connect(deadline)
            except Overdue:
                raise error from None

    def exchange(
        self, method: str, target: str, body: bytes | None, headers: Mapping[str, str], deadline: float
    ) -> Received:
        """Send one request and read its answer. Raises what is in ``TROUBLE``, or NotJSON."""
        response = self._send(method, target, body, headers, deadline)
        try:
            content = response.read(decode_content=True)
        except TROUBLE as error:
            if body is None or response.status not in _REFUSED_UNREAD or isinstance(error, Overdue):
                raise
            self._http.close()
            said = {"error": response.reason or "refused", "reason": "the rest of the answer was lost"}
            return Received(response.status, response.headers, said)
        lasts = _seconds_kept(response.headers.get("keep-alive", ""))
        self.usable_until = time.monotonic() + lasts
        return Received(response.status, response.headers, _decoded(response, content))

    def stream(
        self, target: str, headers: Mapping[str, str], deadline: float, *, silence: float
    ) -> tuple[Received | None, Iterator[bytes]]:
        """Send a request whose answer does not end; its lines, as they come, without their ends.

        Each line, also an empty one, must come within ``silence`` seconds of the one before. An answer of trouble is
        returned whole instead.
        """
        response = self._send("GET", target, None, headers, deadline)
        if response.status != 200:
            content = response.read(decode_content=True)
            return Received(response.status, response.headers, _decoded(response, content)), iter(())
        return None, self._lines(response, silence)

    def cut(self) -> None:
        """End whatever is being read or sent, by another thread."""
        opened = self._http.sock
        if opened is not None:
            with contextlib.suppress(OSError):
                # Not the shutdown of TLS, which would take the reader's state from under it.
                socket.socket.shutdown(opened, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it. May be called again."""
        self.usable_until = 0.0
        self._http.close()

    def _send(
        self, method: str, target: str, body: bytes | None, headers: Mapping[str, str], deadline: float
    ) -> HTTPResponse:
        http = self._http
        if http.sock is None:  # the server has said with its last answer that it closes it
            self.connect(deadline)
        http.timeout = _left(deadline)
        _set_deadline(self._http, deadline)
        try:
            http.request(method, target, body=body, headers=headers, preload_content=False)
        except ConnectionError:
            # A server that refuses a request without reading its body answers first and closes then.
            with contextlib.suppress(*TROUBLE):
                return http.getresponse()
            raise
        return http.getresponse()

    def _connect(self, deadline: float) -> None:
        self._http.timeout = _left(deadline)
        try:
            self._http.connect()
        except TimeoutError as error:
            if self._http.sock is None:
                raise  # no connection, of whatever kind
            raise SilentHandshake from error

    def _speaks_plainly(self, deadline: float) -> bool:
        """Whether what listens there answers HTTP without TLS. Nothing of ours is shown to it."""
        plain = _HTTP(self._http.host, self._http.port)
        try:
            plain.timeout = _left(deadline)
            plain.connect()
            _set_deadline(plain, deadline)
            plain.request("GET", "/", preload_content=False)
            return plain.getresponse().status > 0
        except TROUBLE:
            return False
        finally:
            plain.close()

    def _lines(self, response: HTTPResponse, silence: float) -> Iterator[bytes]:
        rest = b""
        _set_deadline(self._http, time.monotonic() + silence)
        for piece in response.stream(_READ_BYTES):
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
            _set_deadline(self._http, time.monotonic() + silence)


def deadline_context(context: ssl.SSLContext) -> ssl.SSLContext:
    """``context``, whose sockets know a deadline from now on."""
    context.sslsocket_class = _TLSSocket
    return context


def _opened(http: HTTPConnection) -> socket.socket:
    """A connected socket for ``http``, by the first address that answers: urllib3 gives its whole time to each."""
    assert isinstance(http.timeout, float)
    try:
        opened = open_tcp(http.host, http.port, time.monotonic() + http.timeout)
    except (TimeoutError, socket.gaierror):
        raise
    except OSError as error:
        raise NewConnectionError(http, str(error)) from error
    for option in http.socket_options or ():
        opened.setsockopt(*option)
    opened.settimeout(http.timeout)
    return opened


def _set_deadline(http: HTTPConnection, deadline: float) -> None:
    opened = http.sock
    assert isinstance(opened, (_PlainSocket, _TLSSocket)), "a connection that was made here knows its deadline"
    opened.deadline = deadline


def _decoded(response: HTTPResponse, content: bytes) -> Any:
    if not content:
        return None
    try:
        return _decode(content)
    except (ValueError, RecursionError) as error:
        kind = response.headers.get("content-type", "").partition(";")[0]
        with contextlib.suppress(ValueError, RecursionError):
            return _decode(readable(content))  # there is an odd document in it, and others
        raise NotJSON(response.status, kind) from error


def _seconds_kept(keep_alive: str) -> float:
    """How long an idle connection may be used, by the answer's header ``Keep-Alive: timeout=5``."""
    _, found, seconds = keep_alive.partition("timeout=")
    seconds = seconds.partition(",")[0].strip()
    if found and seconds.isdigit():
        return max(0.0, min(IDLE_SECONDS, int(seconds) - _CLOSING_EARLY_SECONDS))
    return IDLE_SECONDS


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise Overdue
    return left
