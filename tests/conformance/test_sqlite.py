"""The SQLite transport and backend keep the contracts."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest
from ekiden.plugins import open_transport
from ekiden.results import Backend
from ekiden.sqlite.backend import SQLiteBackend
from ekiden.testing.conformance import (
    BackendConformance,
    BackendGarbageConformance,
    BackendLimitConformance,
    BackendProcessConformance,
    DeadlineConformance,
    GarbageConformance,
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


class TestLockedSQLite(DeadlineConformance):
    """Another process writes for longer than anybody waits."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/tasks.db?busy_timeout=1"

    @pytest.fixture
    def silent(self, tmp_path: Path) -> Callable[[], AbstractContextManager[None]]:
        @contextmanager
        def locked() -> Iterator[None]:
            with closing(sqlite3.connect(tmp_path / "tasks.db", isolation_level=None)) as connection:
                connection.execute("BEGIN EXCLUSIVE")
                yield
                connection.execute("ROLLBACK")

        return locked


@pytest.mark.slow  # the same again, in another way of waking
class TestSQLiteTransportThatPolls(TransportConformance, LeaseExpiryConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/tasks.db?wake=poll"


class TestSQLiteBackend(BackendConformance, BackendProcessConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/results.db"


class TestSQLiteBackendsLimit(BackendLimitConformance):
    """SQLite's own limit of a gigabyte, lowered where the file is opened."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/results.db"

    @pytest.fixture
    def too_large(self) -> int:
        return 100_000

    def open_backend(self, url: str) -> Backend:
        backend = super().open_backend(url)
        assert isinstance(backend, SQLiteBackend)
        backend._database.write(lambda connection: connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000))
        return backend


@pytest.mark.parametrize(
    "change",
    [
        "headers = '{'",
        "headers = '[]'",
        "headers = x'ff'",
        "headers = CAST(x'7b22ff223a317d' AS TEXT)",
        "body = 'text'",
        "priority = 'x'",
        "due = 'x'",
        "id = x'ff'",
        "id = CAST(x'61ff' AS TEXT)",
    ],
)
class TestSQLiteTransportThatHoldsGarbage(GarbageConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/tasks.db"

    @pytest.fixture
    def spoil(self, tmp_path: Path, change: str) -> Callable[[str, str], None]:
        def spoil(queue: str, message_id: str) -> None:
            with closing(sqlite3.connect(tmp_path / "tasks.db")) as connection, connection:
                connection.execute(f"UPDATE message SET {change} WHERE queue = ? AND id = ?", (queue, message_id))

        return spoil


@pytest.mark.parametrize("garbage", ["x'ff'", "'text'", "5", "1e300", "x''", "CAST(x'61ff' AS TEXT)"])
class TestSQLiteBackendThatHoldsGarbage(BackendGarbageConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/results.db"

    @pytest.fixture
    def spoil(self, tmp_path: Path, garbage: str) -> Callable[[str, str], None]:
        changes = {
            "result": f"UPDATE result SET step = {garbage}, state = {garbage} WHERE task_id = ?",
            "start": f"UPDATE start SET step = {garbage} WHERE task_id = ?",
            "record": f"UPDATE record SET version = {garbage} WHERE key = ?",
        }

        def spoil(kind: str, key: str) -> None:
            with closing(sqlite3.connect(tmp_path / "results.db")) as connection, connection:
                connection.execute(changes[kind], (key,))

        return spoil


@pytest.mark.slow
class TestSQLiteBackendThatPolls(BackendConformance):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/results.db?wake=poll"
