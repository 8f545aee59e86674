"""Brokers in trouble: full, silent, restarted, or forgetting to wake anybody.

Each class needs something that only the plugin can do to its broker, and asks for it by a fixture to override.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress

import pytest

from ekiden.errors import BrokerUnavailable
from ekiden.message import STORED, Delivery, Ending, Message, Published, PublishOutcome, SettleOutcome
from ekiden.testing.conformance.fixtures import (
    PATIENCE,
    TransportFixtures,
    a_message,
    eventually,
    let_it_wait,
    numbered,
    settle,
)
from ekiden.transport import Consumer, Transport


class FullBrokerConformance(TransportFixtures):
    """``url`` names a broker so small that some thousands of messages of a kilobyte fill it."""

    @pytest.mark.timeout(180)
    def test_a_full_broker_says_so_and_recovers_when_it_is_drained(self, transport: Transport, queue: str) -> None:
        stored = self.fill(transport, queue)
        assert stored > 0

        consumer = self.consume(transport, queue)
        drained = 0
        while drained < stored:
            drained += len(settle(consumer, self.collect(consumer, 1)))

        eventually(lambda: self.publish_one(transport, queue).outcome is PublishOutcome.STORED, what="there is room")
        assert self.collect_one(consumer).attempt == 1

    @pytest.mark.timeout(180)
    def test_an_ending_of_a_full_broker_is_answered_and_stays_held_when_it_failed(
        self, transport: Transport, queue: str
    ) -> None:
        transport.publish([a_message(queue)])
        consumer = self.consume(transport, queue, prefetch=1)
        held = self.collect_one(consumer)
        self.fill(transport, f"{queue}-other")
        follow_ups = tuple(a_message(f"{queue}-next", b"x" * 1024) for _ in range(100))

        (answer,) = consumer.settle([Ending(held, follow_ups)])

        assert answer.outcome is SettleOutcome.FAILED
        assert isinstance(answer.error, BrokerUnavailable)
        transport.purge(f"{queue}-other")
        assert eventually(lambda: consumer.settle([Ending(held)])[0].outcome, what="settled") is SettleOutcome.SETTLED

    def fill(self, transport: Transport, queue: str) -> int:
        """Publish until the broker says that it is full, and return how many it took."""
        stored = 0
        while True:
            answer = self.publish_one(transport, queue)
            if answer.outcome is not PublishOutcome.STORED:
                assert isinstance(answer.error, BrokerUnavailable)
                return stored
            stored += 1

    def publish_one(self, transport: Transport, queue: str) -> Published:
        """Publish a kilobyte; that nothing could be asked at all is a failure as well."""
        try:
            return transport.publish([a_message(queue, b"x" * 1024)])[0]
        except BrokerUnavailable as error:
            return Published(PublishOutcome.FAILED, error)


class SilentBrokerConformance(TransportFixtures):
    """A broker that accepts what is sent and does not answer: every call ends, with a typed error, and all recovers."""

    deadline_seconds = 30.0
    """Every call has ended by then. Override it, with a short deadline in the URL, to keep the tests fast."""

    @pytest.fixture
    def silent(self) -> Callable[[], AbstractContextManager[None]]:
        """Returns a context manager; the broker does not answer while it is entered: override this."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'silent'.")

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_every_call_ends_while_the_broker_is_silent_and_works_afterwards(
        self, transport: Transport, queue: str, silent: Callable[[], AbstractContextManager[None]]
    ) -> None:
        transport.publish(numbered(queue, 2))
        consumer = self.consume(transport, queue, prefetch=1)
        held = self.collect_one(consumer)
        calls: dict[str, Callable[[], object]] = {
            "publish": lambda: self.assert_failed(transport.publish([a_message(queue)])),
            "depth": lambda: transport.depth(queue),
            "browse": lambda: transport.browse(queue),
            "purge": lambda: transport.purge(f"{queue}-other"),
            "broadcast": lambda: transport.broadcast(queue, [b"x"]),
            "release": lambda: consumer.release([held]),
        }

        with silent():
            for name, call in calls.items():
                started = time.monotonic()
                with suppress(BrokerUnavailable):
                    call()
                assert time.monotonic() - started < self.deadline_seconds, name
            (answer,) = consumer.settle([Ending(held)])

        assert answer.outcome in {SettleOutcome.FAILED, SettleOutcome.LOST}
        eventually(lambda: self.works(transport, f"{queue}-after"), what="all works again", within=60)

    def assert_failed(self, answers: list[Published]) -> None:
        """What was answered was not "stored"."""
        assert [answer.outcome for answer in answers] == [PublishOutcome.FAILED]

    def works(self, transport: Transport, queue: str) -> bool:
        """A message goes through."""
        try:
            transport.publish([a_message(queue)])
            with self.consume(transport, queue) as consumer:
                return settle(consumer, consumer.receive(1, 1.0)) == [SettleOutcome.SETTLED]
        except BrokerUnavailable:
            return False


