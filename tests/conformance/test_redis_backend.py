"""The Redis backend keeps the contract: on one server, in a cluster, under Sentinel, over TLS, and in trouble."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType

import pytest
from ekiden.message import new_id
from ekiden.testing.conformance import (
    BackendConformance,
    BackendLimitConformance,
    BackendProcessConformance,
    BackendRestartConformance,
    BackendWireConformance,
    FullBackendConformance,
    SilentBackendConformance,
)
from ekiden.testing.conformance.fixtures import eventually

from tests.servers.certificates import Certificates
from tests.servers.redis import RedisClusterOfThree, RedisServer, RedisUnderSentinel
from tests.servers.running import running


class TestRedisBackend(BackendConformance, BackendProcessConformance):
    @pytest.fixture
    def url(self, redis_place: str) -> str:
        return redis_place


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisClusterOfThree]:
    with running(lambda: RedisClusterOfThree(tmp_path_factory.mktemp("cluster"))) as cluster:
        yield cluster


@pytest.mark.slow
class TestRedisClusterBackend(BackendConformance, BackendProcessConformance):
    @pytest.fixture
    def url(self, cluster: RedisClusterOfThree) -> str:
        return f"{cluster.url}?prefix=test-{new_id()}"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisUnderSentinel]:
    with running(lambda: RedisUnderSentinel(tmp_path_factory.mktemp("sentinel"))) as group:
        yield group


@pytest.mark.slow
class TestRedisSentinelBackend(BackendConformance, BackendRestartConformance):
    """A restart is a failover here: the primary is killed, and the replica takes its place."""

    @pytest.fixture
    def url(self, group: RedisUnderSentinel) -> str:
        return f"{group.url}?prefix=test-{new_id()}"

    @pytest.fixture
    def restart_store(self, group: RedisUnderSentinel) -> Callable[[], None]:
        def fail_over() -> None:
            group.wait_until_replicated()
            killed = group.fail_over()
            killed.start()
            (promoted,) = [node for node in group.nodes if node is not killed]
            eventually(lambda: group.replicas_of(promoted) == 1, what="the killed one follows", within=60)

        return fail_over


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[RedisServer]:
    with running(
        lambda: RedisServer(tmp_path_factory.mktemp("tls"), certificates=certificates, password="s:e/c@r et")
    ) as encrypted:
        yield encrypted


@pytest.mark.slow
class TestRedisBackendOverTLS(BackendConformance, BackendProcessConformance):
    @pytest.fixture
    def url(self, encrypted: RedisServer, certificates: Certificates) -> str:
        return f"{encrypted.url}?prefix=test-{new_id()}&cafile={certificates.authority}"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(lambda: RedisServer(tmp_path_factory.mktemp("unix"))) as local:
        yield local


@pytest.mark.slow
class TestRedisBackendOverAUnixSocket(BackendConformance):
    @pytest.fixture
    def url(self, local: RedisServer) -> str:
        return f"unix://{local.socket_path}?db=2&prefix=test-{new_id()}"


class OwnServer:
    """The store is a server that is the test's own."""

    options: Mapping[str, str] = MappingProxyType({})
    append_only = False
    query = ""

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[RedisServer]:
        with running(lambda: RedisServer(tmp_path, options=self.options, append_only=self.append_only)) as server:
            yield server

    @pytest.fixture
    def url(self, server: RedisServer) -> str:
        return f"{server.url}{self.query}"


class TestFullRedisBackend(OwnServer, FullBackendConformance):
    options = MappingProxyType({"maxmemory": "4mb"})


class TestRedisBackendThatTakesSmallValuesOnly(OwnServer, BackendLimitConformance):
    options = MappingProxyType({"proto-max-bulk-len": "1mb"})

    @pytest.fixture
    def too_large(self) -> int:
        return 2 * 1024 * 1024  # of more, the server closes the connection before it has read all


class TestSilentRedisBackend(OwnServer, SilentBackendConformance):
    query = "?timeout=1"
    deadline_seconds = 8.0

    @pytest.fixture
    def silent(self, server: RedisServer) -> Callable[[], AbstractContextManager[None]]:
        return server.frozen


class TestRedisBackendBehindABadWire(OwnServer, BackendWireConformance):
    query = "?timeout=5"


class TestRestartedRedisBackend(OwnServer, BackendRestartConformance):
    append_only = True

    @pytest.fixture
    def restart_store(self, server: RedisServer) -> Callable[[], None]:
        return lambda: server.restart(by_kill=True)


class TestRestartedRedisBackendThatKeepsNothing(OwnServer, BackendRestartConformance):
    survives_restart = False

    @pytest.fixture
    def restart_store(self, server: RedisServer) -> Callable[[], None]:
        return server.restart
