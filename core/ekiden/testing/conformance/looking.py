"""Looking at queues and emptying them: depth, browse, purge."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from ekiden.message import Condition, Depth, Seen, SettleOutcome
from ekiden.testing.conformance.fixtures import TransportFixtures, a_message, ids, numbered, settle
from ekiden.transport import Transport


class Looking(TransportFixtures):
    """What is asked about a queue changes nothing in it; purge leaves what somebody holds."""

    def test_a_queue_that_does_not_exist_is_empty(self, transport: Transport, queue: str) -> None:
        assert transport.browse(queue) == []
        assert transport.purge(queue) == 0
        description = transport.description
        assert transport.depth(queue) == Depth(
            0, 0 if description.counts_delayed else None, 0 if description.counts_leased else None
        )

    def test_depth_tells_ready_delayed_and_leased_apart(self, transport: Transport, queue: str) -> None:
        transport.publish([*numbered(queue, 5), *numbered(queue, 3, due_in=3600)])
        self.collect(self.consume(transport, queue, prefetch=2), 2)

        self.assert_depth(transport, queue, ready=3, delayed=3, leased=2)

    def test_depth_follows_settling_releasing_and_closing(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 6))
        consumer = self.consume(transport, queue, prefetch=6)
        held = self.collect(consumer, 6)
        self.assert_depth(transport, queue, ready=0, leased=6)
        settle(consumer, held[:2])
        self.assert_depth(transport, queue, ready=0, leased=4)
        consumer.release(held[2:4], delay=3600)
        self.assert_depth(transport, queue, ready=0, delayed=2, leased=2)
        consumer.close()
        self.assert_depth(transport, queue, ready=2, delayed=2)

    def test_a_delayed_message_becomes_a_ready_one(self, transport: Transport, queue: str) -> None:
        transport.publish([a_message(queue, due_in=0.3)])

        self.assert_depth(transport, queue, ready=1)

    def test_purge_deletes_what_is_ready_and_delayed(self, transport: Transport, queue: str) -> None:
        transport.publish([*numbered(queue, 5), *numbered(queue, 3, due_in=3600), *numbered(f"{queue}-next", 2)])

        purged = transport.purge(queue)

        kept = 0 if transport.description.purges_delayed else 3
        assert purged == 8 - kept
        self.assert_depth(transport, queue, ready=0, delayed=kept)
        self.assert_depth(transport, f"{queue}-next", ready=2)
        self.assert_nothing_comes(self.consume(transport, queue))

    def test_purge_leaves_what_is_leased(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 10))
        consumer = self.consume(transport, queue, prefetch=4)
        held = self.collect(consumer, 4)

        purged = transport.purge(queue)

        assert purged == 6
        self.assert_depth(transport, queue, ready=0, leased=4)
        assert set(settle(consumer, held)) == {SettleOutcome.SETTLED}

    def test_purging_while_others_claim_counts_every_message_once(
        self, transport: Transport, other: Transport, queue: str
    ) -> None:
        consumer = self.consume(other, queue)
        published = purged = 0
        received: list[str] = []

        with ThreadPoolExecutor() as threads:
            for _ in range(20):
                transport.publish(numbered(queue, 50))
                published += 50
                purging = threads.submit(transport.purge, queue)
                deliveries = consumer.receive(20, 0.05)
                purged += purging.result()
                received += ids(deliveries)
                settle(consumer, deliveries)
        # What a broker has pushed to the consumer before it asked is out of a purge's reach.
        while deliveries := consumer.receive(100, 0.1):
            received += ids(deliveries)
            settle(consumer, deliveries)
        purged += transport.purge(queue)

        assert len(received) + purged == published
        assert len(set(received)) == len(received)
        self.assert_depth(transport, queue, ready=0)

    def test_browsing_shows_messages_whole_and_changes_nothing(self, transport: Transport, queue: str) -> None:
        messages = [a_message(queue, b"%d" % number, headers={"number": number}, priority=4) for number in range(5)]
        transport.publish(messages)

        seen = transport.browse(queue)

        assert sorted(one.message.id for one in seen) == sorted(message.id for message in messages)
        assert {one.message.id: one.message for one in seen} == {message.id: message for message in messages}
        assert {(one.condition, one.attempt) for one in seen} == {(Condition.READY, 0)}
        attempt = 2 if transport.description.browsing_counts else 1
        assert [delivery.attempt for delivery in self.collect(self.consume(transport, queue), 5)] == [attempt] * 5

    def test_browsing_shows_delayed_and_leased_messages(self, transport: Transport, queue: str) -> None:
        description = transport.description
        transport.publish([a_message(queue, b"leased"), a_message(queue, b"delayed", due_in=3600)])
        self.collect_one(self.consume(transport, queue))
        transport.publish([a_message(queue, b"ready")])

        seen = {one.message.body: (one.condition, one.attempt) for one in transport.browse(queue)}

        expected = {b"ready": (Condition.READY, 0)}
        if description.browses_delayed:
            expected[b"delayed"] = (Condition.DELAYED, 0)
        if description.browses_leased:
            expected[b"leased"] = (Condition.LEASED, 1)
        assert seen == expected

    def test_browsing_goes_on_after_a_cursor(self, transport: Transport, queue: str) -> None:
        messages = numbered(queue, 25, priority=2) + numbered(queue, 25, priority=7)
        transport.publish(messages)

        pages: list[list[Seen]] = []
        cursor: str | None = None
        while page := transport.browse(queue, after=cursor, limit=10):
            pages.append(page)
            cursor = page[-1].cursor

        assert [len(page) for page in pages] == [10] * 5
        seen = [one.message.id for page in pages for one in page]
        assert sorted(seen) == sorted(message.id for message in messages)

    def test_a_cursor_survives_that_its_message_goes(self, transport: Transport, queue: str) -> None:
        transport.publish(numbered(queue, 10))
        first_page = transport.browse(queue, limit=5)
        consumer = self.consume(transport, queue, prefetch=10)
        going = {first_page[0].message.id, first_page[-1].message.id}
        settle(consumer, [delivery for delivery in self.collect(consumer, 10) if delivery.message.id in going])
        consumer.close()
        self.assert_depth(transport, queue, ready=8)

        second_page = transport.browse(queue, after=first_page[-1].cursor, limit=10)

        assert len(second_page) == 5
        assert not {one.message.id for one in first_page} & {one.message.id for one in second_page}
