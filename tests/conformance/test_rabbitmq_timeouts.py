"""A task that outlasts the server's consumer_timeout is lost, and its worker goes on: on every version of RabbitMQ.

Up to 4.2 the server closes the channel; from 4.3 on it ends the subscription, and pushes to one that it has ended when
something of it is acknowledged all the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from ekiden.errors import BrokerUnavailable
from ekiden.message import LOST, Delivery, Ending, new_id
from ekiden.plugins import open_transport
from ekiden.testing.conformance.fixtures import a_message, eventually, numbered, settle
from ekiden.transport import Consumer

from tests.servers.rabbitmq import RabbitMQServer
from tests.servers.running import running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

TIMEOUT_SECONDS = 3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQServer]:
    """A node that takes back what is held for three seconds, and looks for it every second."""
    settings = {"consumer_timeout": str(TIMEOUT_SECONDS * 1000)}

    def make() -> RabbitMQServer:
        server = RabbitMQServer(tmp_path_factory.mktemp("rabbitmq-timeouts"), settings=settings)
        server.environment["RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS"] += " -rabbit channel_tick_interval 1000"
        return server

    with running(make) as server:
        yield server


@pytest.mark.parametrize("rests", [False, True], ids=["busy", "idle"])
def test_what_was_held_for_too_long_is_lost_and_the_worker_goes_on(server: RabbitMQServer, rests: bool) -> None:
    queue = f"queue-{new_id()}"
    with (
        open_transport(server.url) as transport,
        transport.consumer([queue], lease=60, prefetch=10, name="one") as consumer,
    ):
        transport.publish([a_message(queue, b"long")])
        (held,) = receive(consumer)
        again: list[Delivery] = []
        done: set[bytes] = set()

        def is_taken_back() -> bool:
            if rests:
                time.sleep(0.5)  # nobody receives, and the subscription is cancelled
                return consumer.extend([held]) == [LOST]
            transport.publish(numbered(queue, 1))
            for each in receive(consumer, at_most=0.1):
                if each.message.id == held.message.id:
                    again.append(each)
                else:
                    done.add(each.message.body)
                    settle(consumer, [each])
            return consumer.extend([held]) == [LOST]

        eventually(is_taken_back, what="the server takes it back", within=30)

        follow_up = a_message(f"{queue}-next")
        assert consumer.settle([Ending(held, (follow_up,))]) == [LOST]
        eventually(lambda: again or again.extend(receive(consumer)) or again, what="it comes again", within=30)
        assert {each.message.id for each in again} >= {held.message.id}
        transport.publish([a_message(queue, bytes([number])) for number in range(20)])
        seen: set[bytes] = set()

        def all_came() -> bool:
            deliveries = receive(consumer)
            settle(consumer, deliveries)
            seen.update(each.message.body for each in deliveries)
            return {bytes([number]) for number in range(20)} <= seen

        eventually(all_came, what="the worker goes on", within=30)
        assert transport.depth(f"{queue}-next").ready == 0
        assert not transport._io.has_crashed  # type: ignore[attr-defined]


def receive(consumer: Consumer, at_most: float = 1.0) -> list[Delivery]:
    try:
        return consumer.receive(10, at_most)
    except BrokerUnavailable:
        return []
