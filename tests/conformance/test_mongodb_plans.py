"""What the MongoDB transport asks is answered from its index, at a cost that does not grow with what is not wanted.

What is really sent is recorded, and the server is asked how it carries that out. A mongod says which bounds it has on
which field, and how many keys it looked at. What works alike may tell less: of it the index must be there, and the
question must be bounded on every field that the index begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable
from ekiden.message import Ending, new_id
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import a_message, eventually, numbered
from ekiden.transport import Transport
from ekiden.urls import parse_url
from ekiden_mongodb.claiming import Claimer
from ekiden_mongodb.client import Client
from ekiden_mongodb.documents import CLAIM_INDEX, MESSAGES, Messages
from ekiden_mongodb.holding import Holdings
from ekiden_mongodb.publishing import Publisher
from ekiden_mongodb.signals import Signals
from pymongo import monitoring

WANTED = 10
"""So many are claimed each time."""

NOT_FOR_ITSELF = 45
"""Keys that may be looked at besides what is wanted: a few for each priority, waiting and leased."""

CROWDS = [20, 200]

_OF_THE_DRIVER = ("lsid", "$db", "$clusterTime", "$readPreference", "readConcern", "maxTimeMS", "txnNumber")


class Recorder(monitoring.CommandListener):
    """Notes the commands that any client in this process sends to one collection."""

    def __init__(self) -> None:
        self.collection = ""
        self.commands: list[dict[str, Any]] = []

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command.get(event.command_name) == self.collection:
            self.commands.append({name: event.command[name] for name in event.command if name not in _OF_THE_DRIVER})

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        """Nothing is to be noted."""

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        """Nothing is to be noted."""


RECORDER = Recorder()


@pytest.fixture(scope="module", autouse=True)
def _recording() -> None:
    if RECORDER not in monitoring._LISTENERS.command_listeners:
        monitoring.register(RECORDER)


class Explained:
    """How the server carries out a command that was sent to it."""

    def __init__(self, client: Client, command: dict[str, Any]) -> None:
        self.command = command
        self.is_mongod = client.features().product == "MongoDB"
        with client.asking():
            said = client.database.command({"explain": command, "verbosity": "executionStats"})
            self.indexes = [list(index["key"].items()) for index in client.collection(MESSAGES).list_indexes()]
        self.stages = list(_dictionaries_with("stage", said.get("queryPlanner", said)))
        self.keys_examined = sum(each["totalKeysExamined"] for each in _dictionaries_with("totalKeysExamined", said))

    @property
    def condition(self) -> dict[str, Any]:
        """What was asked for."""
        match self.command:
            case {"filter": condition}:
                return dict(condition)
            case {"pipeline": [{"$match": condition}, *_]}:
                return dict(condition)
            case {"updates": [update]}:
                return dict(update["q"])
            case _:
                raise AssertionError(f"what does {self.command} ask for?")

    @property
    def hint(self) -> list[tuple[str, int]]:
        """The index that the command names."""
        asked = self.command["updates"][0] if "updates" in self.command else self.command
        return list(dict(asked["hint"]).items())

    def assert_bounded(self, *fields: str) -> None:
        """It uses the index, with bounds on each of these fields."""
        assert self.hint == CLAIM_INDEX
        assert self.hint in self.indexes
        assert set(fields) <= set(self.condition)
        assert [name for name, _ in CLAIM_INDEX[: len(fields)]] == list(fields)
        if self.is_mongod:
            scans = [stage for stage in self.stages if stage["stage"] == "IXSCAN"]
            assert scans
            for scan in scans:
                assert list(scan["keyPattern"].items()) == CLAIM_INDEX
                for field in fields:
                    assert "MinKey" not in str(scan["indexBounds"][field])

    def assert_sorts_nothing(self) -> None:
        """The order is that of the index."""
        if self.is_mongod:
            assert "SORT" not in {stage["stage"] for stage in self.stages}

    def assert_examines_at_most(self, keys: int) -> None:
        """No more than so many entries of the index."""
        if self.is_mongod:
            assert 0 < self.keys_examined <= keys


def _dictionaries_with(name: str, found: Any) -> Iterator[dict[str, Any]]:
    """The outermost ones that say ``totalKeysExamined``, or all stages."""
    if isinstance(found, dict):
        if name in found:
            yield found
            if name != "stage":
                return
        for each in found.values():
            yield from _dictionaries_with(name, each)
    elif isinstance(found, list):
        for each in found:
            yield from _dictionaries_with(name, each)


@pytest.fixture
def client(mongodb_place: str) -> Iterator[Client]:
    client = Client(parse_url(mongodb_place), unavailable=BrokerUnavailable, refused=BrokerRefused)
    RECORDER.collection = f"{client.options.prefix}.{MESSAGES}"
    yield client
    client.close()
    RECORDER.collection = ""


@pytest.fixture
def transport(mongodb_place: str) -> Iterator[Transport]:
    with open_transport(mongodb_place) as transport:
        yield transport


@pytest.fixture
def queue() -> str:
    return f"queue-{new_id()}"


def crowd(transport: Transport, queue: str, count: int) -> None:
    """So many messages of each kind that nobody can have: delayed, leased, dead; of several priorities."""
    for priority in (9, 4, 0):
        messages = numbered(queue, count // 2, priority=priority)
        transport.publish(messages)
    holder = transport.consumer([queue], lease=3600.0, prefetch=10 * count, name=f"{queue}-holder")
    held = 0
    while held < 3 * (count // 2):
        held += len(holder.receive(1000, 5.0))
    transport.publish(
        [each for priority in (9, 4, 0) for each in numbered(queue, count, priority=priority, due_in=3600)]
    )
    transport.publish(numbered(f"{queue}.dead", count))


def recorded(act: Callable[[], object], *names: str) -> list[dict[str, Any]]:
    """The commands of these names that ``act`` sends."""
    RECORDER.commands = []
    act()
    return [command for command in RECORDER.commands if next(iter(command)) in names]


@pytest.mark.parametrize("others", CROWDS)
class TestAnIndexAnswers:
    def ask(self, client: Client, queue: str, question: Callable[[Claimer], object]) -> None:
        """What a consumer of ``queue`` asks now and then."""
        messages = Messages(client)
        publisher = Publisher(client, messages, Signals(client))
        claimer = Claimer(client, messages, publisher, Holdings(), [queue], lease=60.0, name=queue, strict=False)
        with client.asking():
            question(claimer)

    def test_a_claim(self, client: Client, transport: Transport, queue: str, others: int) -> None:
        crowd(transport, queue, others)
        transport.publish([each for priority in (9, 4, 0) for each in numbered(queue, WANTED, priority=priority)])
        consumer = transport.consumer([queue], lease=60.0, prefetch=WANTED, name=queue)

        commands = recorded(lambda: consumer.receive(WANTED, 5.0), "find", "update")

        ready, taken, read = commands
        explained = Explained(client, ready)
        explained.assert_bounded("q", "s", "p", "v")
        explained.assert_sorts_nothing()
        explained.assert_examines_at_most(WANTED + NOT_FOR_ITSELF)
        for condition in (taken["updates"][0]["q"], read["filter"]):
            assert len(condition["_id"]["$in"]) == WANTED

    def test_the_search_for_ended_leases(self, client: Client, transport: Transport, queue: str, others: int) -> None:
        crowd(transport, queue, others)

        (ended,) = recorded(lambda: self.ask(client, queue, Claimer.reap), "find")

        explained = Explained(client, ended)
        assert ended["filter"]["s"] == 1
        explained.assert_bounded("q", "s", "p", "v")
        explained.assert_sorts_nothing()
        explained.assert_examines_at_most(NOT_FOR_ITSELF)

    def test_what_an_idle_consumer_asks(self, client: Client, transport: Transport, queue: str, others: int) -> None:
        crowd(transport, queue, others)

        (next_change,) = recorded(lambda: self.ask(client, queue, Claimer.next_change), "find")

        explained = Explained(client, next_change)
        assert next_change["limit"] == 1
        explained.assert_bounded("q", "s", "p")
        explained.assert_sorts_nothing()
        explained.assert_examines_at_most(1 + NOT_FOR_ITSELF)

    def test_the_search_for_what_an_earlier_consumer_of_the_name_held(
        self, client: Client, transport: Transport, queue: str, others: int
    ) -> None:
        crowd(transport, queue, others)

        (held,) = recorded(lambda: transport.consumer([queue], lease=60.0, prefetch=1, name=f"{queue}-another"), "find")

        assert held["filter"]["s"] == 1
        Explained(client, held).assert_bounded("q", "s", "p")

    def test_counting_a_queue_looks_at_no_other_one(
        self, client: Client, transport: Transport, queue: str, others: int
    ) -> None:
        crowd(transport, queue, others)
        quiet = f"{queue}-quiet"
        transport.publish(numbered(quiet, WANTED))

        (counted,) = recorded(lambda: transport.depth(quiet), "aggregate")

        explained = Explained(client, counted)
        explained.assert_bounded("q", "s", "p")
        explained.assert_examines_at_most(WANTED + NOT_FOR_ITSELF)

    def test_browsing_goes_on_where_it_was(self, client: Client, transport: Transport, queue: str, others: int) -> None:
        crowd(transport, queue, others)
        transport.publish(numbered(queue, 3 * WANTED))
        cursor = transport.browse(queue, limit=WANTED)[-1].cursor

        commands = recorded(lambda: transport.browse(queue, after=cursor, limit=WANTED), "find")

        for command in commands:
            explained = Explained(client, command)
            explained.assert_bounded("q", "s", "p", "v")
            explained.assert_sorts_nothing()
            # Those of the same millisecond as the last one are looked at again.
            explained.assert_examines_at_most(3 * WANTED + NOT_FOR_ITSELF)


def test_the_indexes_are_made_anew_when_somebody_drops_the_collection(
    client: Client, transport: Transport, queue: str
) -> None:
    transport.publish([a_message(queue)])
    consumer = transport.consumer([queue], lease=60.0, prefetch=1, name=queue)
    client.collection(MESSAGES).drop()

    transport.publish([a_message(queue, b"after")])
    (delivery,) = eventually(lambda: consumer.receive(1, 1.0), what="received")

    assert delivery.message.body == b"after"
    assert consumer.settle([Ending(delivery)])
    keys = [list(index["key"].items()) for index in client.collection(MESSAGES).list_indexes()]
    # A server that answers without the index that it is told to use tells nobody that it is gone.
    assert CLAIM_INDEX in keys or client.features().product != "MongoDB"
