"""Databases of messages come and go: nobody writes into one that is dropped, and nobody overlooks a new one."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable
from ekiden.testing.conformance.fixtures import eventually
from ekiden.urls import parse_url
from ekiden_couchdb.catalogue import Catalogue, CatalogueStore, Generation, Stage
from ekiden_couchdb.client import BulkOutcome, Client
from ekiden_couchdb.errors import status_of
from ekiden_couchdb.generations import Generations
from ekiden_couchdb.rotation import Limits

from tests.servers.couchdb_cluster import CouchDBCluster, playing
from tests.servers.couchdb_copies import BROKEN, IGNORED
from tests.servers.couchdb_http import ADMIN

FULL = 10
LIMITS = Limits(rotate_after=FULL, known_after=0.0, tidied_every=0.0, evidence=0.0)
"""All times of the server's clock are as they are in earnest; the tests put that clock forward."""

MINUTE = 60.0
A_LONG_TIME = 20 * MINUTE


class Process:
    """What one process has: a client, and its own view of the generations."""

    def __init__(self, url: str, limits: Limits = LIMITS) -> None:
        self.client = Client(parse_url(url), unavailable=BrokerUnavailable, refused=BrokerRefused)
        self.generations = Generations(self.client, limits)

    def store(self, name: str, *, into: str | None = None) -> BulkOutcome:
        """Store one document, in the current generation."""
        (answer,) = self.client.bulk(into or self.generations.current(), [{"_id": name}])
        return answer.outcome

    def delete(self, name: str, *, within: str) -> BulkOutcome:
        """Delete one document."""
        found = self.client.ask("GET", f"/{within}/{name}").body
        (answer,) = self.client.bulk(within, [{"_id": name, "_rev": found["_rev"], "_deleted": True}])
        self.generations.deleted(within, {name: [answer.rev]})
        return answer.outcome

    def fill(self, count: int = FULL) -> str:
        """Leave so many tombstones in the current generation, and return its name."""
        database = self.generations.current()
        written = self.client.bulk(database, [{"_id": f"full-{number}"} for number in range(count)])
        self.client.bulk(database, [{"_id": each.id, "_rev": each.rev, "_deleted": True} for each in written])
        self.generations.deleted(database, {each.id: [each.rev] for each in written})
        return database


@pytest.fixture
def server() -> Iterator[CouchDBCluster]:
    """One node that does not purge."""
    with playing(copies=1) as server:
        server.purges_permitted = False
        yield server


Opened = Callable[..., Process]


@pytest.fixture
def opened(server: CouchDBCluster) -> Iterator[Opened]:
    """Opens processes, of a ``user`` and with ``limits``, and closes them in the end."""
    processes: list[Process] = []

    def open_process(user: str | None = None, limits: Limits = LIMITS) -> Process:
        processes.append(Process(server.url("p", user=user), limits))
        return processes[-1]

    yield open_process
    for process in processes:
        process.generations.close()
        process.client.close()


@pytest.fixture
def process(opened: Opened) -> Process:
    return opened()


@pytest.fixture
def other(opened: Opened) -> Process:
    return opened()


@pytest.fixture
def two_users(server: CouchDBCluster) -> None:
    """``root`` may do everything, ``shop`` is a member of what is made for buyers."""
    server.users = {"root": ("secret", [ADMIN]), "shop": ("secret", ["buyer"])}


def make_for_buyers(root: Process, name: str) -> None:
    """As an administrator does who does not let workers create databases."""
    root.client.ask("PUT", f"/{name}")
    root.client.ask("PUT", f"/{name}/_security", {"members": {"roles": ["buyer"]}})


def messages_in(server: CouchDBCluster) -> set[str]:
    """The names of the databases of messages that are there."""
    with server.changed:
        return {name for name in server.databases if "-messages" in name}


def tidy_for_long(server: CouchDBCluster, process: Process, *, steps: int = 8) -> None:
    """Let all the time pass that a generation needs from its rotation to its end."""
    for _ in range(steps):
        process.generations.tidy()
        server.advance(A_LONG_TIME)


