"""The Redis transport from inside: its URLs, its keys, its bells, and what no other transport has to be asked."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from ekiden.errors import BrokerUnavailable, ConfigurationError
from ekiden.message import (
    DUPLICATE,
    LOST,
    SETTLED,
    STORED,
    Delivery,
    Depth,
    Ending,
    PublishOutcome,
    SettleOutcome,
    new_id,
)
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import a_message, bodies, eventually, ids, let_it_wait, numbered, settle
from ekiden.testing.conformance.pace import assert_quick
from ekiden.testing.proxy import Proxy
from ekiden.transport import Consumer, Transport
from ekiden.urls import Host, parse_url
from ekiden_redis.keys import QueueKeys, key, queue_keys, slot_of
from ekiden_redis.options import Arrangement, Place, options_in, place_in
from ekiden_redis.scripts import AT_ONCE

from tests.servers.redis import RedisServer
from tests.servers.running import running

PATIENCE = 10.0


def place(url: str) -> Place:
    """What ``url`` names."""
    parsed = parse_url(url)
    return place_in(parsed, options_in(parsed))


class TestURLs:
    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("redis://", Place(Arrangement.ONE_SERVER, (Host("localhost", 6379),))),
            ("redis://h", Place(Arrangement.ONE_SERVER, (Host("h", 6379),))),
            ("redis://h:1/5", Place(Arrangement.ONE_SERVER, (Host("h", 1),), database=5)),
            ("redis://h?db=5", Place(Arrangement.ONE_SERVER, (Host("h", 6379),), database=5)),
            ("redis://[::1]:7/", Place(Arrangement.ONE_SERVER, (Host("::1", 7),))),
            ("redis://u:p%40@h", Place(Arrangement.ONE_SERVER, (Host("h", 6379),), username="u", password="p@")),
            ("redis://:p@h", Place(Arrangement.ONE_SERVER, (Host("h", 6379),), password="p")),
            ("rediss://h", Place(Arrangement.ONE_SERVER, (Host("h", 6379),), tls=True)),
            ("unix:///run/redis.sock", Place(Arrangement.ONE_SERVER, path="/run/redis.sock")),
            (
                "unix://u:p@/a%20b.sock?db=2",
                Place(Arrangement.ONE_SERVER, path="/a b.sock", database=2, username="u", password="p"),
            ),
            (
                "redis+sentinel://u:p@a:1,b/tasks/3",
                Place(
                    Arrangement.SENTINEL,
                    (Host("a", 1), Host("b", 26379)),
                    service="tasks",
                    database=3,
                    username="u",
                    password="p",
                ),
            ),
            ("rediss+sentinel://a/s", Place(Arrangement.SENTINEL, (Host("a", 26379),), service="s", tls=True)),
            ("redis+cluster://a,[::1]:2", Place(Arrangement.CLUSTER, (Host("a", 6379), Host("::1", 2)))),
            ("rediss+cluster://a/0", Place(Arrangement.CLUSTER, (Host("a", 6379),), tls=True)),
        ],
    )
    def test_they_name_servers(self, url: str, expected: Place) -> None:
        assert place(url) == expected

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("redis+ring://h", "no variant 'ring'"),
            ("redis://a,b", "several hosts are a cluster or its Sentinels"),
            ("redis://h/tasks", "'tasks' is not a database"),
            ("redis://h/-1", "'-1' is not a database"),
            ("redis://h/1?db=2", "the database is named twice"),
            ("redis+sentinel://h", "say which service"),
            ("redis+cluster://h/1", "a cluster has the database 0 only"),
            ("unix://redis.sock", "with three slashes"),
            ("unix://", "name the socket's path"),
            ("redis://h?prefix=", "a prefix has 1 to 100"),
            ("redis://h?prefix=a%0Ab", "a prefix has 1 to 100"),
            ("redis://h?timeout=0", "timeout is a number of seconds"),
            ("redis://h?timeout=nan", "timeout is a number of seconds"),
            ("redis://h?timeout=soon", "timeout"),
            ("redis://h?max_message_bytes=-1", "max_message_bytes is a number of bytes"),
            ("redis://h?cafile=x", "cafile is for TLS; write rediss://"),
            ("redis://h?sentinel_username=x", "is for Sentinels"),
            ("rediss://h?keyfile=x", "give both"),
            ("rediss://h?cafile=/no/such/file", "no certificates can be read from cafile=/no/such/file"),
            ("rediss://h?certfile=/no/such/file", "certfile=/no/such/file"),
            ("redis://h?socket_timeout=5", "there is no option 'socket_timeout'"),
        ],
    )
    def test_what_cannot_be_is_refused_with_a_reason(self, url: str, words: str) -> None:
        with pytest.raises(ConfigurationError) as caught:
            open_transport(url)

        assert words in str(caught.value)

    def test_a_place_shows_no_password(self) -> None:
        shown = place("redis+sentinel://user:s3cret@h/s?sentinel_password=s3cret")

        assert "s3cret" not in str(shown) + repr(shown)


class TestKeys:
    @pytest.mark.parametrize(
        ("name", "slot"), [(b"123456789", 12739), (b"foo", 12182), (b"{foo}.bar", 12182), (b"{}foo", 9500)]
    )
    def test_slots_are_those_of_a_cluster(self, name: bytes, slot: int) -> None:
        assert slot_of(name) == slot

    @pytest.mark.parametrize("queue", ["q", "a}b", "{a}", "}", "a{b", "größe", " "])
    def test_all_keys_of_a_queue_are_in_one_slot(self, queue: str) -> None:
        keys = queue_keys("ekiden", queue)

        assert len({slot_of(getattr(keys, part)) for part in QueueKeys.__struct_fields__}) == 1

    def test_two_names_never_share_a_key(self) -> None:
        names = ["a", "a}", "a}:ready", "{a", "a:b", "reply.a"]

        found = {key("ekiden", name, part) for name in names for part in QueueKeys.__struct_fields__}

        assert len(found) == len(names) * len(QueueKeys.__struct_fields__)


@pytest.fixture
def transport(redis_place: str) -> Iterator[Transport]:
    with open_transport(redis_place) as transport:
        yield transport


@pytest.fixture
def other(redis_place: str) -> Iterator[Transport]:
    with open_transport(redis_place) as transport:
        yield transport


@pytest.fixture
def client(redis_place: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_place.partition("?")[0]) as client:
        yield client


@pytest.fixture
def queue() -> str:
    return f"queue-{new_id()}"


@pytest.fixture
def keys(redis_place: str, queue: str) -> QueueKeys:
    return queue_keys(parse_url(redis_place).options["prefix"], queue)


def consume(transport: Transport, *queues: str, lease: float = 60.0, prefetch: int = 10_000) -> Consumer:
    """A consumer with a name of its own."""
    return transport.consumer(queues, lease=lease, prefetch=prefetch, name=new_id())


def collect(consumer: Consumer, count: int) -> list[Delivery]:
    """``count`` deliveries."""
    give_up = time.monotonic() + PATIENCE
    collected: list[Delivery] = []
    while len(collected) < count and time.monotonic() < give_up:
        collected += consumer.receive(count - len(collected), 1.0)
    assert len(collected) == count
    return collected


def existing(client: redis.Redis, keys: QueueKeys) -> set[str]:
    """Which parts of a queue there are."""
    return {part for part in QueueKeys.__struct_fields__ if client.exists(getattr(keys, part))}


class TestWhatIsLeftBehind:
    def test_an_idle_queue_has_one_ring_at_most(
        self, transport: Transport, client: redis.Redis, queue: str, keys: QueueKeys
    ) -> None:
        for _ in range(20):
            transport.publish(numbered(queue, 3))

        assert client.llen(keys.bell) == 1

    def test_of_a_queue_that_is_worked_off_a_number_is_left_that_expires(
        self, transport: Transport, client: redis.Redis, queue: str, keys: QueueKeys
    ) -> None:
        transport.publish([*numbered(queue, 5), a_message(queue, due_in=0.05)])
        consumer = consume(transport, queue)
        held = collect(consumer, 6)
        consumer.release(held[:1])
        settle(consumer, [*held[1:], *collect(consumer, 1)])

        assert consumer.receive(1, 0.0) == []

        assert existing(client, keys) == {"sequence"}
        assert 0 < client.pttl(keys.sequence) <= 24 * 3600 * 1000

    def test_messages_that_come_after_the_number_expired_come_last(
        self, transport: Transport, client: redis.Redis, queue: str, keys: QueueKeys
    ) -> None:
        transport.publish([a_message(queue, b"first")])
        client.delete(keys.sequence)
        transport.publish([a_message(queue, b"second")])

        assert bodies(collect(consume(transport, queue), 2)) == [b"first", b"second"]

    def test_a_purged_queue_is_gone(
        self, transport: Transport, client: redis.Redis, queue: str, keys: QueueKeys
    ) -> None:
        transport.publish([*numbered(queue, 600), *numbered(queue, 300, due_in=3600)])
        consume(transport, queue).close()

        assert transport.purge(queue) == 900

        assert existing(client, keys) <= {"sequence", "bell"}

    def test_every_key_of_a_reply_queue_expires(
        self, transport: Transport, client: redis.Redis, redis_place: str
    ) -> None:
        queue = f"reply.{new_id()}"
        keys = queue_keys(parse_url(redis_place).options["prefix"], queue)

        def assert_all_expire(*expected: str) -> None:
            found = existing(client, keys)
            assert set(expected) <= found
            assert all(0 < client.pttl(getattr(keys, part)) <= 60_000 for part in found), found

        consumer = consume(transport, queue)
        assert_all_expire("open")
        transport.publish([*numbered(queue, 3), a_message(queue, due_in=3600)])
        assert_all_expire("open", "messages", "held", "ready", "delayed", "bell", "sequence")
        held = collect(consumer, 3)
        assert_all_expire("open", "messages", "held", "leased")
        consumer.release(held[:1])
        consumer.close()
        assert_all_expire("open", "messages", "held", "ready")

    def test_a_reply_as_a_follow_up_expires_or_vanishes(
        self, transport: Transport, client: redis.Redis, queue: str, redis_place: str
    ) -> None:
        open_queue, missing = f"reply.{new_id()}", f"reply.{new_id()}"
        listening = consume(transport, open_queue)
        transport.publish([a_message(queue)])
        consumer = consume(transport, queue)

        replies = (a_message(open_queue, b"reply"), a_message(missing))
        assert consumer.settle([Ending(collect(consumer, 1)[0], replies)]) == [SETTLED]

        prefix = parse_url(redis_place).options["prefix"]
        assert client.pttl(queue_keys(prefix, open_queue).messages) > 0
        assert existing(client, queue_keys(prefix, missing)) == set()
        assert bodies(collect(listening, 1)) == [b"reply"]


class TestOrder:
    def test_what_is_released_or_lost_is_where_it_was(self, transport: Transport, other: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 10))
        holder, dying = consume(transport, queue, prefetch=3), consume(other, queue, prefetch=3, lease=0.1)
        held = collect(holder, 3)
        collect(dying, 3)
        eventually(lambda: transport.depth(queue) == Depth(7, 0, 3), what="the leases have ended")

        holder.release(held)

        assert bodies(collect(consume(transport, queue), 10)) == [b"%d" % number for number in range(10)]

    def test_browsing_pages_through_messages_of_one_due_time(self, transport: Transport, queue: str) -> None:
        due = time.time() + 3600
        messages = [message.__class__(message.id, queue, b"", {}, 4, due) for message in numbered(queue, 700)]
        transport.publish(messages)

        seen: list[str] = []
        cursor: str | None = None
        while page := transport.browse(queue, after=cursor, limit=33):
            seen += [one.message.id for one in page]
            cursor = page[-1].cursor

        assert sorted(seen) == sorted(message.id for message in messages)

    def test_browsing_takes_as_many_as_are_asked_for(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 1000))

        assert [one.message.body for one in transport.browse(queue, limit=900)] == [b"%d" % n for n in range(900)]


class TestFollowUps:
    def test_more_than_a_script_takes_are_published_too(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue)])
        consumer = consume(transport, queue)
        (held,) = collect(consumer, 1)
        many = tuple(numbered(f"{queue}-next", 3 * AT_ONCE))

        assert consumer.settle([Ending(held, many)]) == [SETTLED]
        assert consumer.settle([Ending(held, tuple(numbered(f"{queue}-next", 3 * AT_ONCE)))]) == [LOST]

        assert transport.depth(queue) == Depth(0, 0, 0)
        assert transport.depth(f"{queue}-next").ready == 3 * AT_ONCE

    def test_many_endings_with_one_follow_up_each(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 600))
        consumer = consume(transport, queue)
        held = collect(consumer, 600)
        settle(consumer, held[::5])
        endings = [Ending(each, (a_message(f"{queue}-{number % 3}"),)) for number, each in enumerate(held)]

        answers = consumer.settle(endings)

        assert answers == [LOST if number % 5 == 0 else SETTLED for number in range(600)]
        assert sum(transport.depth(f"{queue}-{number}").ready or 0 for number in range(3)) == 480


class TestBells:
    def test_a_consumer_that_has_no_room_passes_its_ring_on(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        full, idle = consume(transport, queue, prefetch=1), consume(other, queue)
        with ThreadPoolExecutor() as threads:
            # It waits for a while at the bell, so the server knows it as the first to be rung.
            waiting = threads.submit(full.receive, 1, PATIENCE)
            let_it_wait()
            transport.publish([a_message(queue, b"first")])
            assert bodies(waiting.result()) == [b"first"]
            waiting_too = threads.submit(full.receive, 1, PATIENCE)
            woken = threads.submit(idle.receive, 1, PATIENCE)
            let_it_wait()
            published = time.monotonic()
            transport.publish([a_message(queue, b"second")])

            assert bodies(woken.result()) == [b"second"]
            assert_quick(time.monotonic() - published, 0.5)
            full.stop()
            assert waiting_too.result() == []

    @pytest.mark.parametrize("how", ["stop", "close"])
    def test_a_consumer_that_waits_ends_at_once(self, transport: Transport, queue: str, how: str) -> None:
        consumer = consume(transport, queue)
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(consumer.receive, 1, PATIENCE)
            let_it_wait()
            began = time.monotonic()
            getattr(consumer, how)()
            assert waiting.result() == []
            assert_quick(time.monotonic() - began, 0.5)

    def test_a_message_of_one_queue_wakes_who_waits_for_many(self, transport: Transport, queue: str) -> None:
        queues = [f"{queue}-{number}" for number in range(30)]
        consumer = consume(transport, *queues)
        with ThreadPoolExecutor() as threads:
            for number in (0, 17, 29):
                waiting = threads.submit(consumer.receive, 1, PATIENCE)
                let_it_wait()
                published = time.monotonic()
                transport.publish([a_message(queues[number])])
                settle(consumer, waiting.result())
                assert_quick(time.monotonic() - published, 0.5)


FORKS_WHILE_IT_WAITS = """
import os, sys, threading, time
from ekiden.message import Message
from ekiden.plugins import open_transport

