"""A store that will never take a result: that call has failed, and the others are stored and settled."""

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from ekiden import Ekiden
from ekiden.control import REVOKED_PREFIX
from ekiden.errors import BackendRefused, MisuseError
from ekiden.memory import MemoryBackend, MemoryTransport
from ekiden.message import Message, new_id
from ekiden.results import StoredResult
from ekiden.urls import parse_url

from tests.working import PATIENCE, Gate, dead_letters, eventually, is_empty, the_dead_letter

SMALL = "?max_value_bytes=3000"


class Store(MemoryBackend):
    """A store in memory that never takes what is about some tasks, and tells how often it was asked."""

    refused: frozenset[str] = frozenset()
    puts = 0

    def put(self, results: Sequence[StoredResult]) -> list[bool]:
        self.puts += 1
        if self.refused & {result.task_id for result in results}:
            raise BackendRefused("the store does not take this")
        return super().put(results)


@pytest.fixture
def url() -> str:
    return f"memory://{new_id()}{SMALL}"


@pytest.fixture
def store(url: str) -> Store:
    return Store(parse_url(url))


@pytest.fixture
def app(url: str, store: Store) -> Iterator[Ekiden]:
    with Ekiden("refused", broker=url, worker_grace=2.0) as app:
        app.adopt(MemoryTransport(parse_url(url)), store)
        yield app


def test_a_result_that_is_too_large_for_the_store_is_a_failure(app: Ekiden) -> None:
    gate = Gate()

    @app.task
    def sized(size: int) -> str:
        gate.pass_through()
        return "x" * size

    @app.task
    def told(task_id: str) -> str:
        return task_id

    with app.worker(threads=8):
        small = [sized.delay(number) for number in range(4)]
        large = sized.apply_async((5000,), link_error=told.s())
        small += [sized.delay(number) for number in range(4, 7)]
        gate.open.set()  # they end together

        assert [len(each.get(PATIENCE)) for each in small] == list(range(7))
        with pytest.raises(MisuseError, match=r"its result cannot be stored: .*max_value_bytes allows 3000"):
            large.get(PATIENCE)
        eventually(lambda: is_empty(app), what="all is settled")
    assert json.loads(the_dead_letter(app).body)["id"] == large.id
    assert [child.get(0) for child in large.children] == [large.id]


def test_what_was_to_be_tried_again_and_cannot_be_stored_is_a_failure(app: Ekiden) -> None:
    @app.task(bind=True)
    def again(self: Any, text: str) -> None:
        self.retry((text * 5000,), countdown=0)

    with app.worker(threads=1):
        result = again.delay("x")

        with pytest.raises(MisuseError, match="its result cannot be stored"):
            result.get(PATIENCE)
        eventually(lambda: is_empty(app), what="all is settled")


def test_what_cannot_even_be_told_as_a_failure_is_settled_and_logged(
    app: Ekiden, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate()

    @app.task
    def work(number: int) -> int:
        gate.pass_through()
        return number

    with app.worker(threads=8):
        results = [work.delay(number) for number in range(8)]
        store.refused = frozenset({results[3].id, results[6].id})
        gate.open.set()

        for number in (0, 1, 2, 4, 5, 7):
            assert results[number].get(PATIENCE) == number
        eventually(lambda: is_empty(app), what="all is settled")
    assert [results[number].state for number in (3, 6)] == ["PENDING", "PENDING"]
    assert {each.headers["ekiden-dead-reason"] for each in dead_letters(app)} == {"MisuseError"}
    assert len(dead_letters(app)) == 2
    assert caplog.text.count("nothing can be stored of how it ended") == 2
    assert store.puts < 40


def test_a_started_that_is_refused_stops_nothing(app: Ekiden, store: Store) -> None:
    @app.task(track_started=True)
    def work() -> int:
        return 1

    store.refused = frozenset({"refused"})
    with app.worker(threads=1):
        work.apply_async(task_id="refused")

        assert work.delay().get(PATIENCE) == 1
        eventually(lambda: is_empty(app), what="all is settled")


def test_a_message_whose_start_is_refused_is_a_dead_letter(app: Ekiden, store: Store) -> None:
    @app.task
    def work() -> int:
        return 1

    def begin(starts: Sequence[Any]) -> list[Any]:
        if "refused" in {start.task_id for start in starts}:
            raise BackendRefused("the store does not take this")
        return MemoryBackend.begin(store, starts)

    store.begin = begin  # type: ignore[method-assign]
    calls = [
        {"v": 1, "task": work.name, "id": task_id, "sent": time.time(), "fenced": True}
        for task_id in ("a", "refused", "b")
    ]
    app.transport.publish([Message(new_id(), "default", json.dumps(call).encode()) for call in calls])
    with app.worker(threads=1):
        assert [app.AsyncResult(each).get(PATIENCE) for each in "ab"] == [1, 1]
        assert json.loads(the_dead_letter(app).body)["id"] == "refused"


@pytest.mark.parametrize("garbage", [b"", b"{}", b"\xff", b"[" * 2500, b'{"at":"x"}', b'{"at":1e999}'])
def test_a_revocation_that_cannot_be_read_revokes_nothing(
    app: Ekiden, caplog: pytest.LogCaptureFixture, garbage: bytes
) -> None:
    @app.task
    def work(number: int) -> int:
        return number

    results = [work.delay(number) for number in range(3)]
    app.revoke(results[0].id)
    app.backend.write(REVOKED_PREFIX + results[1].id, garbage)
    with app.worker(threads=1):
        assert [each.get(PATIENCE) for each in results[1:]] == [1, 2]
        eventually(results[0].ready, what="the other one has ended")
        assert results[0].state == "REVOKED"
    assert f"{REVOKED_PREFIX}{results[1].id} is no revocation" in caplog.text


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xff", b"[" * 2500, b'{"next_start":"x"}', b'{"next_start":1e300}', b'{"next_start":1e12}'],
)
def test_a_rate_limit_that_cannot_be_read_is_begun_anew(app: Ekiden, garbage: bytes) -> None:
    @app.task(rate_limit="100/s")
    def work(number: int) -> int:
        return number

    app.backend.write(f"rate/{work.name}", garbage)
    with app.worker(threads=1):
        assert [work.delay(number).get(PATIENCE) for number in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("payload", [b"", b"\xff", b"[" * 100_000, b'{"revoked":5}', b'{"revoked":["\\u0000","x"]}'])
def test_a_broadcast_that_cannot_be_read_harms_no_worker(app: Ekiden, payload: bytes) -> None:
    @app.task
    def work() -> int:
        return 1

    app.revoke("somebody")
    with app.worker(threads=1) as worker:
        app.transport.broadcast("ekiden.control", [payload, payload])
        gate_id = work.delay()

        assert gate_id.get(PATIENCE) == 1
        assert worker._thread.is_alive()
    assert not worker._thread.is_alive()