class TestBeginning:
    def test_many_processes_that_begin_at_once_agree(self, server: CouchDBCluster, opened: Opened) -> None:
        processes = [opened() for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(lambda each: each.generations.current(), processes))

        (current,) = found
        (readable,) = {each.generations.readable() for each in processes}
        assert current in readable
        assert messages_in(server) == set(readable)  # one may have found another's before that was agreed upon

    @pytest.mark.usefixtures("two_users")
    def test_databases_that_an_administrator_made_are_used(self, opened: Opened) -> None:
        root = opened("root")
        worker = opened("shop")
        with pytest.raises(BrokerRefused, match=r"'p-messages'.*administrator"):
            worker.generations.current()
        make_for_buyers(root, "p-messages")

        assert worker.generations.current() == "p-messages"
        assert worker.store("x") is BulkOutcome.OK
        assert "neither purge nor create" in worker.generations.warnings()[0]
        assert root.generations.warnings() == []

    @pytest.mark.usefixtures("two_users")
    def test_who_has_few_rights_asks_little(self, server: CouchDBCluster, opened: Opened) -> None:
        root = opened("root")
        make_for_buyers(root, "p-messages")
        worker = opened("shop")
        worker.generations.current()
        asked = len(server.requests)

        for _ in range(10):
            worker.generations.readable()
            worker.generations.tidy()

        assert len(server.requests) - asked <= 40

    def test_a_lost_catalogue_is_made_again_of_what_is_there(
        self, server: CouchDBCluster, process: Process, opened: Opened
    ) -> None:
        first = process.fill()
        process.generations.tidy()
        both = process.generations.readable()
        assert both[0] == first
        del server.databases["p-generations"]

        assert opened().generations.readable() == both


class TestRotation:
    def test_a_new_generation_is_known_before_it_takes_messages(
        self, server: CouchDBCluster, process: Process, other: Process
    ) -> None:
        first = process.fill()
        process.generations.tidy()

        server.advance(LIMITS.announced / 2)
        assert other.generations.current() == first
        assert other.generations.readable()[0] == first
        assert len(other.generations.readable()) == 2
        server.advance(MINUTE)
        assert other.generations.current() == other.generations.readable()[1]

    def test_an_old_one_takes_no_new_document_and_lets_go_of_what_it_has(
        self, server: CouchDBCluster, process: Process, other: Process
    ) -> None:
        first = process.generations.current()
        process.store("held")
        process.fill()
        process.generations.tidy()
        server.advance(MINUTE)
        process.generations.tidy()

        assert other.store("late", into=first) is BulkOutcome.FORBIDDEN
        other.generations.refresh()
        assert other.store("late") is BulkOutcome.OK
        held = other.client.ask("GET", f"/{first}/held").body
        (extended,) = other.client.bulk(first, [held | {"v": 1}])
        assert extended.outcome is BulkOutcome.OK
        assert first in other.generations.readable()
        assert other.delete("held", within=first) is BulkOutcome.OK

    def test_it_is_dropped_when_it_is_empty_and_not_before(self, server: CouchDBCluster, process: Process) -> None:
        first = process.generations.current()
        process.store("held")
        process.fill()
        tidy_for_long(server, process)
        assert first in messages_in(server)
        assert first in process.generations.readable()

        process.delete("held", within=first)
        tidy_for_long(server, process)

        assert messages_in(server) == {process.generations.current()}

    def test_a_publisher_that_slept_through_all_of_it_stores_nothing_where_nobody_looks(
        self, server: CouchDBCluster, process: Process, other: Process
    ) -> None:
        remembered = other.generations.current()
        process.fill()
        tidy_for_long(server, process)

        with pytest.raises(BrokerRefused) as refused:
            other.store("late", into=remembered)
        assert status_of(refused.value) == 404
        other.generations.refresh()
        assert other.store("late") is BulkOutcome.OK
        assert remembered not in messages_in(server)

    def test_a_document_that_comes_after_the_last_but_one_look_is_found_by_the_last(
        self, server: CouchDBCluster, process: Process
    ) -> None:
        first = process.fill()
        process.generations.tidy()
        server.advance(MINUTE)
        process.generations.tidy()
        server.advance(MINUTE)
        process.generations.tidy()
        assert first not in process.generations.readable()
        # A write that the server had let through before it was sealed, and finishes now.
        server.databases[first].copies[0].write("late", {}, None, deleted=False)

        tidy_for_long(server, process)

        assert first in process.generations.readable()
        assert "late" in server.databases[first].copies[0].documents

    def test_only_one_of_two_processes_tidies(self, server: CouchDBCluster, process: Process, other: Process) -> None:
        process.fill()
        other.fill()

        process.generations.tidy()
        other.generations.tidy()

        assert len(messages_in(server)) == 2

    def test_another_process_goes_on_where_the_tidier_died(
        self, server: CouchDBCluster, process: Process, other: Process
    ) -> None:
        first = process.fill()
        process.generations.tidy()

        tidy_for_long(server, other)

        assert first not in messages_in(server)

    @pytest.mark.usefixtures("two_users")
    def test_new_databases_are_for_the_same_users(self, server: CouchDBCluster, opened: Opened) -> None:
        root, worker = opened("root"), opened("shop")
        make_for_buyers(root, "p-messages")
        root.fill()
        tidy_for_long(server, root)

        assert worker.generations.current() == root.generations.current() != "p-messages"
        assert worker.store("x") is BulkOutcome.OK

    def test_a_database_of_a_process_that_died_creating_it_is_taken_in(
        self, server: CouchDBCluster, process: Process
    ) -> None:
        orphan = "p-messages-20260102030405678-abcdef"
        process.generations.current()
        process.client.ask("PUT", f"/{orphan}")
        process.store("forgotten", into=orphan)
        process.fill()

        process.generations.tidy()

        assert process.generations.readable()[0] == orphan


