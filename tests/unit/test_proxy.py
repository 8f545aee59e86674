"""The proxy of the conformance kit does to a wire what it says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest
from ekiden.testing.proxy import Proxy


class Echo:
    """Sends back what it receives, in capitals. ``heard`` is all that reached it."""

    def __init__(self) -> None:
        self.heard = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="ekiden-echo", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), name="ekiden-echo", daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1000):
                    self.heard += data
                    connection.sendall(data.upper())
            except OSError:
                return


@pytest.fixture
def echo() -> Iterator[Echo]:
    echo = Echo()
    yield echo
    echo.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", echo.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5.0) as client:
        yield client


def ask(client: socket.socket, data: bytes) -> bytes:
    """What is answered to ``data``, or what came before the end; nothing if that is all."""
    client.sendall(data)
    answer = b""
    while len(answer) < len(data):
        received = client.recv(1000)
        if not received:
            break
        answer += received
    return answer


def end_of(client: socket.socket) -> bytes:
    """What came before the connection ended, by an end or by a reset."""
    received = b""
    with suppress(ConnectionError):
        while data := client.recv(1000):
            received += data
    return received


def test_it_passes_on_both_ways(client: socket.socket) -> None:
    assert ask(client, b"hello") == b"HELLO"
    assert ask(client, b"x" * 100_000) == b"X" * 100_000


@pytest.mark.parametrize(
    ("url", "through"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:PORT/0"),
        ("amqp://a:b%40c@host:1,other:2/%2F?prefix=x/y", "amqp://a:b%40c@127.0.0.1:PORT/%2F?prefix=x/y"),
        ("couchdb://[::1]:5984", "couchdb://127.0.0.1:PORT"),
        ("redis://host:1?timeout=1", "redis://127.0.0.1:PORT?timeout=1"),
    ],
)
def test_a_url_leads_through_it(proxy: Proxy, url: str, through: str) -> None:
    assert proxy.through(url) == through.replace("PORT", str(proxy.port))


def test_frozen_it_passes_on_nothing_and_closes_nothing(proxy: Proxy, echo: Echo, client: socket.socket) -> None:
    ask(client, b"before")
    client.settimeout(0.1)

    with proxy.frozen():
        client.sendall(b"x")
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert echo.heard == b"before"

    client.settimeout(5.0)
    assert client.recv(1) == b"X"


def test_a_lost_reply_is_one_to_a_request_that_arrived(proxy: Proxy, echo: Echo, client: socket.socket) -> None:
    ask(client, b"before")

    proxy.lose_next_reply()
    client.sendall(b"request")
    assert end_of(client) == b""

    assert echo.heard == b"beforerequest"
    assert proxy.replies_lost == 1
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5.0) as another:
        assert ask(another, b"again") == b"AGAIN"
    assert proxy.replies_lost == 1


def test_a_reply_is_not_lost_when_that_was_taken_back(proxy: Proxy, client: socket.socket) -> None:
    proxy.lose_next_reply()
    proxy.lose_no_reply()

    assert ask(client, b"request") == b"REQUEST"


def test_cut_ends_the_connections_there_are_and_takes_new_ones(proxy: Proxy, client: socket.socket) -> None:
    ask(client, b"before")

    proxy.cut()

    assert end_of(client) == b""
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5.0) as another:
        assert ask(another, b"again") == b"AGAIN"


def test_slow_it_passes_on_piece_by_piece(proxy: Proxy, client: socket.socket) -> None:
    ask(client, b"before")
    began = time.monotonic()

    with proxy.slow(piece_bytes=10, piece_seconds=0.01):
        answer = ask(client, b"y" * 100)

    assert answer == b"Y" * 100
    assert time.monotonic() - began >= 0.09  # ten pieces, nine pauses between them


def test_without_a_server_a_connection_ends_at_once() -> None:
    with socket.socket() as taken:  # bound, so that nobody else is there, and never listening
        taken.bind(("127.0.0.1", 0))
        with (
            Proxy("127.0.0.1", taken.getsockname()[1]) as proxy,
            suppress(ConnectionResetError),  # so soon that the client has not noticed yet that it was connected
            socket.create_connection(("127.0.0.1", proxy.port), timeout=5.0) as client,
        ):
            assert end_of(client) == b""


def test_closing_ends_connections_and_threads_also_while_frozen(proxy: Proxy, client: socket.socket) -> None:
    ask(client, b"before")
    with proxy.frozen():
        client.sendall(b"x")

        proxy.close()

    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ekiden-proxy")]
