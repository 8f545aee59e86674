"""What somebody else, or a fault, left in a broker or a store in place of what was written there.

Each class asks for a fixture that plants it; only the plugin knows where its messages and results are.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ekiden.message import new_id
from ekiden.results import Backend, Record, Start
from ekiden.testing.conformance.fixtures import (
    DAY,
    BackendFixtures,
    TransportFixtures,
    a_result,
    eventually,
    ids,
    numbered,
    settle,
)
from ekiden.transport import Transport


class GarbageConformance(TransportFixtures):
    """A stored message that cannot be read harms no other, and nobody who receives, browses or purges."""

    @pytest.fixture
    def spoil(self, url: str) -> Callable[[str, str], None]:
        """Returns ``spoil(queue, message_id)``: makes what is stored of that message unreadable. Override this."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'spoil'.")

    def test_a_message_that_cannot_be_read_harms_no_other(
        self, transport: Transport, queue: str, spoil: Callable[[str, str], None]
    ) -> None:
        messages = numbered(queue, 5, headers={"x": 1})
        transport.publish(messages)
        spoil(queue, messages[2].id)

        seen = [each.message.id for each in transport.browse(queue)]
        consumer = self.consume(transport, queue)
        received = {}

        def all_others() -> bool:
            for delivery in consumer.receive(10, 0.1):
                received[delivery.message.id] = delivery
            return {each.id for each in messages} - {messages[2].id} <= set(received)

        eventually(all_others, what="the others are received")
        settle(consumer, list(received.values()))
        transport.depth(queue)

        others = [each.id for each in messages[:2] + messages[3:]]
        assert [each for each in seen if each in others] == others
        more = numbered(queue, 3)
        transport.publish(more)
        arrived = eventually(lambda: consumer.receive(10, 0.1), what="more is received")
        assert set(ids(arrived)) <= {each.id for each in more}
        consumer.close()
        transport.purge(queue)


class BackendGarbageConformance(BackendFixtures):
    """What is stored and cannot be read is taken for absent, harms nothing else, and is replaced by what follows."""

    @pytest.fixture
    def spoil(self, url: str) -> Callable[[str, str], None]:
        """Returns ``spoil(kind, key)``: makes what is stored unreadable. Override this.

        ``kind`` is "result" or "start" (of a task id), or "record" (of a key).
        """
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'spoil'.")

    def test_a_result_that_cannot_be_read_harms_no_other(
        self, backend: Backend, spoil: Callable[[str, str], None]
    ) -> None:
        results = [a_result(body=b"%d" % number) for number in range(3)]
        task_ids = [result.task_id for result in results]
        backend.put(results)
        spoil("result", task_ids[1])

        found = backend.get(task_ids)
        final = backend.wait(task_ids, 1.0)
        begun = backend.begin([Start(task_id, 0, "message", DAY) for task_id in task_ids])
        replacement = a_result(task_id=task_ids[1], body=b"new")
        answers = backend.put([replacement, a_result()])

        self.assert_same(found[0], results[0])
        self.assert_same(found[2], results[2])
        assert {task_ids[0], task_ids[2]} <= {result.task_id for result in final}
        assert len(begun) == 3
        assert answers == [True, True]
        self.assert_same(backend.get([task_ids[1]])[0], replacement)

    def test_a_start_that_cannot_be_read_harms_no_other(
        self, backend: Backend, spoil: Callable[[str, str], None]
    ) -> None:
        starts = [Start(new_id(), 0, "message", DAY) for _ in range(3)]
        backend.begin(starts)
        spoil("start", starts[1].task_id)

        assert len(backend.begin(starts)) == 3
        assert len(backend.get([start.task_id for start in starts])) == 3
        assert backend.put([a_result(task_id=starts[1].task_id)]) == [True]
        backend.forget([starts[1].task_id])

    def test_a_record_that_cannot_be_read_is_absent_and_written_anew(
        self, backend: Backend, spoil: Callable[[str, str], None]
    ) -> None:
        prefix = new_id()
        keys = [f"{prefix}/{number}" for number in range(3)]
        for key in keys:
            backend.write(key, b"kept")
        spoil("record", keys[1])

        found = backend.read(keys)
        scanned = backend.scan(prefix)

        assert [found[0], found[2]] == [Record(keys[0], b"kept", 1), Record(keys[2], b"kept", 1)]
        assert [record for record in scanned if record.key != keys[1]] == [found[0], found[2]]
        assert backend.write(keys[1], b"new") is not None
        assert [record and record.value for record in backend.read([keys[1]])] == [b"new"]
