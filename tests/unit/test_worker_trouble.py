"""A worker whose broker or result store is away: nothing is lost, nothing is claimed, and it goes on by itself."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
from ekiden import Ekiden
from ekiden.errors import BackendError, BrokerUnavailable, Reject, TransportClosed, TransportCrashed, TransportError
from ekiden.inprocess import InProcessWorker
from ekiden.memory import MemoryBackend, MemoryConsumer, MemoryTransport
from ekiden.message import Delivery, Ending, Settled, SettleOutcome, new_id
from ekiden.results import Begun, Record, Start, StoredResult
from ekiden.transport import Consumer
from ekiden.urls import parse_url

from tests.working import PATIENCE, Gate, Notes, eventually, is_empty


class Store(MemoryBackend):
    """A store in memory that can be switched off."""

    away = False

    def _check(self) -> None:
        if self.away:
            raise BackendError("the store is away")

    def put(self, results: Sequence[StoredResult]) -> list[bool]:
        self._check()
        return super().put(results)

    def read(self, keys: Sequence[str]) -> list[Record | None]:
        self._check()
        return super().read(keys)

    def begin(self, starts: Sequence[Start]) -> list[Begun]:
        self._check()
        return super().begin(starts)


class Broker(MemoryTransport):
    """A broker in memory whose deliveries cannot be settled, or nothing be received, when it is switched off."""

    away = False
    deaf = False
    settles = True

    def consumer(self, queues: Sequence[str], **options: Any) -> Consumer:
        consumer = super().consumer(queues, **options)
        assert isinstance(consumer, MemoryConsumer)
        receive, settle, release = consumer.receive, consumer.settle, consumer.release

        def receive_if_there(limit: int, timeout: float) -> list[Delivery]:
            if self.away or self.deaf:
                raise BrokerUnavailable("the broker is away")
            return receive(limit, timeout)

        def settle_if_there(endings: Sequence[Ending]) -> list[Settled]:
            if self.away or not self.settles:
                return [Settled(SettleOutcome.FAILED, BrokerUnavailable("the broker is away")) for _ in endings]
            return settle(endings)

        def release_if_there(deliveries: Sequence[Delivery], delay: float = 0.0, *, keep_attempt: bool = False) -> None:
            if self.away:
                raise BrokerUnavailable("the broker is away")
            release(deliveries, delay, keep_attempt=keep_attempt)

        consumer.receive = receive_if_there  # type: ignore[method-assign]
        consumer.settle = settle_if_there  # type: ignore[method-assign]
        consumer.release = release_if_there  # type: ignore[method-assign]
        return consumer


@pytest.fixture
def url() -> str:
    return f"memory://{new_id()}"


@pytest.fixture
def store(url: str) -> Store:
    return Store(parse_url(url))


@pytest.fixture
def broker(url: str) -> Broker:
    return Broker(parse_url(url))


@pytest.fixture
def app(url: str, store: Store, broker: Broker) -> Iterator[Ekiden]:
    with Ekiden("troubled", broker=url, worker_grace=2.0) as app:
        app.adopt(broker, store)
        yield app


@pytest.fixture
def notes() -> Notes:
    return Notes()


def test_results_are_kept_until_the_store_is_back(app: Ekiden, store: Store, notes: Notes) -> None:
    @app.task
    def work(number: int) -> int:
        notes.take(number)
        store.away = True
        return number

    with app.worker(threads=1):
        result = work.delay(7)
        notes.wait_for(1)
        eventually(lambda: app.transport.depth("default").leased == 1, what="it is still held")
        store.away = False

        assert result.get(PATIENCE) == 7
        eventually(lambda: is_empty(app), what="it is settled")
    assert notes.taken == [7]


def test_nothing_is_claimed_while_what_has_ended_cannot_be_stored(app: Ekiden, store: Store, notes: Notes) -> None:
    @app.task
    def work(number: int) -> int:
        notes.take(number)
        store.away = number == 0
        return number

    with app.worker(threads=1) as worker:
        first = work.delay(0)
        notes.wait_for(1)
        eventually(lambda: worker.worker._settler is not None and worker.worker._settler.in_trouble, what="trouble")
        second = work.delay(1)
        time.sleep(0.3)  # long enough to claim it, if it were claimed

        assert notes.taken == [0]
        assert app.transport.depth("default").ready == 1
        store.away = False
        assert (first.get(PATIENCE), second.get(PATIENCE)) == (0, 1)


def test_what_cannot_be_asked_about_is_given_back_and_asked_about_again(
    app: Ekiden, store: Store, notes: Notes
) -> None:
    @app.task
    def work() -> int:
        notes.take(work.request.attempt)
        return 1

    store.away = True
    with app.worker(threads=1):
        result = work.delay()
        time.sleep(0.2)  # long enough to run it, if it were run
        assert notes.taken == []
        store.away = False

        assert result.get(PATIENCE) == 1
    assert notes.taken == [1]


def test_endings_are_kept_until_the_broker_is_back(app: Ekiden, broker: Broker, notes: Notes) -> None:
    @app.task
    def work() -> str:
        notes.take("work")
        broker.away = True
        return "value"

    @app.task
    def then(value: str) -> None:
        notes.take(f"then {value}")

    with app.worker(threads=1):
        result = work.apply_async(link=then.s())
        assert result.get(PATIENCE) == "value"  # stored before it is settled
        notes.wait_for(1)
        broker.away = False

        assert notes.wait_for(2) == ["work", "then value"]
        eventually(lambda: is_empty(app), what="all is settled")


def test_receiving_goes_on_when_the_broker_is_back(app: Ekiden, broker: Broker) -> None:
    @app.task
    def work() -> int:
        return 1

    with app.worker(threads=1):
        assert work.delay().get(PATIENCE) == 1
        broker.deaf = True
        result = work.delay()
        time.sleep(0.3)
        broker.deaf = False

        assert result.get(PATIENCE) == 1


@pytest.mark.slow
@pytest.mark.parametrize("what", ["store", "broker"])
def test_a_worker_stops_in_bounded_time_while_it_is_in_trouble(
    app: Ekiden, store: Store, broker: Broker, notes: Notes, what: str
) -> None:
    @app.task
    def work() -> int:
        notes.take("ran")
        if len(notes.taken) == 1:
            store.away = what == "store"
            broker.away = what == "broker"
        return 1

    worker = app.worker(threads=1).start()
    result = work.delay()
    notes.wait_for(1)
    began = time.monotonic()

    worker.stop()

    assert time.monotonic() - began < 8
    store.away = broker.away = False
    (seen,) = app.transport.browse("default")
    assert (seen.message.id, seen.attempt) == (result.id, 1)  # it comes back, as one that was handed out before
    with app.worker(threads=1):
        assert result.get(PATIENCE) == 1


def test_an_early_task_does_not_start_before_its_settling_is_confirmed(
    app: Ekiden, broker: Broker, notes: Notes
) -> None:
    @app.task(acks="early")
    def once() -> int:
        notes.take("ran")
        return 1

    broker.settles = False
    with app.worker(threads=1):
        result = once.delay()
        eventually(lambda: app.transport.depth("default").leased == 1, what="it is claimed")
        time.sleep(0.2)  # long enough to run it, if it were run
        assert notes.taken == []
        broker.settles = True

        assert result.get(PATIENCE) == 1
    assert notes.taken == ["ran"]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.slow
def test_an_early_task_that_gives_itself_back_runs_again(app: Ekiden, notes: Notes, is_async: bool) -> None:
    def body() -> int:
        notes.take(app.tasks["again"].request.attempt)
        if len(notes.taken) < 3:
            raise Reject("not now", requeue=True)
        return 1

    async def async_body() -> int:
        return body()

    task = app.task(name="again", acks="early")(async_body if is_async else body)
    with app.worker(threads=1):
        result = task.apply_async(priority=7, headers={"kind": "x"})

        assert result.get(PATIENCE) == 1
        eventually(lambda: is_empty(app), what="it is settled")
    assert notes.taken == [1, 1, 1]


@pytest.mark.slow
def test_an_early_task_that_cannot_be_settled_when_the_worker_ends_does_not_run(
    app: Ekiden, broker: Broker, notes: Notes
) -> None:
    gate = Gate()

    @app.task(acks="early")
    def once() -> None:
        notes.take("ran")

    @app.task
    def hold() -> None:
        gate.pass_through()

    worker = app.worker(threads=1).start()
    hold.delay()
    assert gate.arrived.wait(PATIENCE)
    once.delay()
    broker.away = True
    gate.open.set()
    worker.stop(at_once=True)

    assert notes.taken == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ekiden-")]


def test_a_lost_delivery_is_a_normal_answer(app: Ekiden, notes: Notes, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()

    @app.task
    def work() -> str:
        notes.take("began")
        gate.pass_through()
        return "late"

    @app.task
    def fine() -> int:
        return 1

    with app.worker(threads=2, name="slot") as worker:
        result = work.delay()
        assert gate.arrived.wait(PATIENCE)
        # Somebody opens the worker's slot: what it holds goes back.
        with app.transport.consumer(["default"], lease=60.0, prefetch=10, name=worker.worker.name) as other:
            (taken,) = other.receive(1, PATIENCE)
            gate.open.set()
            eventually(lambda: "was lost" in caplog.text, what="a warning")
            assert taken.message.id == result.id
            assert taken.attempt == 2
            assert fine.delay().get(PATIENCE) == 1
        assert result.get(PATIENCE) == "late"
        eventually(lambda: is_empty(app), what="it comes back, and is settled")
    assert notes.taken == ["began"]  # its result was stored before its delivery was found to be lost


@pytest.mark.slow
def test_a_bug_in_a_thread_of_ours_ends_the_worker_with_that_error(app: Ekiden, broker: Broker) -> None:
    @app.task
    def work() -> int:
        return 1

    worker: InProcessWorker = app.worker(threads=1).start()
    consumer = worker.worker._consumer
    assert consumer is not None

    def broken(_endings: Sequence[Ending]) -> list[Settled]:
        raise ZeroDivisionError("a bug of ours")

    consumer.settle = broken  # type: ignore[method-assign]
    work.delay()

    worker._thread.join(PATIENCE)
    with pytest.raises(ZeroDivisionError, match="a bug of ours"):
        worker.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ekiden-")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [TransportCrashed("a bug"), TransportClosed("closed elsewhere")], ids=["crash", "close"]
)
@pytest.mark.parametrize("step", ["receive", "settle", "release", "extend", "listen"])
def test_a_transport_that_is_gone_ends_the_worker_wherever_it_is_met(
    app: Ekiden, step: str, error: TransportError
) -> None:
    gate = Gate()

    @app.task
    def work() -> None:
        gate.pass_through()
        raise Reject("later", requeue=step == "release")

    worker: InProcessWorker = app.worker(threads=2, lease=0.3).start()
    consumer = worker.worker._consumer
    assert consumer is not None
    work.delay()
    assert gate.arrived.wait(PATIENCE)

    def fail(*_: object, **_options: object) -> Any:
        raise error

    def answer(asked: Sequence[object]) -> list[Settled]:
        return [Settled(SettleOutcome.FAILED, error) for _ in asked]

    match step:
        case "settle" | "extend":
            setattr(consumer, step, answer)
        case "receive" | "release":
            setattr(consumer, step, fail)
        case "listen":
            control = worker.worker._control
            assert control is not None
            assert control._listener is not None
            control._listener.receive = fail  # type: ignore[method-assign]
            app.revoke("wakes it", terminate=True)
    if step in {"settle", "release"}:
        gate.open.set()
    eventually(worker.worker.is_stopping, what="it cannot go on")
    gate.open.set()

    worker._thread.join(PATIENCE)
    assert not worker._thread.is_alive()
    # That its app was closed in this process is no trouble.
    with nullcontext() if isinstance(error, TransportClosed) else pytest.raises(type(error), match=str(error)):
        worker.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ekiden-")]


def test_a_task_that_closes_the_app_ends_its_worker(app: Ekiden, url: str) -> None:
    app.close()  # the worker opens what the task is to close

    @app.task
    def work() -> None:
        app.close()

    with Ekiden("sender", broker=url) as sender:
        worker: InProcessWorker = app.worker(threads=1).start()
        sender.send_task(work.name)

        worker._thread.join(PATIENCE)
        assert not worker._thread.is_alive()
        worker.stop()  # closing its app is how a worker of this process may be ended


def test_renewals_that_fail_are_logged(app: Ekiden, caplog: pytest.LogCaptureFixture) -> None:
    gate = Gate()

    @app.task
    def work() -> int:
        gate.pass_through()
        return 1

    with app.worker(threads=1, lease=0.3) as worker:
        consumer = worker.worker._consumer
        assert consumer is not None
        extend = consumer.extend
        result = work.delay()
        assert gate.arrived.wait(PATIENCE)

        def fail(_deliveries: Sequence[Delivery]) -> list[Settled]:
            raise BrokerUnavailable("the broker is away")

        consumer.extend = fail  # type: ignore[method-assign]
        eventually(lambda: "were not renewed" in caplog.text, what="it is logged")
        assert "the broker is away" in caplog.text
        consumer.extend = extend  # type: ignore[method-assign]
        eventually(lambda: "renewed again" in caplog.text, what="that it is over, too")
        gate.open.set()
        assert result.get(PATIENCE) == 1
