"""The CouchDB transport from inside: what it asks for, what it does when an answer is lost, and whom ids belong to."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable
from ekiden.message import DUPLICATE, SETTLED, STORED, Ending, PublishOutcome, SettleOutcome, new_id
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import a_message, bodies, eventually, ids, numbered, settle
from ekiden.testing.proxy import Proxy
from ekiden.transport import Consumer, Transport
from ekiden.urls import parse_url
from ekiden_couchdb import claiming, reading
from ekiden_couchdb.client import BulkAnswer, Client
from ekiden_couchdb.documents import Rows
from ekiden_couchdb.reading import Row

from tests.servers.couchdb_cluster import CouchDBCluster, playing

pytestmark = pytest.mark.slow  # each asks a server that takes its time

LEASE = 60.0


@pytest.fixture
def single() -> Iterator[CouchDBCluster]:
    """One node that notes what it is asked, and whose clock can be moved."""
    with playing(copies=1) as single:
        yield single


@pytest.fixture
def played(single: CouchDBCluster) -> Iterator[Transport]:
    with open_transport(single.url("p")) as transport:
        yield transport


@pytest.fixture
def transport(couchdb_place: str) -> Iterator[Transport]:
    with open_transport(couchdb_place) as transport:
        yield transport


def consume(transport: Transport, queue: str = "queue", *, prefetch: int = 1000, lease: float = LEASE) -> Consumer:
    return transport.consumer([queue], lease=lease, prefetch=prefetch, name=new_id())


def asked_of_messages(single: CouchDBCluster) -> Counter[str]:
    """How often what was asked of the databases of messages."""
    kinds = [path.rpartition("/")[2] for _, path, _ in single.requests if path.startswith("/p-messages")]
    return Counter(kinds)


class TestWhatItAsks:
    def test_a_batch_is_published_claimed_and_settled_in_few_requests(
        self, single: CouchDBCluster, played: Transport
    ) -> None:
        consumer = consume(played)
        played.publish(numbered("queue", 1))
        settle(consumer, consumer.receive(1, 5.0))

        single.requests.clear()
        played.publish(numbered("queue", 100))
        assert asked_of_messages(single) == {"_bulk_docs": 2}

        single.requests.clear()
        deliveries = consumer.receive(100, 5.0)
        asked = asked_of_messages(single)
        assert asked in ({"_all_docs": 2, "_bulk_docs": 1}, {"_all_docs": 1, "_bulk_docs": 1})  # leases, now and then

        single.requests.clear()
        assert len(settle(consumer, deliveries)) == 100
        assert asked_of_messages(single) == {"_bulk_docs": 1}

    @pytest.mark.slow
    def test_a_consumer_that_waits_asks_less_than_twice_a_second(
        self, single: CouchDBCluster, played: Transport
    ) -> None:
        consumer = consume(played)
        consumer.receive(10, 0.5)
        single.requests.clear()

        consumer.receive(10, 6.0)

        assert len(single.requests) < 12, single.requests

    @pytest.mark.slow
    def test_what_is_long_held_is_not_read_with_every_claim(
        self, transport: Transport, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[int] = []

        def read_rows(client: Client, database: str, rows: Rows, *, limit: int) -> Sequence[Row]:
            page = reading.read_rows(client, database, rows, limit=limit)
            read.append(len(page))
            return page

        monkeypatch.setattr(claiming, "read_rows", read_rows)
        for _ in range(4):
            transport.publish(numbered("queue", 100))
        holder, worker = consume(transport), consume(transport)
        held = sum(len(holder.receive(100, 5.0)) for _ in range(3))
        worker.receive(5, 5.0)
        read.clear()

        received = sum(len(worker.receive(5, 5.0)) for _ in range(10))

        assert (held, received) == (300, 50)
        assert sum(read) < 600, read


class TestClusters:
    @pytest.mark.parametrize(("copies", "expected"), [(1, False), (3, True)])
    @pytest.mark.parametrize("may_ask", [True, False])
    def test_they_are_known_also_to_whom_the_nodes_are_not_told(
        self, copies: int, expected: bool, may_ask: bool
    ) -> None:
        with playing(copies=copies) as cluster:
            if not may_ask:
                said = {"error": "unauthorized", "reason": "You are not a server admin."}
                cluster.fail("GET", "_membership", 401, body=said)
            client = Client(parse_url(cluster.url("p")), unavailable=BrokerUnavailable, refused=BrokerRefused)
            client.ensure_database("p-messages")

            assert client.is_cluster() is expected
            client.close()

    def test_what_cannot_be_told_is_taken_for_one(self, single: CouchDBCluster) -> None:
        single.fail("GET", "_membership", 401, body={"error": "unauthorized", "reason": "You are not a server admin."})
        client = Client(parse_url(single.url("p")), unavailable=BrokerUnavailable, refused=BrokerRefused)

        assert client.is_cluster()
        client.close()


class TestIds:
    @pytest.mark.parametrize(
        ("first", "second"),
        [((4, None), (9, None)), ((4, 3600.0), (4, None)), ((4, None), (4, 3600.0)), ((9, 60.0), (0, 3600.0))],
    )
    def test_an_id_is_told_whatever_priority_and_due_time_it_comes_with(
        self, transport: Transport, first: tuple[int, float | None], second: tuple[int, float | None]
    ) -> None:
        message_id = new_id()
        (stored,) = transport.publish([a_message("queue", priority=first[0], due_in=first[1], id=message_id)])

        (answer,) = transport.publish([a_message("queue", priority=second[0], due_in=second[1], id=message_id)])

        assert (stored, answer) == (STORED, DUPLICATE)

    def test_of_many_who_publish_the_same_ids_one_stores_each(self, couchdb_place: str) -> None:
        message_ids = [new_id() for _ in range(20)]
        publishers = 4
        ready = threading.Barrier(publishers)

        def publish(priority: int) -> list[PublishOutcome]:
            with open_transport(couchdb_place) as transport:
                transport.publish([a_message("another")])
                ready.wait(10)
                messages = [a_message("queue", priority=priority, id=message_id) for message_id in message_ids]
                return [answer.outcome for answer in transport.publish(messages)]

        with open_transport(couchdb_place) as transport:
            transport.publish([a_message("another")])
            with ThreadPoolExecutor() as threads:
                outcomes = Counter(
                    outcome for answers in threads.map(publish, range(publishers)) for outcome in answers
                )

            received = consume(transport).receive(1000, 5.0)

        assert outcomes == {PublishOutcome.STORED: 20, PublishOutcome.DUPLICATE: 60}
        assert sorted(ids(received)) == sorted(message_ids)

    def test_a_note_without_a_message_is_in_nobodys_way(self, single: CouchDBCluster, played: Transport) -> None:
        message = a_message("queue")
        single.fail("POST", "messages.*/_bulk_docs", 503, skipping=1)
        with pytest.raises(BrokerUnavailable):
            played.publish([message])
        assert [id_[0] for id_ in single.leaves("messages")] == ["~"]

        answers = [*played.publish([message]), *played.publish([message])]

        assert answers == [STORED, DUPLICATE]
        assert ids(consume(played).receive(10, 5.0)) == [message.id]


class TestLostAnswers:
    @pytest.fixture
    def proxy(self, couchdb_place: str) -> Iterator[Proxy]:
        host = parse_url(couchdb_place).hosts[0]
        with Proxy(host.name, host.port or 5984) as proxy:
            yield proxy

    @pytest.fixture
    def through(self, couchdb_place: str, proxy: Proxy) -> Iterator[Transport]:
        with open_transport(proxy.through(couchdb_place)) as transport:
            yield transport

    def test_a_settle_whose_answer_was_lost_is_told_as_settled(self, through: Transport, proxy: Proxy) -> None:
        through.publish(numbered("queue", 3))
        consumer = consume(through)
        held = consumer.receive(3, 5.0)
        proxy.lose_next_reply()

        answers = consumer.settle([Ending(delivery) for delivery in held])

        assert answers == [SETTLED] * 3
        assert through.depth("queue").leased == 0

    def test_what_was_extended_without_an_answer_is_still_held(self, through: Transport, proxy: Proxy) -> None:
        through.publish(numbered("queue", 3))
        consumer = consume(through)
        held = consumer.receive(3, 5.0)
        proxy.lose_next_reply()

        assert consumer.extend(held) == [SETTLED] * 3
        assert set(settle(consumer, held)) == {SettleOutcome.SETTLED}

    def test_a_claim_whose_answer_was_lost_is_handed_out_by_the_next(
        self, through: Transport, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        through.publish(numbered("queue", 3))
        consumer = consume(through)
        write = Client.bulk

        def write_and_lose_the_answer(
            self: Client, database: str, documents: Sequence[Mapping[str, Any]], **options: Any
        ) -> list[BulkAnswer]:
            monkeypatch.setattr(Client, "bulk", write)
            proxy.lose_next_reply()
            return write(self, database, documents, **options)

        monkeypatch.setattr(Client, "bulk", write_and_lose_the_answer)
        with pytest.raises(BrokerUnavailable):
            consumer.receive(10, 5.0)

        received = consumer.receive(10, 5.0)

        assert [(delivery.message.body, delivery.attempt) for delivery in received] == [(b"0", 1), (b"1", 1), (b"2", 1)]
        assert set(settle(consumer, received)) == {SettleOutcome.SETTLED}


class TestReplyQueues:
    def test_what_is_left_in_one_is_deleted_by_whoever_opens_another(
        self, single: CouchDBCluster, played: Transport
    ) -> None:
        consume(played, "reply.one").close()
        played.publish(numbered("reply.one", 5))
        assert played.depth("reply.one").ready == 5

        single.advance(180.0)
        with open_transport(single.url("p")) as later:
            consume(later, "reply.two")

        assert played.depth("reply.one").ready == 0

    def test_what_comes_after_its_time_is_dropped(self, single: CouchDBCluster, played: Transport) -> None:
        consume(played, "reply.one").close()
        single.advance(90.0)

        with open_transport(single.url("p")) as later:
            answers = later.publish(numbered("reply.one", 5))

        assert answers == [STORED] * 5
        assert played.depth("reply.one").ready == 0

    def test_one_whose_consumer_waits_stays(self, single: CouchDBCluster, played: Transport) -> None:
        consumer = consume(played, "reply.one")
        single.advance(50.0)
        consumer.receive(1, 0.01)
        consumer._keep_at = time.monotonic()  # type: ignore[attr-defined]  # fifteen seconds later
        consumer.receive(1, 0.01)
        single.advance(50.0)

        with open_transport(single.url("p")) as later:
            later.publish([a_message("reply.one", b"answer")])

        assert bodies(consumer.receive(1, 5.0)) == [b"answer"]


@pytest.mark.slow
def test_workers_that_want_the_same_get_each_message_once(couchdb_place: str) -> None:
    with open_transport(couchdb_place) as transport:
        transport.publish(numbered("queue", 200))
        received: Counter[str] = Counter()
        lock = threading.Lock()

        def work() -> None:
            with open_transport(couchdb_place) as own, consume(own, prefetch=5) as consumer:
                while deliveries := consumer.receive(5, 1.0):
                    assert set(settle(consumer, deliveries)) == {SettleOutcome.SETTLED}
                    with lock:
                        received.update(ids(deliveries))

        with ThreadPoolExecutor() as threads:
            for working in [threads.submit(work) for _ in range(4)]:
                working.result()

        assert len(received) == received.total() == 200
        eventually(lambda: transport.depth("queue").ready == 0, what="all is settled")