class TestTheCatalogueInACluster:
    @pytest.fixture
    def server(self) -> Iterator[CouchDBCluster]:
        with playing(copies=3) as server:
            server.purges_permitted = False
            yield server

    @pytest.mark.parametrize("seed", range(3))
    def test_steps_that_too_few_nodes_have_stored_are_taken_again(
        self, server: CouchDBCluster, process: Process, other: Process, seed: int
    ) -> None:
        chance = random.Random(seed)
        first = process.fill()
        for _ in range(60):
            if chance.random() < 0.4:
                server.divert("generations", {chance.randrange(3)})
            chance.choice((process, other)).generations.tidy()
            if chance.random() < 0.5:
                server.replicate()
            server.advance(chance.choice((20.0, 20.0, 700.0)))

        assert first not in messages_in(server)
        server.replicate()
        other.generations.refresh()
        assert messages_in(server) == set(other.generations.readable())

    def test_both_branches_of_a_conflict_count(self, server: CouchDBCluster, process: Process) -> None:
        first = process.generations.current()
        store = CatalogueStore(process.client)
        catalogue = store.load()
        assert catalogue is not None
        for copy, name in enumerate(("p-messages-one", "p-messages-two")):
            server.divert("generations", {copy})
            assert store.save(catalogue.with_generation(Generation(name, opens=copy + 1))) is None
        server.replicate()

        merged = store.load()

        assert merged is not None
        assert merged.names() == {first, "p-messages-one", "p-messages-two"}
        server.replicate()
        (leaves,) = server.leaves("generations").values()
        assert sum(not leaf.deleted for leaf in leaves) == 1

    def test_of_two_branches_the_one_counts_that_keeps_a_database_longer(self) -> None:
        open_, sealed = Generation("a", opens=1), Generation("a", opens=1, stage=Stage.SEALED, since=5)
        gone = Catalogue((Generation("b", opens=2),), gone=("a",))

        assert Catalogue((sealed,)).merged(Catalogue((open_,))).generations == (open_,)
        assert Catalogue((open_,)).merged(Catalogue((sealed,))).generations == (open_,)
        assert gone.merged(Catalogue((open_,))).names() == {"b"}

    def test_a_database_is_not_dropped_while_a_node_is_away(self, server: CouchDBCluster, process: Process) -> None:
        first = process.fill()
        process.generations.tidy()
        server.down = {2}
        tidy_for_long(server, process)
        assert first in messages_in(server)

        server.down = set()
        server.replicate()
        tidy_for_long(server, process)
        assert first not in messages_in(server)


