"""CouchDB keeps a trace of everything that was deleted; a queue that lives for years does not grow by that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable
from ekiden.message import SETTLED, STORED, Ending, Message, SettleOutcome
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import a_message, bodies, eventually, ids, numbered, settle
from ekiden.urls import parse_url
from ekiden_couchdb import generations, purging
from ekiden_couchdb.catalogue import CatalogueStore, Stage
from ekiden_couchdb.client import Client
from ekiden_couchdb.generations import Generations
from ekiden_couchdb.moving import Mover
from ekiden_couchdb.purging import Purger, may_purge
from ekiden_couchdb.rotation import Limits, existing_generations
from ekiden_couchdb.transport import CouchDBTransport

from tests.servers.couchdb_cluster import CouchDBCluster, playing
from tests.servers.couchdb_copies import Leaf

LEASE = 60.0
LONG_PATIENCE = 30.0
A_LONG_TIME = 1200.0


@pytest.fixture
def server() -> Iterator[CouchDBCluster]:
    """One node."""
    with playing(copies=1) as server:
        yield server


@pytest.fixture
def cluster() -> Iterator[CouchDBCluster]:
    with playing(copies=3) as cluster:
        yield cluster


Connect = Callable[[CouchDBCluster], Client]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Opens clients, and closes them in the end."""
    clients: list[Client] = []

    def open_client(server: CouchDBCluster) -> Client:
        clients.append(Client(parse_url(server.url("p")), unavailable=BrokerUnavailable, refused=BrokerRefused))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close()


def leave_tombstones(client: Client, count: int) -> None:
    """Write and delete so many documents in a database ``p-messages``."""
    client.ensure_database("p-messages")
    written = client.bulk("p-messages", [{"_id": f"q:{number}"} for number in range(count)])
    client.bulk("p-messages", [{"_id": each.id, "_rev": each.rev, "_deleted": True} for each in written])


def soon() -> float:
    """Later than any step of these tests takes."""
    return time.monotonic() + 60.0


class TestPurgingOnOneNode:
    def test_everything_that_is_deleted_goes_and_nothing_else(self, server: CouchDBCluster, connect: Connect) -> None:
        client = connect(server)
        leave_tombstones(client, 1234)
        client.bulk("p-messages", [{"_id": "alive"}])

        assert may_purge(client, "p-messages")
        assert not Purger(client, "p-messages").step(delay=0.0, deadline=soon())

        assert list(server.leaves("messages")) == ["alive"]

    def test_what_a_process_that_died_had_deleted_goes_as_well(self, server: CouchDBCluster, connect: Connect) -> None:
        leave_tombstones(connect(server), 10)

        purging = Generations(connect(server), Limits(tidied_every=0.0, known_after=0.0))
        purging.current()
        purging.tidy()

        assert server.leaves("messages") == {}

    def test_a_server_that_is_busy_loses_nothing_and_is_asked_again(
        self, server: CouchDBCluster, connect: Connect
    ) -> None:
        leave_tombstones(connect(server), 10)
        purging = Generations(connect(server), Limits(tidied_every=0.0, known_after=0.0))
        purging.current()
        server.fail("POST", "_purge", 503, times=2)

        purging.tidy()
        assert len(server.leaves("messages")) == 10
        purging.tidy()
        purging.tidy()

        assert server.leaves("messages") == {}


