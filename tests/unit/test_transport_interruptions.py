"""An exception out of a signal handler leaves no lock taken, no transaction open, no message lost: at any moment."""

import gc
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ekiden.message import DUPLICATE, LOST, SETTLED, STORED, Delivery, Ending, Message, new_id
from ekiden.plugins import open_backend, open_transport
from ekiden.results import Backend, Start, StoredResult
from ekiden.sqlite import SQLiteTransport
from ekiden.transport import Consumer, Transport
from ekiden.urls import parse_url

from examples.spool.spool import SpoolTransport
from tests.interruptions import Interrupted, interrupted_everywhere, signals_every

PATIENCE = 20.0

# Whoever is interrupted between opening a file and noting it leaves the file to the garbage collector, which says so.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(autouse=True)
def _garbage_is_collected_here() -> Iterator[None]:
    """And not in the middle of another test."""
    yield
    gc.collect()


OTHER_PROCESS = """
import sys
from ekiden.message import Message, new_id
from ekiden.urls import parse_url
from tests.unit.test_transport_interruptions import opened
transports = {}
for line in sys.stdin:
    url = line.strip()
    try:
        transport = transports[url] = transports.get(url) or opened(url)
        print(transport.publish([Message(new_id(), "others", b"")])[0].outcome.value, flush=True)
    except Exception as error:
        print(error, flush=True)
"""

MODULES = {"sqlite": "ekiden.sqlite", "polled": "ekiden.sqlite", "spool": "examples.spool"}


def opened(url: str) -> Transport:
    return SpoolTransport(parse_url(url)) if url.startswith("spool") else open_transport(url)


class Ground:
    """A broker, its users in this process, and another process that writes to it."""

    def __init__(self, kind: str, directory: Path, other: subprocess.Popen[str]) -> None:
        self.kind = kind
        self.module = MODULES[kind]
        self.url = {
            "sqlite": f"sqlite:///{directory}/x.db?busy_timeout=0.5",
            "polled": f"sqlite:///{directory}/x.db?busy_timeout=0.5&wake=poll",
            "spool": f"spool:///{directory}/x.json",
        }[kind]
        self.transport = opened(self.url)
        self.consumer = self.consume()
        self.backend: Backend | None = None if kind == "spool" else open_backend(self.url)
        self._other = other

    def consume(self) -> Consumer:
        return self.transport.consumer(["queue"], lease=60, prefetch=10_000, name="consumer")

    def close(self) -> None:
        if self.backend is not None:
            self.backend.close()
        self.transport.close()

    def assert_others_can_write(self) -> None:
        """Another process, and another thread of this one."""
        assert self._other.stdin is not None
        assert self._other.stdout is not None
        self._other.stdin.write(f"{self.url}\n")
        self._other.stdin.flush()
        assert self._other.stdout.readline() == "stored\n"
        in_time = threading.Event()

        def write() -> None:
            assert self.transport.publish([Message(new_id(), "others", b"")]) == [STORED]
            self.consumer.extend([])
            if self.backend is not None:
                assert self.backend.put([a_result()]) == [True]
                self.backend.get(["nothing"])
            in_time.set()

        threading.Thread(target=write, daemon=True).start()
        assert in_time.wait(PATIENCE)
        self.transport.purge("others")

    def collect(self, count: int = 1) -> list[Delivery]:
        deliveries: list[Delivery] = []
        give_up = time.monotonic() + PATIENCE
        while len(deliveries) < count and time.monotonic() < give_up:
            deliveries += self.consumer.receive(count, 1)
        return deliveries


def a_result() -> StoredResult:
    return StoredResult(new_id(), "SUCCESS", 0, b"1")


@pytest.fixture
def kind() -> str:
    return "sqlite"


@pytest.fixture(scope="module")
def other_process() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", OTHER_PROCESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        yield other
        other.communicate(timeout=PATIENCE)


@pytest.fixture
def ground(kind: str, tmp_path: Path, other_process: subprocess.Popen[str]) -> Iterator[Ground]:
    ground = Ground(kind, tmp_path, other_process)
    ground.assert_others_can_write()
    yield ground
    ground.close()


every_kind = pytest.mark.parametrize("kind", ["sqlite", "spool"])
with_results = pytest.mark.parametrize("kind", ["sqlite"])


@every_kind
@pytest.mark.slow
def test_a_publish_that_is_interrupted_stores_its_message_once_or_not(ground: Ground) -> None:
    ids = map("{:06}".format, itertools.count())
    current = next(ids)

    def publish() -> None:
        ground.transport.publish([Message(current, "queue", b"")])

    for _interruption in interrupted_everywhere(publish, inside=ground.module):
        ground.assert_others_can_write()
        assert ground.transport.publish([Message(current, "queue", b"")]) in ([STORED], [DUPLICATE])
        (delivery,) = ground.collect()
        assert delivery.message.id == current
        assert ground.consumer.settle([Ending(delivery)]) == [SETTLED]
        assert ground.transport.depth("queue").ready == 0
        current = next(ids)


@every_kind
@pytest.mark.slow
def test_a_settling_that_is_interrupted_is_done_or_can_be_repeated(ground: Ground) -> None:
    ids = map("{:06}".format, itertools.count())

    def fresh() -> Ending:
        ground.transport.publish([Message(new_id(), "queue", b"")])
        (delivery,) = ground.collect()
        return Ending(delivery, (Message(next(ids), "next", b""),))

    def settle() -> None:
        ground.consumer.settle([ending])

    ending = fresh()
    for _interruption in interrupted_everywhere(settle, inside=ground.module):
        ground.assert_others_can_write()
        assert ground.consumer.settle([ending]) in ([SETTLED], [LOST])
        assert [seen.message.id for seen in ground.transport.browse("next")] == [ending.publish[0].id]
        assert ground.transport.depth("queue").leased == 0
        ground.transport.purge("next")
        ending = fresh()


