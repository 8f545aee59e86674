"""Redis under Sentinel: a replica takes over from a primary that was killed, and everybody goes on.

Replication is asynchronous, so a failover may lose what was confirmed a moment before. What had reached the replica is
not lost, and that is asserted here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from ekiden.errors import BrokerUnavailable
from ekiden.message import STORED, Ending, Message, PublishOutcome, SettleOutcome, derived_id, new_id
from ekiden.testing.conformance import BrokerRestartConformance
from ekiden.testing.conformance.fixtures import TransportFixtures, a_message, eventually, ids, numbered
from ekiden.transport import Transport

from tests.servers.redis import RedisUnderSentinel
from tests.servers.running import running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisUnderSentinel]:
    with running(lambda: RedisUnderSentinel(tmp_path_factory.mktemp("sentinel"))) as group:
        yield group


@pytest.fixture
def fail_over(group: RedisUnderSentinel) -> Callable[[], None]:
    """Kills the primary once the replica has everything; the killed one is started again and follows."""

    def fail_over() -> None:
        group.wait_until_replicated()
        group.fail_over().start()
        group.wait_until_followed()

    return fail_over


class TestRedisUnderSentinel(BrokerRestartConformance):
    """A restart is a failover."""

    @pytest.fixture
    def url(self, group: RedisUnderSentinel) -> str:
        return f"{group.url}?prefix=test-{new_id()}"

    @pytest.fixture
    def restart_broker(self, fail_over: Callable[[], None]) -> Callable[[], None]:
        return fail_over


class TestWorkersUnderSentinel(TransportFixtures):
    @pytest.fixture
    def url(self, group: RedisUnderSentinel) -> str:
        return f"{group.url}?prefix=test-{new_id()}&timeout=5"

    @pytest.mark.timeout(180)
    def test_workers_and_a_publisher_go_on_through_a_failover(
        self, transport: Transport, other: Transport, queue: str, fail_over: Callable[[], None]
    ) -> None:
        before = numbered(queue, 200)
        assert transport.publish(before) == [STORED] * 200
        finished = threading.Event()
        after: list[Message] = []

        def publish_all_the_time() -> None:
            while not finished.is_set():
                message = a_message(queue)
                if self.is_published(other, message):
                    after.append(message)
                finished.wait(0.02)

        with ThreadPoolExecutor() as threads:
            publishing = threads.submit(publish_all_the_time)
            self.collect(self.consume(transport, queue, lease=2.0, prefetch=20), 20)  # and does no more about them
            fail_over()
            since_failover = len(after)
            eventually(lambda: len(after) > since_failover + 20, what="publishing goes on", within=60)
            finished.set()
            publishing.result()
            seen = self.work(transport, queue)

        assert {message.id for message in before} <= seen
        # The publisher stood still while nobody was there; what came after the failover is all there.
        assert {message.id for message in after[since_failover:]} <= seen
        followed = self.consume(transport, f"{queue}-next")
        worked = {derived_id(each, "next") for each in seen}
        assert set(ids(self.collect(followed, len(worked)))) == worked

    def is_published(self, transport: Transport, message: Message) -> bool:
        try:
            return transport.publish([message])[0].outcome is PublishOutcome.STORED
        except BrokerUnavailable:
            return False

    def work(self, transport: Transport, queue: str) -> set[str]:
        """Receive and settle all that is there, and return the ids of it."""
        seen: set[str] = set()
        with self.consume(transport, queue) as worker:

            def is_done() -> bool:
                try:
                    deliveries = worker.receive(100, 0.2)
                    seen.update(ids(deliveries))
                    endings = [
                        Ending(each, (Message(derived_id(each.message.id, "next"), f"{queue}-next", b""),))
                        for each in deliveries
                    ]
                    assert SettleOutcome.FAILED not in {answer.outcome for answer in worker.settle(endings)}
                    depth = transport.depth(queue)
                except BrokerUnavailable:
                    return False
                return not (depth.ready or depth.leased)

            eventually(is_done, what="all is done", within=60)
        return seen