transport = open_transport(sys.argv[1])
consumer, listener = transport.consumer(["q"], lease=60.0, prefetch=1, name="parent"), transport.listen("t")
received = []
def receive():
    received.append(consumer.receive(1, 30.0))
def hear():
    received.append(listener.receive(30.0))
threads = [threading.Thread(target=receive), threading.Thread(target=hear)]
for thread in threads:
    thread.start()
time.sleep(0.3)  # until they wait
child = os.fork()
if not child:
    transport.forget()
    transport.publish([Message("child", "other", b"")])
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
began = time.monotonic()
transport.publish([Message("parent", "q", b"")])
transport.broadcast("t", [b"x"])
for thread in threads:
    thread.join()
assert time.monotonic() - began < 1.0, time.monotonic() - began
assert all(received), received
transport.close()
"""


def test_a_fork_leaves_the_parents_bell_and_stream_alone(redis_place: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORKS_WHILE_IT_WAITS, redis_place], timeout=50, check=False)

    assert done.returncode == 0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running(lambda: RedisServer(tmp_path)) as server:
        yield server


class TestTrouble:
    @pytest.mark.parametrize("how", ["stop", "close"])
    @pytest.mark.slow
    def test_a_waiting_receive_ends_soon_although_the_server_is_frozen(
        self, server: RedisServer, queue: str, how: str
    ) -> None:
        with open_transport(f"{server.url}?timeout=1") as transport:
            consumer, listener = consume(transport, queue), transport.listen(queue)
            with ThreadPoolExecutor() as threads:
                receiving, hearing = threads.submit(consumer.receive, 1, 60.0), threads.submit(listener.receive, 60.0)
                let_it_wait()
                with server.frozen():
                    began = time.monotonic()
                    listener.close()
                    getattr(consumer, how)()
                    assert hearing.result() == receiving.result() == []
                    assert time.monotonic() - began < 4.0

    def test_what_a_claim_took_whose_answer_was_lost_comes_at_once_with_the_next(
        self, server: RedisServer, queue: str
    ) -> None:
        with Proxy("127.0.0.1", server.port) as proxy, open_transport(proxy.through(server.url)) as transport:
            transport.publish(numbered(queue, 5))
            consumer = consume(transport, queue, lease=600.0)
            consumer.release(collect(consumer, 5))  # from now on the server knows the script
            proxy.lose_next_reply()
            with pytest.raises(BrokerUnavailable):
                consumer.receive(10, 0.0)
            assert transport.depth(queue) == Depth(0, 0, 5)

            received = consumer.receive(10, PATIENCE)

            assert bodies(received) == [b"0", b"1", b"2", b"3", b"4"]
            assert {delivery.attempt for delivery in received} == {1}

    def test_an_answer_that_was_lost_is_asked_for_again_where_that_is_harmless(
        self, server: RedisServer, queue: str
    ) -> None:
        with Proxy("127.0.0.1", server.port) as proxy, open_transport(proxy.through(server.url)) as transport:
            message = a_message(queue)
            transport.publish([message])
            proxy.lose_next_reply()

            assert transport.depth(queue) == Depth(1, 0, 0)
            proxy.lose_next_reply()
            assert transport.publish([a_message(queue), message]) == [DUPLICATE, DUPLICATE]

            assert transport.depth(queue) == Depth(2, 0, 0)

    def test_a_full_server_lets_everybody_end_what_they_have(self, tmp_path: Path, queue: str) -> None:
        with (
            running(lambda: RedisServer(tmp_path, options={"maxmemory": "4mb"})) as server,
            open_transport(server.url) as transport,
        ):
            transport.publish([*numbered(queue, 20), a_message(queue, b"due", due_in=0.2)])
            consumer = consume(transport, queue, prefetch=12)
            held = collect(consumer, 12)
            with server.client() as client:
                client.config_set("maxmemory", "1")  # less than it has

                (answer,) = transport.publish([a_message(queue)])
                assert answer.outcome is PublishOutcome.FAILED
                assert isinstance(answer.error, BrokerUnavailable)
                assert "full" in str(answer.error)
                assert consumer.extend(held) == [SETTLED] * 12
                consumer.release(held[:2])
                consumer.release(held[2:4], delay=0.1)
                follow_up = Ending(held[4], (a_message(queue, b"next"),))
                answers = consumer.settle([follow_up, *map(Ending, held[5:])])
                assert [each.outcome for each in answers] == [SettleOutcome.FAILED] + [SettleOutcome.SETTLED] * 7
                assert len(ids(collect(consumer, 11))) == 11
                transport.depth(queue)
                transport.browse(queue)
                consumer.close()
                with transport.consumer([queue], lease=60.0, prefetch=1, name="next"):
                    assert (transport.depth(queue).ready or 0) >= 12
                transport.purge(queue)

                client.config_set("maxmemory", "0")
                assert transport.publish([a_message(queue)]) == [STORED]


class TestWarnings:
    def warned(self, server: RedisServer) -> str:
        """What is said about a server."""
        with open_transport(server.url) as transport:
            found = transport.warnings(["default"])
        assert all(sentence.endswith(".") for sentence in found)
        return "\n".join(found)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"maxmemory-policy": "allkeys-lru"}, "maxmemory-policy is allkeys-lru, so it deletes messages as soon as"),
            ({"maxmemory-policy": "volatile-ttl", "maxmemory": "100mb"}, "deletes messages when it is full"),
            ({"maxmemory": "1"}, "nearly full"),
            ({}, "keeps nothing on disk"),
            ({"save": "3600 1"}, "snapshots only"),
            ({"appendonly": "yes", "appendfsync": "no"}, "appendfsync is no"),
            ({"appendonly": "yes", "appendfsync": "everysec"}, "appendfsync is everysec"),
        ],
    )
    def test_what_should_be_different_is_said(self, server: RedisServer, settings: dict[str, str], words: str) -> None:
        with server.client() as client:
            for name, value in settings.items():
                client.config_set(name, value)

        assert words in self.warned(server)

    def test_a_server_that_is_set_up_well_is_not_warned_about(self, server: RedisServer) -> None:
        with server.client() as client:
            client.config_set("appendonly", "yes")
            client.config_set("appendfsync", "always")
            client.config_set("maxmemory", "100mb")

        assert self.warned(server) == ""

    def test_replicas_that_nobody_waits_for_are_said(self, server: RedisServer, tmp_path: Path) -> None:
        with running(lambda: RedisServer(tmp_path / "replica")) as replica:
            with replica.client() as client:
                client.replicaof("127.0.0.1", server.port)
            with server.client() as client:
                eventually(lambda: client.info("replication")["connected_slaves"], what="it follows", within=30)

            assert "min-replicas-to-write" in self.warned(server)


class TestListeners:
    def test_one_that_was_cut_off_misses_nothing(self, server: RedisServer, queue: str) -> None:
        with open_transport(server.url) as transport, server.client() as client:
            listener = transport.listen(queue)
            transport.broadcast(queue, [b"before"])
            assert listener.receive(PATIENCE) == [b"before"]
            client.client_kill_filter(_type="normal", skipme=True)

            transport.broadcast(queue, [b"meanwhile"])

            assert eventually(self.heard(listener.receive), what="it is heard") == [b"meanwhile"]

    def test_one_goes_on_after_the_server_lost_everything(self, server: RedisServer, queue: str) -> None:
        with open_transport(server.url) as transport:
            listener = transport.listen(queue)
            transport.broadcast(queue, [b"before"])
            assert listener.receive(PATIENCE) == [b"before"]
            server.restart()

            eventually(lambda: self.heard(listener.receive)() == [], what="it is connected again")
            transport.broadcast(queue, [b"after"])

            assert listener.receive(PATIENCE) == [b"after"]

    def test_what_is_broadcast_is_not_kept_for_ever(
        self, transport: Transport, client: redis.Redis, redis_place: str
    ) -> None:
        transport.broadcast("topic", [b"x"] * 30_000)

        stream = key(parse_url(redis_place).options["prefix"], "topic", "events")
        assert client.xlen(stream) < 11_000
        assert 0 < client.pttl(stream) <= 600_000

    def heard(self, receive: Callable[[float], list[bytes]]) -> Callable[[], list[bytes] | None]:
        """Receives; None where the connection was found to be broken."""

        def hear() -> list[bytes] | None:
            try:
                return receive(0.2)
            except BrokerUnavailable:
                return None

        return hear


def test_threads_share_a_transport(transport: Transport, queue: str) -> None:
    barrier = threading.Barrier(8)

    def publish_and_look(number: int) -> None:
        barrier.wait(PATIENCE)
        for _ in range(50):
            transport.broadcast(f"{queue}-{number}", [b"x"])
            transport.depth(queue)
            transport.browse(queue, limit=1)

    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(publish_and_look, number) for number in range(8)]
        for each in asked:
            each.result()