@every_kind
@pytest.mark.slow
def test_what_an_interrupted_receive_claimed_comes_back(ground: Ground) -> None:
    ground.transport.publish([Message(new_id(), "queue", b"")])

    for _interruption in interrupted_everywhere(lambda: ground.consumer.receive(1, 0), inside=ground.module):
        ground.assert_others_can_write()
        depth = ground.transport.depth("queue")
        assert (depth.ready or 0) + (depth.leased or 0) == 1
        if depth.leased:
            ground.consumer.close()
            ground.consumer = ground.consume()


@every_kind
@pytest.mark.parametrize("act", ["wait for a message", "release", "extend", "broadcast", "hear", "look", "consume"])
@pytest.mark.slow
def test_whatever_is_interrupted_holds_up_nobody(ground: Ground, act: str) -> None:
    ground.transport.publish([Message(new_id(), "queue", b"") for _ in range(3)])
    deliveries = ground.collect(3)
    acts: dict[str, Callable[[], object]] = {
        "wait for a message": lambda: ground.consumer.receive(1, 0.001),
        "release": lambda: ground.consumer.release(deliveries),
        "extend": lambda: ground.consumer.extend(deliveries),
        "broadcast": lambda: ground.transport.broadcast("topic", [b"x"]),
        "hear": lambda: ground.transport.listen("topic").receive(0.001),
        "look": lambda: (ground.transport.browse("queue"), ground.transport.depth("queue")),
        "consume": lambda: ground.transport.consumer(["reply.x"], lease=60, prefetch=1, name="second").close(),
    }

    for _interruption in interrupted_everywhere(acts[act], inside=ground.module, lines_only=True):
        ground.assert_others_can_write()
    ground.assert_others_can_write()


@with_results
@pytest.mark.parametrize("act", ["put", "get", "begin", "join", "write", "scan", "forget"])
@pytest.mark.slow
def test_a_call_to_the_result_store_that_is_interrupted_holds_up_nobody(ground: Ground, act: str) -> None:
    backend = ground.backend
    assert backend is not None
    result = a_result()
    acts: dict[str, Callable[[], object]] = {
        "put": lambda: backend.put([result]),
        "get": lambda: backend.get([result.task_id]),
        "begin": lambda: backend.begin([Start(new_id(), 0, "message")]),
        "join": lambda: backend.join("join", "member", b"", size=2, expires=None),
        "write": lambda: backend.write("key", b"value"),
        "scan": lambda: backend.scan("k"),
        "forget": lambda: backend.forget(["nothing"]),
    }

    for _interruption in interrupted_everywhere(acts[act], inside=ground.module, lines_only=act != "put"):
        ground.assert_others_can_write()
    ground.assert_others_can_write()
    backend.put([result])
    assert backend.get([result.task_id]) == [result]


@pytest.mark.parametrize("kind", ["sqlite", "polled"])
def test_a_wait_that_was_interrupted_can_be_repeated(ground: Ground) -> None:
    backend = ground.backend
    assert backend is not None
    backend.wait(["nothing"], 0.01)  # has whatever it needs started
    result = a_result()

    def wait() -> None:
        backend.wait([result.task_id], 0.001)

    for _interruption in interrupted_everywhere(wait, inside=ground.module):
        assert backend.put([result]) == [True]
        assert backend.wait([result.task_id], PATIENCE) == [result]
        ground.assert_others_can_write()
        result = a_result()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_opening_the_file_can_be_interrupted(tmp_path: Path) -> None:
    numbers = itertools.count()
    current = ""

    def open_and_publish(path: str) -> None:
        with SQLiteTransport(parse_url(f"sqlite:///{path}")) as transport:
            assert transport.publish([Message(new_id(), "queue", b"")]) == [STORED]

    def open_another() -> None:
        nonlocal current
        current = f"{tmp_path}/{next(numbers)}.db"
        open_and_publish(current)

    for _interruption in interrupted_everywhere(open_another, inside="ekiden.sqlite", lines_only=True):
        open_and_publish(current)


@pytest.mark.parametrize("kind", ["sqlite", "polled", "spool"])
def test_a_storm_of_real_signals_holds_up_nobody(ground: Ground, caplog: pytest.LogCaptureFixture) -> None:
    interruptions, published = 0, 0
    give_up = time.monotonic() + 60
    with signals_every(0.0005, inside=ground.module):
        while interruptions < 100 and time.monotonic() < give_up:
            try:
                published += ground.transport.publish([Message(new_id(), "queue", b"")]) == [STORED]
                ground.consumer.settle([Ending(delivery) for delivery in ground.consumer.receive(100, 0)])
                if ground.backend is not None:
                    ground.backend.put([a_result()])
                    ground.backend.wait([new_id()], 0.001)
            except Interrupted:
                interruptions += 1

    ground.assert_others_can_write()
    assert interruptions == 100
    ground.consumer.close()
    ground.consumer = ground.consume()
    left = ground.transport.depth("queue").ready or 0
    assert len(ground.collect(left)) == left
    assert "has failed" not in caplog.text, "a thread met another one in its place"
