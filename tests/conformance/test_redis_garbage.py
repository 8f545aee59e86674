"""What others have written under the keys of Redis that are ekiden's: it holds nothing up, and is set aside."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import product

import msgspec
import pytest
import redis
from ekiden.message import LOST, SETTLED, STORED, Ending, new_id
from ekiden.results import Backend
from ekiden.testing.conformance import (
    BackendGarbageConformance,
    GarbageConformance,
    PlantedBackendGarbageConformance,
    PlantedGarbageConformance,
)
from ekiden.testing.conformance.fixtures import TransportFixtures, a_message, bodies, eventually, numbered, settle
from ekiden.transport import Transport
from ekiden.urls import parse_url
from ekiden_redis import RedisTransport
from ekiden_redis.keys import QueueKeys, events_key, queue_keys
from ekiden_redis.packing import value_of
from ekiden_redis.scripts import RANKS
from ekiden_redis.store_keys import StoreKeys

pack = msgspec.msgpack.encode
GOOD = value_of(4, None, {}, b"good")

NO_MESSAGES = {
    "empty": b"",
    "text": b"garbage",
    "bytes": bytes(range(256)),
    "cut short": GOOD[:-2],
    "a map": pack({"priority": 4}),
    "too few": pack((4, None)),
    "a number": pack(7),
    "a body that is text": pack((4, None, None, "text")),
    "a priority that is none": pack((77, None, None, b"")),
    "headers that are a list": pack((4, None, [1], b"")),
    "a header that is a list": pack((4, None, {"a": [1]}, b"")),
    "text that is no UTF-8": b"\x94\x04\xc0\x81\xa1\xff\x01\xc4\x00",
    "a due time that is text": pack((4, "soon", None, b"")),
}

PARTS = {
    "messages": "hash",
    "held": "hash",
    "ready": "zset",
    "delayed": "zset",
    "leased": "zset",
    "bell": "list",
    "sequence": "string",
}

HELD = {
    "empty": b"",
    "text": b"garbage",
    "short": struct.pack("<I", 3),
    "no number": struct.pack("<Id16s", 3, float("nan"), b""),
    "infinite": struct.pack("<Id16s", 3, float("inf"), b""),
    "negative": struct.pack("<Id16s", 3, -1e300, b""),
    "random": b"\xff" * 40,
}


SCORES = ["inf", "-inf", "1e300", "-5", "0.5", "9007199254740993"]


class Keys(TransportFixtures):
    """Tests that write past the transport."""

    @pytest.fixture
    def url(self, redis_place: str) -> str:
        return redis_place

    @pytest.fixture
    def client(self, url: str) -> Iterator[redis.Redis]:
        with redis.Redis.from_url(url.partition("?")[0]) as client:
            yield client

    @pytest.fixture
    def keys_of(self, url: str) -> Callable[[str], QueueKeys]:
        prefix = parse_url(url).options["prefix"]
        return lambda queue: queue_keys(prefix, queue)

    @pytest.fixture
    def keys(self, keys_of: Callable[[str], QueueKeys], queue: str) -> QueueKeys:
        return keys_of(queue)


class TestGarbageAmongMessages(Keys, PlantedGarbageConformance):
    @pytest.fixture
    def plant(self, client: redis.Redis, keys_of: Callable[[str], QueueKeys]) -> Callable[[str], int]:
        def plant(queue: str) -> int:
            keys = keys_of(queue)
            for number, (name, value) in enumerate(NO_MESSAGES.items()):
                client.hset(keys.messages, name, value)
                client.zadd(keys.ready, {name: number})
            client.hset(keys.messages, b"\xff\xfe", GOOD)  # type: ignore[arg-type]  # an id that is no text
            client.zadd(keys.ready, {b"\xff\xfe": 5 * RANKS})
            client.hset(keys.messages, "delayed", b"garbage")
            client.zadd(keys.delayed, {"delayed": 1.0})
            client.hset(keys.messages, "leased", b"garbage")
            client.zadd(keys.leased, {"leased": float("-inf")})
            client.zadd(keys.ready, {"no message": 0})
            client.zadd(keys.delayed, {"no message, due": 0})
            return len(NO_MESSAGES) + 3

        return plant


class TestSpoiltMessages(Keys, GarbageConformance):
    @pytest.fixture(params=[b"garbage", None], ids=["garbage", "gone"])
    def spoil(
        self, request: pytest.FixtureRequest, client: redis.Redis, keys_of: Callable[[str], QueueKeys]
    ) -> Callable[[str, str], None]:
        def spoil(queue: str, message_id: str) -> None:
            if request.param is None:
                client.hdel(keys_of(queue).messages, message_id)  # type: ignore[arg-type]
            else:
                client.hset(keys_of(queue).messages, message_id, request.param)

        return spoil


class TestOddEntries(Keys):
    """A message is handed out, whatever else is written of it."""

    @pytest.mark.parametrize("odd", list(product(["ready", "delayed", "leased"], HELD.values())))
    def test_a_message_is_handed_out_whatever_is_said_of_its_attempts(
        self, transport: Transport, client: redis.Redis, keys: QueueKeys, queue: str, odd: tuple[str, bytes]
    ) -> None:
        part, entry = odd
        client.hset(keys.messages, "odd", GOOD)
        client.hset(keys.held, "odd", entry)
        client.zadd(getattr(keys, part), {"odd": 1.0})
        transport.publish([a_message(queue, b"other")])
        consumer = self.consume(transport, queue)

        received = self.collect(consumer, 2)
        assert sorted(bodies(received)) == [b"good", b"other"]
        assert [delivery.attempt for delivery in received] == [1, 1]
        consumer.release(received)

        received = self.collect(consumer, 2)
        assert [delivery.attempt for delivery in received] == [1, 1]
        assert consumer.extend(received) == [SETTLED, SETTLED]
        assert consumer.settle([Ending(each, (a_message(queue, b"next"),)) for each in received]) == [SETTLED] * 2
        assert bodies(self.collect(consumer, 2)) == [b"next"] * 2

    @pytest.mark.parametrize("odd", list(product(["ready", "leased"], SCORES)))
    def test_a_message_is_handed_out_whatever_its_score(
        self, transport: Transport, client: redis.Redis, keys: QueueKeys, queue: str, odd: tuple[str, str]
    ) -> None:
        part, score = odd
        client.hset(keys.messages, "odd", GOOD)
        client.zadd(getattr(keys, part), {"odd": score})  # type: ignore[dict-item]
        consumer = self.consume(transport, queue)  # gives back what is leased without an end

        delivery = self.collect_one(consumer)
        assert delivery.message.body == b"good"
        consumer.release([delivery])
        assert self.collect_one(self.consume(transport, queue)).attempt == 1

    @pytest.mark.parametrize("part", ["delayed", "leased"])
    def test_an_idle_consumer_does_not_wake_for_what_is_never_due(
        self, transport: Transport, client: redis.Redis, keys: QueueKeys, queue: str, part: str
    ) -> None:
        assert isinstance(transport, RedisTransport)
        calls: list[object] = []
        run_all = transport._client.run_all
        transport._client.run_all = lambda *these, **how: calls.append(these) or run_all(*these, **how)
        consumer = self.consume(transport, queue)
        client.zadd(getattr(keys, part), {"odd": "inf"})  # type: ignore[dict-item]

        self.assert_nothing_comes(consumer, within=1.0)

        assert 0 < len(calls) < 100

    @pytest.mark.parametrize(
        "value", [b"garbage", b"-7", b"1.5", b"9223372036854775807", b"", b"x" * 1000, b"999999999999999"]
    )
    def test_the_order_goes_on_whatever_is_written_as_the_last_place(
        self, transport: Transport, client: redis.Redis, keys: QueueKeys, queue: str, value: bytes
    ) -> None:
        client.set(keys.sequence, value)

        assert transport.publish(numbered(queue, 3)) == [STORED] * 3
        assert transport.publish([a_message(queue, b"urgent", priority=9)]) == [STORED]

        consumer = self.consume(transport, queue)
        assert bodies(self.collect(consumer, 4)) == [b"urgent", b"0", b"1", b"2"]

    def test_an_event_of_somebody_elses_is_passed_over(
        self, transport: Transport, client: redis.Redis, url: str, queue: str
    ) -> None:
        listener = transport.listen(queue)
        client.xadd(events_key(parse_url(url).options["prefix"], queue), {"theirs": "1"})
        transport.broadcast(queue, [b"ours"])

        assert eventually(lambda: listener.receive(1.0), what="ours is heard") == [b"ours"]


@pytest.mark.parametrize("part", PARTS)
class TestAnotherKindOfThing(Keys):
    """Under a key of ours there is something else: it is kept under another name, and everything works."""

    @pytest.fixture
    def spoil(
        self, client: redis.Redis, keys_of: Callable[[str], QueueKeys], queue: str, part: str
    ) -> Callable[[], bytes]:
        def spoil() -> bytes:
            key: bytes = getattr(keys_of(queue), part)
            client.delete(key)
            if PARTS[part] == "hash":
                client.set(key, "theirs")
            else:
                client.hset(key, "theirs", "theirs")
            return key

        return spoil

    def test_messages_go_through(
        self, transport: Transport, client: redis.Redis, queue: str, part: str, spoil: Callable[[], bytes]
    ) -> None:
        key = spoil()

        answers = transport.publish([*numbered(queue, 3), a_message(queue, b"3", due_in=0.2)])

        assert [answer.error for answer in answers] == [None] * 4
        consumer = self.consume(transport, queue)
        held = self.collect(consumer, 4)
        assert sorted(bodies(held)) == [b"0", b"1", b"2", b"3"]
        assert set(consumer.settle([Ending(each, (a_message(f"{queue}-next"),)) for each in held])) == {SETTLED}
        assert client.type(key) in {b"none", PARTS[part].encode()}
        if part != "bell":  # of which nothing is worth keeping
            assert [client.type(name) for name in client.scan_iter(match=key.replace(b"[", b"\\[") + b":set-aside*")]

    def test_nothing_that_is_claimed_meanwhile_is_lost(
        self,
        transport: Transport,
        queue: str,
        part: str,
        spoil: Callable[[], bytes],
    ) -> None:
        transport.publish(numbered(queue, 3))
        other_queue = f"{queue}-other"
        transport.publish(numbered(other_queue, 3))
        consumer = self.consume(transport, other_queue, queue)
        spoil()

        received = bodies(self.collect(consumer, 3))
        while found := consumer.receive(10, 0.1):
            received += bodies(found)

        lost = 3 if part in {"messages", "ready"} else 0  # they were there
        assert len(received) == 6 - lost

    def test_every_call_works(self, transport: Transport, queue: str, part: str, spoil: Callable[[], bytes]) -> None:
        consumer = self.consume(transport, queue, name="name")
        for act in (
            lambda: transport.depth(queue),
            lambda: transport.browse(queue),
            lambda: transport.purge(queue),
            lambda: consumer.receive(1, 0),
            lambda: consumer.receive(1, 0.1),
            lambda: self.consume(transport, queue, name="name").close(),
        ):
            spoil()
            act()
        transport.publish(numbered(queue, 3))
        held = self.collect(consumer, 3)
        for number, end in enumerate(
            (
                lambda: consumer.extend(held[:1]),
                lambda: consumer.release(held[1:2]),
                lambda: settle(consumer, held[2:]),
            )
        ):
            spoil()
            assert end() in (None, [LOST], [SETTLED], [SETTLED.outcome], [LOST.outcome]), number


class TestEventsThatAreSomethingElse(Keys):
    def test_listening_and_broadcasting_go_on(
        self, transport: Transport, client: redis.Redis, url: str, queue: str
    ) -> None:
        key = events_key(parse_url(url).options["prefix"], queue)
        client.set(key, "theirs")
        listener = transport.listen(queue)
        transport.broadcast(queue, [b"1"])
        assert eventually(lambda: listener.receive(1.0), what="the first is heard") == [b"1"]
        client.delete(key)
        client.set(key, "theirs")

        assert listener.receive(0.1) == []
        transport.broadcast(queue, [b"2"])
        assert eventually(lambda: listener.receive(1.0), what="the second is heard") == [b"2"]


STORED_GARBAGE = {
    "text": b"garbage",
    "empty": b"",
    "bytes": b"\xff\xfe\x00",
    "digits only": b"000000000005",
    "digits and text": b"000000000005 what is this?",
    "digits and a map": b"000000000005" + pack({"state": "SUCCESS"}),
    "a number": b"7",
    "a list": None,
}


class TestGarbageAmongResults(PlantedBackendGarbageConformance, BackendGarbageConformance):
    @pytest.fixture
    def url(self, redis_place: str) -> str:
        return redis_place

    @pytest.fixture(params=STORED_GARBAGE)
    def spoil(self, request: pytest.FixtureRequest, url: str) -> Iterator[Callable[[str, str], None]]:
        value = STORED_GARBAGE[request.param]
        keys = StoreKeys(parse_url(url).options["prefix"], 0)
        key_of = {"result": keys.result, "start": keys.note, "record": keys.record, "join": keys.join}
        with redis.Redis.from_url(url.partition("?")[0]) as client:

            def spoil(kind: str, name: str) -> None:
                key = key_of[kind](name)
                client.delete(key)
                if value is None:
                    client.rpush(key, "theirs")
                elif kind == "result":
                    client.set(key, value)
                else:  # a number and a space are the beginning of a note, and of a record
                    client.set(key, b"theirs " + value)

            yield spoil

    def test_a_member_that_is_no_text_harms_no_other(self, backend: Backend, url: str) -> None:
        join_id = new_id()
        with redis.Redis.from_url(url.partition("?")[0]) as client:
            client.hset(StoreKeys(parse_url(url).options["prefix"], 0).join(join_id), b"\xff", b"theirs")  # type: ignore[arg-type]

        joined = backend.join(join_id, "a", b"1", size=2, expires=60.0)

        assert joined.outcomes == {"\\xff": b"theirs", "a": b"1"}

    def test_the_names_of_records_may_be_anything(self, backend: Backend, url: str) -> None:
        keys = StoreKeys(parse_url(url).options["prefix"], 0)
        backend.write("a", b"1")
        with redis.Redis.from_url(url.partition("?")[0]) as client:
            client.zadd(keys.record_keys, {b"\xff": 0, b"a\x00b": 0, b"gone": 0})

        assert [record.key for record in backend.scan("")] == ["a"]

        with redis.Redis.from_url(url.partition("?")[0]) as client:
            client.delete(keys.record_keys, keys.record_ends)
            client.set(keys.record_keys, "theirs")
            client.set(keys.record_ends, "theirs")

        assert backend.scan("") == []
        assert backend.write("b", b"2", expires=60.0) == 1
        assert [record.key for record in backend.scan("")] == ["b"]
