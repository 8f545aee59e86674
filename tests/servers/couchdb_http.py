"""HTTP for the CouchDB cluster that ``couchdb_cluster`` plays: requests taken apart, answers and feeds written."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit

from tests.servers.processes import HOST

ADMIN = "_admin"


@dataclass(frozen=True)
class Answer(Exception):
    """What a request is answered, wherever that becomes clear."""

    status: int
    body: Any


@dataclass(frozen=True)
class Request:
    """One request, taken apart. ``who``: the user's name and roles."""

    method: str
    path: list[str]
    query: Mapping[str, str]
    body: Any
    name: str | None
    roles: frozenset[str]


class Played(Protocol):
    """What stands behind the HTTP. ``users``: name -> password and roles; without any, all are administrators."""

    users: Mapping[str, tuple[str, Collection[str]]]

    def date(self) -> str:
        """The Date of an answer."""
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
    """Listens on a free port, and hands each request to what is played."""

    daemon_threads = True

    def __init__(self, cluster: Played) -> None:
        super().__init__((HOST, 0), _Handler)
        self.cluster = cluster


class _Handler(BaseHTTPRequestHandler):
    """HTTP: requests taken apart, answers written, and the one feed that does not end."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # one packet for an answer
    server: PlayedServer

    def handle_any(self) -> None:
        """Answer one request."""
        length = int(self.headers.get("Content-Length") or 0)
        content = self.rfile.read(length) if length else b""
        parts = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(parts.query, keep_blank_values=True).items()}
        path = [unquote(part) for part in parts.path.strip("/").split("/")]
        cluster = self.server.cluster
        who = self._who(cluster)
        if who is None:
            self._write(Answer(401, {"error": "unauthorized", "reason": "Name or password is incorrect."}))
            return
        request = Request(self.command, path, query, json.loads(content) if content else None, *who)
        answer = cluster.answer(request)
        if path[-1] == "_changes" and query.get("feed") in {"continuous", "longpoll"} and answer.status == 200:
            self._feed(cluster, request)
        else:
            self._write(answer)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any  # noqa: N815

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The Date of the played servers."""
        return self.server.cluster.date()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Write nothing."""

    def _who(self, cluster: Played) -> tuple[str | None, frozenset[str]] | None:
        """Name and roles; None for a wrong password. Where there are no users, everybody is an administrator."""
        if not cluster.users:
            return None, frozenset({ADMIN})
        kind, _, text = self.headers.get("Authorization", "").partition(" ")
        if kind != "Basic":
            return None, frozenset()
        name, _, password = base64.b64decode(text).decode().partition(":")
        known = cluster.users.get(name)
        return (name, frozenset(known[1])) if known is not None and known[0] == password else None

    def _write(self, answer: Answer) -> None:
        content = json.dumps(answer.body).encode() + b"\n"
        self.send_response(answer.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
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
            lines = b"".join(json.dumps(row).encode() + b"\n" for row in found) or b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(lines), lines))
            self.wfile.flush()
            if found:
                query["since"] = found[-1]["seq"]
                if query["feed"] == "longpoll":
                    self.wfile.write(b"0\r\n\r\n")
                    return
