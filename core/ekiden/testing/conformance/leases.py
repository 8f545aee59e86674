"""Who holds a message, until when, and how that ends: settle, release, extend, close, and the end of a lease."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ekiden.message import (
    LOST,
    SETTLED,
    Delivery,
    Ending,
    HeaderValue,
    Message,
    SettleOutcome,
    derived_id,
)
from ekiden.testing.conformance.fixtures import (
    PATIENCE,
    TransportFixtures,
    a_message,
    bodies,
    ids,
    let_it_wait,
    numbered,
    settle,
)
from ekiden.testing.conformance.pace import assert_quick
from ekiden.times import LONGEST_SECONDS
from ekiden.transport import Consumer, Transport, TransportDescription


class Endings(TransportFixtures):
    """Settling with and without follow-ups, releasing, closing, and fresh tags."""

    def test_what_is_settled_is_gone(self, transport: Transport, other: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 3))
        consumer = self.consume(transport, queue)

        answers = consumer.settle([Ending(delivery) for delivery in self.collect(consumer, 3)])

        assert answers == [SETTLED] * 3
        self.assert_depth(transport, queue, ready=0)
        consumer.close()
        self.assert_nothing_comes(self.consume(other, queue))

    def test_where_the_connection_is_the_lease_no_clock_ends_it(
        self, transport: Transport, other: Transport, queue: str, description: TransportDescription
    ) -> None:
        transport.publish([a_message(queue)])
        consumer = self.consume(transport, queue, lease=description.shortest_lease)
        delivery = self.collect_one(consumer)

        if description.connection_is_lease:
            let_it_wait(1.5 * description.shortest_lease)
            self.assert_nothing_comes(self.consume(other, queue))

        assert settle(consumer, [delivery]) == [SettleOutcome.SETTLED] or not description.connection_is_lease

    def test_settling_extending_or_releasing_nothing_is_answered_with_nothing(
        self, transport: Transport, queue: str
    ) -> None:
        consumer = self.consume(transport, queue)

        assert consumer.settle([]) == []
        assert consumer.extend([]) == []
        consumer.release([])

    def test_settling_publishes_what_follows_to_any_queue(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue, b"first")])
        consumer = self.consume(transport, queue)
        delivery = self.collect_one(consumer)
        here = a_message(queue, b"here", headers={"kind": "follow-up"})
        there = a_message(f"{queue}-there", b"there", priority=8)
        later = a_message(queue, b"later", due_in=3600)

        answers = consumer.settle([Ending(delivery, (here, there, later))])

        assert answers == [SETTLED]
        assert self.collect_one(consumer).message == here
        assert self.collect_one(self.consume(transport, f"{queue}-there")).message == there
        self.assert_depth(transport, queue, ready=0, delayed=1, leased=1)

    def test_a_follow_up_that_is_stored_already_does_not_stop_the_ending(
        self, transport: Transport, queue: str
    ) -> None:
        follow_up = a_message(f"{queue}-next")
        transport.publish([a_message(queue), follow_up])
        consumer = self.consume(transport, queue)

        answers = consumer.settle([Ending(self.collect_one(consumer), (follow_up,))])

        assert answers == [SETTLED]
        stored = 1 if transport.description.names_duplicates else 2
        self.assert_depth(transport, f"{queue}-next", ready=stored)
        self.assert_depth(transport, queue, ready=0)

    def test_an_ending_whose_follow_up_cannot_be_stored_fails_alone_and_stays_held(
        self, transport: Transport, queue: str
    ) -> None:
        transport.publish(numbered(queue, 5))
        consumer = self.consume(transport, queue)
        held = self.collect(consumer, 5)
        good = [a_message(f"{queue}-next", b"%d" % number) for number in range(5)]
        bad = a_message("q" * 201)
        endings = [Ending(delivery, (good[number],)) for number, delivery in enumerate(held)]
        endings[2] = Ending(held[2], (good[2], bad))

        answers = consumer.settle(endings)

        assert [answer.outcome for answer in answers[:2] + answers[3:]] == [SettleOutcome.SETTLED] * 4
        assert answers[2].outcome is SettleOutcome.FAILED
        assert answers[2].error is not None
        assert consumer.extend([held[2]]) == [SETTLED]
        assert consumer.settle([Ending(held[2], (good[2],))]) == [SETTLED]
        self.assert_depth(transport, queue, ready=0)
        if transport.description.names_duplicates:
            self.assert_depth(transport, f"{queue}-next", ready=5)

    def test_a_delivery_settled_twice_is_lost_the_second_time(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue)])
        consumer = self.consume(transport, queue)
        delivery = self.collect_one(consumer)
        consumer.settle([Ending(delivery)])

        answers = consumer.settle([Ending(delivery, (a_message(f"{queue}-next"),))])

        assert answers == [LOST]
        self.assert_depth(transport, f"{queue}-next", ready=0)

    def test_a_batch_of_endings_with_lost_ones_settles_the_others(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 100))
        consumer = self.consume(transport, queue)
        held = self.collect(consumer, 100)
        lost = set(range(0, 100, 7))
        settle(consumer, [held[number] for number in sorted(lost)])

        extended = consumer.extend(held)
        answers = consumer.settle([Ending(delivery) for delivery in held])

        expected = [LOST if number in lost else SETTLED for number in range(100)]
        assert extended == expected
        assert answers == expected
        self.assert_depth(transport, queue, ready=0)

    def test_the_attempt_rises_with_every_hand_out(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue)])

        attempts = []
        for _ in range(4):
            with self.consume(transport, queue) as consumer:
                attempts.append(self.collect_one(consumer).attempt)

        assert attempts == [1, 2, 3, 4]

    def test_release_gives_the_message_and_its_attempt_back(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        message = a_message(queue, b"body", headers={"kind": "x"}, priority=6)
        transport.publish([message])
        consumer = self.consume(transport, queue)

        for _ in range(5):
            delivery = self.collect_one(consumer)
            assert delivery.attempt == 1
            consumer.release([delivery])

        again = self.collect_one(self.consume(other, queue))
        assert again.attempt == 1
        assert again.message == message

    def test_release_takes_back_only_its_own_attempt(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue)])
        for _ in range(2):
            with self.consume(transport, queue) as consumer:
                self.collect_one(consumer)
        consumer = self.consume(transport, queue)

        third = self.collect_one(consumer)
        consumer.release([third])

        assert third.attempt == 3
        assert self.collect_one(consumer).attempt == 3

    @pytest.mark.parametrize("delay", [0.0, 0.2])
    def test_what_was_started_is_released_and_keeps_its_attempt(
        self, transport: Transport, queue: str, delay: float
    ) -> None:
        message = a_message(queue, b"body", headers={"kind": "x"}, priority=6)
        transport.publish([message])
        consumer = self.consume(transport, queue)

        attempts = []
        for _ in range(3):
            delivery = self.collect_one(consumer)
            attempts.append(delivery.attempt)
            consumer.release([delivery], delay, keep_attempt=True)

        again = self.collect_one(consumer)
        assert [*attempts, again.attempt] == [1, 2, 3, 4]
        assert again.message == message

    def test_of_what_is_released_together_each_keeps_its_own_count(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 3))
        consumer = self.consume(transport, queue)
        first, second, third = self.collect(consumer, 3)

        consumer.release([first], keep_attempt=True)
        consumer.release([second, third])

        again = {delivery.message.id: delivery.attempt for delivery in self.collect(consumer, 3)}
        assert again == {first.message.id: 2, second.message.id: 1, third.message.id: 1}

    def test_what_was_lost_is_not_released_to_keep_its_attempt(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        transport.publish([a_message(queue)])
        first, second = self.consume(transport, queue), self.consume(other, queue)
        old = self.collect_one(first)
        first.release([old], keep_attempt=True)
        new = self.collect_one(second)

        first.release([old], keep_attempt=True)

        assert second.settle([Ending(new)]) == [SETTLED]
        assert new.attempt == 2

    def test_released_messages_keep_their_order(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 20))
        consumer = self.consume(transport, queue, prefetch=10)

        consumer.release(self.collect(consumer, 10))

        again = self.collect(self.consume(transport, queue), 20)
        assert sorted(bodies(again)) == sorted(b"%d" % number for number in range(20))
        assert {delivery.attempt for delivery in again} == {1}

    def test_release_with_a_delay_gives_it_back_later(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue, b"body")])
        consumer = self.consume(transport, queue)
        delivery = self.collect_one(consumer)

        released = time.time()
        consumer.release([delivery], delay=0.5)

        again = self.collect_one(consumer)
        assert time.time() - released > 0.45
        assert again.message.body == b"body"
        assert again.attempt == 1

    def test_release_with_the_longest_delay_disturbs_nobody(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 2))
        consumer = self.consume(transport, queue)
        first, second = self.collect(consumer, 2)

        consumer.release([first], delay=LONGEST_SECONDS)
        consumer.release([second], delay=0.2)

        assert ids([self.collect_one(consumer)]) == [second.message.id]
        self.assert_depth(transport, queue, ready=0, delayed=1, leased=1)

    def test_a_message_released_with_a_delay_counts_as_delayed(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 2))
        consumer = self.consume(transport, queue)

        consumer.release(self.collect(consumer, 2), delay=3600)

        self.assert_depth(transport, queue, ready=0, delayed=2)

    def test_tags_are_fresh_so_an_old_one_ends_nothing(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        transport.publish([a_message(queue)])
        first, second = self.consume(transport, queue), self.consume(other, queue)
        old = self.collect_one(first)
        first.release([old])
        new = self.collect_one(second)

        self.assert_lost_and_harmless(first, old)

        assert second.extend([new]) == [SETTLED]
        assert second.settle([Ending(new)]) == [SETTLED]
        self.assert_depth(transport, queue, ready=0)

    def test_an_old_tag_ends_nothing_for_the_same_consumer(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue)])
        consumer = self.consume(transport, queue)
        old = self.collect_one(consumer)
        consumer.release([old])
        new = self.collect_one(consumer)

        self.assert_lost_and_harmless(consumer, old)

        assert consumer.settle([Ending(new)]) == [SETTLED]
        self.assert_depth(transport, queue, ready=0)

    def test_closing_a_consumer_gives_back_what_it_holds(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        transport.publish(numbered(queue, 10))
        consumer = self.consume(transport, queue, prefetch=10)
        held = self.collect(consumer, 10)
        settle(consumer, held[:3])

        consumer.close()

        again = self.collect(self.consume(other, queue), 7)
        assert sorted(ids(again)) == sorted(ids(held[3:]))
        assert {delivery.attempt for delivery in again} == {2}

    def test_closing_the_transport_gives_back_what_its_consumers_hold(
        self, url: str, other: Transport, queue: str
    ) -> None:
        other.publish(numbered(queue, 4))
        transport = self.open_transport(url)
        self.collect(self.consume(transport, queue), 4)

        transport.close()

        assert len(self.collect(self.consume(other, queue), 4)) == 4

    def test_what_is_given_back_wakes_another_consumer(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        transport.publish([a_message(queue, b"given back")])
        holder = self.consume(transport, queue)
        held = self.collect_one(holder)
        waiter = self.consume(other, queue)

        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(waiter.receive, 10, PATIENCE)
            let_it_wait()
            released = time.monotonic()
            holder.release([held])
            received = waiting.result()
            woken_after = time.monotonic() - released

        assert bodies(received) == [b"given back"]
        assert_quick(woken_after, 0.5 + transport.description.wakes_within)

    def test_opening_under_the_same_name_gives_back_at_once(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        transport.publish(numbered(queue, 5))
        earlier = self.consume(transport, queue, name=f"{queue}-slot")
        held = self.collect(earlier, 5)

        later = self.consume(other, queue, name=f"{queue}-slot")

        again = self.collect(later, 5, within=LONG_BEFORE_THE_LEASE)
        assert sorted(ids(again)) == sorted(ids(held))
        assert {delivery.attempt for delivery in again} == {2}
        self.assert_lost_and_harmless(earlier, held[0])
        assert set(settle(later, again)) == {SettleOutcome.SETTLED}

    def test_opening_under_another_name_takes_nothing(self, transport: Transport, other: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 5))
        consumer = self.consume(transport, queue, name=f"{queue}-slot")
        held = self.collect(consumer, 5)

        another = self.consume(other, queue, name=f"{queue}-slot-2")

        self.assert_nothing_comes(another)
        assert set(settle(consumer, held)) == {SettleOutcome.SETTLED}

    def test_extending_what_is_held_is_settled_and_changes_nothing_else(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 5))
        consumer = self.consume(transport, queue)
        held = self.collect(consumer, 5)

        assert consumer.extend(held) == [SETTLED] * 5

        self.assert_nothing_comes(consumer)
        assert set(settle(consumer, held)) == {SettleOutcome.SETTLED}

    def test_what_died_and_was_redriven_dies_again(self, transport: Transport, queue: str) -> None:
        dead_queue = f"{queue}.dead"
        transport.publish([a_message(queue, b"unlucky")])
        living, dead = self.consume(transport, queue), self.consume(transport, dead_queue)

        seen = set()
        for _ in range(3):
            alive = self.collect_one(living)
            assert self.move(living, alive, dead_queue, step="dead") == SETTLED
            died = self.collect_one(dead)
            assert self.move(dead, died, queue, step="redrive") == SETTLED
            seen |= {alive.message.id, died.message.id}

        assert len(seen) == 6
        self.assert_depth(transport, dead_queue, ready=0)
        self.assert_depth(transport, queue, ready=1)

    def move(self, consumer: Consumer, delivery: Delivery, queue: str, *, step: str) -> object:
        """Settle ``delivery`` by publishing it to another queue, as dead-lettering and redriving do."""
        message = delivery.message
        headers: dict[str, HeaderValue] = {**message.headers, "moved by": step}
        moved = Message(derived_id(message.id, step), queue, message.body, headers, message.priority)
        (answer,) = consumer.settle([Ending(delivery, (moved,))])
        return answer

    def assert_lost_and_harmless(self, consumer: Consumer, delivery: Delivery) -> None:
        """Whatever is done with a delivery that is another's now, the answer is LOST and nothing happens."""
        follow_up = a_message(f"{delivery.message.queue}-follow-up")
        assert consumer.extend([delivery]) == [LOST]
        consumer.release([delivery])
        assert consumer.settle([Ending(delivery, (follow_up,))]) == [LOST]


