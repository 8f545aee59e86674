"""A broker whose host has several addresses."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from ekiden.message import STORED
from ekiden.testing.conformance.fixtures import a_message, settle
from ekiden.testing.conformance.trouble import WireFixtures
from ekiden.testing.proxy import Proxy
from ekiden.transport import Transport

NAME = "two-addresses.test"
DEAD, ALIVE = "127.0.0.2", "127.0.0.1"

_MOST_WAITING = 16


class SecondAddressConformance(WireFixtures):
    """The first address of the broker's host refuses connections: the next one is tried.

    Every address of the network 127.0.0.0/8 must lead to this machine, as it does on Linux.
    """

    @pytest.fixture
    def transport(self, url: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Transport]:
        """The broker, at a name that has a dead address first."""
        resolve = socket.getaddrinfo

        def resolve_both(host: Any, *arguments: Any, **named: Any) -> list[Any]:
            names = [DEAD, ALIVE] if host in {NAME, NAME.encode()} else [host]
            return [found for name in names for found in resolve(name, *arguments, **named)]

        monkeypatch.setattr(socket, "getaddrinfo", resolve_both)
        with self.open_transport(proxy.through(url).replace(f"{ALIVE}:{proxy.port}", f"{NAME}:{proxy.port}")) as opened:
            yield opened

    def test_it_works_although_the_first_address_refuses(self, transport: Transport, queue: str) -> None:
        self.assert_works(transport, queue)

    def assert_works(self, transport: Transport, queue: str) -> None:
        """A message goes through, and a broadcast."""
        assert transport.publish([a_message(queue)]) == [STORED]

        consumer, listener = self.consume(transport, queue), transport.listen(queue)
        settle(consumer, [self.collect_one(consumer, within=60)])
        transport.broadcast(queue, [b"heard"])
        assert listener.receive(5.0) == [b"heard"]
        self.assert_depth(transport, queue, ready=0)


class SilentAddressConformance(SecondAddressConformance):
    """The first address may also be silent: it neither takes a connection nor refuses it."""

    @pytest.fixture
    def silent_address(self, proxy: Proxy) -> Iterator[None]:
        """Somebody listens there who never takes a connection, and more wait than the system keeps waiting."""
        with socket.create_server((DEAD, proxy.port), backlog=0):
            waiting = [socket.socket() for _ in range(_MOST_WAITING)]
            for each in waiting:
                each.setblocking(False)
                each.connect_ex((DEAD, proxy.port))
            yield
            for each in waiting:
                each.close()

    @pytest.mark.slow
    @pytest.mark.usefixtures("silent_address")
    def test_it_works_although_the_first_address_is_silent(self, transport: Transport, queue: str) -> None:
        self.assert_works(transport, queue)
