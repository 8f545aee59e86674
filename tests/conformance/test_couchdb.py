"""The CouchDB transport keeps the contract."""

import pytest
from ekiden.testing.conformance import BrokerClockConformance, LeaseExpiryConformance, TransportConformance


class TestCouchDBTransport(TransportConformance, LeaseExpiryConformance, BrokerClockConformance):
    @pytest.fixture
    def url(self, couchdb_place: str) -> str:
        return couchdb_place
