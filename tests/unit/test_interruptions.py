"""An exception out of a signal handler (Ctrl-C, an alarm), wherever it comes, leaves nothing locked or half done.

The interpreter runs signal handlers in the main thread after calls, at the start of functions and at the end of loops.
Here a signal arrives at every instruction of ekiden's, one run after another, and its handler raises at the next of
these places: where a real one would.
"""

from __future__ import annotations

import functools
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ekiden
import pytest
from ekiden import Ekiden, Task, hooks, memory
from ekiden.errors import BrokerUnavailable
from ekiden.memory import MemoryTransport
from ekiden.message import Message, Published, PublishOutcome, new_id
from ekiden.messaging import connect
from ekiden.options import Publishing
from ekiden.publisher import Publisher
from ekiden.testing.interruptions import Signals
from ekiden.transport import Transport
from ekiden.urls import parse_url

from tests.working import PATIENCE, eventually

OURS = ekiden.__file__.rpartition("/")[0] + "/"
ONCE = Publishing(PATIENCE, None)


@pytest.fixture
def signals() -> Iterator[Signals]:
    signals = Signals()
    with signals.handled():
        yield signals


def at_every_instruction(
    signals: Signals, call: Callable[[], object], check: Callable[[], None], *, within: str = "", lines: bool = False
) -> int:
    """Interrupt ``call`` at each of its instructions and ``check`` afterwards; how often it was interrupted."""
    interrupted = number = 0
    while True:
        number += 1
        was_interrupted = signals.interrupt(call, number, within=OURS + within, lines=lines)
        check()
        if was_interrupted is None:
            return interrupted
        interrupted += was_interrupted


def in_another_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result(PATIENCE)


def everything_in(transport: Transport, queue: str = "default") -> Counter[str]:
    """The ids of all messages of a queue, as often as they are handed out, and the queue is empty then."""
    with transport.consumer([queue], lease=60, prefetch=100_000, name=new_id()) as consumer:
        found: Counter[str] = Counter()
        while deliveries := consumer.receive(1000, 0):
            found.update(delivery.message.id for delivery in deliveries)
            consumer.settle([ekiden.message.Ending(delivery) for delivery in deliveries])
        depth = transport.depth(queue)
        assert (depth.ready, depth.delayed, depth.leased) == (0, 0, 0)
    return found


@pytest.fixture
def broker_url() -> Iterator[str]:
    name = new_id()
    yield f"memory://{name}"
    memory.discard(name)


@pytest.fixture(params=["memory", "rpc"])
def app(request: pytest.FixtureRequest, broker_url: str) -> Iterator[Ekiden]:
    backend = broker_url if request.param == "memory" else "rpc://"
    with Ekiden("interrupted", broker=broker_url, backend=backend) as app:
        yield app


@pytest.fixture
def add(app: Ekiden) -> Task[[int, int], int]:
    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    return add


@pytest.mark.slow
def test_delay_leaves_nothing_locked(signals: Signals, app: Ekiden, add: Task[[int, int], int]) -> None:
    add.delay(0, 0)
    everything_in(app.transport)

    def check() -> None:
        sent = {in_another_thread(functools.partial(add.delay, 1, 2)).id, add.delay(3, 4).id}
        found = everything_in(app.transport)
        assert {found[each] for each in sent} == {1}
        assert set(found.values()) == {1}
        assert len(found) <= 3

    assert at_every_instruction(signals, lambda: add.delay(1, 2), check) > 100
    with app.worker():
        assert add.delay(1, 2).get(PATIENCE) == 3


