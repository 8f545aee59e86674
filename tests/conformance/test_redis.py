"""The Redis transport keeps the contract, against a real server."""

from __future__ import annotations

import pytest
from ekiden.testing.conformance import BrokerClockConformance, LeaseExpiryConformance, TransportConformance


class TestRedisTransport(TransportConformance, LeaseExpiryConformance, BrokerClockConformance):
    @pytest.fixture
    def url(self, redis_place: str) -> str:
        return redis_place
