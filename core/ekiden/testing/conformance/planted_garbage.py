"""What somebody else has written where a broker keeps messages, or a store results: it harms nothing but itself.

Only the plugin knows how to write past its own transport, so it plants the garbage, by a fixture to override.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ekiden.errors import BackendError
from ekiden.message import DEAD_SUFFIX, RESERVED_HEADER_PREFIX, STORED, Seen, new_id
from ekiden.results import Backend, BeginOutcome, Record, Start
from ekiden.testing.conformance.fixtures import (
    DAY,
    BackendFixtures,
    TransportFixtures,
    a_message,
    a_result,
    bodies,
    eventually,
    numbered,
    settle,
)
from ekiden.transport import Transport


class PlantedGarbageConformance(TransportFixtures):
    """What lies among the messages of a queue and is none goes to the dead letters, and holds nothing up."""

    @pytest.fixture
    def plant(self) -> Callable[[str], int]:
        """Returns a function that puts garbage of every kind into a queue, as if it were ready to be handed out.

        It returns how many pieces there are. Override this.
        """
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'plant'.")

    def test_it_goes_to_the_dead_letters_and_holds_nothing_up(
        self,
        transport: Transport,
        other: Transport,
        queue: str,
        plant: Callable[[str], int],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        transport.publish(numbered(queue, 3))
        count = plant(queue)
        assert count
        transport.publish([a_message(queue, b"%d" % number) for number in range(3, 6)])
        consumer = self.consume(transport, queue)

        received = self.collect(consumer, 6)
        settle(consumer, received)
        self.assert_nothing_comes(consumer)

        assert sorted(bodies(received)) == [b"%d" % number for number in range(6)]
        eventually(lambda: other.depth(queue).ready == 0, what="nothing is left")
        dead = eventually(lambda: self.all_of(other, f"{queue}{DEAD_SUFFIX}", count), what="all are dead letters")
        assert {seen.message.headers[f"{RESERVED_HEADER_PREFIX}dead-queue"] for seen in dead} == {queue}
        assert all(seen.message.headers[f"{RESERVED_HEADER_PREFIX}dead-error"] for seen in dead)
        assert sum("dead letters" in record.getMessage() for record in caplog.records) >= count
        transport.publish([a_message(queue, b"after")])
        assert bodies(self.collect(consumer, 1)) == [b"after"]

    def test_what_is_among_the_dead_letters_is_handed_out_as_one(
        self, transport: Transport, queue: str, plant: Callable[[str], int]
    ) -> None:
        dead_queue = f"{queue}{DEAD_SUFFIX}"
        count = plant(dead_queue)
        consumer = self.consume(transport, dead_queue)

        received = self.collect(consumer, count)

        wanted = {f"{RESERVED_HEADER_PREFIX}dead-queue": queue, f"{RESERVED_HEADER_PREFIX}dead-reason": "MessageError"}
        assert all(wanted.items() <= delivery.message.headers.items() for delivery in received)
        settle(consumer, received)
        self.assert_depth(transport, dead_queue, ready=0)

    def test_a_queue_that_holds_it_can_be_looked_at_and_emptied(
        self, transport: Transport, queue: str, plant: Callable[[str], int]
    ) -> None:
        plant(queue)
        good = a_message(queue, b"good")
        assert transport.publish([good]) == [STORED]

        assert (transport.depth(queue).ready or 0) >= 1
        assert good in [seen.message for seen in transport.browse(queue, limit=1000)]
        transport.purge(queue)
        self.assert_depth(transport, queue, ready=0)
        assert transport.publish([good]) == [STORED]
        assert self.collect_one(self.consume(transport, queue)).message == good

    def all_of(self, transport: Transport, queue: str, count: int) -> list[Seen] | None:
        """Everything in a queue, once there are so many."""
        seen = transport.browse(queue, limit=1000)
        return seen if len(seen) == count else None


class PlantedBackendGarbageConformance(BackendFixtures):
    """What is stored under a key of ours and cannot be read counts as not there, and is replaced."""

    @pytest.fixture
    def spoil(self) -> Callable[[str, str], None]:
        """Returns a function that writes something unreadable over, or instead of, what is stored.

        It takes a kind (``result``, ``start``: the fence's note; ``record``, ``join``) and the id or key. Override it;
        with ``params`` it may do so in several ways.
        """
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'spoil'.")

    def test_a_result_counts_as_none_and_is_replaced(
        self, backend: Backend, other: Backend, spoil: Callable[[str, str], None]
    ) -> None:
        good, bad = [a_result(body=b"%d" % number) for number in range(2)], a_result(body=b"at last")
        backend.put(good)
        spoil("result", bad.task_id)

        first, unreadable, second = other.get([good[0].task_id, bad.task_id, good[1].task_id])
        assert unreadable is None
        self.assert_same(first, good[0])
        self.assert_same(second, good[1])
        assert self.alone(other, bad.task_id) in (None, bad.task_id)
        assert [found.task_id for found in other.wait([bad.task_id, good[1].task_id], 5.0)] == [good[1].task_id]
        assert other.wait([bad.task_id], 0.1) == []

        assert backend.put([bad]) == [True]
        self.assert_same(other.get([bad.task_id])[0], bad)
        assert [found.task_id for found in other.wait([bad.task_id], 5.0)] == [bad.task_id]

    def alone(self, backend: Backend, task_id: str) -> str | None:
        """None where the store says that it has nothing for this task alone, else the task that its error names."""
        try:
            assert backend.get([task_id]) == [None]
        except BackendError as error:
            return task_id if task_id in str(error) else str(error)
        return None

    @pytest.mark.parametrize("kind", ["result", "start"])
    def test_a_task_with_it_may_begin_and_so_may_the_others(
        self, backend: Backend, spoil: Callable[[str, str], None], kind: str
    ) -> None:
        starts = [Start(new_id(), 0, "message", DAY) for _ in range(3)]
        spoil(kind, starts[1].task_id)

        begun = backend.begin(starts)

        assert [each.outcome for each in begun] == [BeginOutcome.GO] * 3
        again = [Start(start.task_id, 0, "another", DAY) for start in starts]
        assert [each.outcome for each in backend.begin(again)] == [BeginOutcome.SECOND_COPY] * 3
        result = a_result(task_id=starts[1].task_id)
        assert backend.put([result]) == [True]
        self.assert_same(backend.get([result.task_id])[0], result)

    def test_a_record_counts_as_none_and_is_replaced(
        self, backend: Backend, other: Backend, spoil: Callable[[str, str], None]
    ) -> None:
        prefix = f"{new_id()}/"
        for name in ("a", "b", "c"):
            backend.write(prefix + name, name.encode())
        spoil("record", f"{prefix}b")

        assert other.read([f"{prefix}{name}" for name in "abc"]) == [
            Record(f"{prefix}a", b"a", 1),
            None,
            Record(f"{prefix}c", b"c", 1),
        ]
        assert [record.key for record in other.scan(prefix)] == [f"{prefix}a", f"{prefix}c"]
        assert backend.write(f"{prefix}b", b"new", expected_version=1) is None
        assert backend.write(f"{prefix}b", b"new", expected_version=0) == 1
        assert other.read([f"{prefix}b"]) == [Record(f"{prefix}b", b"new", 1)]
        assert [record.key for record in other.scan(prefix)] == [f"{prefix}{name}" for name in "abc"]

    def test_a_join_begins_anew(self, backend: Backend, spoil: Callable[[str, str], None]) -> None:
        join_id = new_id()
        spoil("join", join_id)

        first = backend.join(join_id, "a", b"1", size=2, expires=DAY)
        second = backend.join(join_id, "b", b"2", size=2, expires=DAY)

        assert (first.arrived, first.complete) == (1, False)
        assert (second.arrived, second.complete, second.outcomes) == (2, True, {"a": b"1", "b": b"2"})
