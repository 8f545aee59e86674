"""The CouchDB backend keeps the contract, also in trouble."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from ekiden.message import new_id
from ekiden.results import Backend
from ekiden.testing.conformance import (
    BackendConformance,
    BackendGarbageConformance,
    BackendLimitConformance,
    BackendProcessConformance,
    BackendRestartConformance,
    BackendWireConformance,
    SilentBackendConformance,
)
from ekiden_couchdb.store_documents import escaped

from tests.servers.couchdb import CouchDBServer, spoil_document
from tests.servers.couchdb_cluster import CouchDBCluster, playing
from tests.servers.running import running


class TestCouchDBBackend(BackendConformance, BackendProcessConformance, BackendGarbageConformance):
    many_members = 1000

    @pytest.fixture
    def url(self, couchdb_place: str) -> str:
        return couchdb_place

    @pytest.fixture
    def spoil(self, url: str) -> Callable[[str, str], None]:
        spoiled: dict[str, tuple[str, dict[str, object]]] = {
            "result": ("results", {"state": 5}),
            "start": ("results", {"begun": "!"}),
            "record": ("records", {"version": "!"}),
        }

        def spoil(kind: str, key: str) -> None:
            part, changes = spoiled[kind]
            spoil_document(url, part, escaped(key), changes)

        return spoil

    @pytest.mark.slow
    @pytest.mark.timeout(240)
    def test_a_join_may_have_thousands_of_members(self, backend: Backend) -> None:
        """What stands in for CouchDB takes longer with each revision of a document, and this makes thousands of one."""
        super().test_a_join_may_have_thousands_of_members(backend)


@pytest.fixture(scope="module")
def cluster() -> Iterator[CouchDBCluster]:
    with playing() as cluster:
        yield cluster


@pytest.mark.slow
class TestCouchDBBackendInAPlayedCluster(BackendConformance):
    @pytest.fixture
    def url(self, cluster: CouchDBCluster) -> str:
        return cluster.url(f"test-{new_id()}")


class TestCouchDBBackendWithSmallDocuments(BackendLimitConformance):
    """A server whose ``max_document_size`` is 100 kB."""

    @pytest.fixture
    def url(self) -> Iterator[str]:
        with playing(copies=1) as single:
            single.largest_document_bytes = 100_000
            yield single.url(f"test-{new_id()}")

    @pytest.fixture
    def too_large(self) -> int:
        return 200_000


class TestCouchDBBackendWithSmallAttachments(BackendLimitConformance):
    """A server whose ``max_attachment_size`` is 4 MB: what is larger than 3 MB is stored as one."""

    @pytest.fixture
    def url(self) -> Iterator[str]:
        with playing(copies=1) as single:
            single.largest_attachment_bytes = 4_000_000
            yield single.url(f"test-{new_id()}")

    @pytest.fixture
    def too_large(self) -> int:
        return 4_100_000


class OwnServer:
    """The store is a server that is the test's own."""

    in_memory = True
    query = ""

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[CouchDBServer]:
        with running(lambda: CouchDBServer(tmp_path, in_memory=self.in_memory)) as server:
            yield server

    @pytest.fixture
    def url(self, server: CouchDBServer) -> str:
        return f"{server.url}store{self.query}"


class TestSilentCouchDBBackend(OwnServer, SilentBackendConformance):
    query = "?timeout=1"
    deadline_seconds = 8.0

    @pytest.fixture
    def silent(self, server: CouchDBServer) -> Callable[[], AbstractContextManager[None]]:
        return server.frozen


class TestCouchDBBackendBehindABadWire(OwnServer, BackendWireConformance):
    query = "?timeout=5"


class TestRestartedCouchDBBackend(OwnServer, BackendRestartConformance):
    in_memory = False

    @pytest.fixture
    def restart_store(self, server: CouchDBServer) -> Callable[[], None]:
        return lambda: server.restart(by_kill=True)


class TestRestartedCouchDBBackendThatKeepsNothing(OwnServer, BackendRestartConformance):
    survives_restart = False

    @pytest.fixture
    def restart_store(self, server: CouchDBServer) -> Callable[[], None]:
        return server.restart
