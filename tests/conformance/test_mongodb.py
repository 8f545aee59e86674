"""The MongoDB transport keeps the contract, against a server that is there, and against one without transactions."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from ekiden.message import DUPLICATE, LOST, SETTLED, STORED, Ending
from ekiden.plugins import open_transport
from ekiden.testing.conformance import BrokerClockConformance, LeaseExpiryConformance, TransportConformance
from ekiden.testing.conformance.fixtures import TransportFixtures, a_message, bodies, numbered
from ekiden.testing.conformance.leases import Endings
from ekiden.transport import Consumer, Transport
from ekiden.urls import parse_url
from pymongo import MongoClient
from pymongo.collection import Collection

from tests.servers.mongodb import MongoDBServer, a_client
from tests.servers.places import own_prefix, with_prefix
from tests.servers.running import running

Document = dict[str, object]


# What stands in for a server may look at every document for each question, and needs its time.
@pytest.mark.timeout(300)
class TestMongoDBTransport(TransportConformance, LeaseExpiryConformance, BrokerClockConformance):
    many_delayed = 5000
    messages_in_a_storm = 1000

    @pytest.fixture
    def url(self, mongodb_place: str) -> str:
        return f"{mongodb_place}&timeout=60"


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoDBServer]:
    """A server that is no replica set: it has neither transactions nor change streams."""
    directory = tmp_path_factory.mktemp("mongodb-standalone")
    with running(lambda: MongoDBServer(directory, standalone=True)) as server:
        yield server


class Documents(TransportFixtures):
    """Tests that see, and change, what is stored."""

    @pytest.fixture
    def database(self, url: str) -> Iterator[MongoClient[Document]]:
        """A connection of the test's own."""
        with a_client(url.partition("?")[0]) as client:
            yield client

    @pytest.fixture
    def messages(self, url: str, database: MongoClient[Document]) -> Collection[Document]:
        """The messages that the transport stored."""
        return database.get_default_database().get_collection(f"{parse_url(url).options['prefix']}.messages")

    @pytest.fixture
    def replies(self, url: str, database: MongoClient[Document]) -> Collection[Document]:
        """The reply queues that there are."""
        return database.get_default_database().get_collection(f"{parse_url(url).options['prefix']}.replies")


class Following(Documents):
    """What follows is stored, or nothing is done, whatever became of the deliveries meanwhile."""

    def test_of_many_endings_those_that_are_lost_are_told_and_publish_nothing(
        self, transport: Transport, messages: Collection[Document], queue: str
    ) -> None:
        transport.publish(numbered(queue, 10))
        consumer = self.consume(transport, queue)
        held = self.collect(consumer, 10)
        messages.update_many({"b": {"$in": [b"3", b"7"]}}, {"$set": {"t": "somebody else"}})
        self.forget_what_is_sure(consumer)

        answers = consumer.settle([Ending(each, (a_message(f"{queue}-next", each.message.body),)) for each in held])

        assert answers == [LOST if number in {3, 7} else SETTLED for number in range(10)]
        self.assert_depth(transport, f"{queue}-next", ready=8)
        self.assert_depth(transport, queue, ready=0, leased=2)

    def test_what_is_stored_already_or_follows_twice_is_stored_once(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 3))
        consumer = self.consume(transport, queue)
        first, second, third = self.collect(consumer, 3)
        there, shared, new = (a_message(f"{queue}-next", body) for body in (b"there", b"shared", b"new"))
        transport.publish([there])

        answers = consumer.settle([Ending(first, (there, shared)), Ending(second, (shared,)), Ending(third, (new,))])

        assert answers == [SETTLED] * 3
        followed = bodies(self.collect(self.consume(transport, f"{queue}-next"), 3))
        assert sorted(followed) == [b"new", b"shared", b"there"]
        assert transport.publish([shared]) == [DUPLICATE]
        self.assert_depth(transport, queue, ready=0)

    def test_very_many_that_follow_are_all_stored(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 4))
        consumer = self.consume(transport, queue)
        held = self.collect(consumer, 4)
        endings = [Ending(each, tuple(numbered(f"{queue}-next", 150))) for each in held]

        assert consumer.settle(endings) == [SETTLED] * 4

        self.assert_depth(transport, f"{queue}-next", ready=600)
        self.assert_depth(transport, queue, ready=0)

    def test_a_reply_that_follows_is_stored_where_somebody_waits_and_else_dropped(
        self, transport: Transport, queue: str
    ) -> None:
        transport.publish(numbered(queue, 2))
        waited_for, not_waited_for = f"reply.{queue}", f"reply.{queue}-other"
        waiting = self.consume(transport, waited_for)
        consumer = self.consume(transport, queue)
        held = self.collect(consumer, 2)

        answers = consumer.settle([Ending(each, (a_message(waited_for), a_message(not_waited_for))) for each in held])

        assert answers == [SETTLED] * 2
        assert len(self.collect(waiting, 2)) == 2
        self.assert_depth(transport, not_waited_for, ready=0)

    def forget_what_is_sure(self, consumer: Consumer) -> None:
        """As after a pause that was longer than the lease: it has to ask what it holds."""
        holdings = getattr(consumer, "_holdings")  # noqa: B009  # what is private is what is tested here
        for token, ids in holdings.by_token().items():
            for each in ids:
                holdings.doubt(each, token)


