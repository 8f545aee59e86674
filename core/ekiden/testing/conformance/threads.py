"""Threads on one transport: a consumer's two, many that wait for nothing, and many that want the same."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import Empty, SimpleQueue

import pytest

from ekiden.message import Delivery, SettleOutcome
from ekiden.testing.conformance.fixtures import (
    PATIENCE,
    TransportFixtures,
    a_message,
    eventually,
    let_it_wait,
    numbered,
    settle,
)
from ekiden.testing.conformance.pace import assert_quick
from ekiden.transport import Consumer, Transport

WAITERS = 50
QUEUES = 20
IDLE_SECONDS = 2.0
BUSY_SHARE = 0.03
"""The share of one core that fifty idle waiters may use together, on a machine that does other things too."""


def busy_seconds() -> float:
    """How much processor time this process uses in ``IDLE_SECONDS``; more of it while others keep the machine busy."""
    before = time.process_time()
    let_it_wait(IDLE_SECONDS)
    return time.process_time() - before


class Threads(TransportFixtures):
    """What is called by several threads, and what sleeps until it is called."""

    def test_one_thread_receives_while_another_ends(self, transport: Transport, other: Transport, queue: str) -> None:
        count = 2000
        consumer = self.consume(other, queue, prefetch=100)
        to_end: SimpleQueue[list[Delivery]] = SimpleQueue()
        settled: Counter[str] = Counter()
        attempts: set[int] = set()

        def end() -> None:
            while settled.total() < count:
                try:
                    deliveries = to_end.get(timeout=PATIENCE)
                except Empty:
                    return
                # Some are extended first, and every seventh is given back and comes again.
                consumer.extend(deliveries[::3])
                consumer.release(deliveries[6::7])
                kept = [delivery for number, delivery in enumerate(deliveries) if number % 7 != 6]
                outcomes = settle(consumer, kept)
                attempts.update(delivery.attempt for delivery in kept)
                settled.update(
                    delivery.message.id
                    for delivery, outcome in zip(kept, outcomes, strict=True)
                    if outcome is SettleOutcome.SETTLED
                )

        with ThreadPoolExecutor() as threads:
            ending = threads.submit(end)
            publishing = threads.submit(self.publish_in_batches, transport, queue, count)
            while not ending.done():
                deliveries = consumer.receive(40, 0.2)
                if deliveries:
                    to_end.put(deliveries)
            publishing.result()
            ending.result()

        assert len(settled) == settled.total() == count
        assert attempts == {1}
        self.assert_depth(transport, queue, ready=0)

    def test_asking_disturbs_no_working_consumer(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 500))
        consumer = self.consume(transport, queue, prefetch=50)
        over = threading.Event()

        def ask() -> None:
            while not over.is_set():
                transport.depth(queue)
                transport.browse(queue, limit=5)
                transport.broadcast(queue, [b"x"])

        with ThreadPoolExecutor() as threads:
            asking = threads.submit(ask)
            try:
                worked_off = sum(len(settle(consumer, self.collect(consumer, 50))) for _ in range(10))
            finally:
                over.set()
            asking.result()

        assert worked_off == 500
        self.assert_depth(transport, queue, ready=0)

    @pytest.mark.slow
    def test_fifty_idle_waiters_use_no_processor_time(self, transport: Transport, other: Transport, queue: str) -> None:
        transport.publish([a_message(f"{queue}-0", due_in=3600)])
        with self.waiters(other, queue, settle):
            let_it_wait(0.7)  # while they connect
            spans = [busy_seconds()]
            while min(spans) >= IDLE_SECONDS * BUSY_SHARE and len(spans) < 3:
                spans.append(busy_seconds())
        assert_quick(min(spans), IDLE_SECONDS * BUSY_SHARE, spans)

    @pytest.mark.slow
    def test_one_message_wakes_one_of_many_waiters_in_milliseconds(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        received: SimpleQueue[tuple[str, float]] = SimpleQueue()

        def work(consumer: Consumer, deliveries: list[Delivery]) -> None:
            now = time.monotonic()
            for delivery in deliveries:
                received.put((delivery.message.id, now))
            settle(consumer, deliveries)

        delays = []
        with self.waiters(other, queue, work):
            let_it_wait(0.7)
            for number in range(20):
                message = a_message(f"{queue}-{number}")
                published = time.monotonic()
                transport.publish([message])
                message_id, at = received.get(timeout=PATIENCE)
                assert message_id == message.id
                delays.append(at - published)
            let_it_wait(0.2)

        assert received.empty(), "a message was handed out twice"
        assert_quick(sorted(delays)[10], 0.1, delays)

    @pytest.mark.slow
    def test_many_messages_wake_several_waiters(self, transport: Transport, other: Transport, queue: str) -> None:
        workers: Counter[str] = Counter()
        lock = threading.Lock()

        def work(consumer: Consumer, deliveries: list[Delivery]) -> None:
            let_it_wait(0.05)
            settle(consumer, deliveries)
            with lock:
                workers[threading.current_thread().name] += len(deliveries)

        with self.waiters(other, queue, work, queues=1, limit=5, count=8):
            let_it_wait(0.5)
            transport.publish(numbered(f"{queue}-0", 200))
            eventually(lambda: workers.total() >= 200, what="all are worked off", within=30)

        assert workers.total() == 200
        assert len(workers) >= 4, workers

    @contextmanager
    def waiters(
        self,
        transport: Transport,
        queue: str,
        work: Callable[[Consumer, list[Delivery]], object],
        *,
        count: int = WAITERS,
        queues: int = QUEUES,
        limit: int = 10,
    ) -> Iterator[None]:
        """Threads that each have a consumer of one of the queues ``QUEUE-0``, ``QUEUE-1``, ..., and wait and work."""
        consumers = [
            self.consume(transport, f"{queue}-{number % queues}", prefetch=limit, name=f"{queue}-waiter-{number}")
            for number in range(count)
        ]
        over = threading.Event()

        def wait_and_work(consumer: Consumer) -> None:
            while not over.is_set():
                deliveries = consumer.receive(limit, 60.0)
                if deliveries:
                    work(consumer, deliveries)

        with ThreadPoolExecutor(count) as threads:
            waiting = [threads.submit(wait_and_work, consumer) for consumer in consumers]
            try:
                yield
            finally:
                over.set()
                for consumer in consumers:
                    consumer.stop()
            for wait in waiting:
                wait.result()

    def publish_in_batches(self, transport: Transport, queue: str, count: int) -> None:
        """Publish ``count`` messages, fifty at a time."""
        for _ in range(0, count, 50):
            transport.publish(numbered(queue, 50))
