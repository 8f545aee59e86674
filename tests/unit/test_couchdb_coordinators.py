"""Which node of a cluster is asked: the same by all clients, as far as they can agree."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable
from ekiden.message import STORED
from ekiden.plugins import open_backend, open_transport
from ekiden.testing.conformance.fixtures import a_message
from ekiden.transport import Transport
from ekiden.urls import parse_url
from ekiden_couchdb import connections, coordinators
from ekiden_couchdb.client import Client
from ekiden_couchdb.coordinators import Coordinators, Order, agreed

from tests.servers.couchdb_cluster import CouchDBCluster, playing
from tests.servers.processes import HOST
from tests.working import eventually

pytestmark = pytest.mark.slow  # each asks a server that takes its time

LATER, A_LONG_TIME = 10.0, 1200.0


@pytest.fixture(autouse=True)
def looking_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(coordinators, "_LOOK_AFTER_SECONDS", ())
    monkeypatch.setattr(coordinators, "_LOOK_EVERY_SECONDS", 0.0)


@pytest.fixture
def cluster() -> Iterator[CouchDBCluster]:
    with playing() as cluster:
        yield cluster


Opened = Callable[..., Client]


@pytest.fixture
def opened(cluster: CouchDBCluster) -> Iterator[Opened]:
    """Opens clients of the cluster ``through`` some nodes, and closes them in the end."""
    clients: list[Client] = []

    def open_client(*through: int, options: str = "") -> Client:
        url = parse_url(cluster.url("p", through=through, options=options))
        clients.append(Client(url, unavailable=BrokerUnavailable, refused=BrokerRefused))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close()


def asked(cluster: CouchDBCluster, act: Callable[[], object]) -> set[int]:
    """The nodes that are asked meanwhile, but for those of which it is asked whether they are there."""
    cluster.requests.clear()
    cluster.asked.clear()
    act()
    return {node for node, (_, path, _) in zip(cluster.asked, cluster.requests, strict=True) if path != "/_up"}


def work(client: Client) -> Callable[[], None]:
    """Several requests, one after another."""

    def ask() -> None:
        for _ in range(5):
            client.ask("GET", "/_membership")

    return ask


class TestTheFirstThatAnswers:
    def test_it_is_the_first_of_the_url(self, cluster: CouchDBCluster, opened: Opened) -> None:
        assert asked(cluster, work(opened(2, 0, 1))) == {2}
        assert asked(cluster, work(opened(1, 2))) == {1}

    def test_a_transport_and_a_backend_ask_no_other(self, cluster: CouchDBCluster) -> None:
        url = cluster.url("p", through=(1, 0, 2))

        def use_them() -> None:
            with open_transport(url) as transport, open_backend(url) as backend:
                assert transport.publish([a_message("queue")]) == [STORED]
                with transport.consumer(["queue"], lease=60.0, prefetch=1, name="one") as consumer:
                    assert len(consumer.receive(1, 5.0)) == 1
                with transport.listen("topic") as listener:
                    transport.broadcast("topic", [b"x"])
                    assert listener.receive(5.0) == [b"x"]
                assert backend.write("key", b"x") == 1

        assert asked(cluster, use_them) == {1}

    def test_the_next_takes_its_place_while_it_is_away(self, cluster: CouchDBCluster, opened: Opened) -> None:
        client = opened(1, 2, 0)
        assert asked(cluster, work(client)) == {1}

        cluster.stop(1)

        assert asked(cluster, work(client)) == {2}
        cluster.stop(2)
        assert asked(cluster, work(client)) == {0}
        cluster.start_again(1)
        eventually(lambda: asked(cluster, work(client)) == {1}, what="the first is asked again")
        cluster.start_again(2)
        assert asked(cluster, work(client)) == {1}
        eventually(lambda: not threads(), what="nobody looks any more")

    def test_a_client_that_has_never_seen_the_first_asks_it_when_it_comes(
        self, cluster: CouchDBCluster, opened: Opened
    ) -> None:
        cluster.stop(1)
        client = opened(1, 0)
        assert asked(cluster, work(client)) == {0}

        cluster.start_again(1)

        eventually(lambda: asked(cluster, work(client)) == {1}, what="the first is asked")

    def test_one_that_is_silent_is_left_after_one_call(self, cluster: CouchDBCluster) -> None:
        with socket.create_server((HOST, 0)) as silent:
            address = f"{HOST}:{silent.getsockname()[1]}"
            url = cluster.url("p", options="?timeout=1").replace("couchdb://", f"couchdb://{address},")
            client = Client(parse_url(url), unavailable=BrokerUnavailable, refused=BrokerRefused)
            with pytest.raises(BrokerUnavailable):
                client.ask("GET", "/")

            assert asked(cluster, work(client)) == {0}
            client.close()

    def test_one_that_rests_is_asked_by_nobody_anew(self, cluster: CouchDBCluster, opened: Opened) -> None:
        """In maintenance a node answers, and says that it does not want to be asked."""
        client = opened(1, 0)
        cluster.stop(1)
        assert asked(cluster, work(client)) == {0}
        cluster.fail("GET", "/_up", 404, body={"status": "maintenance_mode"}, times=3)
        cluster.start_again(1)
        eventually(lambda: cluster.requests.count(("GET", "/_up", 404)) == 2, what="it was looked at")
        assert asked(cluster, work(client)) == {0}

        eventually(lambda: asked(cluster, work(client)) == {1}, what="the first is asked again")

    def test_a_connection_that_was_closed_while_it_was_idle_is_no_change(
        self, cluster: CouchDBCluster, opened: Opened
    ) -> None:
        client = opened(1, 0)
        work(client)()
        cluster.stop(1)
        cluster.start_again(1)

        assert asked(cluster, work(client)) == {1}
        assert threads() == []

    def test_a_call_in_a_hurry_is_no_change(self, cluster: CouchDBCluster, opened: Opened) -> None:
        client = opened(1, 0)
        work(client)()
        slow = threading.Event()
        cluster.after("GET", "/_membership", slow.wait)
        with client.one_deadline(by=time.monotonic() + 0.3), pytest.raises(BrokerUnavailable):
            client.ask("GET", "/_membership")
        slow.set()

        assert asked(cluster, work(client)) == {1}

    def test_closing_ends_the_look_for_those_that_are_away(self, cluster: CouchDBCluster, opened: Opened) -> None:
        cluster.stop(1)
        client = opened(1, 0)
        work(client)()
        assert len(threads()) == 1

        client.close()

        assert threads() == []


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ekiden-couchdb-hosts"]


def an_order(*hosts: str, since: int = 0) -> Order:
    return Order(hosts, since, 10**13)


class TestAgreeing:
    @pytest.mark.parametrize(
        ("own", "others", "expected"),
        [
            ("ab", [], "ab"),
            ("ab", [an_order("a", "b", since=1)], "ab"),
            ("ba", [an_order("a", "b", since=1), an_order("b", "a", since=2)], "ab"),
            ("ba", [an_order("a", "b", since=2), an_order("b", "a", since=1)], "ba"),
            ("ba", [an_order("a", "b", since=1), an_order("b", "a", since=1)], "ab"),
            ("ab", [an_order("b", since=1), an_order("b", "a", "c", since=1)], "ab"),
        ],
    )
    def test_the_order_counts_that_is_there_longest(
        self, own: Sequence[str], others: Sequence[Order], expected: str
    ) -> None:
        assert "".join(agreed(own, others)) == expected

    def test_clients_with_the_same_nodes_in_another_order_ask_the_same(
        self, cluster: CouchDBCluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        first, second = cluster.url("p", through=(2, 0, 1)), cluster.url("p", through=(0, 1, 2))
        with open_transport(first) as one, open_transport(second) as two, caplog.at_level(logging.WARNING):
            publish(one)
            cluster.advance(LATER)
            publish(two)

            assert asked(cluster, lambda: (publish(one), publish(two))) == {2}
        said = [record.getMessage() for record in caplog.records if "in different orders" in record.getMessage()]
        assert len(said) == len(set(said)) > 0
        assert f"all ask {cluster.address(2)} first" in said[0]

    def test_backends_agree_as_transports_do(self, cluster: CouchDBCluster) -> None:
        first, second = cluster.url("p", through=(2, 0)), cluster.url("p", through=(0, 2))
        with open_backend(first) as one, open_backend(second) as two:
            one.write("a", b"1")
            cluster.advance(LATER)
            two.write("b", b"1")

            assert asked(cluster, lambda: (one.write("a", b"2"), two.write("b", b"2"))) == {2}

    def test_what_was_agreed_on_holds_when_the_first_is_away(self, cluster: CouchDBCluster) -> None:
        first, second = cluster.url("p", through=(2, 0, 1)), cluster.url("p", through=(1, 0, 2))
        with open_transport(first) as one, open_transport(second) as two:
            publish(one)
            cluster.advance(LATER)
            publish(two)
            cluster.stop(2)
            for transport in (one, two):
                with suppress(BrokerUnavailable):
                    transport.publish([a_message("queue")])

            assert asked(cluster, lambda: (publish(one), publish(two))) == {0}

    def test_an_order_that_nobody_has_any_more_does_not_count(self, cluster: CouchDBCluster) -> None:
        with open_transport(cluster.url("p", through=(2, 0))) as gone:
            publish(gone)
        cluster.advance(A_LONG_TIME)

        with open_transport(cluster.url("p", through=(0, 2))) as later:
            publish(later)
            assert asked(cluster, lambda: publish(later)) == {0}

    def test_a_node_that_others_do_not_name_is_told_of(
        self, cluster: CouchDBCluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        url = cluster.url("p", through=(0,))
        with (
            open_transport(cluster.url("p", through=(2, 1))) as one,
            open_transport(url) as two,
            open_backend(url) as backend,
            caplog.at_level(logging.WARNING),
        ):
            publish(one)
            publish(two)
            publish(one)
            with open_backend(cluster.url("p", through=(2, 1))) as other:
                other.write("a", b"1")
            advised = [*two.warnings(["queue"]), *backend.warnings()]

        words = f"some clients ask the node {cluster.address(2)} first, and others {cluster.address(0)}"
        assert [record.getMessage() for record in caplog.records if words in record.getMessage()]
        mirrored = f"some clients ask the node {cluster.address(0)} first, and others {cluster.address(2)}"
        assert len([text for text in advised if mirrored in text]) == 2

    def test_one_node_says_nothing_of_all_that(self, caplog: pytest.LogCaptureFixture) -> None:
        with playing(copies=1) as single, open_transport(single.url("p")) as transport:
            publish(transport)

            assert not [path for _, path, _ in single.requests if "order" in path]
            assert not single.leaves("signals") or all("order" not in id_ for id_ in single.leaves("signals"))
            (told,) = transport.warnings(["queue"])
        assert "everybody is an administrator" in told
        assert caplog.records == []

    @pytest.mark.parametrize(
        "garbage",
        [
            {"hosts": "a", "since": 1, "until": 2},
            {"hosts": [], "since": 1, "until": 10**13},
            {"hosts": ["a"], "since": 1, "until": 10**30},
            {"hosts": [1], "since": None},
            {},
        ],
    )
    def test_what_is_no_order_is_passed_over(
        self, cluster: CouchDBCluster, opened: Opened, garbage: dict[str, object]
    ) -> None:
        client = opened(1, 0)
        client.ensure_database("p-signals")
        client.bulk("p-signals", [{"_id": "order:0000", **garbage}])

        Coordinators(client, "signals").look()

        assert asked(cluster, work(client)) == {1}
        assert len(cluster.leaves("signals")) == 2

    def test_who_may_not_write_there_works_all_the_same(self, cluster: CouchDBCluster, opened: Opened) -> None:
        client = opened(1, 0)
        cluster.fail("PUT", "p-signals", 403, body={"error": "forbidden", "reason": "not allowed"}, times=5)

        Coordinators(client, "signals").look()

        assert asked(cluster, work(client)) == {1}


def publish(transport: Transport) -> None:
    assert transport.publish([a_message("queue")]) == [STORED]


class TestWhatTheDoctorSays:
    def test_an_address_that_leads_to_several_nodes(self, cluster: CouchDBCluster) -> None:
        with balancer(cluster) as address:
            url = f"couchdb://{address}/p"
            with open_transport(url) as transport:
                (said,) = [text for text in transport.warnings(["queue"]) if "behind this address" in text]

        assert "couchdb@0, couchdb@1, couchdb@2" in said

    def test_several_servers_that_are_no_cluster(self) -> None:
        with playing(copies=1) as one, playing(copies=1) as two:
            url = one.url("p").replace("/p", f",{two.address()}/p")
            with open_transport(url) as transport:
                (said,) = [text for text in transport.warnings(["queue"]) if "no node of a cluster" in text]

        assert "names 2 servers" in said


@contextmanager
def balancer(cluster: CouchDBCluster) -> Iterator[str]:
    """An address whose connections lead to the nodes in turn."""
    with socket.create_server((HOST, 0)) as listening:
        ends: list[socket.socket] = []

        def accept() -> None:
            number = 0
            with suppress(OSError):
                while True:
                    client, _ = listening.accept()
                    host, _, port = cluster.address(number % 3).partition(":")
                    node = socket.create_connection((host, int(port)))
                    ends.extend((client, node))
                    number += 1
                    for source, target in ((client, node), (node, client)):
                        threading.Thread(target=_pass_on, args=(source, target), daemon=True).start()

        thread = threading.Thread(target=accept, name="a balancer", daemon=True)
        thread.start()
        yield f"{HOST}:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
        for end in ends:
            end.close()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(65_536):
            target.sendall(piece)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