@pytest.mark.slow
def test_a_first_delay_leaves_nothing_locked(signals: Signals, broker_url: str) -> None:
    apps = [Ekiden("first", broker=broker_url, backend="rpc://")]

    def first() -> None:
        apps[-1].send_task("somewhere", (1,))

    def check() -> None:
        app = apps.pop()
        sent = in_another_thread(functools.partial(app.send_task, "somewhere", (1,)))
        assert everything_in(app.transport)[sent.id] == 1
        app.close()
        apps.append(Ekiden("first", broker=broker_url, backend="rpc://"))

    first()
    check()
    assert at_every_instruction(signals, first, check, within="rpc.py", lines=True) > 20
    assert at_every_instruction(signals, first, check, within="app.py", lines=True) > 20
    eventually(lambda: "ekiden-replies" not in {each.name for each in threading.enumerate()}, what="no thread is left")


@pytest.mark.slow
def test_delayed_calls_and_many_calls_leave_nothing_by_half(signals: Signals, broker_url: str) -> None:
    transport = MemoryTransport(parse_url(broker_url))
    publisher = Publisher(lambda: transport)

    def send() -> None:
        later = Message(new_id(), "later", b"", due=time.time() + 3600)
        publisher.publish([Message(new_id(), "default", b""), later, Message(new_id(), "default", b"")], ONCE)

    send()

    def check() -> None:
        in_another_thread(lambda: publisher.publish([Message(new_id(), "default", b"")], ONCE))
        assert set(everything_in(transport).values()) == {1}
        later = transport.depth("later").delayed
        assert transport.purge("later") == later
        depth = transport.depth("later")
        assert (depth.ready, depth.delayed, depth.leased) == (0, 0, 0)

    assert at_every_instruction(signals, send, check) > 100


class GatedTransport(MemoryTransport):
    """A memory broker whose publishes of some messages wait for a gate."""

    def __init__(self, url: str) -> None:
        super().__init__(parse_url(url))
        self.gates: dict[str, threading.Event] = {}
        self.entered: set[str] = set()

    def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
        for message in messages:
            if message.id in self.gates:
                self.entered.add(message.id)
                assert self.gates[message.id].wait(PATIENCE)
        return super().publish(messages, deadline=deadline)


