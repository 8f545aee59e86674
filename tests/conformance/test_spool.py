"""The transport of docs/writing-a-transport.md keeps what it describes, but for what the page says that it does not."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from ekiden.testing.conformance import DeadlineConformance, LeaseExpiryConformance, TransportConformance
from ekiden.transport import Transport
from ekiden.urls import parse_url

from examples.spool.spool import SpoolTransport


@pytest.mark.slow  # an example, held to the same kit
@pytest.mark.timeout(240)  # it reads all of its file every time: 20,000 messages take it long
class TestSpool(TransportConformance, LeaseExpiryConformance):
    many_delayed = 4000  # each publish reads and writes the whole file

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"spool:///{tmp_path}/tasks.json"

    def open_transport(self, url: str) -> Transport:
        return SpoolTransport(parse_url(url))  # one that is installed is found by its entry point

    @pytest.mark.slow
    @pytest.mark.xfail(reason="it looks at the file all the time, as its page says", strict=False)
    def test_fifty_idle_waiters_use_no_processor_time(self, transport: Transport, other: Transport, queue: str) -> None:
        super().test_fifty_idle_waiters_use_no_processor_time(transport, other, queue)


class TestLockedSpool(DeadlineConformance):
    """Another process holds the lock for longer than anybody waits."""

    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"spool:///{tmp_path}/tasks.json"

    def open_transport(self, url: str) -> Transport:
        return SpoolTransport(parse_url(url))

    @pytest.fixture
    def silent(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
        monkeypatch.setattr("examples.spool.spool.LONGEST_CALL_SECONDS", 1.0)

        @contextmanager
        def locked() -> Iterator[None]:
            with open(tmp_path / "tasks.lock", "a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield

        return locked
