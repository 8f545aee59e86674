"""The SQLite transport and backend keep the contracts."""

from pathlib import Path

import pytest
from ekiden.testing.conformance import BackendConformance, LeaseExpiryConformance, TransportConformance


class TestSQLiteTransport(TransportConformance, LeaseExpiryConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/tasks.db"


class TestSQLiteTransportThatPolls(TransportConformance, LeaseExpiryConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/tasks.db?wake=poll"


class TestSQLiteBackend(BackendConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/results.db"


class TestSQLiteBackendThatPolls(BackendConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/results.db?wake=poll"