LONG_BEFORE_THE_LEASE = 5.0


class LeaseExpiryConformance(TransportFixtures):
    """For transports whose leases end by the clock, also when their consumer lives and merely does nothing.

    Where the connection is the lease (a push broker), a plugin leaves this class out.
    """

    def test_a_message_whose_lease_ended_is_handed_out_again(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        lease = transport.description.shortest_lease
        transport.publish([a_message(queue, b"body")])
        late = self.consume(transport, queue, lease=lease)
        started = time.monotonic()
        first = self.collect_one(late)

        second = self.collect_one(self.consume(other, queue), within=self.lease_over(transport))

        took = time.monotonic() - started
        assert took >= lease - 0.01
        assert (first.attempt, second.attempt) == (1, 2)
        assert second.message == first.message

    def test_who_lost_the_lease_can_end_nothing(self, transport: Transport, other: Transport, queue: str) -> None:
        transport.publish([a_message(queue)])
        late, next_holder = self.consume(transport, queue, lease=self.short(transport)), self.consume(other, queue)
        lost = self.collect_one(late)
        held = self.collect_one(next_holder, within=self.lease_over(transport))
        follow_up = a_message(f"{queue}-next")

        assert late.settle([Ending(lost, (follow_up,))]) == [LOST]
        assert late.extend([lost]) == [LOST]
        late.release([lost])

        assert next_holder.extend([held]) == [SETTLED]
        self.assert_depth(transport, f"{queue}-next", ready=0)
        assert next_holder.settle([Ending(held)]) == [SETTLED]
        self.assert_depth(transport, queue, ready=0)

    def test_a_lease_that_is_extended_in_time_does_not_end(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        lease = max(self.short(transport), 0.3)
        transport.publish([a_message(queue)])
        holder, rival = self.consume(transport, queue, lease=lease), self.consume(other, queue)
        held = self.collect_one(holder)

        for _ in range(8):
            self.assert_nothing_comes(rival, within=lease / 4)
            assert holder.extend([held]) == [SETTLED]

        assert holder.settle([Ending(held)]) == [SETTLED]

    def test_only_those_not_extended_come_back(self, transport: Transport, other: Transport, queue: str) -> None:
        lease = max(self.short(transport), 0.3)
        transport.publish(numbered(queue, 10))
        holder, rival = self.consume(transport, queue, lease=lease), self.consume(other, queue)
        held = self.collect(holder, 10)
        kept, left = held[::2], held[1::2]

        received: list[Delivery] = []
        give_up = time.monotonic() + self.lease_over(transport)
        while len(received) < 5 and time.monotonic() < give_up:
            received += rival.receive(10, lease / 5)
            assert holder.extend(kept) == [SETTLED] * 5

        assert sorted(ids(received)) == sorted(ids(left))
        assert settle(holder, held) == [SettleOutcome.SETTLED, SettleOutcome.LOST] * 5

    def test_the_end_of_a_lease_wakes_a_waiting_consumer(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        lease = self.short(transport)
        waiter = self.consume(other, queue)
        with ThreadPoolExecutor() as threads:
            transport.publish([a_message(queue)])
            self.collect_one(self.consume(transport, queue, lease=lease))
            waiting = threads.submit(waiter.receive, 10, self.lease_over(transport))
            received = waiting.result()

        assert [delivery.attempt for delivery in received] == [2]

    def test_the_end_of_a_lease_makes_room_for_its_holder(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 2))
        consumer = self.consume(transport, queue, lease=self.short(transport), prefetch=1)
        self.collect_one(consumer)

        received = self.collect_one(consumer, within=self.lease_over(transport))

        assert received.message.body in {b"0", b"1"}

    def test_attempts_rise_with_every_lost_lease(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue)])
        consumer = self.consume(transport, queue, lease=self.short(transport))

        attempts = [self.collect_one(consumer, within=self.lease_over(transport)).attempt for _ in range(4)]

        assert attempts == [1, 2, 3, 4]

    def test_a_message_whose_lease_ended_counts_as_ready(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue)])
        self.collect_one(self.consume(transport, queue, lease=self.short(transport)))

        self.assert_depth(transport, queue, ready=1)

    def short(self, transport: Transport) -> float:
        """The shortest lease that this transport gives, in seconds."""
        return transport.description.shortest_lease

    def lease_over(self, transport: Transport) -> float:
        """After so many seconds a lease of ``short`` has ended, and its message is with somebody else."""
        description = transport.description
        return description.shortest_lease + description.dead_consumer_noticed_within + description.wakes_within + 5.0
