"""The SQLite transport and backend keep the contracts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from ekiden.plugins import open_transport
from ekiden.testing.conformance import (
    BackendConformance,
    BackendProcessConformance,
    LeaseExpiryConformance,
    LostWakeUpConformance,
    ProcessConformance,
    TransportConformance,
)
from ekiden.transport import Transport


class TestSQLiteTransport(TransportConformance, LeaseExpiryConformance, ProcessConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/tasks.db"


class TestSQLiteTransportThatMissesABell(LostWakeUpConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/tasks.db"

    @pytest.fixture
    def silent_publisher(self, url: str) -> Iterator[Transport]:
        with open_transport(f"{url}?wake=poll") as transport:
            yield transport


@pytest.mark.slow  # the same again, in another way of waking
class TestSQLiteTransportThatPolls(TransportConformance, LeaseExpiryConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/tasks.db?wake=poll"


class TestSQLiteBackend(BackendConformance, BackendProcessConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/results.db"


@pytest.mark.slow
class TestSQLiteBackendThatPolls(BackendConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/results.db?wake=poll"
