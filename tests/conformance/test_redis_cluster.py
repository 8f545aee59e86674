"""A Redis Cluster of three keeps the contract, by its URL alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ekiden.message import STORED, Ending, SettleOutcome, new_id
from ekiden.testing.conformance import BrokerClockConformance, LeaseExpiryConformance, TransportConformance
from ekiden.testing.conformance.fixtures import TransportFixtures, a_message, bodies
from ekiden.transport import Transport
from ekiden_redis.keys import CLUSTER_SLOTS, queue_keys, slot_of

from tests.servers.redis import RedisClusterOfThree
from tests.servers.running import running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisClusterOfThree]:
    with running(lambda: RedisClusterOfThree(tmp_path_factory.mktemp("cluster"))) as cluster:
        yield cluster


class InACluster:
    @pytest.fixture
    def url(self, cluster: RedisClusterOfThree) -> str:
        return f"{cluster.url}?prefix=test-{new_id()}"


class TestRedisCluster(InACluster, TransportConformance, LeaseExpiryConformance, BrokerClockConformance):
    pass


class TestQueuesOnSeveralServers(TransportFixtures):
    PREFIX = "test-cluster"

    @pytest.fixture
    def url(self, cluster: RedisClusterOfThree) -> str:
        return f"{cluster.url}?prefix={self.PREFIX}"

    def queue_on(self, server: int) -> str:
        """The name of a queue whose keys are on that one of the three servers."""
        while True:
            name = f"queue-{new_id()}"
            if slot_of(queue_keys(self.PREFIX, name).ready) * 3 // CLUSTER_SLOTS == server:
                return name

    def test_one_batch_and_one_consumer_reach_all_three(self, transport: Transport) -> None:
        queues = [self.queue_on(server) for server in range(3)]
        consumer = self.consume(transport, *queues)

        assert transport.publish([a_message(queue, queue.encode()) for queue in queues]) == [STORED] * 3

        held = self.collect(consumer, 3)
        assert sorted(bodies(held)) == sorted(queue.encode() for queue in queues)
        follow_ups = [a_message(self.queue_on(server)) for server in (1, 2, 0)]
        answers = consumer.settle([Ending(each, (next_,)) for each, next_ in zip(held, follow_ups, strict=True)])
        assert [answer.outcome for answer in answers] == [SettleOutcome.SETTLED] * 3
        for follow_up in follow_ups:
            self.assert_depth(transport, follow_up.queue, ready=1)

    def test_a_slot_that_moved_is_followed(self, transport: Transport, cluster: RedisClusterOfThree) -> None:
        queue = self.queue_on(0)
        transport.publish([a_message(queue, b"before")])
        consumer = self.consume(transport, queue)
        move_slot(cluster, slot_of(queue_keys(self.PREFIX, queue).ready), giver=0, taker=1)

        assert transport.publish([a_message(queue, b"after")]) == [STORED]

        held = self.collect(consumer, 2)
        assert bodies(held) == [b"before", b"after"]
        assert {answer.outcome for answer in consumer.settle([Ending(each) for each in held])} == {
            SettleOutcome.SETTLED
        }


def move_slot(cluster: RedisClusterOfThree, slot: int, *, giver: int, taker: int) -> None:
    """Move all keys of a slot to another server, as an operator does who rebalances a cluster."""
    source, target = cluster.nodes[giver], cluster.nodes[taker]
    with source.client() as giving, target.client() as taking:
        giver_id, taker_id = (client.execute_command("CLUSTER MYID") for client in (giving, taking))
        taking.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", giver_id)
        giving.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", taker_id)
        while keys := giving.execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
            giving.execute_command("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)
        for client in (taking, giving):
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", taker_id)
