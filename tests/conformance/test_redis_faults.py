"""Redis in trouble: killed, frozen, full, read-only, loading, failing over, and behind a bad wire."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType

import pytest
from ekiden.errors import BrokerUnavailable
from ekiden.message import STORED, PublishOutcome, SettleOutcome
from ekiden.plugins import open_transport
from ekiden.testing.conformance import (
    BrokerRestartConformance,
    FullBrokerConformance,
    LostReplyConformance,
    LostWakeUpConformance,
    SilentAddressConformance,
    SilentBrokerConformance,
    SlowWireConformance,
)
from ekiden.testing.conformance.fixtures import (
    TransportFixtures,
    a_message,
    bodies,
    eventually,
    numbered,
    settle,
)
from ekiden.testing.proxy import Proxy
from ekiden.transport import Transport
from ekiden.urls import parse_url
from ekiden_redis.keys import queue_keys
from redis import Redis

from tests.servers.redis import RedisServer
from tests.servers.running import running


class OwnServer:
    """The broker is a server of the test's own."""

    append_only = False
    options: Mapping[str, str] = MappingProxyType({})
    query = ""

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[RedisServer]:
        with running(lambda: RedisServer(tmp_path, append_only=self.append_only, options=self.options)) as server:
            yield server

    @pytest.fixture
    def url(self, server: RedisServer) -> str:
        return f"{server.url}{self.query}"


@pytest.mark.parametrize("by_kill", [False, True], ids=["stopped", "killed"])
class TestRestartedRedis(OwnServer, BrokerRestartConformance):
    append_only = True

    @pytest.fixture
    def restart_broker(self, server: RedisServer, by_kill: bool) -> Callable[[], None]:
        return functools.partial(server.restart, by_kill=by_kill)


class TestFrozenRedis(OwnServer, SilentBrokerConformance):
    query = "?timeout=1"
    deadline_seconds = 3.0

    @pytest.fixture
    def silent(self, server: RedisServer) -> Callable[[], AbstractContextManager[None]]:
        return server.frozen


class TestRedisBehindAFrozenWire(OwnServer, SilentBrokerConformance):
    deadline_seconds = 3.0

    @pytest.fixture
    def proxy(self, server: RedisServer) -> Iterator[Proxy]:
        with Proxy("127.0.0.1", server.port) as proxy:
            yield proxy

    @pytest.fixture
    def url(self, server: RedisServer, proxy: Proxy) -> str:
        return proxy.through(f"{server.url}?timeout=1")

    @pytest.fixture
    def silent(self, proxy: Proxy) -> Callable[[], AbstractContextManager[None]]:
        return proxy.frozen


class TestFullRedis(OwnServer, FullBrokerConformance):
    options = MappingProxyType({"maxmemory": "4mb"})


class TestRedisThatLosesReplies(OwnServer, LostReplyConformance):
    query = "?timeout=5"


class TestRedisAtItsSecondAddress(OwnServer, SilentAddressConformance):
    pass


class TestRedisOverABadWire(OwnServer, SlowWireConformance):
    pass


class TestRedisThatWakesNobody(LostWakeUpConformance):
    @pytest.fixture
    def url(self, redis_place: str) -> str:
        return redis_place

    @pytest.fixture
    def silent_publisher(self, url: str, queue: str) -> Iterator[Transport]:
        """Whoever waits longest for a bell hears it: here, somebody who does nothing then, as if it had died."""
        prefix = parse_url(url).options["prefix"]
        deaf = Redis.from_url(url.partition("?")[0]).connection_pool.get_connection()
        deaf.send_command("BLPOP", queue_keys(prefix, queue).bell, 0)
        with open_transport(url) as transport:
            yield transport
        deaf.disconnect()


class TestRedisThatForgetsScripts(OwnServer, TransportFixtures):
    def test_scripts_are_sent_again_after_a_flush(self, transport: Transport, server: RedisServer, queue: str) -> None:
        consumer = self.consume(transport, queue)

        def flush() -> None:
            with server.client() as client:
                client.script_flush()

        for _ in range(2):
            flush()
            assert transport.publish(numbered(queue, 3)) == [STORED] * 3
            flush()
            held = self.collect(consumer, 3)
            flush()
            assert {answer.outcome for answer in consumer.extend(held)} == {SettleOutcome.SETTLED}
            flush()
            consumer.release(held[:1])
            flush()
            assert settle(consumer, held) == [SettleOutcome.LOST, SettleOutcome.SETTLED, SettleOutcome.SETTLED]
            flush()
            assert transport.purge(queue) == 1


class TestReadOnlyRedis(OwnServer, TransportFixtures):
    def test_a_replica_is_named_as_one_and_all_goes_on_once_it_is_a_primary(
        self, transport: Transport, server: RedisServer, queue: str
    ) -> None:
        transport.publish([a_message(queue, b"before")])
        consumer = self.consume(transport, queue)
        held = self.collect_one(consumer)
        with server.client() as client:
            client.replicaof("127.0.0.1", 1)  # nobody is there: it stays as it is, and takes no writes

            assert "read-only replica" in self.refusal(transport, queue)
            with pytest.raises(BrokerUnavailable, match="read-only replica"):
                consumer.receive(1, 0.1)
            assert settle(consumer, [held]) == [SettleOutcome.FAILED]

            client.replicaof("NO", "ONE")
        assert settle(consumer, [held]) == [SettleOutcome.SETTLED]
        assert transport.publish([a_message(queue, b"after")]) == [STORED]
        assert bodies(self.collect(consumer, 1)) == [b"after"]

    def refusal(self, transport: Transport, queue: str) -> str:
        """What the transport says when it is to publish."""
        try:
            (answer,) = transport.publish([a_message(queue)])
        except BrokerUnavailable as error:
            return str(error)
        assert answer.outcome is PublishOutcome.FAILED
        assert isinstance(answer.error, BrokerUnavailable)
        return str(answer.error)


class TestLoadingRedis(TransportFixtures):
    """A server that has to load much first answers everything with that."""

    @pytest.fixture
    def server(self, tmp_path: Path) -> Iterator[RedisServer]:
        slowly = {"key-load-delay": "1000", "loading-process-events-interval-bytes": "1024"}  # microseconds for a key
        with running(lambda: RedisServer(tmp_path, options=slowly)) as server:
            yield server

    @pytest.fixture
    def url(self, server: RedisServer) -> str:
        return server.url

    @pytest.mark.slow
    def test_loading_is_named_and_all_goes_on_afterwards(
        self, transport: Transport, server: RedisServer, queue: str
    ) -> None:
        transport.publish([a_message(queue, b"before")])
        with server.client() as client, client.pipeline(transaction=False) as pipeline:
            for number in range(2000):
                pipeline.set(f"other-{number}", "x" * 100)
            pipeline.execute()
            client.save()
        server.kill()
        server.launch()

        said = eventually(lambda: self.complaint(transport, queue), what="it says that it is loading", within=5)
        server.wait_until_ready()

        assert "is still loading its data" in said
        consumer = self.consume(transport, queue)
        assert bodies(self.collect(consumer, 1)) == [b"before"]

    def complaint(self, transport: Transport, queue: str) -> str | None:
        """What is said instead of the depth, once somebody listens at all."""
        with pytest.raises(BrokerUnavailable) as caught:
            transport.depth(queue)
        return None if "cannot be reached" in str(caught.value) else str(caught.value)