class TestPurgingInACluster:
    DELAY = 0.05

    def purge(self, purger: Purger, *, delay: float = DELAY) -> None:
        purger.step(delay=delay, deadline=soon())

    def test_the_evidence_stays_for_its_time(self, cluster: CouchDBCluster, connect: Connect) -> None:
        client = connect(cluster)
        leave_tombstones(client, 250)
        purger = Purger(client, "p-messages")

        self.purge(purger, delay=A_LONG_TIME)
        self.purge(purger, delay=A_LONG_TIME)
        assert len(cluster.leaves("messages")) == 250
        assert purger.is_waiting

        eventually(lambda: self.purge(purger) or not cluster.leaves("messages"), what="all are purged")

    def test_it_stays_while_a_node_is_away(self, cluster: CouchDBCluster, connect: Connect) -> None:
        client = connect(cluster)
        leave_tombstones(client, 5)
        purger = Purger(client, "p-messages")
        self.purge(purger)
        cluster.down = {2}

        for _ in range(3):
            self.purge(purger, delay=0.001)
        assert len(cluster.leaves("messages")) == 5

        cluster.down = set()
        eventually(lambda: self.purge(purger) or not cluster.leaves("messages"), what="all are purged")

    def test_it_stays_while_nodes_have_something_to_tell_each_other(
        self, cluster: CouchDBCluster, connect: Connect
    ) -> None:
        client = connect(cluster)
        leave_tombstones(client, 5)
        cluster.replication_jobs = 1
        purger = Purger(client, "p-messages")

        for _ in range(3):
            self.purge(purger, delay=0.001)

        assert len(cluster.leaves("messages")) == 5
        assert purger.is_waiting
        cluster.replication_jobs = 0
        eventually(lambda: self.purge(purger, delay=0.001) or not cluster.leaves("messages"), what="all are purged")

    def test_what_was_seen_before_some_work_need_not_be_seen_again(
        self, cluster: CouchDBCluster, connect: Connect
    ) -> None:
        """In a cluster that works there is always something to tell: the waiting must not begin anew each time."""
        client = connect(cluster)
        leave_tombstones(client, 5)
        purger = Purger(client, "p-messages")
        self.purge(purger, delay=A_LONG_TIME)
        cluster.replication_jobs = 1
        self.purge(purger, delay=A_LONG_TIME)
        cluster.replication_jobs = 0

        self.purge(purger, delay=0.000_001)

        assert cluster.leaves("messages") == {}

    def test_what_was_seen_before_a_node_was_away_is_seen_again_by_itself(
        self, cluster: CouchDBCluster, connect: Connect
    ) -> None:
        client = connect(cluster)
        leave_tombstones(client, 5)
        purger = Purger(client, "p-messages")
        self.purge(purger, delay=A_LONG_TIME)
        cluster.down = {2}
        self.purge(purger, delay=A_LONG_TIME)

        assert purger.is_waiting

    def test_what_waits_for_longer_than_the_feed_is_read_again_goes(
        self, cluster: CouchDBCluster, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(purging, "_READ_AGAIN_SECONDS", 0.0)
        client = connect(cluster)
        leave_tombstones(client, 5)
        purger = Purger(client, "p-messages")

        eventually(lambda: self.purge(purger, delay=0.2) or not cluster.leaves("messages"), what="all are purged")

    def test_a_purge_that_failed_is_repeated(self, cluster: CouchDBCluster, connect: Connect) -> None:
        client = connect(cluster)
        leave_tombstones(client, 250)
        purger = Purger(client, "p-messages")
        self.purge(purger)
        cluster.fail("POST", "_purge", 503, skipping=1)

        def purged() -> bool:
            try:
                self.purge(purger)
            except BrokerUnavailable:
                return False
            return not cluster.leaves("messages")

        eventually(purged, what="all are purged")

    def test_an_idle_cluster_comes_to_its_end(self, cluster: CouchDBCluster, connect: Connect) -> None:
        """Each purge gives the nodes something to tell; nobody deletes any more, and a node is away for a moment."""
        leave_tombstones(connect(cluster), 1500)
        limits = Limits(tidied_every=0.0, known_after=0.0, evidence=0.05)
        purging = Generations(connect(cluster), limits)
        purging.current()
        cluster.jobs_after_purge = 12
        for _ in range(5):
            purging.tidy()
        cluster.down = {1}
        for _ in range(5):
            purging.tidy()
        cluster.down = set()

        eventually(
            lambda: purging.tidy() or not cluster.leaves("messages"), what="all are purged", within=LONG_PATIENCE
        )

    def test_a_losers_branch_that_turns_up_late_finds_the_evidence(
        self, cluster: CouchDBCluster, connect: Connect
    ) -> None:
        client = connect(cluster)
        client.ensure_database("p-messages")
        (written,) = client.bulk("p-messages", [{"_id": "q:1"}])
        cluster.divert("messages", {0})
        client.bulk("p-messages", [{"_id": "q:1", "_rev": written.rev, "by": "a loser"}])
        cluster.read_from = 1
        (settled,) = client.bulk("p-messages", [{"_id": "q:1", "_rev": written.rev, "_deleted": True}])
        assert settled.rev
        purger = Purger(client, "p-messages")
        self.purge(purger)
        cluster.replicate()

        for _ in range(5):
            self.purge(purger, delay=0.001)

        (leaves,) = cluster.leaves("messages").values()
        assert sorted(leaf.deleted for leaf in leaves) == [False, True]

    def test_all_leaves_go_together(self, cluster: CouchDBCluster, connect: Connect) -> None:
        client = connect(cluster)
        client.ensure_database("p-messages")
        (written,) = client.bulk("p-messages", [{"_id": "q:1"}])
        for copy, author in ((0, "one"), (1, "two")):
            cluster.divert("messages", {copy})
            client.bulk("p-messages", [{"_id": "q:1", "_rev": written.rev, "by": author}])
        cluster.replicate()
        for leaf in cluster.leaves("messages")["q:1"]:
            client.bulk("p-messages", [{"_id": "q:1", "_rev": leaf.rev, "_deleted": True}])
        cluster.replicate()
        assert len(cluster.leaves("messages")["q:1"]) == 2

        purger = Purger(client, "p-messages")
        eventually(lambda: self.purge(purger) or not cluster.leaves("messages"), what="all are purged")
        cluster.replicate()

        assert cluster.leaves("messages") == {}

    def test_evidence_is_kept_for_twice_the_longest_lease(self, cluster: CouchDBCluster, connect: Connect) -> None:
        leave_tombstones(connect(cluster), 5)
        purging = Generations(connect(cluster), Limits(tidied_every=0.0, known_after=0.0, evidence=0.0))
        purging.leases(A_LONG_TIME)
        purging.current()

        for _ in range(5):
            purging.tidy()

        assert len(cluster.leaves("messages")) == 5


class TestMoving:
    """Messages that nobody receives leave an old database, each exactly once."""

    @pytest.fixture
    def transport(self, server: CouchDBCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[CouchDBTransport]:
        server.purges_permitted = False
        limits = Limits(rotate_after=20, known_after=0.0, tidied_every=0.0)
        monkeypatch.setattr(generations, "LIMITS", limits)
        with open_transport(server.url("p")) as transport:
            assert isinstance(transport, CouchDBTransport)
            yield transport

    @pytest.fixture
    def two(self, server: CouchDBCluster, transport: CouchDBTransport, connect: Connect) -> tuple[str, str]:
        """An old database, sealed, with ``left()`` in it, and the current one."""
        transport.publish(self.left())
        with transport.consumer(["busy"], lease=LEASE, prefetch=100, name="busy") as consumer:
            transport.publish(numbered("busy", 20))
            assert set(settle(consumer, consumer.receive(20, 5.0))) == {SettleOutcome.SETTLED}
            store = CatalogueStore(connect(server))
            for _ in range(3):
                consumer.receive(1, 0.0)
                server.advance(60.0)
            catalogue = store.load()
        assert catalogue is not None
        old, new = catalogue.generations
        assert (old.stage, new.stage) == (Stage.SEALED, Stage.OPEN)
        return old.name, new.name

    def left(self) -> list[Message]:
        """What nobody receives."""
        return [
            a_message("letters.dead", b"dead", id="dead"),
            a_message("calendar", b"in a year", id="year", due_in=365 * 86_400.0),
        ]

    def tidy_for_long(self, server: CouchDBCluster, transport: CouchDBTransport) -> None:
        with transport.consumer(["busy"], lease=LEASE, prefetch=1, name="busy") as consumer:
            for _ in range(8):
                consumer.receive(1, 0.0)
                server.advance(A_LONG_TIME)

    def alive_in(self, server: CouchDBCluster, database: str) -> list[str]:
        """The ids of the messages that are there."""
        found = server.leaves(database)
        return sorted(
            id_.rpartition(":")[2] for id_, leaves in found.items() if id_[0] != "~" and not leaves[0].deleted
        )

    def test_an_old_database_comes_to_its_end(
        self, server: CouchDBCluster, transport: CouchDBTransport, two: tuple[str, str]
    ) -> None:
        self.tidy_for_long(server, transport)

        assert [name for name in server.databases if "-messages" in name] == [two[1]]
        assert self.alive_in(server, two[1]) == ["dead", "year"]
        assert [seen.message.body for seen in transport.browse("calendar")] == [b"in a year"]
        assert [answer.outcome.value for answer in transport.publish(self.left())] == ["duplicate"] * 2
        with transport.consumer(["letters.dead"], lease=LEASE, prefetch=10, name="reader") as consumer:
            (delivery,) = consumer.receive(10, 5.0)
            assert (delivery.message.body, delivery.attempt) == (b"dead", 1)
            assert consumer.settle([Ending(delivery)]) == [SETTLED]
        assert transport.publish([a_message("letters.dead", id="dead")]) == [STORED]

    def test_what_is_held_stays_where_it_is(
        self, server: CouchDBCluster, transport: CouchDBTransport, two: tuple[str, str], connect: Connect
    ) -> None:
        with transport.consumer(["letters.dead"], lease=LEASE, prefetch=10, name="reader") as consumer:
            (delivery,) = consumer.receive(10, 5.0)

            Mover(connect(server), two[0]).step(two[1])

            assert self.alive_in(server, two[0]) == ["dead"]
            assert self.alive_in(server, two[1]) == ["year"]
            assert consumer.settle([Ending(delivery)]) == [SETTLED]

    def test_what_is_marked_is_received_nowhere_else(
        self, server: CouchDBCluster, transport: CouchDBTransport, two: tuple[str, str], connect: Connect
    ) -> None:
        """Who moved it died after the mark."""
        server.fail("POST", f"{two[1]}/_bulk_docs", 503)
        with pytest.raises(BrokerUnavailable):
            Mover(connect(server), two[0]).step(two[1])

        with transport.consumer(["letters.dead"], lease=LEASE, prefetch=10, name="reader") as consumer:
            assert bodies(consumer.receive(10, 0.1)) == []
            Mover(connect(server), two[0]).step(two[1])
            assert bodies(consumer.receive(10, 5.0)) == [b"dead"]

    def test_a_move_that_is_repeated_after_the_copy_was_settled_does_not_bring_it_back(
        self, server: CouchDBCluster, transport: CouchDBTransport, two: tuple[str, str], connect: Connect
    ) -> None:
        """Who moved it died after the copy; the copy is settled before another one goes on."""
        sleeper = connect(server)
        server.fail("POST", f"{two[0]}/_bulk_docs", 503, skipping=1)
        with pytest.raises(BrokerUnavailable):
            Mover(sleeper, two[0]).step(two[1])
        with transport.consumer(["letters.dead"], lease=LEASE, prefetch=10, name="reader") as consumer:
            assert settle(consumer, consumer.receive(10, 5.0)) == [SettleOutcome.SETTLED]

            Mover(sleeper, two[0]).step(two[1])

            assert bodies(consumer.receive(10, 0.1)) == []
        assert self.alive_in(server, two[0]) == []
        assert self.alive_in(server, two[1]) == ["year"]

    def test_a_target_that_was_sealed_meanwhile_is_changed(
        self, server: CouchDBCluster, two: tuple[str, str], connect: Connect
    ) -> None:
        client = connect(server)
        server.fail("POST", f"{two[1]}/_bulk_docs", 503)
        with pytest.raises(BrokerUnavailable):
            Mover(client, two[0]).step(two[1])
        seal = client.ask("GET", f"/{two[0]}/_design/ekiden-sealed").body
        client.ask("PUT", f"/{two[1]}/_design/ekiden-sealed", {"validate_doc_update": seal["validate_doc_update"]})
        client.ensure_database("p-messages-third")

        for _ in range(2):
            Mover(client, two[0]).step("p-messages-third")

        assert self.alive_in(server, two[0]) == []
        assert self.alive_in(server, two[1]) == []
        assert self.alive_in(server, "third") == ["dead", "year"]


class TestMovingInACluster:
    def test_the_original_stays_while_too_few_copies_have_the_moved_one(
        self, cluster: CouchDBCluster, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is handed over as replication does is answered alike however few copies take it."""
        cluster.purges_permitted = False
        monkeypatch.setattr(generations, "LIMITS", Limits(known_after=0.0))
        client = connect(cluster)
        with open_transport(cluster.url("p")) as transport:
            transport.publish([a_message("queue", id="waiting", due_in=DAY)])
        (old,) = Generations(client).readable()
        client.ensure_database("p-messages-new")
        mover = Mover(client, old)
        cluster.after("POST", f"{old}/_bulk_docs", lambda: setattr(cluster, "down", {1, 2}))
        mover.step("p-messages-new")

        cluster.down = {0}
        cluster.read_from = 1
        assert not cluster.leaves("messages-new") or not any(
            leaf.deleted for leaves in cluster.leaves(old).values() for leaf in leaves if "message" in leaf.body
        )
        cluster.down = set()
        cluster.replicate()
        eventually(
            lambda: mover.step("p-messages-new") or all(leaf[0].deleted for leaf in alive_or_not(cluster, old)),
            what="it was moved",
        )
        moved = alive_or_not(cluster, "messages-new")
        assert [leaves[0].deleted for leaves in moved] == [False]

    def test_what_was_settled_and_has_risen_again_is_not_moved(
        self, cluster: CouchDBCluster, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cluster.purges_permitted = False
        monkeypatch.setattr(generations, "LIMITS", Limits(known_after=0.0))
        client = connect(cluster)
        with open_transport(cluster.url("p")) as transport, open_transport(cluster.url("p")) as other:
            transport.publish([a_message("queue", id="settled"), a_message("queue", id="waiting", due_in=DAY)])
            loser = other.consumer(["queue"], lease=LEASE, prefetch=10, name="loser")
            winner = transport.consumer(["queue"], lease=LEASE, prefetch=10, name="winner")
            cluster.divert("messages", {1, 2})
            held = winner.receive(10, 0.0)
            cluster.divert("messages", {0})
            assert loser.receive(10, 0.0) == []
            cluster.read_from = 1
            assert settle(winner, held) == [SettleOutcome.SETTLED]
            cluster.replicate()
            cluster.advance(A_LONG_TIME)
            (old,) = Generations(client).readable()
            client.ensure_database("p-messages-new")

            for _ in range(2):
                Mover(client, old).step("p-messages-new")

            moved = [id_ for id_ in cluster.leaves("messages-new") if not id_.startswith("~")]
            assert [id_.rpartition(":")[2] for id_ in moved] == ["waiting"]
            cluster.replicate()
            assert all(
                leaf.deleted for leaves in cluster.leaves(old).values() for leaf in leaves if "message" in leaf.body
            )


def alive_or_not(server: CouchDBCluster, database: str) -> list[list[Leaf]]:
    """The leaves of each message there."""
    return [leaves for id_, leaves in server.leaves(database).items() if not id_.startswith("~")]


DAY = 86_400.0
MESSAGES, BATCH = 20_000, 500

QUICK = Limits(
    rotate_after=4000,
    known_after=0.2,
    announced=0.6,
    drained_after=0.3,
    dropped_after=0.5,
    tidied_every=0.3,
    evidence=1.0,
)
MOST_DATABASES, MOST_UPDATES = 6, 60_000
"""Of the 100,000 updates that so many messages are; what is bounded for 20,000 messages is so for any number."""


@pytest.mark.slow
class TestTwentyThousandMessages:
    """They leave 40,000 tombstones if nothing is done: each of a message and of its note."""

    def go_through(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(generations, "LIMITS", QUICK)
        received: set[str] = set()
        with (
            open_transport(url) as transport,
            transport.consumer(["queue"], lease=LEASE, prefetch=BATCH, name="worker") as consumer,
        ):
            client = Client(parse_url(url), unavailable=BrokerUnavailable, refused=BrokerRefused)
            try:
                for _ in range(MESSAGES // BATCH):
                    assert transport.publish(numbered("queue", BATCH)) == [STORED] * BATCH
                    settled = 0
                    while settled < BATCH:
                        deliveries = consumer.receive(BATCH, 10.0)
                        assert deliveries
                        assert set(settle(consumer, deliveries)) == {SettleOutcome.SETTLED}
                        settled += len(deliveries)
                        received.update(ids(deliveries))
                    sizes = self.sizes(client)
                    assert len(sizes) <= MOST_DATABASES
                    assert sum(sizes) <= MOST_UPDATES, sizes
                assert len(received) == MESSAGES
                eventually(
                    lambda: consumer.receive(1, 0.1) or sum(self.sizes(client)) <= 5 * QUICK.rotate_after,
                    what="what is old is gone",
                    within=LONG_PATIENCE,
                )
                assert consumer.receive(1, 0.0) == []
            finally:
                client.close()

    def sizes(self, client: Client) -> list[int]:
        """What each database of messages has to keep: living and deleted documents, or all updates."""
        sizes: list[int] = []
        for name in existing_generations(client) or ():
            info = client.ask("GET", f"/{name}", accept={404}).body
            if "doc_del_count" in info:
                sizes.append(info["doc_count"] + info["doc_del_count"])
            else:
                sizes.append(int(str(info.get("update_seq", 0)).partition("-")[0]))
        return sizes

    def test_leave_a_bounded_database(self, couchdb_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_through(couchdb_place, monkeypatch)

    def test_leave_an_empty_database_where_it_is_purged(
        self, server: CouchDBCluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.go_through(server.url("p"), monkeypatch)

        with (
            open_transport(server.url("p")) as transport,
            transport.consumer(["queue"], lease=LEASE, prefetch=1, name="worker") as consumer,
        ):
            eventually(
                lambda: consumer.receive(1, 0.1) or len(server.leaves("messages")) <= 10,
                what="all is purged",
                within=LONG_PATIENCE,
            )
        assert len([name for name in server.databases if "-messages" in name]) == 1
