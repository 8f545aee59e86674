"""What the SQLite result store promises beyond the conformance kit: waiting without polling, expiry, processes."""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from ekiden.errors import BackendError
from ekiden.message import new_id
from ekiden.results import BeginOutcome, Begun, Start, StoredResult
from ekiden.sqlite import SQLiteBackend, backend, waits
from ekiden.testing.conformance.pace import assert_quick
from ekiden.urls import parse_url

DAY = 86400.0


@pytest.fixture
def path() -> Iterator[Path]:
    with TemporaryDirectory() as short:  # the addresses of the sockets beside it have a hundred bytes
        yield Path(short) / "x.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteBackend]:
    with opened(path) as store:
        yield store


def opened(path: Path) -> SQLiteBackend:
    return SQLiteBackend(parse_url(f"sqlite:///{path}?busy_timeout=0.5"))


def success(task_id: str | None = None, *, expires: float | None = DAY) -> StoredResult:
    return StoredResult(task_id or new_id(), "SUCCESS", 0, b"1", expires)


def rows_in(path: Path, table: str) -> int:
    connection = sqlite3.connect(path)
    try:
        (count,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        return int(count)
    finally:
        connection.close()


# Waiting.


def test_two_waits_for_one_task_are_both_told(store: SQLiteBackend) -> None:
    result = success()
    found: list[StoredResult] = []
    threads = [threading.Thread(target=lambda: found.extend(store.wait([result.task_id], 10))) for _ in range(5)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)

    store.put([result])

    for thread in threads:
        thread.join(10)
    assert found == [result] * 5


def test_a_result_stored_between_two_waits_is_found_by_the_second(store: SQLiteBackend) -> None:
    result = success()
    assert store.wait([result.task_id], 0.01) == []
    store.put([result])
    time.sleep(0.05)

    assert store.wait([result.task_id, new_id()], 5) == [result]
    assert store.wait([result.task_id], 5) == [result]


def test_a_result_that_comes_back_after_it_was_forgotten_is_told(store: SQLiteBackend) -> None:
    result = success()
    store.put([result])
    assert store.wait([result.task_id], 5) == [result]
    store.forget([result.task_id])
    assert store.wait([result.task_id], 0.01) == []

    storing = threading.Timer(0.05, store.put, [[result]])
    storing.start()

    assert store.wait([result.task_id], 5) == [result]
    storing.join()


def test_a_result_is_found_although_the_bell_was_taken_away(store: SQLiteBackend, path: Path) -> None:
    result = success()
    store.wait([result.task_id], 0.01)
    for bell in path.with_name("x.db-bells").iterdir():
        bell.unlink()
    storing = threading.Timer(0.05, store.put, [[result]])
    storing.start()

    assert store.wait([result.task_id], 5) == [result]
    storing.join()


def test_another_process_wakes_who_waits_in_a_millisecond_or_so(store: SQLiteBackend, path: Path) -> None:
    script = """
import sys, time
from ekiden.plugins import open_backend
from ekiden.results import StoredResult
with open_backend(sys.argv[1]) as store:
    for task_id in sys.argv[2:]:
        time.sleep(0.02)
        store.put([StoredResult(task_id, "SUCCESS", 0, repr(time.time()).encode())])
"""
    task_ids = [new_id() for _ in range(30)]
    other = subprocess.Popen([sys.executable, "-c", script, f"sqlite:///{path}", *task_ids])
    delays = []

    for task_id in task_ids:
        found = store.wait([task_id], 10)
        delays.append(time.time() - float(found[0].body))

    assert other.wait(20) == 0
    assert_quick(sorted(delays)[15], 0.02, delays)


def test_what_nobody_waits_for_any_more_is_not_followed_for_ever(
    store: SQLiteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "PENDING_KEPT_SECONDS", 0.1)
    monkeypatch.setattr(waits, "LOOK_AGAIN_SECONDS", 0.05)
    task_id = new_id()
    store.wait([task_id], 0.01)
    time.sleep(0.5)

    assert store._waits._pending == {}

    storing = threading.Timer(0.05, store.put, [[success(task_id)]])
    storing.start()
    assert len(store.wait([task_id], 5)) == 1
    storing.join()


def test_closing_leaves_no_thread_and_no_bell(path: Path) -> None:
    before = threading.active_count()
    store = opened(path)
    store.wait([new_id()], 0.01)
    assert threading.active_count() == before + 1

    store.close()

    assert threading.active_count() == before
    assert not path.with_name("x.db-bells").exists()
    with pytest.raises(BackendError, match="was closed here"):
        store.get(["x"])


def test_a_forked_child_waits_and_stores_by_itself(store: SQLiteBackend) -> None:
    store.wait([new_id()], 0.01)
    childs, parents = success(), success()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.forget_connections()
            store.put([childs])
            code = 0 if store.wait([parents.task_id], 10) == [parents] else 2
            store.close()
        finally:
            os._exit(code)

    assert store.wait([childs.task_id], 10) == [childs]
    store.put([parents])

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Expiry.


def test_what_has_expired_is_deleted_by_and_by(
    store: SQLiteBackend, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "TIDY_SECONDS", 0.0)
    store.put([success(expires=0.05) for _ in range(200)])
    store.begin([Start(new_id(), 0, "m", 0.05) for _ in range(50)])
    store.join("join", "member", b"x", size=2, expires=0.05)
    store.write("key", b"x", expires=0.05)
    kept = success()
    store.put([kept])
    time.sleep(0.1)

    store.put([kept, success(expires=None)])

    counted = {table: rows_in(path, table) for table in ("result", "start", "joining", "arrival", "record")}
    assert counted == {"result": 2, "start": 0, "joining": 0, "arrival": 0, "record": 0}
    assert store.get([kept.task_id]) == [kept]


def test_deleting_what_expired_is_bounded_and_goes_on(
    store: SQLiteBackend, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "DELETED_AT_ONCE", 100)
    store.put([success(expires=1.0) for _ in range(250)])  # long enough that putting them deletes none
    time.sleep(1.0)
    monkeypatch.setattr(store, "_tidy_at", 0.0)
    left = []

    for _ in range(3):
        store.write("key", b"x")
        left.append(rows_in(path, "result"))

    assert left == [150, 50, 0]


# Trouble.


@pytest.mark.slow
def test_a_locked_file_is_a_backend_error_and_everything_may_be_tried_again(store: SQLiteBackend, path: Path) -> None:
    task_id = new_id()
    store.write("key", b"x")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    for use in (
        lambda: store.put([success(task_id)]),
        lambda: store.begin([Start(task_id, 0, "m")]),
        lambda: store.write("key", b"y"),
        lambda: store.join("j", "m", b"", size=1, expires=None),
        lambda: store.forget([task_id]),
    ):
        with pytest.raises(BackendError, match="locked by another process"):
            use()
    assert store.get([task_id]) == [None]
    other.execute("COMMIT")
    other.close()

    assert store.begin([Start(task_id, 0, "m")]) == [Begun(BeginOutcome.GO)]
    assert store.put([success(task_id)]) == [True]


def test_a_file_that_is_not_a_database_is_told_to_who_waits(path: Path) -> None:
    path.write_bytes(b"no database at all, only text" * 1000)

    with opened(path) as store, pytest.raises(BackendError, match="not an SQLite database"):
        store.wait([new_id()], 5)


def test_ten_thousand_waits_that_end_bit_by_bit_are_quick(store: SQLiteBackend) -> None:
    results = [success() for _ in range(10_000)]
    waited_for = {result.task_id for result in results}
    assert store.wait(list(waited_for), 0.01) == []
    started = time.process_time()

    for start in range(0, 10_000, 500):
        store.put(results[start : start + 500])
        while len(waited_for) > 10_000 - start - 500:
            waited_for -= {result.task_id for result in store.wait(list(waited_for), 5)}

    assert waited_for == set()
    assert time.process_time() - started < 10
