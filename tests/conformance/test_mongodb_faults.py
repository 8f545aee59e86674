"""MongoDB in trouble: stopped, killed, frozen, and behind a bad wire. (To fill one takes more than a test should.)"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from ekiden.plugins import open_transport
from ekiden.testing.conformance import (
    BrokerRestartConformance,
    LostReplyConformance,
    LostWakeUpConformance,
    SecondAddressConformance,
    SilentBrokerConformance,
    SlowWireConformance,
)
from ekiden.testing.conformance.fixtures import (
    PATIENCE,
    TransportFixtures,
    a_message,
    bodies,
    eventually,
    numbered,
    settle,
)
from ekiden.testing.proxy import Proxy
from ekiden.transport import Transport
from ekiden_mongodb.documents import document_id
from ekiden_mongodb.giving_back import PASSED_OVER_SECONDS
from ekiden_mongodb.signals import Signals

from tests.conformance.killed_while_writing import KilledWhileWriting
from tests.servers.mongodb import DATABASE, MongoDBServer
from tests.servers.processes import HOST
from tests.servers.running import running


class OwnServer:
    """The broker and store is a server of the test's own. ``timeout``: the deadline (seconds) of every call."""

    standalone = False
    timeout = 10

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[MongoDBServer]:
        with running(lambda: MongoDBServer(tmp_path / "server", standalone=self.standalone)) as server:
            yield server

    @pytest.fixture
    def url(self, server: MongoDBServer) -> str:
        return f"{server.url}?timeout={self.timeout}"


class ThroughAProxy(OwnServer):
    """The server is believed to be where the URL says, not where it says itself."""

    timeout = 5

    @pytest.fixture
    def url(self, server: MongoDBServer) -> str:
        return f"{server.direct_url}&timeout={self.timeout}"


class BehindAFrozenWire(OwnServer):
    """There is a proxy in front of it, which does nothing while it is silent."""

    timeout = 1

    @pytest.fixture
    def proxy(self, server: MongoDBServer) -> Iterator[Proxy]:
        with Proxy(HOST, server.port) as proxy:
            yield proxy

    @pytest.fixture
    def url(self, server: MongoDBServer, proxy: Proxy) -> str:
        return proxy.through(f"{server.direct_url}&timeout={self.timeout}")

    @pytest.fixture
    def silent(self, proxy: Proxy) -> Callable[[], AbstractContextManager[None]]:
        return proxy.frozen


class Frozen(OwnServer):
    """The server itself does nothing while it is silent."""

    timeout = 1

    @pytest.fixture
    def silent(self, server: MongoDBServer) -> Callable[[], AbstractContextManager[None]]:
        return server.frozen


@pytest.mark.parametrize("by_kill", [False, True], ids=["stopped", "killed"])
class TestRestartedMongoDB(OwnServer, BrokerRestartConformance):
    @pytest.fixture
    def restart_broker(self, server: MongoDBServer, by_kill: bool) -> Callable[[], None]:
        return functools.partial(server.restart, by_kill=by_kill)


class TestRestartedStandaloneMongoDB(OwnServer, BrokerRestartConformance):
    standalone = True

    @pytest.fixture
    def restart_broker(self, server: MongoDBServer) -> Callable[[], None]:
        return functools.partial(server.restart, by_kill=True)


class TestMongoDBKilledWhileWriting(OwnServer, KilledWhileWriting):
    timeout = 2


class TestStandaloneMongoDBKilledWhileWriting(OwnServer, KilledWhileWriting):
    standalone = True
    timeout = 2


class TestFrozenMongoDB(Frozen, SilentBrokerConformance):
    deadline_seconds = 3.0


class TestMongoDBBehindAFrozenWire(BehindAFrozenWire, SilentBrokerConformance):
    deadline_seconds = 3.0


class TestMongoDBThatLosesReplies(ThroughAProxy, LostReplyConformance):
    pass


class TestStandaloneMongoDBThatLosesReplies(ThroughAProxy, LostReplyConformance):
    """Without transactions, what follows is published before its delivery is ended."""

    standalone = True
    turns = 30


class TestMongoDBAtItsSecondAddress(ThroughAProxy, SecondAddressConformance):
    pass


class TestMongoDBOverABadWire(ThroughAProxy, SlowWireConformance):
    pass


class TestMongoDBThatWakesNobody(LostWakeUpConformance):
    @pytest.fixture
    def url(self, mongodb_place: str) -> str:
        return mongodb_place

    @pytest.fixture
    def silent_publisher(self, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Transport]:
        """What it publishes is stored, and it rings for nobody."""
        monkeypatch.setattr(Signals, "ring", lambda signals, queues: None)
        with open_transport(url) as transport:
            yield transport


class TestMongoDBWithATransactionThatSomebodyLeftOpen(OwnServer, TransportFixtures):
    """A worker was killed while it settled: until the server gives its transaction up, nobody can write to its message.

    Alone, outside of a replica set, a server has no transactions.
    """

    @pytest.mark.slow
    def test_its_message_comes_back_later_and_nobody_waits_for_it(
        self, transport: Transport, server: MongoDBServer, queue: str
    ) -> None:
        lease = transport.description.shortest_lease
        transport.publish(numbered(queue, 5))
        (lost,) = self.consume(transport, queue, lease=lease, name="killed", prefetch=1).receive(1, PATIENCE)
        with server.client() as client, client.start_session() as session:
            session.start_transaction()
            messages = client[DATABASE]["ekiden.messages"]
            assert messages.delete_one({"_id": document_id(queue, lost.message.id)}, session=session).deleted_count

            started = time.monotonic()
            successor = self.consume(transport, queue, name="killed")
            settle(successor, self.collect(successor, 4))
            eventually(lambda: transport.depth(queue).ready == 1, what="its lease has ended")
            self.assert_nothing_comes(successor)
            transport.publish([a_message(queue, b"later")])
            assert bodies(self.collect(successor, 1)) == [b"later"]
            assert time.monotonic() - started < self.timeout

            session.abort_transaction()
        again = self.collect_one(successor, within=PATIENCE + PASSED_OVER_SECONDS)
        assert (again.message, again.attempt) == (lost.message, 2)
