"""A web server on loopback that is as unreliable as the real web: some pages are slow, some fail the first time.

Which ones depends on the path alone, so every crawl meets the same trouble. The server counts what it served, so that
a test can tell whether a crawler visited a page twice.
"""

from __future__ import annotations

import socket
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .site import FRONT_PAGE, ROBOTS, Site

SLOWNESS_SECONDS = 0.4
IDLE_SECONDS = 5.0


class Temper(Enum):
    """How a page takes to being asked for."""

    CALM = "answers"
    SLOW = "answers late"
    BUSY = "says 503 the first time"
    RUDE = "hangs up the first time"


def temper(path: str) -> Temper:
    """One page in eight is slow, one in sixteen busy, one in sixteen rude."""
    if path == FRONT_PAGE:
        return Temper.CALM
    match zlib.crc32(path.encode()) % 16:
        case 0 | 1:
            return Temper.SLOW
        case 2:
            return Temper.BUSY
        case 3:
            return Temper.RUDE
        case _:
            return Temper.CALM


class SiteServer(ThreadingHTTPServer):
    """Serves a site, a thread per connection. ``lock`` guards both counters."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, site: Site, *, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), SiteHandler)
        self.site = site
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.served: Counter[str] = Counter()
        self.stopping = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{FRONT_PAGE}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: it is the crawler, killed in the middle of a page or impatient, that has gone away."""

    def count_asked(self, path: str) -> int:
        """How often this path has been asked for, this time included."""
        with self.lock:
            self.asked[path] += 1
            return self.asked[path]

    def count_served(self, path: str) -> None:
        with self.lock:
            self.served[path] += 1


class SiteHandler(BaseHTTPRequestHandler):
    """One connection of a crawler."""

    server: SiteServer
    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Answer one request, in the temper of its path."""
        is_first_time = self.server.count_asked(self.path) == 1
        match temper(self.path):
            case Temper.BUSY if is_first_time:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", "Too busy, try again.\n")
                return
            case Temper.RUDE if is_first_time:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            case Temper.SLOW:
                self.server.stopping.wait(SLOWNESS_SECONDS)
            case _:
                pass
        if (page := self.server.site.page(self.path)) is not None:
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", page)
        elif self.path == "/robots.txt":
            self._answer(HTTPStatus.OK, "text/plain", ROBOTS)
        elif (source := self.server.site.source(self.path)) is not None:
            self._answer(HTTPStatus.OK, "text/plain; charset=utf-8", source)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "No such page.\n")

    def _answer(self, status: HTTPStatus, content_type: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if status == HTTPStatus.OK:
            self.server.count_served(self.path)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the name is http.server's)
        """Nothing: the crawl has its own progress."""


@contextmanager
def serving(site: Site, *, port: int = 0) -> Iterator[SiteServer]:
    """The site on this port of loopback, or on any free one, until the block ends.

    Raises OSError when somebody else has the port.
    """
    server = SiteServer(site, port=port)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="site-server")
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()
