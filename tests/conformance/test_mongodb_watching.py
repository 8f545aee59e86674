"""Following a feed at each of its three levels: who is told, of what, how soon, and at what cost."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest
from ekiden.errors import BrokerRefused, BrokerUnavailable
from ekiden.message import new_id
from ekiden.testing.conformance.fixtures import let_it_wait
from ekiden.testing.conformance.pace import assert_quick
from ekiden.testing.proxy import Proxy
from ekiden.urls import parse_url
from ekiden_mongodb import watching
from ekiden_mongodb.client import Client
from ekiden_mongodb.feeds import Document, Feed, Position
from ekiden_mongodb.listener import MongoDBListener, broadcast
from ekiden_mongodb.signals import Signals
from ekiden_mongodb.watching import LEVEL_NAMES, LEVELS, Level, Watch

from tests.servers.mongodb import MongoDBServer
from tests.servers.running import running
from tests.working import PATIENCE, eventually

EVERY_LEVEL = pytest.mark.parametrize("level", LEVELS, ids=LEVEL_NAMES.values())
FEED_BYTES = 2**20


@contextmanager
def opened(url: str, **options: object) -> Iterator[Client]:
    query = "&".join(f"{name}={value}" for name, value in options.items())
    client = Client(parse_url(f"{url}&{query}"), unavailable=BrokerUnavailable, refused=BrokerRefused)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture
def client(mongodb_place: str) -> Iterator[Client]:
    with opened(mongodb_place, timeout=5) as client:
        yield client


@pytest.fixture
def other(mongodb_place: str) -> Iterator[Client]:
    """The same, as another process has it."""
    with opened(mongodb_place, timeout=5) as other:
        yield other


@pytest.fixture(scope="module")
def standalone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoDBServer]:
    with running(lambda: MongoDBServer(tmp_path_factory.mktemp("standalone"), standalone=True)) as server:
        yield server


def standalone_place(standalone: MongoDBServer) -> str:
    return f"{standalone.url_as(None, None, direct=True)}&prefix=test-{new_id()}"


def feed_of(client: Client) -> Feed:
    return Feed(client, "news", max_bytes=FEED_BYTES)


class Hearer:
    """Notes what a watch tells, and when."""

    def __init__(self, client: Client, *, position: Position | None = None, levels: Sequence[Level] = LEVELS) -> None:
        self.heard: list[int] = []
        self.news: queue.SimpleQueue[tuple[int, float]] = queue.SimpleQueue()
        self.opened = threading.Event()
        self.watch = Watch(
            feed_of(client),
            thread_name="ekiden-mongodb-test",
            told=self._hear,
            opened=self.opened.set,
            position=position,
            levels=levels,
        )

    def _hear(self, documents: Sequence[Document]) -> None:
        for document in documents:
            self.heard.append(document["number"])
            self.news.put((document["number"], time.monotonic()))

    def is_told(self, number: int) -> float:
        """When it was told of this one, which comes next."""
        found, at = self.news.get(timeout=PATIENCE)
        assert found == number
        return at


@contextmanager
def following(client: Client, *, remembers: bool = False, levels: Sequence[Level] = LEVELS) -> Iterator[Hearer]:
    """Somebody who is told. ``remembers``: of everything once, also of what came while it was not followed."""
    position = None
    if remembers:
        feed = feed_of(client)
        with client.asking():
            feed.make()
            position = Position(feed, {"kind": "test"})
    hearer = Hearer(client, position=position, levels=levels)
    hearer.watch.want({"kind": "test"})
    try:
        assert hearer.opened.wait(PATIENCE)
        yield hearer
    finally:
        hearer.watch.close()


def append(client: Client, *numbers: int, acknowledged: bool = True) -> None:
    feed_of(client).append([{"kind": "test", "number": number} for number in numbers], acknowledged=acknowledged)


# Being told.


@EVERY_LEVEL
def test_what_is_inserted_is_told_within_milliseconds(client: Client, other: Client, level: Level) -> None:
    delays = []
    with following(client, levels=[level]) as hearer:
        for number in range(20):
            let_it_wait(0.02)
            inserted = time.monotonic()
            append(other, number, acknowledged=False)
            delays.append(hearer.is_told(number) - inserted)

        assert hearer.watch.level == LEVEL_NAMES[level]

    assert_quick(median(delays), 0.1, delays)


@EVERY_LEVEL
def test_what_does_not_match_is_not_told(client: Client, other: Client, level: Level) -> None:
    with following(client, levels=[level]) as hearer:
        feed_of(other).append([{"kind": "another", "number": 0}])
        append(other, 1)

        hearer.is_told(1)

    assert hearer.heard == [1]


@EVERY_LEVEL
def test_something_else_may_be_wanted_meanwhile(client: Client, other: Client, level: Level) -> None:
    with following(client, levels=[level]) as hearer:
        hearer.opened.clear()
        hearer.watch.want({"kind": "another"})
        assert hearer.opened.wait(PATIENCE)
        append(other, 0)
        feed_of(other).append([{"kind": "another", "number": 1}])

        hearer.is_told(1)


@EVERY_LEVEL
def test_who_has_a_position_misses_nothing_over_a_wire_that_is_cut(
    mongodb_url: str, mongodb_place: str, other: Client, level: Level
) -> None:
    host = parse_url(mongodb_url).hosts[0]
    assert host.port is not None
    with (
        Proxy(host.name, host.port) as proxy,
        opened(through(proxy, mongodb_place), timeout=2) as client,
        following(client, remembers=True, levels=[level]) as hearer,
    ):
        for number in range(60):
            append(other, number)
            if number % 10 == 5:
                proxy.cut()
            let_it_wait(0.01)
        eventually(lambda: len(hearer.heard) >= 60, what="all are told", within=30)

    assert hearer.heard == list(range(60))


def through(proxy: Proxy, url: str) -> str:
    """Through the proxy, although the server names another address."""
    separator = "&" if "?" in url else "?"
    return proxy.through(url) if "directConnection" in url else f"{proxy.through(url)}{separator}directConnection=true"


@EVERY_LEVEL
def test_a_feed_that_is_dropped_is_followed_on(client: Client, other: Client, level: Level) -> None:
    append(other, 0)
    with following(client, levels=[level, LEVELS[-1]]) as hearer:
        with other.asking():
            feed_of(other).collection.drop()
        numbers = iter(range(1, 1000))

        def is_heard() -> bool:
            append(other, next(numbers))
            let_it_wait(0.05)
            return bool(hearer.heard)

        eventually(is_heard, what="it is told again", within=20)


# What it costs.


@pytest.mark.slow
@EVERY_LEVEL
def test_an_idle_watch_asks_less_than_twice_a_second(client: Client, level: Level) -> None:
    asked = []

    class Counted(level):  # type: ignore[valid-type, misc]  # one of three classes
        def next(self) -> list[Document]:
            asked.append(time.monotonic())
            found: list[Document] = super().next()
            return found

    hearer = Hearer(client)
    hearer.watch = Watch(
        feed_of(client), thread_name="ekiden-mongodb-test", told=lambda _: None, levels=[Counted], longest_poll=1.5
    )
    hearer.watch.want({"kind": "test"})
    let_it_wait(3.0)
    begun = time.monotonic()
    let_it_wait(4.0)
    hearer.watch.close()

    assert sum(at > begun for at in asked) <= 6


@EVERY_LEVEL
def test_closing_ends_the_thread_at_once(client: Client, level: Level) -> None:
    with following(client, levels=[level]) as hearer:
        let_it_wait(0.3)
        closed = time.monotonic()
        hearer.watch.close()

        assert_quick(time.monotonic() - closed, 1.0)
    assert not is_running()


def test_the_thread_ends_some_time_after_nobody_wants_to_be_told(
    client: Client, other: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LINGER_SECONDS", 0.1)
    monkeypatch.setattr(watching, "AWAIT_SECONDS", 0.1)
    with following(client) as hearer:
        let_it_wait(0.3)
        assert is_running()
        hearer.watch.leave()
        eventually(lambda: not is_running(), what="it has ended")

        hearer.opened.clear()
        hearer.watch.want({"kind": "test"})
        assert hearer.opened.wait(PATIENCE)
        append(other, 1)
        hearer.is_told(1)


def is_running() -> bool:
    return any(thread.name == "ekiden-mongodb-test" for thread in threading.enumerate())


# Levels.


def test_a_replica_set_is_followed_by_change_stream(client: Client) -> None:
    with following(client) as hearer:
        assert (hearer.watch.level, hearer.watch.degraded) == ("change stream", [])


def test_one_server_alone_is_followed_without_change_streams(standalone: MongoDBServer) -> None:
    place = standalone_place(standalone)
    with opened(place) as client, opened(place) as other, following(client, remembers=True) as hearer:
        (reason,) = hearer.watch.degraded
        assert reason.startswith("change stream: ")
        assert "replica set" in reason
        for number in range(10):
            append(other, number)
            hearer.is_told(number)
        assert hearer.watch.level == "tailable cursor" or "do not wake" in hearer.watch.degraded[1]


def test_what_is_not_capped_has_no_tailable_cursor(client: Client, other: Client) -> None:
    with client.asking():
        client.database.create_collection(feed_of(client).collection.name)
    with following(client, levels=LEVELS[1:]) as hearer:
        (reason,) = hearer.watch.degraded
        assert "capped" in reason
        append(other, 1)
        hearer.is_told(1)
        assert hearer.watch.level == "poll"


def test_a_feed_is_capped_and_never_empty(client: Client) -> None:
    feed = feed_of(client)
    with client.asking():
        feed.make()
        assert feed.collection.options()["capped"]
        assert feed.collection.count_documents({}) == 1


def test_a_feed_without_capped_collections_expires(client: Client) -> None:
    feed = feed_of(client)
    with client.asking():
        client.database.create_collection(feed.collection.name)
        feed.make()
        indexes = feed.collection.index_information().values()

    assert [each["expireAfterSeconds"] for each in indexes if "expireAfterSeconds" in each] == [600]


def test_a_better_level_is_tried_again_after_some_time(
    client: Client, other: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LINGER_SECONDS", 0.0)
    monkeypatch.setattr(watching, "AWAIT_SECONDS", 0.1)
    monkeypatch.setattr(watching, "TRIED_AGAIN_SECONDS", 0.2)
    with client.asking():
        client.database.create_collection(feed_of(client).collection.name)
    with following(client, levels=LEVELS[1:]) as hearer:
        assert hearer.watch.degraded
        hearer.watch.leave()
        eventually(lambda: not is_running(), what="nobody follows")
        with client.asking():
            feed_of(client).collection.drop()
            feed_of(client).make()

        def is_better() -> bool:
            hearer.watch.want({"kind": "test"})
            let_it_wait(0.2)
            hearer.watch.leave()
            return hearer.watch.level == "tailable cursor" and not hearer.watch.degraded

        eventually(is_better, what="it is followed by tailable cursor")


# Rings.


def test_who_waits_is_woken_within_milliseconds(client: Client, other: Client) -> None:
    publisher, hearer = Signals(client), Signals(other)
    waiter = hearer.waiter(["a", "b"])
    delays = []
    try:
        waiter.wait(0.5)  # everybody looks when following begins
        for _ in range(20):
            with ThreadPoolExecutor(1) as threads:
                woken = threads.submit(lambda: waiter.wait(PATIENCE) and time.monotonic())
                let_it_wait(0.03)
                rung = time.monotonic()
                publisher.ring(["b"])
                delays.append(woken.result() - rung)
    finally:
        publisher.close()
        hearer.close()

    assert_quick(median(delays), 0.05, delays)


def test_a_ring_between_two_waits_is_remembered(client: Client, other: Client) -> None:
    publisher, hearer = Signals(client), Signals(other)
    waiter = hearer.waiter(["a"])
    try:
        assert waiter.wait(PATIENCE)
        assert not waiter.wait(0.1)
        publisher.ring(["a"])
        let_it_wait(0.3)
        started = time.monotonic()

        assert waiter.wait(PATIENCE)
        assert_quick(time.monotonic() - started, 0.05)
    finally:
        publisher.close()
        hearer.close()


def test_who_waits_for_other_queues_sleeps_on(client: Client, other: Client) -> None:
    publisher, hearer = Signals(client), Signals(other)
    waiter = hearer.waiter(["a"])
    try:
        assert waiter.wait(PATIENCE)
        publisher.ring(["b"])

        assert not waiter.wait(0.3)
    finally:
        publisher.close()
        hearer.close()


def test_a_ring_without_a_server_does_nothing(mongodb_url: str) -> None:
    with opened("mongodb://127.0.0.1:9/test?directConnection=true", timeout=0.3) as client:
        signals = Signals(client)
        waiter = signals.waiter(["a"])

        signals.ring(["a"])

        assert waiter.wait(0.0), "who waits in the same process hears it"
        signals.close()


@pytest.mark.parametrize("end", ["wake", "close"])
def test_a_wait_is_ended_by_others(client: Client, end: str) -> None:
    signals = Signals(client)
    waiter = signals.waiter(["a"])
    assert waiter.wait(PATIENCE)
    ended: Callable[[], None] = waiter.wake if end == "wake" else signals.close
    timer = threading.Timer(0.1, ended)
    timer.start()
    started = time.monotonic()

    assert waiter.wait(PATIENCE)

    assert_quick(time.monotonic() - started, 2.0)
    timer.join()
    signals.close()


# Broadcasts.


def test_a_listener_hears_everything_once_over_a_wire_that_is_cut(
    mongodb_url: str, mongodb_place: str, other: Client
) -> None:
    host = parse_url(mongodb_url).hosts[0]
    assert host.port is not None
    with (
        Proxy(host.name, host.port) as proxy,
        opened(through(proxy, mongodb_place), timeout=2) as client,
        MongoDBListener(client, "topic", left=lambda _: None) as listener,
    ):
        heard: list[bytes] = []
        for number in range(30):
            broadcast(other, "topic", [b"%d" % number])
            if number % 10 == 5:
                proxy.cut()
            heard += listener.receive(0.02)
        give_up = time.monotonic() + 30
        while len(heard) < 30 and time.monotonic() < give_up:
            heard += listener.receive(0.1)

    assert heard == [b"%d" % number for number in range(30)]


def test_a_listener_says_that_the_server_is_gone(tmp_path: Path) -> None:
    with (
        running(lambda: MongoDBServer(tmp_path)) as server,
        opened(server.url_as(None, None, direct=True), timeout=0.5) as client,
        opened(server.url_as(None, None, direct=True)) as other,
        MongoDBListener(client, "topic", left=lambda _: None) as listener,
    ):
        server.kill()
        started = time.monotonic()

        with pytest.raises(BrokerUnavailable, match="cannot be reached"):
            listener.receive(30)

        assert time.monotonic() - started < 20
        server.start()
        broadcast(other, "topic", [b"back"])
        eventually(lambda: heard_of(listener) == [b"back"], what="it hears again", within=30)


def heard_of(listener: MongoDBListener) -> list[bytes] | None:
    try:
        return listener.receive(0.1)
    except BrokerUnavailable:
        return None


class Trouble:
    """Raises once, when it is told of something, and then notes what it is told of."""

    def __init__(self, client: Client, error: BaseException, level: Level) -> None:
        self._error: BaseException | None = error
        self.heard: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.watch = Watch(feed_of(client), thread_name="ekiden-mongodb-test", told=self._hear, levels=(level,))

    def _hear(self, documents: Sequence[Document]) -> None:
        for document in documents:
            error, self._error = self._error, None
            if error is not None:
                raise error
            self.heard.put(document["number"])

    def wait_for(self, number: int) -> None:
        while self.heard.get(timeout=PATIENCE) != number:
            continue


@EVERY_LEVEL
@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()], ids=["a bug", "an interruption"])
def test_what_our_own_code_raises_is_said_and_following_begins_anew(
    client: Client, level: Level, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    trouble = Trouble(client, error, level)
    trouble.watch.want({"kind": "test"})
    try:
        append(client, 1)
        eventually(lambda: type(error).__name__ in caplog.text, what="it is said")
        append(client, 2)
        trouble.wait_for(2)
        assert trouble.watch.trouble(0.0) is None
    finally:
        trouble.watch.close()


def test_a_thread_that_could_not_be_started_is_started_by_who_wants_next(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    hearer = Hearer(client)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", _no_more_threads)
        with pytest.raises(RuntimeError):
            hearer.watch.want({"kind": "test"})
    hearer.watch.want({"kind": "test"})
    try:
        assert hearer.opened.wait(PATIENCE)
        append(client, 1)
        hearer.is_told(1)
    finally:
        hearer.watch.close()


def _no_more_threads(_thread: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
