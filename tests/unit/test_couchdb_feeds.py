"""CouchDB's feeds: rings wake who waits, broadcasts survive what happens to a connection, and little is kept."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportClosed
from ekiden.testing.conformance.fixtures import let_it_wait
from ekiden.testing.conformance.pace import assert_quick
from ekiden.testing.proxy import Proxy
from ekiden.urls import parse_url
from ekiden_couchdb import events, ringing
from ekiden_couchdb.changes import Change, Changes
from ekiden_couchdb.client import BulkOutcome, Client
from ekiden_couchdb.listener import CouchDBListener, broadcast
from ekiden_couchdb.ringing import Ringer
from ekiden_couchdb.signals import Signals, Waiter

from tests.servers.couchdb import CouchDBClient
from tests.servers.couchdb_cluster import CouchDBCluster, playing
from tests.servers.couchdb_http import ADMIN
from tests.working import PATIENCE, eventually

pytestmark = pytest.mark.slow  # each asks a server that takes its time

LONG_AGO = "20200101"


@pytest.fixture
def looking(couchdb_url: str) -> Iterator[CouchDBClient]:
    """For looking at the server."""
    with CouchDBClient(couchdb_url) as client:
        yield client


@pytest.fixture
def url(couchdb_place: str) -> str:
    return f"{couchdb_place}{'&' if '?' in couchdb_place else '?'}timeout=3"


@pytest.fixture
def proxy(couchdb_url: str) -> Iterator[Proxy]:
    host = parse_url(couchdb_url).hosts[0]
    with Proxy(host.name, host.port or 5984) as proxy:
        yield proxy


Opened = Callable[[str], Client]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Opens a client, as another process would, and closes all in the end."""
    clients: list[Client] = []

    def open_client(url: str) -> Client:
        clients.append(Client(parse_url(url), unavailable=BrokerUnavailable, refused=BrokerRefused))
        return clients[-1]

    yield open_client
    for client in clients:
        client.close()


@pytest.fixture
def client(opened: Opened, url: str) -> Client:
    return opened(url)


@pytest.fixture
def signals(client: Client) -> Iterator[Signals]:
    with closing(Signals(client)) as signals:
        yield signals


@pytest.fixture
def elsewhere(opened: Opened, url: str) -> Iterator[Signals]:
    """Another process's."""
    with closing(Signals(opened(url))) as signals:
        yield signals