class BrokerRestartConformance(TransportFixtures):
    """A broker that is stopped, or killed, and started again: everybody reconnects, and what was confirmed is there."""

    @pytest.fixture
    def restart_broker(self) -> Callable[[], None]:
        """Returns a function that stops the broker and has started it again when it returns: override this."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'restart_broker'.")

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_what_was_confirmed_survives_a_restart(
        self, transport: Transport, queue: str, restart_broker: Callable[[], None]
    ) -> None:
        published = [*numbered(queue, 50), *numbered(queue, 50, due_in=1.0)]
        assert transport.publish(published) == [STORED] * 100

        restart_broker()

        consumer = self.consume(transport, queue)
        received = self.collect_through_trouble(consumer, 100 if transport.description.survives_restart else 0)
        assert set(received) <= {message.id for message in published}

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_a_waiting_consumer_and_listener_survive_a_restart(
        self, transport: Transport, queue: str, restart_broker: Callable[[], None]
    ) -> None:
        consumer, listener = self.consume(transport, queue), transport.listen(queue)
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(self.collect_through_trouble, consumer, 1)
            let_it_wait()
            restart_broker()
            message = a_message(queue)
            eventually(lambda: self.published(transport, message), what="published", within=60)
            assert waiting.result() == [message.id]

        eventually(lambda: self.heard(transport, listener.receive, queue), what="a broadcast is heard", within=60)

    @pytest.mark.slow
    @pytest.mark.timeout(300)
    def test_what_was_held_over_a_restart_ends_or_comes_again(
        self, transport: Transport, queue: str, restart_broker: Callable[[], None]
    ) -> None:
        transport.publish(numbered(queue, 10))
        consumer = self.consume(transport, queue, lease=transport.description.shortest_lease)
        held = self.collect(consumer, 10)

        restart_broker()

        outcomes = eventually(lambda: self.settled(consumer, held), what="every ending is answered", within=60)
        lost = [delivery for delivery, outcome in zip(held, outcomes, strict=True) if outcome is SettleOutcome.LOST]
        if transport.description.survives_restart:
            assert len(self.collect_through_trouble(consumer, len(lost))) == len(lost)

    def collect_through_trouble(self, consumer: Consumer, count: int) -> list[str]:
        """The ids of ``count`` messages, each counted once, received and settled through errors."""
        seen: dict[str, None] = {}
        give_up = time.monotonic() + 60
        while len(seen) < count and time.monotonic() < give_up:
            try:
                deliveries = consumer.receive(100, 1.0)
            except BrokerUnavailable:
                let_it_wait()
                continue
            settle(consumer, deliveries)
            seen.update((delivery.message.id, None) for delivery in deliveries)
        assert len(seen) >= count
        return list(seen)

    def published(self, transport: Transport, message: Message) -> bool:
        """Whether it is stored now, by this or an earlier call."""
        try:
            return transport.publish([message])[0].outcome is not PublishOutcome.FAILED
        except BrokerUnavailable:
            return False

    def heard(self, transport: Transport, receive: Callable[[float], list[bytes]], topic: str) -> bool:
        """Whether a broadcast reaches the listener."""
        try:
            transport.broadcast(topic, [b"still there?"])
            return bool(receive(1.0))
        except BrokerUnavailable:
            return False

    def settled(self, consumer: Consumer, held: list[Delivery]) -> list[SettleOutcome] | None:
        """What became of each, once none FAILED any more; an ending that succeeded before is LOST then."""
        outcomes = settle(consumer, held)
        return None if SettleOutcome.FAILED in outcomes else outcomes


class LostWakeUpConformance(TransportFixtures):
    """A wake-up is a hint: a message whose signal was lost is noticed all the same, a little later."""

    @pytest.fixture
    def silent_publisher(self) -> Iterator[Transport]:
        """The same broker, opened so that publishing stores messages and wakes nobody: override this."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'silent_publisher'.")

    @pytest.mark.slow
    def test_a_message_is_noticed_although_its_signal_was_lost(
        self, transport: Transport, silent_publisher: Transport, queue: str
    ) -> None:
        consumer = self.consume(transport, queue)
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(consumer.receive, 1, transport.description.wakes_within + PATIENCE)
            let_it_wait(0.3)
            published = time.monotonic()
            silent_publisher.publish([a_message(queue, b"psst")])
            received = waiting.result()
            noticed_after = time.monotonic() - published

        assert [delivery.message.body for delivery in received] == [b"psst"]
        assert noticed_after < transport.description.wakes_within + 1.0
