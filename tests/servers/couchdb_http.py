"""HTTP for the CouchDB cluster that ``couchdb_cluster`` plays: requests taken apart, answers and feeds written.

What it does with connections is what CouchDB 3.5.0 was seen to do:

    a POST or PUT that is refused before its     401, 403 or 404 with ``Connection: close``; then the connection is
    body is read (no session, no such            closed with the body unread, which makes a reset of it: the answer to
    database, no right)                          ``POST /missing/_bulk_docs`` of 1 MB was lost 5 times of 20
    the first bytes of TLS on the plain port     no answer at all
    the ``Date`` header                          renewed once a second by a timer whose phase is fixed when a node
                                                 starts: 0.08 to 1.49 s old on arrival
"""

from __future__ import annotations

import base64
import json
import socket
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers.processes import HOST

ADMIN = "_admin"

DEEP, LARGE, HALF = "<<deep>>", "<<large>>", "<<half>>"
"""A text in a document that is answered as JSON that Python does not write: nested, beyond a float, half a pair."""
_ODD = {DEEP: b"[" * 5000 + b"]" * 5000, LARGE: b"1e400", HALF: b'"\\ud83d"'}
_TLS_HANDSHAKE = b"\x16"
_READ_BYTES = 65_536


@dataclass(frozen=True)
class Answer(Exception):
    """What a request is answered, wherever that becomes clear."""

    status: int
    body: Any
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """One request, taken apart. ``name`` and ``roles`` say who asks, ``node`` which node was asked."""

    method: str
    path: list[str]
    query: Mapping[str, str]
    body: Any
    name: str | None
    roles: frozenset[str]
    node: int


class Played(Protocol):
    """What stands behind the HTTP. ``users``: name -> password and roles; without any, all are administrators."""

    users: Mapping[str, tuple[str, Collection[str]]]

    def date(self, node: int) -> str:
        """The Date of an answer of this node."""
        ...

    def refused_unread(self, request: Request) -> Answer | None:
        """What a request is answered before its body is read; None: read on."""
        ...

    def user_of(self, cookie: str) -> str | None:
        """Whose session this is; None for one that has ended."""
        ...

    def answer(self, request: Request) -> Answer:
        """Carry a request out."""
        ...

    def changes(self, name: str, query: Mapping[str, str]) -> dict[str, Any]:
        """What has changed in a database behind ``since``."""
        ...

    def awaited_changes(self, name: str, query: Mapping[str, str], seconds: float) -> list[Any] | None:
        """The same, waited for; none after so many seconds, None when it ends."""
        ...


class PlayedServer(ThreadingHTTPServer):
    """One node: listens on a port, a free one if none is given, and hands each request to what is played."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, cluster: Played, node: int, port: int = 0) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__((HOST, port), _Handler)
        self.cluster = cluster
        self.node = node

    def process_request(self, request: Any, client_address: Any) -> None:
        """Note the connection, so that all can be cut."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget the connection."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def cut_all(self) -> None:
        """End every connection, as a process that is killed does."""
        for connection in list(self.connections):
            try:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # it has ended by itself


class _Handler(BaseHTTPRequestHandler):
    """HTTP: requests taken apart, answers written, and the one feed that does not end."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # one packet for an answer
    server: PlayedServer

    def handle_one_request(self) -> None:
        """Answer one request; say nothing to who begins with TLS."""
        if self.connection.recv(1, socket.MSG_PEEK) == _TLS_HANDSHAKE:
            while self.connection.recv(_READ_BYTES):
                continue
            self.close_connection = True
            return
        super().handle_one_request()

    def handle(self) -> None:
        """Answer all requests of a connection, until one of both sides ends it."""
        try:
            super().handle()
        except OSError:  # it was cut
            return

    def handle_any(self) -> None:
        """Answer one request."""
        length = int(self.headers.get("Content-Length") or 0)
        parts = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        path = [unquote(part) for part in parts.path.strip("/").split("/")]
        cluster = self.server.cluster
        who = self._who(cluster)
        if who is None:
            wrong = Answer(401, {"error": "unauthorized", "reason": "Name or password is incorrect."})
            self._write(wrong, closes=length > 0)
            return
        request = Request(self.command, path, query, None, *who, self.server.node)
        if length and (refusal := cluster.refused_unread(request)):
            self._write(refusal, closes=True)
            return
        content = self.rfile.read(length) if length else b""
        if content:
            request = Request(self.command, path, query, json.loads(content), *who, self.server.node)
        answer = cluster.answer(request)
        if path[-1] == "_changes" and query.get("feed") in {"continuous", "longpoll"} and answer.status == 200:
            self._feed(cluster, request)
        else:
            self._write(answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The Date of the played servers."""
        return self.server.cluster.date(self.server.node)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write nothing."""

    def _who(self, cluster: Played) -> tuple[str | None, frozenset[str]] | None:
        """Name and roles; None for a wrong password. Where there are no users, everybody is an administrator.

        A session that has ended is nobody's: who comes with its cookie is not refused, but unknown.
        """
        if not cluster.users:
            return None, frozenset({ADMIN})
        kind, _, text = self.headers.get("Authorization", "").partition(" ")
        if kind == "Basic":
            name, _, password = base64.b64decode(text).decode().partition(":")
            known = cluster.users.get(name)
            return (name, frozenset(known[1])) if known is not None and known[0] == password else None
        cookie = self.headers.get("Cookie", "").partition("AuthSession=")[2]
        user = cluster.user_of(cookie) if cookie else None
        return (None, frozenset()) if user is None else (user, frozenset(cluster.users[user][1]))

    def _write(self, answer: Answer, *, closes: bool = False) -> None:
        """``closes``: with the body unread, so that the kernel makes a reset of it."""
        content = _written(answer.body) + b"\n"
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if closes:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _feed(self, cluster: Played, request: Request) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        try:
            self._stream(cluster, request)
        except OSError:
            self.close_connection = True

    def _stream(self, cluster: Played, request: Request) -> None:
        query = dict(request.query)
        pause = float(query.get("heartbeat", "60000")) / 1000
        query["since"] = cluster.changes(request.path[0], query | {"limit": "0"})["last_seq"]
        while True:
            found = cluster.awaited_changes(request.path[0], query, pause)
            if found is None:
                self.close_connection = True
                return
            lines = b"".join(_written(row) + b"\n" for row in found) or b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(lines), lines))
            self.wfile.flush()
            if found:
                query["since"] = found[-1]["seq"]
                if query["feed"] == "longpoll":
                    self.wfile.write(b"0\r\n\r\n")
                    return


def _written(value: Any) -> bytes:
    content = json.dumps(value).encode()
    for text, odd in _ODD.items():
        content = content.replace(b'"%s"' % text.encode(), odd)
    return content
