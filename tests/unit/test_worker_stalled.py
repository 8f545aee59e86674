"""A worker counts as alive only while each of its threads works: what is stuck is named, what is slow is not."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from ekiden import Ekiden
from ekiden import runner as runner_module
from ekiden import worker as worker_module
from ekiden.memory import MemoryBackend, MemoryConsumer, MemoryTransport
from ekiden.message import Delivery, Ending, Settled, new_id
from ekiden.results import StoredResult
from ekiden.transport import Consumer
from ekiden.urls import parse_url
from ekiden.worker import Worker

from tests.working import PATIENCE, eventually

SOON = 2.0
"""The settler, when idle, turns once a second."""

pytestmark = pytest.mark.slow


class Broker(MemoryTransport):
    """A broker of whose calls one never comes back while ``stuck`` names it; and whose own thread may be stuck."""

    def __init__(self, name: str) -> None:
        self.url = f"memory://{name}"
        super().__init__(parse_url(self.url))
        self.stuck = ""
        self.goes_on = threading.Event()
        self.says: str | Exception | None = None

    def hang(self, call: str) -> None:
        if self.stuck == call:
            self.goes_on.wait(PATIENCE)

    def consumer(self, queues: Sequence[str], **options: Any) -> Consumer:
        consumer = super().consumer(queues, **options)
        assert isinstance(consumer, MemoryConsumer)
        receive, settle, extend = consumer.receive, consumer.settle, consumer.extend

        def hanging_receive(limit: int, timeout: float) -> list[Delivery]:
            self.hang("receive")
            return receive(limit, min(timeout, 0.05))

        def hanging_settle(endings: Sequence[Ending]) -> list[Settled]:
            self.hang("settle")
            return settle(endings)

        def hanging_extend(deliveries: Sequence[Delivery]) -> list[Settled]:
            self.hang("extend")
            return extend(deliveries)

        consumer.receive = hanging_receive  # type: ignore[method-assign]
        consumer.settle = hanging_settle  # type: ignore[method-assign]
        consumer.extend = hanging_extend  # type: ignore[method-assign]
        return consumer

    def stalled(self) -> str | None:
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


class Store(MemoryBackend):
    """A store that never comes back from ``put`` while its broker's ``stuck`` names that."""

    broker: Broker

    def put(self, results: Sequence[StoredResult]) -> list[bool]:
        self.broker.hang("put")
        return super().put(results)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "_STALLED_SECONDS", SOON)
    monkeypatch.setattr(runner_module, "_BLOCKED_SECONDS", 0.5)


@pytest.fixture
def broker() -> Broker:
    return Broker(new_id())


@pytest.fixture
def app(broker: Broker) -> Iterator[Ekiden]:
    store = Store(parse_url(broker.url))
    store.broker = broker
    with Ekiden("stalls", broker=broker.url, worker_grace=0.1) as app:
        app.adopt(broker, store)
        yield app
        broker.goes_on.set()


@pytest.fixture
def worker(app: Ekiden) -> Iterator[Worker]:
    @app.task(name="work")
    def work(seconds: float) -> None:
        time.sleep(seconds)

    @app.task(name="block")
    async def block(seconds: float) -> None:
        time.sleep(seconds)

    with app.worker(threads=1, lease=1.0) as running:
        yield running.worker
        app.transport.goes_on.set()  # type: ignore[attr-defined]


def stays_well(worker: Worker, seconds: float) -> bool:
    give_up = time.monotonic() + seconds
    while time.monotonic() < give_up:
        if worker.stalled() is not None:
            return False
        time.sleep(0.02)
    return True


def test_an_idle_worker_and_a_long_task_are_well(app: Ekiden, worker: Worker) -> None:
    app.send_task("work", (1.5 * SOON,))
    assert stays_well(worker, 3 * SOON)


@pytest.mark.parametrize(
    ("call", "named"),
    [("receive", "receives"), ("settle", "settles"), ("extend", "settles"), ("put", "stores results")],
)
def test_a_thread_that_is_stuck_in_a_call_is_named(
    app: Ekiden, worker: Worker, broker: Broker, call: str, named: str
) -> None:
    broker.stuck = call
    app.send_task("work", (3.0 if call == "extend" else 0.0,))

    said = eventually(worker.stalled, what="it is found to be stuck")
    assert named in said

    broker.stuck = ""
    broker.goes_on.set()
    eventually(lambda: worker.stalled() is None, what="it works again")


def test_an_event_loop_that_is_blocked_is_named(app: Ekiden, worker: Worker) -> None:
    app.send_task("block", (1.5,))

    said = eventually(worker.stalled, what="it is found to be stuck")
    assert "event loop" in said
    eventually(lambda: worker.stalled() is None, what="it works again")


@pytest.mark.parametrize("how", [lambda: "the I/O thread is stuck", lambda: ValueError("the I/O thread is a mess")])
def test_what_a_transport_says_of_its_own_threads_counts(
    worker: Worker, broker: Broker, how: Callable[[], str | Exception]
) -> None:
    broker.says = how()
    assert "the I/O thread is" in str(worker.stalled())

    broker.says = None
    assert worker.stalled() is None
