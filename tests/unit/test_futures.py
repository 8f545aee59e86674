"""The thread that waits for all who await: nobody is forgotten, whenever they come."""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from ekiden import Ekiden
from ekiden.errors import BackendError, MisuseError, TransportCrashed
from ekiden.futures import WaitingThread
from ekiden.memory import MemoryBackend, MemoryTransport
from ekiden.message import Message, Published, PublishOutcome, new_id
from ekiden.options import Publishing
from ekiden.publisher import Publisher
from ekiden.results import StoredResult
from ekiden.testing.conformance.pace import assert_quick
from ekiden.urls import parse_url

from tests.working import PATIENCE, eventually


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


class Bug(BaseException):
    """What no thread expects."""


def test_what_ends_the_thread_is_told_to_everyone(backend: WatchedBackend) -> None:
    waiting = WaitingThread(backend)
    met = Called()

    def fail() -> None:
        raise Bug

    backend.before_wait = fail
    waiting.call_when_final("x", met)

    assert met.event.wait(PATIENCE)
    assert isinstance(met.error, BackendError)
    assert waiting.has_failed
    with pytest.raises(BackendError, match="has just failed"):
        waiting.call_when_final("y", Called())
    waiting.close()


def test_an_app_starts_another_thread_where_one_has_failed() -> None:
    name = new_id()
    with Ekiden("apart", broker=f"memory://{name}", backend=f"memory://{name}") as app:
        store = WatchedBackend()
        app.adopt(app.transport, store)
        first = app.waiting_thread()
        met, later = Called(), Called()

        def fail() -> None:
            store.before_wait = lambda: None
            raise Bug

        store.before_wait = fail
        first.call_when_final("x", met)
        assert met.event.wait(PATIENCE)

        app.waiting_thread().call_when_final("x", later)
        store.put([final("x")])

        assert later.event.wait(PATIENCE)
        assert later.result == final("x")


def test_callbacks_for_what_never_comes_do_not_pile_up() -> None:
    waiting = WaitingThread(store := WatchedBackend(), most=10)
    called = [Called() for _ in range(25)]
    try:
        for number, each in enumerate(called):
            waiting.call_when_final(f"never-{number}", each)

        assert [each.event.is_set() for each in called] == [True] * 15 + [False] * 10
        assert "more than 10 callbacks wait" in str(called[0].error)
        assert len(waiting._callbacks) == len(waiting._unowned) == 10

        store.put([final(f"never-{number}") for number in range(15, 25)])
        assert all(each.event.wait(PATIENCE) for each in called)
        assert len(waiting._callbacks) == len(waiting._unowned) == 0
    finally:
        waiting.close()


def test_a_callback_that_ends_the_program_ends_no_thread() -> None:
    name = new_id()
    with Ekiden("apart", broker=f"memory://{name}", backend=f"memory://{name}") as app:
        called: list[object] = []

        def leave(result: object) -> None:
            called.append(result)
            sys.exit(1)

        app.AsyncResult("x").then(leave)
        app.backend.put([final("x")])
        eventually(lambda: called, what="it is called")
        later = Called()
        app.waiting_thread().call_when_final("y", later)
        app.backend.put([final("y")])

        assert later.event.wait(PATIENCE)
        assert later.result == final("y")


def test_async_callers_are_told_what_ends_their_thread_and_another_one_begins() -> None:
    stored: list[str] = []

    class Failing(MemoryTransport):
        def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
            if not stored:
                stored.append("failed")
                raise Bug
            return super().publish(messages, deadline=deadline)

    async def publish() -> list[Published]:
        return await publisher.publish_async([Message(new_id(), "queue", b"")], Publishing(10.0, None))

    with Failing(parse_url(f"memory://{new_id()}")) as transport:
        publisher = Publisher(lambda: transport)
        with pytest.raises(TransportCrashed, match="Bug"):
            asyncio.run(publish())

        assert [each.outcome for each in asyncio.run(publish())] == [PublishOutcome.STORED]
        publisher.close()


def test_who_has_given_up_awaiting_leaves_nothing_behind(backend: WatchedBackend, waiting: WaitingThread) -> None:
    async def main() -> None:
        for task_id in ("a", "a", "b"):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(waiting.wait(task_id), 0.01)
        patient = asyncio.ensure_future(waiting.wait("a"))
        cancelled = asyncio.ensure_future(waiting.wait("a"))
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        assert {task_id: len(callbacks) for task_id, callbacks in waiting._callbacks.items()} == {"a": 1}
        await asyncio.to_thread(backend.put, [final("a")])
        assert await asyncio.wait_for(patient, PATIENCE) == final("a")

    asyncio.run(main())

    assert not waiting._callbacks


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
