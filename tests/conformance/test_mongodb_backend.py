"""The MongoDB backend keeps the contract: on one server, and in trouble."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from ekiden.message import new_id
from ekiden.testing.conformance import (
    BackendConformance,
    BackendLimitConformance,
    BackendProcessConformance,
    BackendRestartConformance,
    BackendWireConformance,
    SilentBackendConformance,
)
from ekiden.testing.conformance.fence import Fence
from ekiden.testing.conformance.waiting import Waiting

from tests.servers.mongodb import MongoDBServer
from tests.servers.running import running


@pytest.mark.timeout(600)  # what stands in for MongoDB takes its time for documents that grow
class TestMongoDBBackend(BackendConformance, BackendProcessConformance):
    many_members = 600

    @pytest.fixture
    def url(self, mongodb_place: str) -> str:
        return mongodb_place


@pytest.mark.timeout(600)
@pytest.mark.slow
class TestMongoDBBackendAndLargeValues(BackendLimitConformance):
    @pytest.fixture
    def url(self, mongodb_place: str) -> str:
        return f"{mongodb_place}&timeout=60"

    @pytest.fixture
    def too_large(self) -> int:
        return 16 * 1024 * 1024


class OwnServer:
    """The store is a server that is the test's own."""

    query = ""

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[MongoDBServer]:
        with running(lambda: MongoDBServer(tmp_path)) as server:
            yield server

    @pytest.fixture
    def url(self, server: MongoDBServer) -> str:
        return f"{server.url_as(None, None, direct=True)}{self.query}"


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoDBServer]:
    with running(lambda: MongoDBServer(tmp_path_factory.mktemp("standalone"), standalone=True)) as server:
        yield server


@pytest.mark.slow
class TestStandaloneMongoDBBackend(Waiting, Fence):
    """Without change streams and transactions."""

    @pytest.fixture
    def url(self, standalone: MongoDBServer) -> str:
        return f"{standalone.url_as(None, None, direct=True)}&prefix=test-{new_id()}"


class TestSilentMongoDBBackend(OwnServer, SilentBackendConformance):
    query = "&timeout=1"
    deadline_seconds = 8.0

    @pytest.fixture
    def silent(self, server: MongoDBServer) -> Callable[[], AbstractContextManager[None]]:
        return server.frozen


class TestMongoDBBackendBehindABadWire(OwnServer, BackendWireConformance):
    query = "&timeout=5"


class TestRestartedMongoDBBackend(OwnServer, BackendRestartConformance):
    @pytest.fixture
    def restart_store(self, server: MongoDBServer) -> Callable[[], None]:
        return lambda: server.restart(by_kill=True)
