"""CouchDB in trouble: stopped, killed, frozen, and behind a bad wire. (To fill one takes more than a test should.)"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from ekiden.plugins import open_transport
from ekiden.testing.conformance import (
    BrokerRestartConformance,
    LostReplyConformance,
    LostWakeUpConformance,
    SilentAddressConformance,
    SilentBrokerConformance,
    SlowWireConformance,
)
from ekiden.testing.proxy import Proxy
from ekiden.transport import Transport
from ekiden_couchdb.signals import Signals

from tests.conformance.killed_while_writing import KilledWhileWriting
from tests.servers.couchdb import CouchDBServer
from tests.servers.processes import HOST
from tests.servers.running import running


class OwnServer:
    """The broker and store is a server of the test's own. ``timeout``: the deadline (seconds) of every call."""

    timeout = 10

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[CouchDBServer]:
        with running(lambda: CouchDBServer(tmp_path / "server")) as server:
            yield server

    @pytest.fixture
    def url(self, server: CouchDBServer) -> str:
        return f"{server.url}ekiden?timeout={self.timeout}"


class BehindAFrozenWire(OwnServer):
    """There is a proxy in front of it, which does nothing while it is silent."""

    timeout = 1

    @pytest.fixture
    def proxy(self, server: CouchDBServer) -> Iterator[Proxy]:
        with Proxy(HOST, server.port) as proxy:
            yield proxy

    @pytest.fixture
    def url(self, server: CouchDBServer, proxy: Proxy) -> str:
        return proxy.through(f"{server.url}ekiden?timeout={self.timeout}")

    @pytest.fixture
    def silent(self, proxy: Proxy) -> Callable[[], AbstractContextManager[None]]:
        return proxy.frozen


class Frozen(OwnServer):
    """The server itself does nothing while it is silent."""

    timeout = 1

    @pytest.fixture
    def silent(self, server: CouchDBServer) -> Callable[[], AbstractContextManager[None]]:
        return server.frozen


@pytest.mark.parametrize("by_kill", [False, True], ids=["stopped", "killed"])
class TestRestartedCouchDB(OwnServer, BrokerRestartConformance):
    @pytest.fixture
    def restart_broker(self, server: CouchDBServer, by_kill: bool) -> Callable[[], None]:
        return functools.partial(server.restart, by_kill=by_kill)


class TestCouchDBKilledWhileWriting(OwnServer, KilledWhileWriting):
    timeout = 2


class TestFrozenCouchDB(Frozen, SilentBrokerConformance):
    deadline_seconds = 3.0


class TestCouchDBBehindAFrozenWire(BehindAFrozenWire, SilentBrokerConformance):
    deadline_seconds = 3.0


class TestCouchDBThatLosesReplies(OwnServer, LostReplyConformance):
    timeout = 5


class TestCouchDBAtItsSecondAddress(OwnServer, SilentAddressConformance):
    timeout = 5


class TestCouchDBOverABadWire(OwnServer, SlowWireConformance):
    timeout = 5


class TestCouchDBThatWakesNobody(LostWakeUpConformance):
    @pytest.fixture
    def url(self, couchdb_place: str) -> str:
        return couchdb_place

    @pytest.fixture
    def silent_publisher(self, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Transport]:
        """What it publishes is stored, and it rings for nobody."""
        monkeypatch.setattr(Signals, "ring", lambda signals, queues: None)
        with open_transport(url) as transport:
            yield transport