class TestWhereSealingDoesNotWork:
    def test_no_database_is_dropped_where_validation_is_ignored(self, server: CouchDBCluster, process: Process) -> None:
        server.validation = IGNORED
        first = process.fill()

        tidy_for_long(server, process)

        assert first in process.generations.readable()
        assert process.store("late", into=first) is BulkOutcome.OK
        (warning,) = process.generations.warnings()
        assert first in warning
        assert "validate_doc_update" in warning

    def test_what_is_there_can_be_settled_where_nothing_runs_validation(
        self, server: CouchDBCluster, process: Process
    ) -> None:
        server.validation = BROKEN
        first = process.generations.current()
        process.store("held")
        process.fill()

        tidy_for_long(server, process)

        assert first in process.generations.readable()
        assert process.delete("held", within=first) is BulkOutcome.OK


@pytest.mark.slow
class TestWhileEverybodyWorks:
    PUBLISHERS, CONSUMERS, EACH = 3, 2, 120
    QUICK = Limits(
        rotate_after=30,
        known_after=0.01,
        announced=0.05,
        drained_after=0.02,
        dropped_after=0.05,
        tidied_every=0.01,
    )

    def test_nothing_is_lost(self, server: CouchDBCluster, opened: Opened) -> None:
        """Publishers sleep between their look and their write, and all consumers tidy."""
        stored: set[str] = set()
        consumed: set[str] = set()
        seen: set[str] = set()
        ended = threading.Event()

        def publish(number: int) -> None:
            process, naps = opened(limits=self.QUICK), random.Random(number)
            for count in range(self.EACH):
                name = f"message-{number}-{count}"
                database = process.generations.current()
                if naps.random() < 0.1:
                    threading.Event().wait(naps.uniform(0, 1.0))
                while not self.has_stored(process, name, database):
                    process.generations.refresh()
                    database = process.generations.current()
                stored.add(name)
                seen.add(database)

        def consume(_: int) -> None:
            process = opened(limits=self.QUICK)
            while not ended.is_set():
                for database in process.generations.readable():
                    consumed.update(self.consumed(process, database))
                process.generations.tidy()

        process = opened(limits=self.QUICK)
        process.generations.current()
        with ThreadPoolExecutor(self.PUBLISHERS + self.CONSUMERS) as pool:
            consumers = [pool.submit(consume, number) for number in range(self.CONSUMERS)]
            try:
                for publisher in [pool.submit(publish, number) for number in range(self.PUBLISHERS)]:
                    publisher.result(60)
                eventually(lambda: consumed >= stored, what="all are consumed", within=5.0)
            finally:
                ended.set()
            for consumer in consumers:
                consumer.result(60)

        assert len(stored) == self.PUBLISHERS * self.EACH
        assert len(seen) > 3
        eventually(lambda: process.generations.tidy() or len(messages_in(server)) <= 2, what="the old ones are gone")

    def has_stored(self, process: Process, name: str, database: str) -> bool:
        try:
            return process.store(name, into=database) is BulkOutcome.OK
        except BrokerRefused as error:
            if status_of(error) != 404:
                raise
            return False

    def consumed(self, process: Process, database: str) -> list[str]:
        query = {"limit": "100", "startkey": '"message"', "endkey": '"n"'}
        rows = process.client.ask("GET", f"/{database}/_all_docs", query=query, accept={404}).body.get("rows", [])
        endings = [{"_id": row["id"], "_rev": row["value"]["rev"], "_deleted": True} for row in rows]
        answers = process.client.bulk(database, endings) if endings else []
        taken = [answer.id for answer in answers if answer.outcome is BulkOutcome.OK]
        process.generations.deleted(database, {name: [] for name in taken})
        return taken
