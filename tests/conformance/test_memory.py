"""The memory transport and backend keep the contracts."""

from collections.abc import Iterator

import pytest
from ekiden import memory
from ekiden.message import new_id
from ekiden.testing.conformance import (
    BackendConformance,
    BackendLimitConformance,
    FullBrokerConformance,
    LeaseExpiryConformance,
    TransportConformance,
)


@pytest.fixture
def memory_url() -> Iterator[str]:
    name = new_id()
    yield f"memory://{name}"
    memory.discard(name)


class TestMemoryTransport(TransportConformance, LeaseExpiryConformance):
    @pytest.fixture
    def url(self, memory_url: str) -> str:
        return memory_url


class TestFullMemoryTransport(FullBrokerConformance):
    @pytest.fixture
    def url(self, memory_url: str) -> str:
        return f"{memory_url}?max_messages=200"


class TestMemoryBackend(BackendConformance):
    @pytest.fixture
    def url(self, memory_url: str) -> str:
        return memory_url


class TestSmallMemoryBackend(BackendLimitConformance):
    @pytest.fixture
    def url(self, memory_url: str) -> str:
        return f"{memory_url}?max_value_bytes=3000"

    @pytest.fixture
    def too_large(self) -> int:
        return 3001