def threads_called(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def is_woken_within(waiter: Waiter, seconds: float) -> bool:
    """Whether it is woken, and not by a look that it takes by itself."""
    began = time.monotonic()
    return waiter.wait(seconds) and time.monotonic() - began < seconds


# Rings.


def test_who_waits_for_a_queue_is_woken_by_a_ring_for_it_and_no_other(signals: Signals, elsewhere: Signals) -> None:
    with closing(signals.waiter(["a", "b"])) as waiter, closing(signals.waiter(["c"])) as other:
        for each in (waiter, other):
            assert each.wait(PATIENCE)  # the feed has begun

        elsewhere.ring(["b"])

        assert is_woken_within(waiter, 1.0)
        assert not other.wait(0.1)
        assert not waiter.wait(0.1)


def test_a_ring_between_two_waits_ends_the_second_at_once(signals: Signals, elsewhere: Signals) -> None:
    with closing(signals.waiter(["a"])) as waiter:
        assert waiter.wait(PATIENCE)
        elsewhere.ring(["a"])
        let_it_wait(0.3)

        assert is_woken_within(waiter, 0.05)


def test_waking_takes_milliseconds_and_nobody_is_woken_without_a_ring(signals: Signals, elsewhere: Signals) -> None:
    delays = []
    with closing(signals.waiter(["a"])) as waiter:
        assert waiter.wait(PATIENCE)
        for _ in range(20):
            assert not waiter.wait(0.03)
            rung = time.monotonic()
            elsewhere.ring(["a"])
            assert waiter.wait(PATIENCE)
            delays.append(time.monotonic() - rung)

    assert_quick(sorted(delays)[10], 0.05, delays)


def test_of_many_rings_the_last_is_heard_and_few_are_written(
    signals: Signals, elsewhere: Signals, looking: CouchDBClient, client: Client
) -> None:
    with closing(signals.waiter(["last"])) as waiter:
        assert waiter.wait(PATIENCE)
        for _ in range(2000):
            elsewhere.ring(["a"])
        elsewhere.ring(["last"])

        assert is_woken_within(waiter, 2.0)

    _, said = looking.request("GET", f"/{client.database('signals')}")
    assert said["doc_count"] == 1
    assert int(str(said["update_seq"]).partition("-")[0]) < 50  # CouchDB's is a text that begins with a number


def test_processes_that_take_the_same_document_move_apart(
    client: Client, opened: Opened, url: str, looking: CouchDBClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ringing, "randrange", drawing(7, 7, 7, 8, 9))
    database = client.database("signals")
    with closing(Ringer(client, database)) as one, closing(Ringer(opened(url), database)) as two:
        for _ in range(3):
            one.ring(["a"])
            two.ring(["b"])
            let_it_wait(0.05)

    _, said = looking.request("GET", f"/{database}/_all_docs")
    assert len(said["rows"]) == 2


def drawing(*numbers: int) -> Callable[[int], int]:
    """Draws these, one after another."""
    rest = iter(numbers)
    return lambda _most: next(rest)


def test_a_ring_that_cannot_be_written_raises_nothing_and_holds_up_nobody(opened: Opened) -> None:
    with closing(Signals(opened("couchdb://127.0.0.1:1/nobody?timeout=5"))) as signals:
        began = time.monotonic()
        for _ in range(100):
            signals.ring(["a"])

        assert_quick(time.monotonic() - began, 1.0)

    assert threads_called("ekiden-couchdb-rings") == []


def test_without_a_feed_who_waits_looks_each_second(opened: Opened) -> None:
    with (
        closing(Signals(opened("couchdb://127.0.0.1:1/nobody?timeout=5"))) as signals,
        closing(signals.waiter(["a"])) as waiter,
    ):
        began = time.monotonic()

        assert waiter.wait(30.0)
        took = time.monotonic() - began
        assert took > 0.9
        assert_quick(took, 2.0)


def test_the_feed_lives_while_somebody_waits(signals: Signals) -> None:
    assert threads_called("ekiden-couchdb-signals") == []
    one, two = signals.waiter(["a"]), signals.waiter(["b"])
    assert len(threads_called("ekiden-couchdb-signals")) == 1

    one.close()
    assert len(threads_called("ekiden-couchdb-signals")) == 1
    two.close()
    two.close()

    eventually(lambda: not threads_called("ekiden-couchdb-signals"), what="the feed ended")


def test_closing_is_quick_also_while_the_server_is_silent(proxy: Proxy, opened: Opened, couchdb_place: str) -> None:
    signals = Signals(opened(proxy.through(couchdb_place)))
    waiter = signals.waiter(["a"])
    assert waiter.wait(PATIENCE)
    with proxy.frozen():
        proxy.cut()
        let_it_wait(0.3)
        began = time.monotonic()
        signals.close()

        assert_quick(time.monotonic() - began, 2.0)
        assert threads_called("ekiden-couchdb-signals") == []


def test_closing_is_quick_also_before_the_silent_server_has_said_a_word(
    proxy: Proxy, opened: Opened, couchdb_place: str
) -> None:
    signals = Signals(opened(proxy.through(couchdb_place)))
    with proxy.frozen():
        signals.waiter(["a"])
        let_it_wait(0.3)
        began = time.monotonic()
        signals.close()

        assert time.monotonic() - began < 4.0  # it waits for the thread for five seconds at most
        assert threads_called("ekiden-couchdb-signals") == []


def test_after_a_cut_rings_are_heard_again(proxy: Proxy, opened: Opened, url: str, elsewhere: Signals) -> None:
    with (
        closing(Signals(opened(proxy.through(url)))) as signals,
        closing(signals.waiter(["a"])) as waiter,
    ):
        assert waiter.wait(PATIENCE)
        for _ in range(3):
            proxy.cut()
            elsewhere.ring(["a"])
            assert is_woken_within(waiter, 5.0)
            eventually(lambda: signals.is_live, what="the feed is back", within=20)
            while waiter.wait(0.05):
                continue


@pytest.mark.slow
def test_an_idle_process_asks_less_than_twice_a_second(cluster: CouchDBCluster, opened: Opened) -> None:
    client = opened(cluster.url("p"))
    with (
        closing(Signals(client)) as signals,
        closing(signals.waiter(["a"])) as waiter,
        closing(CouchDBListener(client, "control", left=lambda _: None)) as listener,
    ):
        assert waiter.wait(PATIENCE)
        let_it_wait(0.5)
        before = len(cluster.requests)
        heard, woken = listener.receive(1.0), waiter.wait(1.0)
        asked = len(cluster.requests) - before

    assert (heard, woken) == ([], False)
    assert asked <= 1


# Broadcasts.


@pytest.fixture
def cluster() -> Iterator[CouchDBCluster]:
    with playing() as cluster:
        yield cluster


@pytest.fixture
def listener(client: Client) -> Iterator[CouchDBListener]:
    with closing(CouchDBListener(client, "topic", left=lambda _: None)) as listener:
        yield listener


def hear(listener: CouchDBListener, count: int) -> list[bytes]:
    """The next ``count`` payloads, through errors."""
    heard: list[bytes] = []
    give_up = time.monotonic() + PATIENCE
    while len(heard) < count and time.monotonic() < give_up:
        try:
            heard += listener.receive(give_up - time.monotonic())
        except BrokerUnavailable:
            let_it_wait()
    return heard


def test_a_listener_that_was_cut_off_hears_what_was_broadcast_meanwhile(
    proxy: Proxy, opened: Opened, url: str, client: Client
) -> None:
    with (
        closing(CouchDBListener(opened(proxy.through(url)), "topic", left=lambda _: None)) as listener,
    ):
        for number in range(3):
            with proxy.frozen():
                proxy.cut()
                broadcast(client, "topic", [b"%d" % number, b"and"])

            assert hear(listener, 2) == [b"%d" % number, b"and"]


def test_a_broadcast_of_many_large_payloads_keeps_its_order(client: Client, listener: CouchDBListener) -> None:
    payloads = [bytes([number]) * 700_000 for number in range(12)]

    broadcast(client, "topic", payloads)

    assert hear(listener, 12) == payloads


def test_a_listener_at_a_server_that_is_gone_says_so(proxy: Proxy, opened: Opened, couchdb_place: str) -> None:
    url = proxy.through(f"{couchdb_place}{'&' if '?' in couchdb_place else '?'}timeout=1")
    with closing(CouchDBListener(opened(url), "topic", left=lambda _: None)) as listener, proxy.frozen():
        proxy.cut()
        began = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            listener.receive(30.0)

        assert time.monotonic() - began < 6.0


def test_a_closed_listener_leaves_no_thread(client: Client) -> None:
    left: list[CouchDBListener] = []
    listener = CouchDBListener(client, "topic", left=left.append)

    listener.close()
    listener.close()

    assert left == [listener]
    assert threads_called("ekiden-couchdb-listener") == []
    with pytest.raises(TransportClosed):
        listener.receive(0.0)


def test_databases_of_days_that_have_gone_by_are_dropped(
    client: Client, looking: CouchDBClient, opened: Opened, url: str
) -> None:
    prefix = client.database("events-")
    for day in (LONG_AGO, "29991231"):
        opened(url).ensure_database(f"{prefix}{day}")
    kept = f"{prefix}older"
    opened(url).ensure_database(kept)

    with closing(CouchDBListener(client, "topic", left=lambda _: None)):
        today = f"{prefix}{datetime.now(UTC):%Y%m%d}"

        assert sorted(looking.databases(prefix)) == sorted([today, f"{prefix}29991231", kept])


def test_a_listener_follows_the_day(cluster: CouchDBCluster, opened: Opened) -> None:
    cluster.advance(seconds_to_midnight() - 60.0)  # a minute before midnight
    client = opened(cluster.url("p"))
    with closing(CouchDBListener(client, "topic", left=lambda _: None)) as listener:
        broadcast(client, "topic", [b"yesterday"])
        first = databases_of_days(cluster)
        cluster.advance(90.0)
        late = opened(cluster.url("p"))

        broadcast(late, "topic", [b"today"])

        assert sorted(hear(listener, 2)) == [b"today", b"yesterday"]
    assert len(first) == 2
    assert len(databases_of_days(cluster)) == 2


def test_a_listener_that_nobody_asked_for_days_hears_of_today(cluster: CouchDBCluster, opened: Opened) -> None:
    client = opened(cluster.url("p"))
    with closing(CouchDBListener(client, "topic", left=lambda _: None)) as listener:
        cluster.advance(5 * 86400.0)
        late = opened(cluster.url("p"))
        late.server_time()
        client.ask("GET", "/")  # the clock is looked at with every answer

        broadcast(late, "topic", [b"today"])

        assert hear(listener, 1) == [b"today"]
        eventually(lambda: len(databases_of_days(cluster)) == 1, what="the old day is gone")


def seconds_to_midnight() -> float:
    return 86400.0 - time.time() % 86400.0


def databases_of_days(cluster: CouchDBCluster) -> list[str]:
    return sorted(name for name in cluster.databases if name.startswith("p-events-"))


def test_a_database_for_all_days_is_used_where_an_administrator_has_made_it(
    cluster: CouchDBCluster, opened: Opened
) -> None:
    cluster.users.update({"worker": ("secret", ()), "admin": ("secret", (ADMIN,))})
    admin, client = opened(cluster.url("p", user="admin")), opened(cluster.url("p", user="worker"))
    with pytest.raises(BrokerRefused, match=r"no database 'p-events-\d+'.*'p-events' will do"):
        CouchDBListener(client, "topic", left=lambda _: None)
    admin.ensure_database("p-events")
    admin.ask("PUT", "/p-events/_security", {"members": {"names": ["worker"]}})

    with closing(CouchDBListener(client, "topic", left=lambda _: None)) as listener:
        broadcast(client, "topic", [b"one"])
        broadcast(admin, "topic", [b"two"])

        assert hear(listener, 2) == [b"one", b"two"]
    assert databases_of_days(cluster) == []


def test_an_event_that_a_cluster_tells_again_is_heard_once(client: Client, listener: CouchDBListener) -> None:
    database = events.database_of(client, client.server_time())
    event = {"_id": "1-x", "topic": "topic", "payloads": ["MQ=="]}
    (answer,) = client.bulk(database, [event])
    assert hear(listener, 1) == [b"1"]

    client.bulk(database, [{**event, "_rev": answer.rev}])
    broadcast(client, "topic", [b"2"])

    assert hear(listener, 1) == [b"2"]


# A feed.


def test_a_feed_begins_anew_when_its_database_was_deleted(cluster: CouchDBCluster, opened: Opened) -> None:
    client = opened(cluster.url("p"))
    database = client.database("signals")
    heard: list[str] = []
    began = threading.Semaphore(0)

    def note(change: Change) -> None:
        heard.append(change.id)

    changes = Changes(
        client, database, thread_name="ekiden-couchdb-test", heard=note, began=began.release, failed=lambda: None
    )
    with closing(changes):
        changes.start()
        assert began.acquire(timeout=PATIENCE)
        for name in ("a", "b", "c"):
            client.bulk(database, [{"_id": name}])
        eventually(lambda: heard == ["a", "b", "c"], what="it is told of three")

        client.ask("DELETE", f"/{database}")
        assert began.acquire(timeout=PATIENCE)
        (answer,) = client.bulk(database, [{"_id": "d"}])

        assert answer.outcome is BulkOutcome.OK
        eventually(lambda: heard[3:] == ["d"], what="it is told of the new one")
