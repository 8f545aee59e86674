"""The RabbitMQ transport keeps the contract, against a real server: on quorum queues, and on classic ones."""

from __future__ import annotations

import pytest
from ekiden.testing.conformance import BrokerClockConformance, TransportConformance


class TestRabbitMQTransport(TransportConformance, BrokerClockConformance):
    @pytest.fixture
    def url(self, rabbitmq_place: str) -> str:
        return f"{rabbitmq_place}&heartbeat=3"  # a stopped process is noticed after three of them


@pytest.mark.slow  # the same again, on the other kind of queue
class TestRabbitMQTransportWithClassicQueues(TransportConformance, BrokerClockConformance):
    @pytest.fixture
    def url(self, rabbitmq_place: str) -> str:
        return f"{rabbitmq_place}&heartbeat=3&queue_type=classic"
