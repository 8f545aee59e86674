"""The thread that waits for all who await: nobody is forgotten, whenever they come."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from ekiden.errors import BackendError, MisuseError
from ekiden.futures import WaitingThread
from ekiden.memory import MemoryBackend
from ekiden.message import new_id
from ekiden.results import StoredResult
from ekiden.testing.conformance.pace import assert_quick
from ekiden.urls import parse_url

from tests.working import PATIENCE


class WatchedBackend(MemoryBackend):
    """A store in memory that tells when somebody is about to wait, and can fail."""

    def __init__(self) -> None:
        super().__init__(parse_url(f"memory://{new_id()}"))
        self.before_wait: Callable[[], None] = lambda: None
        self.failure: Exception | None = None

    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        self.before_wait()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        return super().wait(ids, timeout)


@pytest.fixture
def backend() -> Iterator[WatchedBackend]:
    with WatchedBackend() as backend:
        yield backend


@pytest.fixture
def waiting(backend: WatchedBackend) -> Iterator[WaitingThread]:
    waiting = WaitingThread(backend)
    yield waiting
    waiting.close()


class Called:
    """What a callback was called with."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.result: StoredResult | None = None
        self.error: Exception | None = None

    def __call__(self, result: StoredResult | None, error: Exception | None) -> None:
        self.result, self.error = result, error
        self.event.set()


def final(task_id: str) -> StoredResult:
    return StoredResult(task_id, "SUCCESS", 0, b"")


def test_who_comes_while_others_wait_is_served_too(backend: WatchedBackend, waiting: WaitingThread) -> None:
    first, second = Called(), Called()
    waiting.call_when_final("first", first)

    waiting.call_when_final("second", second)
    backend.put([final("second")])

    assert second.event.wait(PATIENCE)
    assert second.result == final("second")
    assert not first.event.is_set()


def test_who_comes_just_before_the_thread_waits_is_not_forgotten(
    backend: WatchedBackend, waiting: WaitingThread
) -> None:
    late = Called()
    began: list[float] = []

    def come_late() -> None:
        if not began:
            began.append(time.monotonic())
            waiting.call_when_final("late", late)
            backend.put([final("late")])

    backend.before_wait = come_late
    waiting.call_when_final("first", Called())

    assert late.event.wait(PATIENCE)
    assert time.monotonic() - began[0] < 2


def test_many_may_wait_for_one(backend: WatchedBackend, waiting: WaitingThread) -> None:
    called = [Called() for _ in range(10)]
    for each in called:
        waiting.call_when_final("one", each)

    backend.put([final("one")])

    assert all(each.event.wait(PATIENCE) for each in called)


@pytest.mark.parametrize("failure", [BackendError("away"), RuntimeError("a bug")])
def test_trouble_is_told_to_everyone_and_ends_nothing(
    backend: WatchedBackend, waiting: WaitingThread, failure: Exception
) -> None:
    backend.failure = failure
    met, later = Called(), Called()
    waiting.call_when_final("x", met)
    assert met.event.wait(PATIENCE)

    waiting.call_when_final("y", later)
    backend.put([final("y")])

    assert met.error is failure
    assert later.event.wait(PATIENCE)
    assert later.result == final("y")


def test_closing_is_quick_and_told_to_who_waits(backend: WatchedBackend) -> None:
    waiting = WaitingThread(backend)
    called = Called()
    waiting.call_when_final("x", called)
    began = time.monotonic()

    waiting.close()

    assert_quick(time.monotonic() - began, 2)
    assert isinstance(called.error, MisuseError)
    with pytest.raises(MisuseError, match="has been closed"):
        waiting.call_when_final("y", called)
    assert _no_thread("ekiden-results")


def _no_thread(name: str) -> Any:
    return name not in {thread.name for thread in threading.enumerate()}
