"""What somebody has put into the databases, or a fault has left there, is set aside and harms nothing else."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from ekiden import Ekiden
from ekiden.errors import BackendError
from ekiden.message import DUPLICATE, STORED, Delivery, Depth, Message, SettleOutcome, new_id
from ekiden.plugins import open_backend, open_transport
from ekiden.results import Backend, BeginOutcome, Begun, Joined, Record, Start, StoredResult
from ekiden.states import STARTED
from ekiden.testing.conformance.fixtures import a_message, bodies, eventually, numbered, settle
from ekiden.transport import Consumer, Transport
from ekiden_couchdb import generations, tidying
from ekiden_couchdb.backend import CouchDBBackend
from ekiden_couchdb.changes import Change
from ekiden_couchdb.documents import Packed, new_document, packed
from ekiden_couchdb.generations import Generations
from ekiden_couchdb.listener import CouchDBListener
from ekiden_couchdb.moving import Mover
from ekiden_couchdb.rotation import Limits
from ekiden_couchdb.signals import Signals
from ekiden_couchdb.transport import CouchDBTransport

from tests.servers.couchdb_cluster import CouchDBCluster, playing
from tests.servers.couchdb_http import DEEP, HALF, LARGE

LEASE = 60.0
DAY = 86_400.0
HUGE = 10**30

VALUES: list[Any] = [None, True, -1, 1.5, HUGE, "x", "\0", [], {}, [{}], {"a": {}}, DEEP, LARGE, HALF]
"""What may stand where something else is expected."""
TEXTS, NULLS = ("x", "\0", HALF), (None, LARGE)
"""Those that are read as a text, or as null."""


@pytest.fixture
def single() -> Iterator[CouchDBCluster]:
    with playing(copies=1) as single:
        yield single


@pytest.fixture
def transport(single: CouchDBCluster) -> Iterator[Transport]:
    with open_transport(single.url("p")) as transport:
        yield transport


@pytest.fixture
def backend(single: CouchDBCluster) -> Iterator[Backend]:
    with open_backend(single.url("p")) as backend:
        yield backend


def consume(transport: Transport, queue: str = "queue") -> Consumer:
    return transport.consumer([queue], lease=LEASE, prefetch=1000, name=new_id())


def database_of_messages(single: CouchDBCluster) -> str:
    (name,) = [name for name in single.databases if "-messages" in name]
    return name


def errors_about(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    """What was logged as an error, and contains these words."""
    found = [record for record in caplog.records if record.levelno >= logging.ERROR]
    return [record.getMessage() for record in found if words in record.getMessage()]


# Messages.


def stored(message: Message, **changes: Any) -> dict[str, Any]:
    """The document of a message that is ready, with some fields as they should not be."""
    value = packed(message, max_message_bytes=1000)
    assert isinstance(value, Packed)
    document = new_document(f"{message.queue}:r:0:{7:016d}:{message.id}", value, "")
    return {**document, **changes}


def damaged_messages() -> list[dict[str, Any]]:
    """Documents at the head of the queue that were messages of ours, each damaged in another way."""
    found: list[dict[str, Any]] = []
    for number, value in enumerate([*VALUES, "", "!", "AAAA", "kZGRkQ==", "3" * 10_000]):
        found.append({**stored(a_message("queue", id=f"damaged-{number}")), "message": value})
        others = {"attempts": value, "until": value, "token": value, "owner": value, "note": value, "given_back": value}
        found.append({**stored(a_message("queue", id=f"damaged-beside-{number}")), "message": None, **others})
    lacking = stored(a_message("queue", id="lacking"))
    return [*found, {"_id": lacking["_id"], "format": 1}]


def foreign_documents() -> list[dict[str, Any]]:
    """Documents at the head of the queue that are none of ours, or of a later version."""
    found = [
        {**stored(a_message("queue", id=f"foreign-{number}")), "format": value} for number, value in enumerate(VALUES)
    ]
    places = ["queue:r:", "queue:r:0", "queue:r:x:y", "queue:r:0:1:2:3:4", "queue:r:9999", "queue:d:", "queue:d:x:y:z"]
    found += [{**stored(a_message("queue", id="x")), "_id": place} for place in places]
    return found + [{"_id": f"queue:r:0:{9:016d}:{name}"} for name in ("a", "b=", "c")]


def grown(held: list[Delivery], more: list[Delivery]) -> int:
    """How many are held with ``more``."""
    held += more
    return len(held)


def test_damaged_messages_are_handed_out_as_what_no_worker_takes_for_a_call(
    single: CouchDBCluster, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    transport.publish(numbered("queue", 5))
    damaged = damaged_messages()
    single.plant(database_of_messages(single), *damaged)
    assert len(transport.browse("queue", limit=1000)) == 5 + len(damaged)
    assert transport.depth("queue").ready == 5 + len(damaged)

    with consume(transport) as consumer, consume(transport) as other:
        held: list[Delivery] = []
        eventually(
            lambda: grown(held, consumer.receive(30, 0.1) + other.receive(30, 0.1)) >= 5 + len(damaged),
            what="all came",
            within=30.0,
        )
        readable = [each for each in held if "content-type" not in each.message.headers]
        assert sorted(bodies(readable)) == [b"0", b"1", b"2", b"3", b"4"]
        assert {each.message.id for each in held} >= {"damaged-0", "damaged-beside-3", "lacking"}
        assert consumer.receive(9, 0.0) + other.receive(9, 0.0) == []
        consumer.extend(held)
        other.extend(held)
        settle(consumer, held)
        settle(other, held)

    assert transport.depth("queue") == Depth(0, 0, 0)
    assert len(errors_about(caplog, "cannot be read")) == len(damaged)


def test_a_worker_buries_what_it_cannot_read(single: CouchDBCluster) -> None:
    app = Ekiden("garbage", broker=single.url("p"), backend=single.url("p"))

    @app.task
    def double(number: int) -> int:
        return 2 * number

    with app:
        app.transport.publish([a_message("default")])
        app.transport.purge("default")
        odd = stored(a_message("queue", id="damaged"))
        place = odd["_id"].replace("queue:", "default:")
        single.plant(database_of_messages(single), {**odd, "_id": place, "message": "!"})
        result = double.delay(4)
        with app.worker():
            assert result.get(timeout=30) == 8
            letters = eventually(lambda: app.transport.browse("default.dead"), what="it is buried", within=30.0)

    assert [letter.message.body for letter in letters] == [b"!"]


def test_what_is_none_of_ours_holds_up_nobody(
    single: CouchDBCluster, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    transport.publish(numbered("queue", 5))
    foreign = foreign_documents()
    single.plant(database_of_messages(single), *foreign)

    with consume(transport) as consumer, consume(transport) as other:
        held = consumer.receive(3, 5.0) + other.receive(3, 5.0)
        assert sorted(bodies(held)) == [b"0", b"1", b"2", b"3", b"4"]
        assert transport.publish(numbered("queue", 5)) == [STORED] * 5
        again = other.receive(100, 5.0)
        assert len(again) == 5
        assert set(settle(other, again)) == {SettleOutcome.SETTLED}
        assert consumer.receive(100, 0.0) == []

    assert transport.depth("queue").ready == 5
    assert transport.depth("queue").leased == 0
    assert len(transport.browse("queue", limit=1000)) == 5
    told = errors_about(caplog, "is set aside")
    assert len(told) == len(foreign)


def test_odd_numbers_of_messages_are_taken_for_possible_ones(single: CouchDBCluster, transport: Transport) -> None:
    transport.publish([a_message("other")])
    odd = [
        stored(a_message("queue", b"a", id="a"), attempts=-5),
        stored(a_message("queue", b"b", id="b"), attempts=HUGE),
        stored(a_message("queue", b"c", id="c"), until=-5),
        stored(a_message("queue", b"d", id="d"), until=HUGE),
        stored(a_message("queue", b"e", id="e"), until=HUGE, token="x", owner="nobody"),
        stored(a_message("queue", b"f", id="f"), note=HUGE, owner=[], given_back={}, moving=None),
    ]
    single.plant(database_of_messages(single), *odd)

    with consume(transport) as consumer:
        held = consumer.receive(100, 5.0)
        attempts = {delivery.message.body: delivery.attempt for delivery in held}
        assert attempts == {b"a": 1, b"b": 1_000_000, b"c": 1, b"d": 1, b"e": 1, b"f": 1}
        consumer.release(held, math.inf)
        assert consumer.receive(100, 0.0) == []
        assert transport.depth("queue").delayed == 6
    with consume(transport) as consumer:
        single.plant(database_of_messages(single), *odd)
        held = consumer.receive(100, 5.0)
        assert len(consumer.extend(held)) == 6
        consumer.release(held, math.nan)
        assert set(settle(consumer, consumer.receive(100, 5.0))) == {SettleOutcome.SETTLED}


@pytest.mark.parametrize("at", [*VALUES, "queue:r:", "~x", "_design/x", "../x"])
def test_a_note_that_cannot_be_read_is_written_anew(single: CouchDBCluster, transport: Transport, at: Any) -> None:
    transport.publish([a_message("other")])
    messages = numbered("queue", 3)
    single.plant(database_of_messages(single), {"_id": f"~queue:{messages[1].id}", "at": at})

    assert transport.publish(messages) == [STORED] * 3
    assert transport.publish(messages) == [DUPLICATE] * 3


@pytest.mark.parametrize("held", VALUES)
def test_a_slot_that_cannot_be_read_keeps_no_consumer_from_work(
    single: CouchDBCluster, transport: Transport, held: Any
) -> None:
    transport.publish(numbered("queue", 2))
    with transport.consumer(["queue"], lease=LEASE, prefetch=1, name="slot") as consumer:
        assert len(consumer.receive(1, 5.0)) == 1
        (slot,) = [id_ for id_ in single.leaves("messages") if id_.startswith("~~")]
    single.plant(database_of_messages(single), {"_id": slot, "held": held, "at": held}, {"_id": "~~odd", "held": held})

    with transport.consumer(["queue"], lease=LEASE, prefetch=9, name="slot") as consumer:
        assert len(consumer.receive(9, 5.0)) == 2


def test_a_message_that_a_claim_makes_too_large_is_left_alone(
    single: CouchDBCluster, transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    transport.publish([a_message("queue", b"x" * 3000), *numbered("queue", 3)])
    (large,) = [leaves[0] for leaves in single.leaves("messages").values() if len(str(leaves[0].body)) > 3000]
    single.largest_document_bytes = len(str(large.body)) + 90

    with consume(transport) as consumer:
        held = consumer.receive(100, 5.0) + consumer.receive(100, 0.1)
        assert sorted(bodies(held)) == [b"0", b"1", b"2"]
        assert set(settle(consumer, held)) == {SettleOutcome.SETTLED}
    assert len(errors_about(caplog, "max_document_size")) == 1


# The catalogue.


CATALOGUES: list[dict[str, Any]] = [
    *({"generations": value} for value in VALUES),
    *({"generations": [value]} for value in VALUES),
    *(
        {"generations": [{"name": name, "opens": 0}]}
        for name in ("_users", "p-results", "../p-messages", "p-messages/x")
    ),
    {"generations": [{"name": "p-messages-x", "opens": 0, "stage": {}}]},
    {},
]


@pytest.mark.parametrize("number", range(len(CATALOGUES)))
def test_a_catalogue_that_cannot_be_read_is_made_anew(
    single: CouchDBCluster, transport: Transport, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    single.plant("p-results", {"_id": "kept"})
    transport.publish(numbered("queue", 2))
    single.plant("p-generations", {"_id": "catalogue", **CATALOGUES[number]})

    with open_transport(single.url("p")) as other, consume(other) as consumer:
        assert other.publish(numbered("queue", 2)) == [STORED] * 2
        assert sorted(bodies(consumer.receive(9, 5.0))) == [b"0", b"0", b"1", b"1"]
    assert transport.publish(numbered("queue", 2)) == [STORED] * 2
    assert len(errors_about(caplog, "the catalogue cannot be read")) == 1
    assert [id_ for id_ in single.leaves("p-generations") if "unreadable" in id_]
    assert "kept" in single.leaves("p-results")


def test_a_catalogue_that_names_what_is_no_database_of_messages_has_nothing_deleted(
    single: CouchDBCluster, transport: Transport
) -> None:
    transport.publish(numbered("queue", 2))
    good = {"name": database_of_messages(single), "opens": 0}
    single.plant("p-results", {"_id": "kept"})
    single.plant("others", {"_id": "kept"})
    gone = [{"name": name, "opens": -1, "stage": 3} for name in ("p-results", "others", "_users")]
    single.plant("p-generations", {"_id": "catalogue", "generations": [*gone, good]})

    for _ in range(3):
        purging = Generations(transport._client, Limits(tidied_every=0.0, known_after=0.0))  # type: ignore[attr-defined]
        purging.tidy()

    assert {"p-results", "others"} <= single.databases.keys()
    with consume(transport) as consumer:
        assert len(consumer.receive(9, 5.0)) == 2


@pytest.mark.parametrize(
    "odd",
    [
        {"tidier": "nobody", "tidier_until": HUGE},
        {"longest_lease": 1e300},
        {"longest_lease": HUGE},
        {"tidier_until": -HUGE},
        {"gone": ["x"] * 5},
    ],
)
def test_odd_numbers_in_the_catalogue_keep_nobody_from_purging(single: CouchDBCluster, odd: dict[str, Any]) -> None:
    with open_transport(single.url("p")) as transport, consume(transport) as consumer:
        assert isinstance(transport, CouchDBTransport)
        transport.publish(numbered("queue", 20))
        settle(consumer, consumer.receive(100, 5.0))
        generation = {"name": database_of_messages(single), "opens": 0, "stage": 99}
        single.plant("p-generations", {"_id": "catalogue", "generations": [generation], **odd})
        purging = Generations(transport._client, Limits(tidied_every=0.0, known_after=0.0))

        for _ in range(3):
            purging.tidy()

    assert len(single.leaves("messages")) <= 2  # slots


def test_a_catalogue_of_a_later_version_is_left_alone(single: CouchDBCluster, transport: Transport) -> None:
    transport.publish(numbered("queue", 2))
    later = {"_id": "catalogue", "format": 2, "generations": {"of": "a later version"}}
    single.plant("p-generations", later)

    with open_transport(single.url("p")) as other, pytest.raises(Exception, match="of a later version of ekiden"):
        other.publish(numbered("queue", 2))

    (leaf,) = single.leaves("p-generations")["catalogue"]
    assert leaf.body["format"] == 2


@pytest.mark.parametrize(
    "mark", [*VALUES, {"to": "p-results", "until": 0, "rev": "1-x"}, {"to": "_users", "until": 0, "rev": "1-x"}]
)
def test_a_mark_that_cannot_be_read_moves_nothing(single: CouchDBCluster, transport: Transport, mark: Any) -> None:
    assert isinstance(transport, CouchDBTransport)
    transport.publish([a_message("queue", b"good", due_in=DAY)])
    old = database_of_messages(single)
    single.plant("p-results", {"_id": "kept"})
    single.plant(old, stored(a_message("queue", id="odd"), moving=mark))
    single.plant("p-messages-new")

    for _ in range(2):
        Mover(transport._client, old).step("p-messages-new")

    moved = [id_.rpartition(":")[2] for id_ in single.leaves("p-messages-new") if not id_.startswith("~")]
    assert "odd" not in moved
    assert len(moved) == 1
    assert list(single.leaves("p-results")) == ["kept"]


# Feeds.


@pytest.mark.parametrize("value", VALUES)
def test_a_ring_that_cannot_be_read_ends_no_feed(single: CouchDBCluster, transport: Transport, value: Any) -> None:
    assert isinstance(transport, CouchDBTransport)
    signals: Signals = transport._signals
    with consume(transport), open_transport(single.url("p")) as other:
        eventually(lambda: signals.is_live, what="the feed has begun")
        other.publish([a_message("another")])
        single.plant(
            "p-signals", {"_id": "ring-99", "by": value, "rung": value}, {"_id": "odd", "rung": {"queue": value}}
        )
        waiter = signals.waiter(["rung"])
        while waiter.wait(0.2):
            continue

        other.publish([a_message("rung")])

        assert waiter.wait(5.0)
        assert signals.is_live
        waiter.close()


@pytest.mark.parametrize("value", VALUES)
def test_an_event_that_cannot_be_read_ends_no_listener(
    single: CouchDBCluster, transport: Transport, value: Any
) -> None:
    with transport.listen("topic") as listener:
        transport.broadcast("topic", [b"before"])
        days = [name for name in single.databases if "-events-" in name]
        for day in days:
            single.plant(
                day,
                {"_id": "odd-1", "topic": "topic", "payloads": value},
                {"_id": "odd-2", "topic": value, "payloads": ["eA=="]},
                {"_id": "odd-3", "topic": "topic", "payloads": [value]},
                {"_id": "odd-4"},
            )
        transport.broadcast("topic", [b"after"])

        heard: list[bytes] = []

        def is_heard() -> bool:
            heard.extend(listener.receive(0.1))
            return b"after" in heard

        eventually(is_heard, what="it is heard")
        assert heard == [b"before", b"after"]


def test_what_a_listener_makes_of_a_change_ends_no_feed(
    single: CouchDBCluster, transport: Transport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hear = CouchDBListener._hear

    def hear_some(self: CouchDBListener, change: Change) -> None:
        if b"fault" in bytes(change.doc):
            raise ZeroDivisionError("a fault of ours")
        hear(self, change)

    monkeypatch.setattr(CouchDBListener, "_hear", hear_some)
    with transport.listen("topic") as listener:
        days = [name for name in single.databases if "-events-" in name]
        for day in days:
            single.plant(day, {"_id": "1", "topic": "topic", "payloads": [], "fault": 1})
        transport.broadcast("topic", [b"after"])

        assert listener.receive(5.0) == [b"after"]
    assert errors_about(caplog, "could not be heard")


# Results and records.


def results_of(value: Any) -> list[dict[str, Any]]:
    """Documents of a result that is none, each in another way."""
    good = {"state": "SUCCESS", "step": 0, "expires": DAY, "result_ends": None, "body": "MQ=="}
    return [
        *({**good, field: value} for field in good if not _fits(field, value)),
        {"begun": value},
        {"begun": {"step": value, "message": value}},
        {"state": "SUCCESS"},
        {"_attachments": {}, "state": "SUCCESS", "step": 0},
    ]


def _fits(field: str, value: Any) -> bool:
    """Whether the field may say that, once it has come over the wire."""
    match field:
        case "state":
            return value in TEXTS
        case "step":
            return type(value) is int
        case "result_ends":
            return type(value) is int or value in NULLS
        case "expires":
            return type(value) in {int, float} or value in NULLS
    return False


@pytest.mark.parametrize("value", VALUES)
def test_results_that_cannot_be_read_are_as_if_there_were_none(
    single: CouchDBCluster, backend: Backend, value: Any
) -> None:
    backend.put([StoredResult("good", "SUCCESS", 0, b"1", DAY)])
    odd = {f"odd{number}": document for number, document in enumerate(results_of(value))}
    ids = list(odd)

    def plant() -> None:
        single.plant("p-results", *({"_id": f"t:{id_}", **document} for id_, document in odd.items()))

    plant()
    found = backend.get(["good", *ids])
    assert [each and each.body for each in found] == [b"1", *([None] * len(ids))]
    assert [each.task_id for each in backend.wait([*ids, "good"], 5.0)] == ["good"]
    assert backend.wait(ids, 0.1) == []
    assert backend.begin([Start(id_, 1, "message", DAY) for id_ in ids]) == [Begun(BeginOutcome.GO)] * len(ids)
    plant()
    assert backend.put([StoredResult(id_, "SUCCESS", 0, b"2", DAY) for id_ in ids]) == [True] * len(ids)
    assert [each and each.body for each in backend.get(ids)] == [b"2"] * len(ids)
    plant()
    backend.forget(ids)
    assert backend.get(ids) == [None] * len(ids)


def test_a_waiting_thread_outlives_what_cannot_be_read(single: CouchDBCluster, backend: Backend) -> None:
    backend.put([StoredResult("other", "SUCCESS", 0, b"", DAY)])
    found: list[StoredResult] = []
    waiting = threading.Thread(target=lambda: found.extend(backend.wait(["task"], 10.0)))
    waiting.start()
    for value in VALUES:
        single.plant("p-results", {"_id": "t:task", "state": value, "step": value})
        single.plant("p-results", {"_id": "odd", "x": value})
    backend.put([StoredResult("task", "SUCCESS", 0, b"1", DAY)])
    waiting.join(10.0)

    assert [each.body for each in found] == [b"1"]


@pytest.mark.parametrize("value", VALUES)
def test_records_that_cannot_be_read_are_as_if_there_were_none(
    single: CouchDBCluster, backend: Backend, value: Any
) -> None:
    backend.write("k/good", b"1")
    good = {"key": "k/odd", "version": 1, "body": "MQ=="}
    odd = [{**good, "key": value}, {**good, "key": "k/other"}, {"key": "k/odd"}, {}]
    odd += [{**good, "version": value}] if type(value) is not int else []
    odd += [{**good, "body": value}, {**good, "body": "!"}]
    odd += [{**good, "ends": value}] if type(value) is not int and value not in NULLS else []
    for document in odd:
        single.plant("p-records", {"_id": "r:k=2fodd", **document})

        assert backend.read(["k/odd", "k/good"]) == [None, Record("k/good", b"1", 1)]
        assert backend.scan("k/") == [Record("k/good", b"1", 1)]
        assert backend.write("k/odd", b"2", expected_version=0) == 1
        assert backend.write("k/odd", None) == 0


@pytest.mark.parametrize("value", [value for value in VALUES if value is not None and type(value) is not int])
def test_a_join_that_cannot_be_read_begins_anew(single: CouchDBCluster, backend: Backend, value: Any) -> None:
    backend.write("there", b"1")
    odd: list[dict[str, Any]] = [{"born": value, "members": value}, {"born": "x", "members": [value]}, {"born": "x"}]
    odd += [{"born": "x", "members": [], "ends": value}] if type(value) is not bool else []
    for number, document in enumerate(odd):
        if (document.get("members") == [value] and value in TEXTS) or (document.get("ends") and value in NULLS):
            continue
        join_id = f"join{number}"
        single.plant("p-records", {"_id": f"j:{join_id}", **document}, {"_id": f"m:{join_id}:a", "born": value})

        assert backend.join(join_id, "a", b"1", size=2, expires=DAY) == Joined(1, complete=False)
        assert backend.join(join_id, "b", b"2", size=2, expires=DAY).outcomes == {"a": b"1", "b": b"2"}


def test_what_a_member_brought_that_cannot_be_read_is_brought_again(
    single: CouchDBCluster, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ekiden_couchdb.joins.PATIENCE_SECONDS", 0.1)
    backend.join("join", "a", b"1", size=2, expires=DAY)
    (leaf,) = single.leaves("records")["m:join:a"]
    single.plant("p-records", {"_id": "m:join:a", **leaf.body, "body": "!"})

    assert backend.join("join", "b", b"2", size=2, expires=DAY) == Joined(1, complete=False)
    assert backend.join("join", "a", b"1", size=2, expires=DAY).outcomes == {"a": b"1", "b": b"2"}


@pytest.mark.parametrize("value", VALUES)
def test_a_turn_that_cannot_be_read_is_nobodys(single: CouchDBCluster, backend: Backend, value: Any) -> None:
    assert isinstance(backend, CouchDBBackend)
    backend.put([StoredResult("old", "SUCCESS", 0, b"", 0.01), StoredResult("new", "SUCCESS", 0, b"", DAY)])
    for name in ("p-results", "p-records"):
        single._locals[name, "ekiden-tidying"] = {"_id": "_local/x", "_rev": "0-1", "who": value, "until": value}
    single.advance(10.0)
    backend.put([StoredResult("other", "SUCCESS", 0, b"", DAY)])
    single.advance(0.0)

    backend._tidying.step()

    assert ["t:old" in single.leaves("results"), "t:new" in single.leaves("results")] == [False, True]


@pytest.mark.parametrize("value", VALUES)
def test_a_reply_queue_that_cannot_be_read_empties_no_other(
    single: CouchDBCluster, transport: Transport, backend: Backend, value: Any
) -> None:
    backend.write("there", b"1")
    transport.publish(numbered("orders", 3))
    single.plant(
        "p-records",
        {"_id": "reply:reply.odd", "queue": "reply.odd", "until": value},
        {"_id": "reply:a", "queue": value, "until": 0},
        {"_id": "reply:b", "queue": "orders", "until": 0},
        {"_id": "reply:orders", "queue": "orders", "until": 0},
        {"_id": "reply:c", "queue": "reply.none"},
    )

    with consume(transport, "reply.mine") as consumer:
        assert transport.publish([a_message("reply.odd"), a_message("reply.mine", b"x")]) == [STORED] * 2
        assert bodies(consumer.receive(9, 5.0)) == [b"x"]

    assert transport.depth("orders").ready == 3


# Faults of ours, and a system without threads.


def test_a_fault_in_tidying_ends_no_consumer(
    single: CouchDBCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(generations, "LIMITS", Limits(tidied_every=0.0))

    def fail(self: Generations) -> bool:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(Generations, "_tidy", fail)
    with open_transport(single.url("p")) as transport, consume(transport) as consumer:
        transport.publish(numbered("queue", 2))
        assert len(consumer.receive(9, 5.0)) == 2
        assert consumer.receive(9, 0.05) == []
    assert errors_about(caplog, "could not be tidied")


def test_a_fault_in_ringing_ends_no_publisher(
    single: CouchDBCluster, transport: Transport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    with monkeypatch.context() as patched:
        patched.setattr("ekiden_couchdb.ringing.Ringer._write", fail)
        patched.setattr("ekiden_couchdb.ringing.AFTER_TROUBLE_SECONDS", 0.01)
        for _ in range(20):
            assert transport.publish([a_message("queue")]) == [STORED]
        eventually(lambda: len(errors_about(caplog, "nobody was rung for")) > 1, what="the thread has met it, too")
    with consume(transport, "later") as consumer:
        assert consumer.receive(1, 0.1) == []
        transport.publish([a_message("later")])
        assert len(consumer.receive(1, 5.0)) == 1


def test_a_fault_in_tidying_the_store_is_told_and_the_next_step_comes(
    single: CouchDBCluster, backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(backend, CouchDBBackend)

    def fail(*_: object) -> bool:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(tidying, "TIDY_SECONDS", 0.01)
    with monkeypatch.context() as patched:
        patched.setattr(tidying.Tidying, "step", fail)
        backend._tidying._next_at = 0.0
        backend.write("key", b"1")
        eventually(lambda: errors_about(caplog, "what has expired was not deleted"), what="it is told")
    single.requests.clear()

    def is_tidied() -> bool:
        backend.write("key", b"1")
        return any("ekiden-tidying" in path for _, path, _ in single.requests)

    eventually(is_tidied, what="the next step")


def test_where_no_threads_can_be_started_everything_goes_on(
    single: CouchDBCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    refused: list[str] = []

    def start_some(thread: threading.Thread) -> None:
        if thread.name.startswith("ekiden-couchdb"):
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    with open_transport(single.url("p")) as transport, open_backend(single.url("p")) as backend:
        assert isinstance(backend, CouchDBBackend)
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start_some)
            consumer = consume(transport)
            for _ in range(50):
                assert transport.publish([a_message("queue")]) == [STORED]
            assert len(consumer.receive(99, 5.0)) == 50
            backend._tidying._next_at = 0.0
            backend.begin([Start("task", 0, "message", DAY)])
            assert backend.wait(["task"], 0.05) == []
            backend.put([StoredResult("task", "SUCCESS", 0, b"1", DAY)])
            assert [each.body for each in backend.wait(["task"], 5.0)] == [b"1"]
            with pytest.raises(Exception, match="no thread can be started"):
                transport.listen("topic")
        assert {f"ekiden-couchdb-{name}" for name in ("signals", "rings", "tidies", "results")} <= set(refused)

        assert isinstance(transport, CouchDBTransport)
        signals = transport._signals
        eventually(lambda: consumer.receive(1, 0.1) or signals.is_live, what="the feed begins after all", within=20)
        with transport.listen("topic") as listener:
            transport.broadcast("topic", [b"x"])
            assert listener.receive(5.0) == [b"x"]


def test_a_task_that_has_begun_is_told_beside_what_cannot_be_read(single: CouchDBCluster, backend: Backend) -> None:
    backend.begin([Start("begun", 0, "message", DAY)])
    single.plant("p-results", {"_id": "t:odd", "state": 1})

    found = backend.get(["begun", "odd"])

    assert [each and each.state for each in found] == [STARTED, None]


def test_a_server_that_answers_something_else_is_refused(single: CouchDBCluster, backend: Backend) -> None:
    backend.write("key", b"1")
    answers: list[Any] = [None, [], "x", {"rows": None}, {"rows": [1]}, {"rows": {}}, 5]
    for answer in answers:
        single.fail("GET", "p-records/_all_docs", 200, body=answer)
        with pytest.raises(BackendError):
            backend.scan("key")
        single.fail("POST", "p-records/_bulk_docs", 201, body=answer)
        with pytest.raises(BackendError):
            backend.write("key", b"2")
    assert backend.scan("key") == [Record("key", b"1", 1)]
