"""A host with several addresses is reached by the first that answers, and when none does, each is named."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ekiden.sockets import open_tcp

HOST = "several-addresses.test"

Resolve = Callable[[list[str]], None]


@pytest.fixture
def resolve_to(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Has HOST resolved to these addresses."""

    def resolve_to(addresses: list[str]) -> None:
        def resolve(host: str, port: int, **_: Any) -> list[Any]:
            assert host == HOST
            families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
            return [
                (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))
                for family, address in zip(families, addresses, strict=True)
            ]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)

    return resolve_to


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def port_of(server: socket.socket) -> int:
    port: int = server.getsockname()[1]
    return port


@pytest.mark.parametrize("dead", [[], ["127.0.0.2"], ["::1", "127.0.0.2"], ["255.255.255.255"]])
def test_the_first_address_that_answers_is_taken(server: socket.socket, resolve_to: Resolve, dead: list[str]) -> None:
    resolve_to([*dead, "127.0.0.1", "127.0.0.3"])

    with open_tcp(HOST, port_of(server), time.monotonic() + 10) as opened:
        assert opened.getpeername() == ("127.0.0.1", port_of(server))


def test_a_silent_address_does_not_hold_up_the_next(server: socket.socket, resolve_to: Resolve) -> None:
    resolve_to(["127.0.0.2", "127.0.0.1"])
    with socket.create_server(("127.0.0.2", port_of(server)), backlog=0):
        waiting = [socket.socket() for _ in range(16)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(("127.0.0.2", port_of(server)))

        with open_tcp(HOST, port_of(server), time.monotonic() + 10) as opened:
            assert opened.getpeername() == ("127.0.0.1", port_of(server))

        resolve_to(["127.0.0.2"])
        with pytest.raises(TimeoutError):
            open_tcp(HOST, port_of(server), time.monotonic() + 0.2)
        for each in waiting:
            each.close()


def test_what_all_addresses_said_is_told_with_the_addresses(server: socket.socket, resolve_to: Resolve) -> None:
    resolve_to(["127.0.0.2", "127.0.0.3"])

    with pytest.raises(ConnectionRefusedError) as caught:
        open_tcp(HOST, port_of(server), time.monotonic() + 10)

    assert caught.value.strerror == "Connection refused (127.0.0.2, 127.0.0.3)"


def test_one_address_says_what_it_said(server: socket.socket, resolve_to: Resolve) -> None:
    resolve_to(["127.0.0.2"])

    with pytest.raises(ConnectionRefusedError) as caught:
        open_tcp(HOST, port_of(server), time.monotonic() + 10)

    assert caught.value.strerror == "Connection refused"


def test_a_host_without_an_address_is_told(resolve_to: Resolve) -> None:
    resolve_to([])

    with pytest.raises(OSError, match="no address"):
        open_tcp(HOST, 1, time.monotonic() + 10)