class TestWhatFollowsInATransaction(Following):
    @pytest.fixture
    def url(self, mongodb_place: str) -> str:
        return mongodb_place

    def test_what_was_carried_out_without_an_answer_is_not_carried_out_again(
        self, transport: Transport, messages: Collection[Document], queue: str
    ) -> None:
        transport.publish(numbered(queue, 3))
        consumer = self.consume(transport, queue)
        held = self.collect(consumer, 3)
        messages.delete_one({"b": b"1"})  # by a transaction of our own, with what followed

        answers = consumer.settle([Ending(each, (a_message(f"{queue}-next", each.message.body),)) for each in held])

        assert answers == [SETTLED] * 3
        followed = bodies(self.collect(self.consume(transport, f"{queue}-next"), 2))
        assert sorted(followed) == [b"0", b"2"]


@pytest.mark.timeout(300)
class TestStandaloneMongoDB(Following, Endings, LeaseExpiryConformance):
    @pytest.fixture
    def url(self, standalone: MongoDBServer) -> str:
        return with_prefix(standalone.url, own_prefix())


class TestReplyQueues(Documents):
    @pytest.fixture
    def url(self, mongodb_place: str) -> str:
        return mongodb_place

    def test_a_queue_that_has_vanished_takes_nothing(
        self, transport: Transport, replies: Collection[Document], queue: str
    ) -> None:
        reply_queue = f"reply.{queue}"
        self.consume(transport, reply_queue)
        replies.update_one({"_id": reply_queue}, {"$set": {"x": datetime(2020, 1, 1, tzinfo=UTC)}})

        assert transport.publish([a_message(reply_queue)]) == [STORED]

        assert transport.browse(reply_queue) == []

    def test_what_has_vanished_is_not_seen_before_the_server_deletes_it(
        self, transport: Transport, messages: Collection[Document], queue: str
    ) -> None:
        reply_queue = f"reply.{queue}"
        consumer = self.consume(transport, reply_queue)
        transport.publish(numbered(reply_queue, 2))
        messages.update_one({"b": b"0"}, {"$set": {"x": datetime(2020, 1, 1, tzinfo=UTC)}})

        assert [seen.message.body for seen in transport.browse(reply_queue)] == [b"1"]
        self.assert_depth(transport, reply_queue, ready=1)
        assert bodies(self.collect(consumer, 1)) == [b"1"]
        self.assert_nothing_comes(consumer)

    def test_a_consumer_keeps_its_queue_and_what_is_in_it(
        self, transport: Transport, messages: Collection[Document], replies: Collection[Document], queue: str
    ) -> None:
        reply_queue = f"reply.{queue}"
        self.consume(transport, reply_queue)
        transport.publish([a_message(reply_queue)])
        before = [document["x"] for collection in (messages, replies) for document in collection.find()]

        self.consume(transport, reply_queue)

        after = [document["x"] for collection in (messages, replies) for document in collection.find()]
        assert all(now > then for now, then in zip(after, before, strict=True))  # type: ignore[operator]


def test_what_must_be_right_is_so_whatever_the_url_says(mongodb_place: str) -> None:
    options = "readPreference=secondaryPreferred&readPreferenceTags=dc:a&readPreferenceTags=&w=0&retryWrites=false"
    with open_transport(f"{mongodb_place}&{options}") as transport:
        assert transport.publish(numbered("queue", 3)) == [STORED] * 3
        with transport.consumer(["queue"], lease=60.0, prefetch=3, name="consumer") as consumer:
            received = consumer.receive(3, 5.0)
            assert consumer.settle([Ending(each) for each in received]) == [SETTLED] * 3
