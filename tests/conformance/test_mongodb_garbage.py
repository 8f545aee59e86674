"""What others have written into the collections that are ekiden's: it holds nothing up, and is set aside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from bson import ObjectId
from ekiden.message import SETTLED, Ending, new_id
from ekiden.results import Backend
from ekiden.testing.conformance import (
    BackendGarbageConformance,
    GarbageConformance,
    PlantedBackendGarbageConformance,
    PlantedGarbageConformance,
)
from ekiden.testing.conformance.fixtures import (
    DAY,
    TransportFixtures,
    a_message,
    a_result,
    bodies,
    eventually,
    let_it_wait,
)
from ekiden.transport import Transport
from ekiden.urls import parse_url
from pymongo.database import Database

from tests.servers.mongodb import a_client

Document = dict[str, Any]

DUE = datetime(2020, 1, 1, tzinfo=UTC)
ENOUGH: Document = {"s": 0, "p": 5, "v": DUE, "w": DUE, "o": 1, "n": 0, "b": b""}
NO_MESSAGES: dict[str, Document] = {
    "no body": {"b": None},
    "a body that is text": {"b": "text"},
    "a body that is a number": {"b": 2**40},
    "a priority between two": {"p": 4.5},
    "headers that are no JSON": {"h": "no JSON"},
    "headers that are a list": {"h": "[1]"},
    "headers that are no text": {"h": 7},
    "a header that is a list": {"h": '{"a": [1]}'},
    "a due time that is text": {"d": "soon"},
    "a due time that is none": {"d": float("nan")},
    "attempts that are text": {"n": "many", "b": None},
}


class Collections(TransportFixtures):
    """Tests that write past the transport."""

    @pytest.fixture
    def url(self, mongodb_place: str) -> str:
        return mongodb_place

    @pytest.fixture
    def database(self, url: str) -> Iterator[Database[Document]]:
        with a_client(url.partition("?")[0]) as client:
            yield client.get_default_database()

    @pytest.fixture
    def prefix(self, url: str) -> str:
        return parse_url(url).options["prefix"]


class TestGarbageAmongMessages(Collections, PlantedGarbageConformance):
    @pytest.fixture
    def plant(self, database: Database[Document], prefix: str) -> Callable[[str], int]:
        def plant(queue: str) -> int:
            documents = [{"_id": f"{queue}\0{name}", "q": queue, **ENOUGH, **odd} for name, odd in NO_MESSAGES.items()]
            odd_ids: list[Any] = [ObjectId(), 7, {"a": queue}, queue, f"other{queue}\0id", f"{queue}\0"]
            documents += [{"_id": odd, "q": queue, **ENOUGH} for odd in odd_ids]
            database[f"{prefix}.messages"].insert_many(documents)
            return len(documents)

        return plant


class TestSpoiltMessages(Collections, GarbageConformance):
    @pytest.fixture
    def spoil(self, database: Database[Document], prefix: str) -> Callable[[str, str], None]:
        def spoil(queue: str, message_id: str) -> None:
            database[f"{prefix}.messages"].update_one({"_id": f"{queue}\0{message_id}"}, {"$set": {"b": 7}})

        return spoil


class TestOddFields(Collections):
    """A message is handed out, whatever else is written beside it."""

    @pytest.mark.parametrize(
        "odd",
        [
            {"n": "many"},
            {"n": None},
            {"n": float("nan")},
            {"n": 1.5},
            {"w": "never"},
            {"w": None},
            {"o": "first"},
            {"o": None},
            {"s": 1, "v": DUE, "t": 7},
            {"s": 1, "v": DUE, "w": "never", "n": "many"},
            {"v": datetime(1, 1, 1, tzinfo=UTC)},
            {"more": {"than": "expected"}},
        ],
        ids=str,
    )
    def test_a_message_goes_through(
        self, transport: Transport, database: Database[Document], prefix: str, queue: str, odd: Document
    ) -> None:
        odd = {"_id": f"{queue}\0odd", "q": queue, **ENOUGH, "b": b"odd", **odd}
        transport.publish([a_message(queue, b"other")])
        database[f"{prefix}.messages"].insert_one(odd)
        consumer = self.consume(transport, queue)

        received = self.collect(consumer, 2)
        assert sorted(bodies(received)) == [b"odd", b"other"]
        consumer.release(received)
        received = self.collect(consumer, 2)
        assert [delivery.attempt for delivery in received] == [1, 1]
        assert consumer.extend(received) == [SETTLED, SETTLED]
        assert consumer.settle([Ending(each, (a_message(queue, b"next"),)) for each in received]) == [SETTLED] * 2
        assert bodies(self.collect(consumer, 2)) == [b"next"] * 2

    @pytest.mark.parametrize(
        "odd", [{"v": "now"}, {"v": None}, {"v": 7}, {"s": "waiting"}, {"p": "high"}, {"q": 7}], ids=str
    )
    def test_what_is_not_found_at_all_harms_nobody(
        self, transport: Transport, database: Database[Document], prefix: str, queue: str, odd: Document
    ) -> None:
        consumer = self.consume(transport, queue)
        self.assert_nothing_comes(consumer)
        database[f"{prefix}.messages"].insert_one({"_id": f"{queue}\0odd", "q": queue, **ENOUGH, **odd})
        waiting = threading.Thread(target=lambda: received.extend(consumer.receive(10, 10.0)))
        received: list[Any] = []
        waiting.start()
        let_it_wait(0.3)

        transport.publish([a_message(queue, b"good", due_in=0.2)])
        waiting.join()

        assert bodies(received) == [b"good"]
        transport.depth(queue)
        transport.browse(queue)
        transport.purge(queue)


class TestFeeds(Collections):
    """What lies in the collections by which everybody is told of what happens is passed over."""

    @pytest.mark.parametrize(
        "odd", [{}, {"q": 7, "ids": 7, "payloads": 7}, {"q": [{}], "ids": [{}], "payloads": [7, "x", None]}], ids=str
    )
    @pytest.mark.parametrize("odd_id", [{}, {"_id": 7}, {"_id": {"a": 1}}], ids=str)
    def test_whoever_waits_is_told(
        self, transport: Transport, database: Database[Document], url: str, odd: Document, odd_id: Document
    ) -> None:
        queue, prefix = new_id(), parse_url(url).options["prefix"]
        listener, consumer = transport.listen(queue), self.consume(transport, queue)
        with self.backend(url) as backend, self.backend(url) as other:
            result = a_result()
            found: list[Any] = []
            waiting = [
                threading.Thread(target=lambda: found.extend(consumer.receive(1, 10.0))),
                threading.Thread(target=lambda: found.extend(backend.wait([result.task_id], 10.0))),
            ]
            for thread in waiting:
                thread.start()
            let_it_wait(0.3)
            now = datetime.now(UTC)
            for feed in ("signals", "ended", "events"):
                odd_one = {"topic": queue, "t": now, **odd, **odd_id}
                database[f"{prefix}.{feed}"].insert_one(dict(odd_one))
                database[f"{prefix}.{feed}"].insert_one({"topic": queue, "t": "now", **odd})
            let_it_wait(0.2)
            transport.publish([a_message(queue)])
            other.put([result])
            transport.broadcast(queue, [b"heard"])

            for thread in waiting:
                thread.join()
            assert len(found) == 2
            assert eventually(lambda: listener.receive(1.0), what="a broadcast is heard") == [b"heard"]

    def backend(self, url: str) -> Backend:
        from ekiden.plugins import open_backend

        return open_backend(url)


STORED_GARBAGE: dict[str, Document] = {
    "nothing but an id": {},
    "texts": dict.fromkeys("oskbuwnmvx", "theirs"),
    "numbers": {**dict.fromkeys("skbwmnr", 7), "u": 2**52, "v": 2**52, "o": 2**52},
    "maps": {field: {"a": 1} for field in "oskbuwnmvxr"},
    "no numbers": {
        "u": float("inf"),
        "v": float("inf"),
        "o": float("nan"),
        "k": 1.5,
        "n": 1.5,
        "s": "SUCCESS",
        "b": b"1",
    },
    "lists": {field: ["a"] for field in "oskbuwnmvr"},
}


class TestGarbageAmongResults(PlantedBackendGarbageConformance, BackendGarbageConformance):
    @pytest.fixture
    def url(self, mongodb_place: str) -> str:
        return mongodb_place

    @pytest.fixture(params=STORED_GARBAGE)
    def spoil(self, request: pytest.FixtureRequest, url: str) -> Iterator[Callable[[str, str], None]]:
        collections = {"result": "results", "start": "results", "record": "records", "join": "joins"}
        odd = STORED_GARBAGE[request.param]
        with a_client(url.partition("?")[0]) as client:
            database: Database[Document] = client.get_default_database()
            prefix = parse_url(url).options["prefix"]

            def spoil(kind: str, name: str) -> None:
                database[f"{prefix}.{collections[kind]}"].replace_one({"_id": name}, odd, upsert=True)

            yield spoil

    def test_an_outcome_that_is_none_is_replaced_by_its_member(self, backend: Backend, url: str) -> None:
        join_id, prefix = new_id(), parse_url(url).options["prefix"]
        with a_client(url.partition("?")[0]) as client:
            outcomes = client.get_default_database()[f"{prefix}.outcomes"]
            outcomes.insert_one({"_id": f"{len(join_id)}:{join_id}:a", "b": "theirs", "u": "theirs"})

        assert backend.join(join_id, "a", b"1", size=1, expires=DAY).outcomes == {"a": b"1"}
