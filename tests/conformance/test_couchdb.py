"""The CouchDB transport keeps the contract."""

from collections.abc import Callable

import pytest
from ekiden.testing.conformance import (
    BrokerClockConformance,
    GarbageConformance,
    LeaseExpiryConformance,
    TransportConformance,
)

from tests.servers.couchdb import spoil_document


class TestCouchDBTransport(TransportConformance, LeaseExpiryConformance, BrokerClockConformance, GarbageConformance):
    @pytest.fixture
    def url(self, couchdb_place: str) -> str:
        return couchdb_place

    @pytest.fixture
    def spoil(self, url: str) -> Callable[[str, str], None]:
        return lambda _queue, message_id: spoil_document(url, "messages", f":{message_id}", {"message": "!"})