class Crowd:
    """One caller publishes and is held up, the main thread comes second, and one more caller comes behind it."""

    def __init__(self, broker_url: str) -> None:
        self.transport = GatedTransport(broker_url)
        self.publisher = Publisher(lambda: self.transport)
        self.outcomes: dict[str, PublishOutcome] = {}
        self._threads: list[threading.Thread] = []
        self._rounds = 0

    def publish_in_between(self) -> None:
        """What the main thread does."""
        self._rounds += 1
        first, last = f"first-{self._rounds}", f"last-{self._rounds}"
        gate = self.transport.gates[first] = threading.Event()
        self._start(first)
        eventually(lambda: first in self.transport.entered, what="the first is publishing")
        line, publisher = len(self.publisher._line), self.publisher

        def follow() -> None:
            eventually(lambda: len(publisher._line) > line or gate.is_set(), what="the main thread is in the line")
            self._start(last)
            eventually(lambda: len(publisher._waiting) > 1 or gate.is_set(), what="the last one waits")
            gate.set()

        self._threads.append(threading.Thread(target=follow))
        self._threads[-1].start()
        try:
            publisher.publish([Message(f"main-{self._rounds}", "default", b"")], ONCE)
        finally:
            gate.set()

    def check(self) -> None:
        """Every other caller was answered, and each message is there once."""
        for thread in list(self._threads):
            thread.join(PATIENCE)
            assert not thread.is_alive()
        for thread in list(self._threads):  # those that were started meanwhile
            thread.join(PATIENCE)
        self._threads.clear()
        in_another_thread(lambda: self.publisher.publish([Message("after", "default", b"")], ONCE))
        found = everything_in(self.transport)
        expected = {f"first-{self._rounds}", f"last-{self._rounds}", "after"}
        assert set(found) - {f"main-{self._rounds}"} == expected
        assert set(found.values()) == {1}
        assert {self.outcomes.pop(f"{name}-{self._rounds}") for name in ("first", "last")} <= {
            PublishOutcome.STORED,
            PublishOutcome.DUPLICATE,
        }
        assert not self.publisher._line
        assert not self.publisher._waiting

    def _start(self, name: str) -> None:
        def publish() -> None:
            (answer,) = self.publisher.publish([Message(name, "default", b"")], ONCE)
            self.outcomes[name] = answer.outcome

        thread = threading.Thread(target=publish)
        self._threads.append(thread)
        thread.start()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_who_leads_and_is_interrupted_holds_up_nobody(
    signals: Signals, broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ekiden.publisher._LOOK_AGAIN_SECONDS", 0.02)  # an interruption loses the call; it is faster so
    crowd = Crowd(broker_url)

    assert at_every_instruction(signals, crowd.publish_in_between, crowd.check, within="publisher.py") > 50


@pytest.mark.slow
def test_queues_without_tasks_leave_nothing_locked(signals: Signals, broker_url: str) -> None:
    with connect(broker_url) as connection:
        queue, topic = connection.queue("q"), connection.topic("t")
        subscription = topic.subscribe()
        queue.put(0)
        queue.get(0)

        def turn() -> None:
            queue.put("mine")
            item = queue.get(0)
            if item is not None:
                item.release()
            item = queue.get(0)
            if item is not None:
                item.ack()
            topic.publish("x")
            subscription.receive(0)
            queue.depth()

        def check() -> None:
            in_another_thread(lambda: queue.put("others"))
            found = in_another_thread(lambda: [item.value for item in all_of(queue)])
            assert found.count("others") == 1
            in_another_thread(lambda: topic.publish("y"))

        def all_of(queue: ekiden.messaging.Queue) -> Iterator[ekiden.messaging.Received]:
            for item in queue.iterate(timeout=0):
                item.ack()
                yield item

        assert at_every_instruction(signals, turn, check) > 100


@pytest.mark.slow
def test_waiting_for_a_result_leaves_nothing_locked(signals: Signals, app: Ekiden, add: Task[[int, int], int]) -> None:
    pending = add.delay(1, 2)

    def wait() -> None:
        with pytest.raises(TimeoutError):
            app.AsyncResult(pending.id).get(0.001)

    def check() -> None:
        in_another_thread(wait)

    assert at_every_instruction(signals, wait, check) > 50
    with app.worker():
        assert pending.get(PATIENCE) == 3


def test_ctrl_c_in_a_receiver_is_not_taken_for_its_failure(app: Ekiden, add: Task[[int, int], int]) -> None:
    def stop(**_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    hooks.before_task_publish.connect(stop)
    try:
        with pytest.raises(KeyboardInterrupt):
            add.delay(1, 2)
    finally:
        hooks.before_task_publish.disconnect(stop)

    assert add.delay(1, 2).id in everything_in(app.transport)


def test_the_line_of_those_who_get_keeps_to_their_timeouts(broker_url: str) -> None:
    with connect(broker_url) as connection, ThreadPoolExecutor(1) as thread:
        queue = connection.queue("q")
        patient = thread.submit(queue.get, PATIENCE)
        eventually(lambda: len(queue._receiving) == 1, what="the first one waits")

        assert queue.get(0.01) is None

        queue.put("x")
        item = patient.result(PATIENCE)
        assert item is not None
        assert item.value == "x"


def test_a_publish_that_nobody_could_lead_ends_in_time(broker_url: str) -> None:
    crowd = Crowd(broker_url)
    gate = crowd.transport.gates["stuck"] = threading.Event()
    crowd._start("stuck")
    eventually(lambda: "stuck" in crowd.transport.entered, what="it is stuck")

    with pytest.raises(BrokerUnavailable, match=r"within 0\.1 s"):
        crowd.publisher.publish([Message("late", "default", b"")], Publishing(0.1, None))

    gate.set()
    for each in crowd._threads:
        each.join(PATIENCE)
    assert set(everything_in(crowd.transport)) == {"stuck"}
