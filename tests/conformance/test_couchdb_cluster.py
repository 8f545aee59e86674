"""A cluster of CouchDB answers what a single server never does: accepted by too few, won by nobody, risen again."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportError
from ekiden.message import DUPLICATE, LOST, SETTLED, STORED, Delivery, Ending, Published, PublishOutcome, SettleOutcome
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import a_message, bodies, eventually, ids, numbered, settle
from ekiden.transport import Consumer, Transport
from ekiden.urls import parse_url
from ekiden_couchdb.client import Client
from ekiden_couchdb.consumer import CouchDBConsumer
from ekiden_couchdb.holding import Holdings

from tests.servers.couchdb_cluster import NOT_HEARD_OF, CouchDBCluster, playing
from tests.servers.couchdb_copies import Leaf
from tests.servers.couchdb_http import ADMIN

LEASE = 60.0
AFTER_THE_LEASE = LEASE + 10.0
MESSAGES = "messages"
"""What the names of the databases of messages contain."""
WRITES = "messages.*/_bulk_docs"


@pytest.fixture
def cluster() -> Iterator[CouchDBCluster]:
    with playing() as cluster:
        yield cluster


Opened = Callable[[str], Consumer]
Connect = Callable[[], Client]


@pytest.fixture
def connect(cluster: CouchDBCluster) -> Iterator[Connect]:
    """Opens clients, for a test to write what it wants, and closes them in the end."""
    clients: list[Client] = []

    def open_client() -> Client:
        clients.append(Client(parse_url(cluster.url("p")), unavailable=BrokerUnavailable, refused=BrokerRefused))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close()


@pytest.fixture
def opened(cluster: CouchDBCluster) -> Iterator[Opened]:
    """Opens a consumer of ``queue``, each as a process of its own, and closes all in the end."""
    transports: list[Transport] = []

    def open_consumer(name: str) -> Consumer:
        transports.append(open_transport(cluster.url("p")))
        return transports[-1].consumer(["queue"], lease=LEASE, prefetch=100, name=name)

    yield open_consumer
    for transport in transports:
        transport.close()


@pytest.fixture
def transport(cluster: CouchDBCluster) -> Iterator[Transport]:
    with open_transport(cluster.url("p")) as transport:
        yield transport


@pytest.fixture
def one(opened: Opened) -> Consumer:
    return opened("one")


@pytest.fixture
def two(opened: Opened) -> Consumer:
    return opened("two")


def received(consumer: Consumer, limit: int = 100) -> list[Delivery]:
    """What is there now. The first look may only tell what time it is by now."""
    return consumer.receive(limit, 0.0) or consumer.receive(limit, 0.0)


def messages(cluster: CouchDBCluster) -> dict[str, list[Leaf]]:
    """The leaves of every message, by its id, the visible one first."""
    found = cluster.leaves(MESSAGES)
    return {id_.rpartition(":")[2]: leaves for id_, leaves in found.items() if not id_.startswith("~")}


def race(cluster: CouchDBCluster, winner: Consumer, loser: Consumer) -> list[Delivery]:
    """``winner`` claims everything by two of three copies, while ``loser`` reads from the third and claims there."""
    cluster.read_from = 0
    cluster.divert(MESSAGES, {1, 2})
    won = received(winner)
    cluster.divert(MESSAGES, {0})
    assert received(loser) == []
    cluster.read_from = 1
    return won


class TestClaims:
    def test_what_nobody_has_won_is_not_run_and_comes_back_after_the_lease(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, two: Consumer
    ) -> None:
        transport.publish([a_message("queue", b"x")])
        cluster.divert(MESSAGES, {1})
        assert received(one) == []
        cluster.divert(MESSAGES, {0})
        assert received(two) == []
        cluster.replicate()
        (leaves,) = messages(cluster).values()
        assert len(leaves) == 2

        assert received(one) + received(two) == []
        cluster.advance(AFTER_THE_LEASE)
        (delivery,) = received(one) + received(two)

        assert delivery.message.body == b"x"
        assert delivery.attempt == 2
        assert received(one) + received(two) == []

    def test_of_two_claims_the_one_with_the_quorum_holds(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, two: Consumer
    ) -> None:
        transport.publish(numbered("queue", 20))

        held = race(cluster, winner=one, loser=two)

        assert len(held) == 20
        cluster.replicate()
        visible = [leaves[0] for leaves in messages(cluster).values()]
        assert len({leaf.body["owner"] for leaf in visible}) == 2  # some show the loser's claim
        assert received(two) == []

    @pytest.mark.parametrize("meet_before", [True, False], ids=["they-meet-before", "they-meet-after"])
    def test_a_settled_message_that_rises_again_is_not_run(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, two: Consumer, *, meet_before: bool
    ) -> None:
        transport.publish(numbered("queue", 20))
        held = race(cluster, winner=one, loser=two)
        if meet_before:
            cluster.replicate()

        assert set(settle(one, held)) == {SettleOutcome.SETTLED}

        cluster.replicate()
        cluster.advance(AFTER_THE_LEASE)
        assert received(two) + received(one) == []
        cluster.replicate()
        assert all(leaf.deleted for leaves in messages(cluster).values() for leaf in leaves)

    def test_settling_deletes_all_leaves_that_are_known(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, two: Consumer
    ) -> None:
        transport.publish(numbered("queue", 20))
        held = race(cluster, winner=one, loser=two)
        cluster.replicate()

        assert set(settle(one, held)) == {SettleOutcome.SETTLED}

        cluster.replicate()
        assert all(len(leaves) == 2 for leaves in messages(cluster).values())
        assert all(leaf.deleted for leaves in messages(cluster).values() for leaf in leaves)

    def test_what_its_holder_did_not_settle_comes_back_although_others_had_wanted_it(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, two: Consumer
    ) -> None:
        transport.publish(numbered("queue", 20))
        race(cluster, winner=one, loser=two)
        cluster.replicate()

        cluster.advance(AFTER_THE_LEASE)

        assert len(received(two)) == 20

    def test_a_holder_whose_claim_is_hidden_by_a_losers_extends_and_releases(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, two: Consumer
    ) -> None:
        transport.publish(numbered("queue", 20))
        held = race(cluster, winner=one, loser=two)
        cluster.replicate()

        assert one.extend(held) == [SETTLED] * 20
        cluster.advance(0.9 * LEASE)
        assert received(one) == []
        assert one.extend(held) == [SETTLED] * 20
        cluster.advance(0.9 * LEASE)
        assert received(two) == []
        assert set(settle(one, held)) == {SettleOutcome.SETTLED}

        cluster.advance(AFTER_THE_LEASE)
        assert received(two) == []

    def test_a_late_holder_is_told_that_it_has_lost(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, two: Consumer
    ) -> None:
        transport.publish([a_message("queue")])
        held = received(one)
        cluster.advance(AFTER_THE_LEASE)
        taken = received(two)

        assert one.settle([Ending(each) for each in held]) == [LOST]
        assert settle(two, taken) == [SettleOutcome.SETTLED]

    def test_a_lost_claim_that_shows_after_settling_is_soon_gone(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, two: Consumer
    ) -> None:
        """Until its lease ends a settled message would look as if somebody had it."""
        transport.publish(numbered("queue", 20))
        held = race(cluster, winner=one, loser=two)
        assert set(settle(one, held)) == {SettleOutcome.SETTLED}
        cluster.replicate()
        assert any(leaves[0].deleted is False for leaves in messages(cluster).values())

        def is_gone() -> bool:
            assert two.receive(100, 0.05) == []
            cluster.replicate()
            return transport.depth("queue").leased == 0

        eventually(is_gone, what="nothing looks leased any more", within=20.0)
        assert all(leaf.deleted for leaves in messages(cluster).values() for leaf in leaves)

    def test_evidence_that_the_first_copy_lacks_is_found(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, two: Consumer
    ) -> None:
        """Of two copies that agree on what is visible, the second to answer knows that it was settled."""
        transport.publish(numbered("queue", 20))
        held = race(cluster, winner=one, loser=two)
        assert set(settle(one, held)) == {SettleOutcome.SETTLED}
        cluster.replicate(MESSAGES, source=0, target=1)
        cluster.read_from = 0
        cluster.advance(AFTER_THE_LEASE)

        assert received(two) + received(one) == []

    def test_an_extension_by_too_few_is_no_extension(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer
    ) -> None:
        transport.publish([a_message("queue")])
        held = received(one)
        cluster.divert(MESSAGES, {0})

        (answer,) = one.extend(held)

        assert answer.outcome is SettleOutcome.FAILED
        assert isinstance(answer.error, BrokerUnavailable)
        cluster.replicate()
        assert one.extend(held) == [SETTLED]


class TestSlots:
    """A consumer writes down what it may hold; that of a killed one goes."""

    def slots(self, cluster: CouchDBCluster) -> list[str]:
        found = cluster.leaves(MESSAGES)
        return [id_ for id_, leaves in found.items() if id_.startswith("~~") and not leaves[0].deleted]

    @pytest.fixture
    def killed(self, cluster: CouchDBCluster, transport: Transport) -> None:
        """Three consumers claimed two messages each, and were killed: nothing is given back."""
        for number in range(3):
            transport.publish(numbered("queue", 2))
            with open_transport(cluster.url("p")) as killed:
                consumer = killed.consumer(["queue"], lease=LEASE, prefetch=10, name=f"killed {number}")
                assert isinstance(consumer, CouchDBConsumer)
                assert len(received(consumer)) == 2
                consumer._holdings = Holdings()
                consumer._claimer._slots.clear()

    @pytest.mark.usefixtures("killed")
    def test_those_of_killed_consumers_go_once_others_have_what_they_held(
        self, cluster: CouchDBCluster, transport: Transport, opened: Opened
    ) -> None:
        assert len(self.slots(cluster)) == 3
        cluster.advance(AFTER_THE_LEASE)
        survivor = opened("survivor")
        assert set(settle(survivor, received(survivor))) == {SettleOutcome.SETTLED}
        assert len(self.slots(cluster)) == 4
        cluster.advance(1200.0)

        assert received(opened("another")) == []

        assert self.slots(cluster) == []

    @pytest.mark.usefixtures("killed")
    def test_those_whose_messages_nobody_has_received_since_stay(
        self, cluster: CouchDBCluster, transport: Transport, opened: Opened
    ) -> None:
        cluster.advance(1200.0)
        with transport.consumer(["another"], lease=LEASE, prefetch=10, name="of another queue") as consumer:
            assert received(consumer) == []

        assert len(self.slots(cluster)) == 3
        assert len(received(opened("killed 1"))) == 6

    def test_a_consumer_whose_slot_was_deleted_writes_it_again_at_once(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, connect: Connect
    ) -> None:
        transport.publish(numbered("queue", 1))
        assert set(settle(one, received(one))) == {SettleOutcome.SETTLED}
        cluster.advance(1200.0)
        client = connect()
        (database,) = [name for name in cluster.databases if MESSAGES in name]
        (slot,) = self.slots(cluster)
        rev = client.ask("GET", f"/{database}/{slot}").body["_rev"]
        client.bulk(database, [{"_id": slot, "_rev": rev, "_deleted": True}])
        transport.publish(numbered("queue", 2))

        held = received(one)

        assert len(held) == 2
        body = client.ask("GET", f"/{database}/{slot}").body
        assert len(body["held"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_no_settled_message_is_ever_run_again(
    cluster: CouchDBCluster, transport: Transport, opened: Opened, seed: int
) -> None:
    """Three processes race by copies that differ, in any order, and the copies meet now and then."""
    chance = random.Random(seed)
    consumers = [opened(name) for name in ("one", "two", "three")]
    runs: Counter[str] = Counter()
    settled: set[str] = set()
    batch = numbered("queue", 60)
    transport.publish(batch)
    for _ in range(150):
        cluster.read_from = chance.randrange(3)
        reaches = chance.choice([{0}, {1}, {2}, {0, 1}, {1, 2}, {0, 2}, {0, 1, 2}])
        cluster.divert(MESSAGES, reaches)
        consumer = chance.choice(consumers)
        deliveries = received(consumer, chance.randrange(1, 6))
        runs.update(ids(deliveries))
        assert settled.isdisjoint(ids(deliveries))
        if chance.random() < 0.3:
            cluster.replicate()
        answers = settle(consumer, deliveries)
        settled.update(
            id_ for id_, answer in zip(ids(deliveries), answers, strict=True) if answer is SettleOutcome.SETTLED
        )
        if chance.random() < 0.1:
            cluster.replicate()
            cluster.advance(AFTER_THE_LEASE)

    for _ in range(5):
        cluster.replicate()
        cluster.advance(AFTER_THE_LEASE)
        for consumer in consumers:
            deliveries = received(consumer)
            runs.update(ids(deliveries))
            assert settled.isdisjoint(ids(deliveries))
            settled.update(ids(deliveries))
            assert set(settle(consumer, deliveries)) <= {SettleOutcome.SETTLED}
    assert settled == {message.id for message in batch}
    assert set(runs) == settled
    cluster.replicate()
    assert all(leaf.deleted for leaves in messages(cluster).values() for leaf in leaves)


class TestPublishing:
    def test_what_too_few_have_accepted_is_told_as_not_stored(
        self, cluster: CouchDBCluster, transport: Transport
    ) -> None:
        transport.publish([a_message("other")])
        cluster.down = {1, 2}

        (answer,) = transport.publish([a_message("queue")])

        assert answer.outcome is PublishOutcome.FAILED
        assert isinstance(answer.error, BrokerUnavailable)
        assert "too few nodes" in str(answer.error)

    def test_nor_is_it_a_duplicate_when_it_is_published_again(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer
    ) -> None:
        transport.publish([a_message("other")])
        batch = numbered("queue", 5)
        cluster.down = {1, 2}

        for _ in range(3):
            answers = transport.publish(batch)
            assert {answer.outcome for answer in answers} == {PublishOutcome.FAILED}
            assert {type(answer.error) for answer in answers} == {BrokerUnavailable}

        cluster.down = set()
        assert transport.publish(batch) == [STORED] * 5 or transport.publish(batch) == [DUPLICATE] * 5
        assert transport.publish(batch) == [DUPLICATE] * 5
        assert sorted(bodies(received(one))) == sorted(message.body for message in batch)

    def test_a_document_that_one_copy_has_is_no_duplicate(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer
    ) -> None:
        """Its note was stored by all of them; then two went away."""
        transport.publish([a_message("other")])
        message = a_message("queue", b"x")
        cluster.divert(MESSAGES, {0, 1, 2})
        cluster.divert(MESSAGES, {0})
        assert transport.publish([message]) == [STORED]  # a second write has made sure of it
        again = a_message("queue", b"y")
        cluster.divert(MESSAGES, {0, 1, 2})
        cluster.after("POST", WRITES, lambda: setattr(cluster, "down", {1, 2}))

        assert [answer.outcome for answer in transport.publish([again])] == [PublishOutcome.FAILED]
        assert [answer.outcome for answer in transport.publish([again])] == [PublishOutcome.FAILED]

        cluster.down = set()
        assert transport.publish([message, again]) == [DUPLICATE, DUPLICATE]
        cluster.down, cluster.read_from = {0}, 1
        assert sorted(bodies(received(one))) == [b"x", b"y"]

    def test_a_holder_keeps_what_is_published_again_meanwhile(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer
    ) -> None:
        message = a_message("queue")
        transport.publish([message])
        held = received(one)

        assert transport.publish([message]) == [DUPLICATE]

        assert one.extend(held) == [SETTLED]
        assert settle(one, held) == [SettleOutcome.SETTLED]
        assert received(one) == []

    def test_an_ending_whose_messages_too_few_have_is_not_settled_when_it_is_repeated(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer
    ) -> None:
        transport.publish([a_message("queue"), a_message("next")])
        held = received(one)
        ending = Ending(held[0], (a_message("next", b"follows"),))
        cluster.down = {1, 2}

        for _ in range(2):
            (answer,) = one.settle([ending])
            assert answer.outcome is SettleOutcome.FAILED
            assert isinstance(answer.error, BrokerUnavailable)

        cluster.down = set()
        assert one.settle([ending]) == [SETTLED]
        assert transport.depth("next").ready == 2

    @pytest.mark.parametrize("reaches", [{0}, {1}, {2}])
    def test_one_id_at_two_nodes_at_once_is_one_message(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, reaches: set[int]
    ) -> None:
        """One copy takes the first one's notes, and the others the second one's, who is the quicker."""
        transport.publish([a_message("other")])
        batch = [a_message("queue", b"%d" % number) for number in range(10)]
        quicker: list[Published] = []
        with open_transport(cluster.url("p")) as other:
            other.publish([a_message("another")])
            cluster.divert(MESSAGES, reaches)
            cluster.after("POST", WRITES, lambda: quicker.extend(other.publish(batch)))

            answers = transport.publish(batch)

        assert quicker == [STORED] * 10
        assert answers == [DUPLICATE] * 10
        cluster.replicate()
        assert sorted(bodies(received(one))) == sorted(message.body for message in batch)
        assert received(one) == []

    def test_a_note_of_one_who_died_at_another_node_makes_no_second_message(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, connect: Connect
    ) -> None:
        """Too few had taken the note, and it shows now beside that of the message that is there."""
        transport.publish([a_message("other")])
        batch = numbered("queue", 10)
        notes = [f"~queue:{message.id}" for message in batch]
        client = connect()
        (database,) = [name for name in cluster.databases if MESSAGES in name]
        cluster.divert(MESSAGES, {0})
        client.bulk(database, [{"_id": note, "at": f"queue:r:5:{0:016d}:{note[7:]}"} for note in notes])
        cluster.read_from = 1
        cluster.divert(MESSAGES, {1, 2})
        cluster.divert(MESSAGES, {1, 2})
        assert transport.publish(batch) == [STORED] * 10
        cluster.replicate()

        assert transport.publish(batch) == [DUPLICATE] * 10

        assert len(received(one)) == 10
        assert received(one) == []

    def test_it_is_safe_when_it_is_published_again_and_told_as_stored(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer
    ) -> None:
        """The only copy that had accepted it the first time is lost for ever."""
        transport.publish([a_message("other")])
        message = a_message("queue", b"x")
        cluster.down = {1, 2}
        transport.publish([message])
        cluster.down = set()

        assert transport.publish([message]) in ([STORED], [DUPLICATE])

        cluster.down = {0}
        cluster.read_from = 1
        assert bodies(received(one)) == [b"x"]

    def test_one_node_away_is_nobodys_trouble(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer
    ) -> None:
        cluster.down = {0}

        assert transport.publish(numbered("queue", 5)) == [STORED] * 5
        assert set(settle(one, received(one))) == {SettleOutcome.SETTLED}

        cluster.down = set()
        cluster.replicate()
        cluster.advance(AFTER_THE_LEASE)
        assert received(one) == []


class TestAnswers:
    """What is not 2xx: whether it may work later, in one sentence, and what becomes of the message."""

    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
    def test_trouble_may_be_over_later(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, status: int
    ) -> None:
        transport.publish([a_message("queue", b"first")])
        cluster.fail("POST", WRITES, status)
        message = a_message("queue", b"second")

        error = told(lambda: transport.publish([message]))

        assert isinstance(error, BrokerUnavailable)
        assert transport.publish([message]) == [STORED]
        cluster.fail("POST", WRITES, status)
        assert isinstance(told(lambda: received(one)), BrokerUnavailable)
        assert sorted(bodies(received(one))) == [b"first", b"second"]

    @pytest.mark.parametrize("carried_out", [False, True], ids=["not carried out", "carried out"])
    def test_a_database_that_a_node_has_not_heard_of_takes_the_first_messages(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, carried_out: bool
    ) -> None:
        del one  # its database is there
        for part in ("generations", "messages", "signals", "events"):
            cluster.fail("POST", f"p-{part}.*/_bulk_docs", 500, body=NOT_HEARD_OF, times=2, carried_out=carried_out)

        assert transport.publish(numbered("queue", 5)) == [STORED] * 5
        with transport.listen("topic") as listener:
            transport.broadcast("topic", [b"heard"])
            assert listener.receive(5.0) == [b"heard"]
        assert transport.depth("queue").ready == 5

    @pytest.mark.parametrize("status", [429, 503])
    def test_a_settle_that_meets_trouble_can_be_repeated(
        self, cluster: CouchDBCluster, transport: Transport, one: Consumer, status: int
    ) -> None:
        transport.publish([a_message("queue")])
        held = received(one)
        cluster.fail("POST", WRITES, status, times=10)

        (answer,) = one.settle([Ending(each) for each in held])

        assert answer.outcome is SettleOutcome.FAILED
        assert isinstance(answer.error, BrokerUnavailable)
        cluster.serve_again()
        assert settle(one, held) == [SettleOutcome.SETTLED]

    def test_too_large_a_message_is_refused_and_its_neighbours_are_stored(
        self, cluster: CouchDBCluster, transport: Transport
    ) -> None:
        transport.publish([a_message("queue")])
        said = {"error": "document_too_large", "reason": "queue:r:5"}
        cluster.fail("POST", WRITES, 413, body=said, skipping=1)  # the documents, after their notes
        cluster.fail("POST", WRITES, 413, body=said, skipping=1)

        answers = transport.publish(numbered("queue", 3))

        assert [answer.outcome for answer in answers].count(PublishOutcome.FAILED) == 1
        (failed,) = [answer for answer in answers if answer.outcome is PublishOutcome.FAILED]
        assert isinstance(failed.error, BrokerRefused)
        assert "max_document_size" in str(failed.error)
        assert transport.depth("queue").ready == 3

    def test_who_may_not_is_told_so(self, cluster: CouchDBCluster) -> None:
        cluster.users = {"root": ("secret", [ADMIN]), "shop": ("other-secret", [])}
        with open_transport(cluster.url("p", user="root")) as transport:
            assert transport.publish([a_message("queue")]) == [STORED]

        for user, words in (("shop", "does not permit user 'shop'"), (None, "wants to know who asks")):
            with open_transport(cluster.url("p", user=user)) as transport:
                error = told(lambda: transport.publish([a_message("queue")]))
            assert isinstance(error, BrokerRefused)
            assert words in str(error)
            assert "secret" not in str(error)

    def test_a_wrong_password_is_told(self, cluster: CouchDBCluster) -> None:
        cluster.users = {"root": ("secret", [ADMIN])}
        url = cluster.url("p", user="root").replace("secret", "wrong")
        with open_transport(url) as transport:
            error = told(lambda: transport.publish([a_message("queue")]))

        assert isinstance(error, BrokerRefused)
        assert "refused the user name or the password" in str(error)

    def test_rights_that_are_taken_away_lose_nothing(self, cluster: CouchDBCluster) -> None:
        cluster.users = {"root": ("secret", [ADMIN])}
        with (
            open_transport(cluster.url("p", user="root")) as transport,
            transport.consumer(["queue"], lease=LEASE, prefetch=10, name="one") as consumer,
        ):
            transport.publish([a_message("queue", b"x")])
            held = received(consumer)
            cluster.users["root"] = ("secret", [])

            assert settle(consumer, held) == [SettleOutcome.FAILED]

            cluster.users["root"] = ("secret", [ADMIN])
            assert settle(consumer, held) == [SettleOutcome.SETTLED]


def told(publish: Callable[[], list[Published] | list[Delivery]]) -> Exception | None:
    """What is raised, or stands in the only answer."""
    try:
        answers = publish()
    except TransportError as error:
        return error
    (answer,) = answers
    return answer.error if isinstance(answer, Published) else None
