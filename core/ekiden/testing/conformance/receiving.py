"""Who gets which message, in which order, and when: batches, priorities, turns, waiting, delays."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ekiden.bounds import MOST_IN_HAND
from ekiden.errors import ConfigurationError, TransportClosed, TransportError
from ekiden.message import STORED, Message, SettleOutcome, new_id
from ekiden.testing.conformance.fixtures import (
    PATIENCE,
    TransportFixtures,
    a_message,
    bodies,
    eventually,
    ids,
    let_it_wait,
    numbered,
    settle,
)
from ekiden.testing.conformance.pace import assert_quick
from ekiden.times import LATEST_TIME
from ekiden.transport import Transport

EARLY = 0.05
"""A delayed message may come this much (seconds) before it is due, and no more."""

SOON = 3.0
"""A delayed message that is due should be there within this many seconds, on a busy machine too."""


class Receiving(TransportFixtures):
    """Order, batches, turns and waiting."""

    def test_messages_come_in_the_order_of_publishing(self, transport: Transport, queue: str) -> None:
        for message in numbered(queue, 30):
            transport.publish([message])
        consumer = self.consume(transport, queue)

        received = self.collect(consumer, 30, limit=7)

        assert bodies(received) == [b"%d" % number for number in range(30)]

    def test_a_batch_comes_in_its_order(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 1000))

        received = self.collect(self.consume(transport, queue), 1000)

        assert bodies(received) == [b"%d" % number for number in range(1000)]

    def test_no_more_than_the_limit_is_received(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 10))
        consumer = self.consume(transport, queue)

        assert len(consumer.receive(3, PATIENCE)) <= 3

    def test_two_consumers_share_a_queue_and_no_message(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        published = numbered(queue, 40)
        transport.publish(published)
        first, second = self.consume(transport, queue, prefetch=20), self.consume(other, queue, prefetch=20)

        received = self.collect(first, 20) + self.collect(second, 20)

        assert sorted(ids(received)) == sorted(message.id for message in published)

    def test_the_largest_prefetch_and_limit_are_taken(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 10))
        consumer = self.consume(transport, queue, prefetch=MOST_IN_HAND)

        received = consumer.receive(MOST_IN_HAND, PATIENCE)
        while len(received) < 10 and (more := consumer.receive(MOST_IN_HAND, PATIENCE)):
            received += more

        assert bodies(received) == [b"%d" % number for number in range(10)]

    def test_a_consumer_holds_no_more_than_its_prefetch(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 10))
        consumer = self.consume(transport, queue, prefetch=4)
        held = self.collect(consumer, 4)
        self.assert_nothing_comes(consumer)

        settle(consumer, held[:1])

        assert len(self.collect(consumer, 1)) == 1
        self.assert_nothing_comes(consumer)

    def test_settling_in_another_thread_makes_room_for_a_waiting_receive(
        self, transport: Transport, queue: str
    ) -> None:
        transport.publish(numbered(queue, 2))
        consumer = self.consume(transport, queue, prefetch=1)
        held = self.collect_one(consumer)

        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(consumer.receive, 10, PATIENCE)
            let_it_wait()
            settled = time.monotonic()
            assert settle(consumer, [held])
            received = waiting.result()
            woken_after = time.monotonic() - settled

        assert bodies(received) == [b"1"]
        assert_quick(woken_after, 1.0 + transport.description.wakes_within)

    def test_urgent_messages_come_first(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue, b"%d" % priority, priority=priority) for priority in (4, 0, 9, 5, 1, 8)])

        received = self.collect(self.consume(transport, queue, prefetch=1000), 6)

        assert bodies(received) == [b"9", b"8", b"5", b"4", b"1", b"0"]

    def test_all_ten_priorities_are_told_apart(self, transport: Transport, queue: str) -> None:
        messages = [a_message(queue, b"%d" % number, priority=number % 10) for number in range(100)]
        transport.publish(messages)

        received = self.collect(self.consume(transport, queue), 100, limit=10)

        in_order = sorted(messages, key=lambda message: -message.priority)
        assert ids(received) == [message.id for message in in_order]

    def test_an_urgent_message_overtakes_what_is_not_yet_received(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 50))
        consumer = self.consume(transport, queue, prefetch=5)
        settle(consumer, self.collect(consumer, 5))

        transport.publish([a_message(queue, b"urgent", priority=9)])

        # What this consumer has in hand already may come before it.
        received: list[bytes] = []
        while b"urgent" not in received and len(received) <= 5:
            delivery = self.collect_one(consumer)
            settle(consumer, [delivery])
            received.append(delivery.message.body)
        assert b"urgent" in received

    def test_a_busy_queue_does_not_starve_a_quiet_one(self, transport: Transport, queue: str) -> None:
        busy, quiet, empty = f"{queue}-busy", f"{queue}-quiet", f"{queue}-empty"
        transport.publish([*numbered(busy, 200, priority=9), *numbered(quiet, 20, priority=0)])
        consumer = self.consume(transport, busy, empty, quiet, prefetch=10)

        served: list[str] = []
        while len(served) < 220:
            received = self.collect(consumer, 5)
            settle(consumer, received)
            served += [delivery.message.queue for delivery in received]

        assert served[:120].count(quiet) == 20

    def test_queues_are_served_in_turn_one_by_one(self, transport: Transport, queue: str) -> None:
        names = [f"{queue}-{number}" for number in range(3)]
        transport.publish([message for name in names for message in numbered(name, 10)])
        consumer = self.consume(transport, *names, prefetch=1)

        served: list[str] = []
        for _ in range(15):
            delivery = self.collect_one(consumer)
            settle(consumer, [delivery])
            served.append(delivery.message.queue)

        assert all(served.count(name) >= 3 for name in names), served

    def test_a_strict_consumer_serves_the_first_queue_first(self, transport: Transport, queue: str) -> None:
        first, second = f"{queue}-first", f"{queue}-second"
        transport.publish([*numbered(second, 30, priority=9), *numbered(first, 30, priority=0)])
        consumer = self.consume(transport, first, second, prefetch=10, strict=True)

        served: list[str] = []
        while len(served) < 60:
            received = self.collect(consumer, 10)
            settle(consumer, received)
            served += [delivery.message.queue for delivery in received]

        assert served == [first] * 30 + [second] * 30

    def test_a_strict_consumer_returns_to_the_first_queue(self, transport: Transport, queue: str) -> None:
        first, second = f"{queue}-first", f"{queue}-second"
        transport.publish(numbered(second, 20))
        consumer = self.consume(transport, first, second, prefetch=1, strict=True)
        settle(consumer, [self.collect_one(consumer)])
        transport.publish([a_message(first, b"first")])

        received: list[bytes] = []
        while b"first" not in received and len(received) < 3:
            delivery = self.collect_one(consumer)
            settle(consumer, [delivery])
            received.append(delivery.message.body)

        assert b"first" in received

    def test_receive_with_no_timeout_returns_at_once(self, transport: Transport, queue: str) -> None:
        consumer = self.consume(transport, queue)
        consumer.receive(10, 0)
        started = time.monotonic()

        received = consumer.receive(10, 0)

        assert received == []
        assert_quick(time.monotonic() - started, 1)

    def test_receive_waits_no_longer_than_its_timeout(self, transport: Transport, queue: str) -> None:
        consumer = self.consume(transport, queue)
        started = time.monotonic()

        received = consumer.receive(10, 0.3)

        assert received == []
        took = time.monotonic() - started
        assert took > 0.25
        assert_quick(took, 0.3 + 1)

    def test_a_message_wakes_a_waiting_consumer(self, transport: Transport, other: Transport, queue: str) -> None:
        consumer = self.consume(other, queue)
        assert consumer.receive(1, 0.05) == []

        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(consumer.receive, 10, PATIENCE)
            let_it_wait()
            published = time.monotonic()
            transport.publish([a_message(queue, b"wake up")])
            received = waiting.result()
            woken_after = time.monotonic() - published

        assert bodies(received) == [b"wake up"]
        assert_quick(woken_after, 0.5)

    def test_waking_takes_milliseconds(self, transport: Transport, other: Transport, queue: str) -> None:
        consumer = self.consume(other, queue)
        consumer.receive(1, 0.05)
        delays = []

        with ThreadPoolExecutor() as threads:
            for _ in range(20):
                waiting = threads.submit(consumer.receive, 1, PATIENCE)
                let_it_wait(0.02)
                published = time.monotonic()
                transport.publish([a_message(queue)])
                settle(consumer, waiting.result())
                delays.append(time.monotonic() - published)

        assert_quick(sorted(delays)[10], 0.1, delays)

    def test_stop_wakes_a_waiting_receive(self, transport: Transport, queue: str) -> None:
        consumer = self.consume(transport, queue)

        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(consumer.receive, 10, 30)
            let_it_wait()
            consumer.stop()
            assert waiting.result(timeout=5) == []

    def test_a_message_does_not_wait_for_a_consumer_that_stops(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        waiter = self.consume(other, queue)
        patience = 1.0 + transport.description.wakes_within

        with ThreadPoolExecutor() as threads:
            for _ in range(15):
                stopping = self.consume(transport, queue)
                asked_first = threads.submit(stopping.receive, 1, PATIENCE)
                let_it_wait(0.02)
                asked_next = threads.submit(waiter.receive, 1, PATIENCE)
                let_it_wait(0.02)
                published = time.monotonic()
                transport.publish([a_message(queue)])
                stopping.stop()
                received = asked_first.result()
                if received:
                    stopping.release(received)
                settle(waiter, asked_next.result())
                assert_quick(time.monotonic() - published, patience)
                stopping.close()

    def test_a_stopped_consumer_claims_nothing_and_can_still_settle(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 3))
        consumer = self.consume(transport, queue, prefetch=2)
        held = self.collect(consumer, 2)

        consumer.stop()

        assert consumer.receive(10, 0.1) == []
        assert len(settle(consumer, held)) == 2
        self.assert_depth(transport, queue, ready=1)

    def test_what_was_not_received_before_stop_is_anothers(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        transport.publish(numbered(queue, 100))
        stopped = self.consume(transport, queue, prefetch=50)
        held = self.collect(stopped, 10)
        stopped.stop()

        received = self.collect(self.consume(other, queue), 90)

        assert sorted(ids(received) + ids(held)) == sorted(set(ids(received) + ids(held)))
        assert {delivery.attempt for delivery in received} == {1}

    def test_a_consumer_can_be_closed_twice_and_is_closed_then(self, transport: Transport, queue: str) -> None:
        consumer = self.consume(transport, queue)

        consumer.close()
        consumer.close()

        with pytest.raises(TransportClosed):
            consumer.receive(1, 0)

    def test_a_transport_can_be_closed_twice_and_is_closed_then(self, url: str, queue: str) -> None:
        transport = self.open_transport(url)
        transport.publish([a_message(queue)])
        consumer, listener = self.consume(transport, queue), transport.listen(queue)

        transport.close()
        transport.close()

        for use in (
            lambda: transport.publish([a_message(queue)]),
            lambda: self.consume(transport, queue),
            lambda: transport.depth(queue),
            lambda: transport.browse(queue),
            lambda: transport.purge(queue),
            lambda: transport.broadcast(queue, [b""]),
            lambda: transport.listen(queue),
            lambda: consumer.receive(1, 0),
            lambda: listener.receive(0),
        ):
            with pytest.raises(TransportClosed):
                use()

    def test_a_transport_that_was_never_used_can_be_closed(self, url: str) -> None:
        self.open_transport(url).close()

    def test_closing_wakes_a_waiting_receive(self, url: str, queue: str) -> None:
        transport = self.open_transport(url)
        consumer = self.consume(transport, queue)

        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(consumer.receive, 10, 30)
            let_it_wait()
            transport.close()
            assert waiting.result(timeout=5) == []

    def test_an_unknown_option_is_refused_by_its_name(self, url: str) -> None:
        separator = "&" if "?" in url else "?"

        with pytest.raises(ConfigurationError, match="no_such_option"):
            self.open_transport(f"{url}{separator}no_such_option=1")

    def test_a_password_is_never_shown(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        shown = []

        try:
            transport = self.open_transport(f"{scheme}://user:s3cret@{rest.rpartition('@')[2]}")
            shown += [str(transport), repr(transport), repr(vars(transport)) if hasattr(transport, "__dict__") else ""]
            with transport:
                transport.publish([a_message("queue")])
        except (ConfigurationError, TransportError) as error:
            shown += [str(error), repr(error)]

        assert shown
        assert not any("s3cret" in text for text in shown), shown


class Delays(TransportFixtures):
    """The broker holds what is not due."""

    many_delayed = 20_000
    """So many must not slow down the others. Override it where the server of the tests is a slow one."""

    def test_a_delayed_message_comes_when_it_is_due(self, transport: Transport, queue: str) -> None:
        message = a_message(queue, due_in=0.4)
        transport.publish([message])
        assert message.due is not None

        delivery = self.collect_one(self.consume(transport, queue))

        assert time.time() >= message.due - EARLY
        assert_quick(time.time() - message.due, SOON + transport.description.wakes_within)
        assert delivery.message == message

    @pytest.mark.parametrize("due", [0.0, 1, LATEST_TIME - 1, LATEST_TIME], ids=["1970", "whole", "2999", "3000"])
    def test_the_ends_of_time_disturb_nobody(self, transport: Transport, queue: str, due: float) -> None:
        far, soon = Message(new_id(), queue, b"far", due=due), a_message(queue, b"soon", due_in=0.2)

        assert transport.publish([far, soon]) == [STORED] * 2

        consumer = self.consume(transport, queue)
        expected = [soon] if due > time.time() else [far, soon]
        deliveries = self.collect(consumer, len(expected))
        assert {delivery.message.id: delivery.message.due for delivery in deliveries} == {
            message.id: message.due for message in expected
        }
        assert set(settle(consumer, deliveries)) == {SettleOutcome.SETTLED}
        self.assert_depth(transport, queue, ready=0, delayed=2 - len(expected))

    def test_none_of_many_delayed_messages_comes_early(self, transport: Transport, queue: str) -> None:
        messages = [a_message(queue, b"%d" % number, due_in=0.2 + number * 0.01) for number in range(50)]
        dues = {message.id: message.due or 0.0 for message in messages}
        transport.publish(messages[::-1])
        consumer = self.consume(transport, queue)

        early = []
        for _ in range(50):
            delivery = self.collect_one(consumer)
            early.append(dues[delivery.message.id] - time.time())
            settle(consumer, [delivery])

        assert max(early) < EARLY

    def test_what_was_due_long_ago_comes_at_once(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue, b"late", due_in=-3600)])

        assert bodies([self.collect_one(self.consume(transport, queue))]) == [b"late"]

    def test_a_waiting_consumer_wakes_for_a_message_that_becomes_due(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        consumer = self.consume(other, queue)
        transport.publish([a_message(queue, b"much later", due_in=3600)])

        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(consumer.receive, 10, PATIENCE)
            let_it_wait()
            message = a_message(queue, b"soon", due_in=0.3)
            transport.publish([message])
            received = waiting.result()

        assert bodies(received) == [b"soon"]
        assert_quick(time.time() - (message.due or 0.0), SOON + transport.description.wakes_within)

    def test_delayed_messages_do_not_block_due_ones(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 1000, priority=9, due_in=3600))
        soon = [a_message(queue, b"soon", due_in=1.0) for _ in range(100)]
        transport.publish(soon)
        transport.publish(numbered(queue, 100, priority=0))
        consumer = self.consume(transport, queue)
        started = time.time()

        now = self.collect(consumer, 100)
        took = time.time() - started
        later = self.collect(consumer, 100)

        assert bodies(now) == [b"%d" % number for number in range(100)]
        assert_quick(took, 1.0)
        assert bodies(later) == [b"soon"] * 100
        assert time.time() > (soon[0].due or 0.0) - EARLY
        self.assert_nothing_comes(consumer)

    @pytest.mark.slow
    def test_many_delayed_messages_do_not_slow_down_the_others(self, transport: Transport, queue: str) -> None:
        alone, crowded = f"{queue}-alone", f"{queue}-crowded"
        for _ in range(0, self.many_delayed, 1000):
            transport.publish(numbered(crowded, 1000, priority=9, due_in=3600))

        took = {name: self._time_to_work_off(transport, name) for name in (alone, crowded)}

        assert took[crowded] < 3 * took[alone] + 0.2, took

    def _time_to_work_off(self, transport: Transport, queue: str) -> float:
        transport.publish(numbered(queue, 1000))
        consumer = self.consume(transport, queue)
        started = time.monotonic()
        for _ in range(10):
            settle(consumer, self.collect(consumer, 100))
        return time.monotonic() - started

    def test_priority_counts_among_messages_that_became_due(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue, b"low", priority=1, due_in=0.2), a_message(queue, b"ready", priority=5)])
        transport.publish([a_message(queue, b"high", priority=9, due_in=0.2)])
        eventually(lambda: transport.depth(queue).ready == 3, what="all are due")

        received = self.collect(self.consume(transport, queue), 3)

        assert bodies(received) == [b"high", b"ready", b"low"]
