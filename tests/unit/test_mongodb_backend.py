"""What the MongoDB backend promises beyond the conformance kit: one thread, no polling, nothing left behind."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from ekiden.errors import BackendError
from ekiden.message import new_id
from ekiden.results import BeginOutcome, Begun, Start, StoredResult
from ekiden.states import State, may_follow
from ekiden.testing.conformance.fixtures import let_it_wait
from ekiden.testing.conformance.pace import assert_quick
from ekiden.urls import parse_url
from ekiden_mongodb import MongoDBBackend, expiring, waits, watching
from ekiden_mongodb.results import follows, order, parts
from ekiden_mongodb.warnings import missing_rights
from pymongo.database import Database

from tests.servers.mongodb import DATABASE, MongoDBServer
from tests.servers.running import running
from tests.working import eventually

pytestmark = pytest.mark.slow  # each asks a server that takes its time

DAY = 86400.0
STATES = [*(state.value for state in State), "COMPILING"]
THREAD = "ekiden-mongodb-results"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MongoDBServer]:
    """A server that only these tests use."""
    with running(lambda: MongoDBServer(tmp_path_factory.mktemp("mongodb"))) as server:
        yield server


@pytest.fixture
def database(server: MongoDBServer) -> Iterator[Database[dict[str, Any]]]:
    """For looking at the database, which is empty."""
    with server.client() as client:
        database = client.get_database(DATABASE)
        for name in database.list_collection_names():
            database.drop_collection(name)
        yield database


@pytest.fixture
def store(server: MongoDBServer, database: Database[dict[str, Any]]) -> Iterator[MongoDBBackend]:
    with opened(server) as store:
        yield store


@pytest.fixture
def waiter(server: MongoDBServer, database: Database[dict[str, Any]]) -> Iterator[MongoDBBackend]:
    """The same store in another process, as it were."""
    with opened(server) as store:
        yield store


def opened(server: MongoDBServer, **options: object) -> MongoDBBackend:
    return opened_at(server.url_as(None, None, direct=True), **options)


def opened_at(url: str, **options: object) -> MongoDBBackend:
    query = "&".join(f"{name}={value}" for name, value in {"timeout": 5, **options}.items())
    return MongoDBBackend(parse_url(f"{url}&{query}"))


def success(task_id: str | None = None, *, body: bytes = b"1", expires: float | None = DAY) -> StoredResult:
    return StoredResult(task_id or new_id(), "SUCCESS", 0, body, expires)


def brief(results: list[StoredResult | None] | list[StoredResult]) -> list[tuple[str, bytes] | None]:
    return [None if result is None else (result.task_id, result.body) for result in results]


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


# What may follow what.


def test_the_rule_of_the_pipeline_is_the_table_of_states() -> None:
    told = list(itertools.product(STATES, [0, 1, 2, 9, 10, 11, 12345]))

    for (old, old_step), (new, new_step) in itertools.product(told, told):
        allowed = follows(order(old, old_step), order(new, new_step))

        assert allowed == may_follow(old, old_step, new, new_step), (old, old_step, new, new_step)


def test_a_later_try_outranks_an_earlier_one_also_beyond_ten(store: MongoDBBackend) -> None:
    task_id = new_id()

    answers = [store.put([StoredResult(task_id, "RETRY", step, b"", DAY)]) for step in (8, 9, 10, 11, 100, 99)]

    assert answers == [[True]] * 5 + [[False]]


def test_a_batch_is_split_into_parts_of_different_tasks_that_keep_the_order_of_each() -> None:
    results = [StoredResult(task_id, "PROGRESS", 0, b"%d" % number) for number, task_id in enumerate("abacbbdae")]

    found = list(parts(results, 3))

    assert [[result.task_id for _, result in part] for part in found] == [
        ["a", "b", "c"],
        ["d", "e"],
        ["a", "b"],
        ["b", "a"],
    ]
    assert sorted(place for part in found for place, _ in part) == list(range(9))
    assert all(results[place] is result for part in found for place, result in part)


def test_known_and_new_tasks_mix_in_a_batch(store: MongoDBBackend) -> None:
    """Whether tasks are mostly new or not decides how a batch is written, not what is answered."""
    for share in (1, 5, 9, 5, 1):
        known = [success(body=b"first") for _ in range(share)]
        started = [StoredResult(new_id(), "STARTED", 0, b"", DAY) for _ in range(share)]
        store.put([*known, *started])
        again = [success(result.task_id, body=b"second") for result in known]
        ended = [success(result.task_id, body=b"ended") for result in started]
        new = [success(body=b"new") for _ in range(10 - share)]

        assert store.put([*again, *new, *ended]) == [False] * share + [True] * 10
        found = store.get([result.task_id for result in [*again, *new, *ended]])
        bodies = [result.body for result in found if result is not None]
        assert bodies == [b"first"] * share + [b"new"] * (10 - share) + [b"ended"] * share


def test_starts_and_results_of_one_task_do_not_delete_each_other(store: MongoDBBackend) -> None:
    task_id = new_id()

    store.begin([Start(task_id, 1, "a", DAY)])
    store.put([StoredResult(task_id, "RETRY", 1, b"again", 0.2)])
    eventually(lambda: store.get([task_id]) == [StoredResult(task_id, "STARTED", 1, b"")], what="only the note is left")

    assert store.begin([Start(task_id, 1, "b", DAY)]) == [Begun(BeginOutcome.SECOND_COPY)]
    assert store.begin([Start(task_id, 1, "a", DAY)]) == [Begun(BeginOutcome.GO)]


# Nothing is left behind.


def test_everything_that_expires_has_its_date_and_an_index_by_it(
    store: MongoDBBackend, database: Database[dict[str, Any]]
) -> None:
    task_id = new_id()
    store.begin([Start(task_id, 0, "message", 3600.0)])
    store.put([success(task_id, expires=60.0), success("new", expires=60.0)])
    store.join("join", "a", b"1", size=2, expires=60.0)
    store.write("record", b"1", expires=60.0)
    now = datetime.now(UTC).replace(tzinfo=None)

    def seconds(collection: str, key: str) -> float:
        document = database[f"ekiden.{collection}"].find_one({"_id": key})
        assert document is not None
        found: float = (document["x"] - now).total_seconds()
        return found

    assert seconds("results", task_id) == pytest.approx(3600, abs=10)
    assert seconds("results", "new") == pytest.approx(60, abs=10)
    assert seconds("joins", "join") == pytest.approx(60, abs=10)
    assert seconds("outcomes", "4:join:a") == pytest.approx(120, abs=10)
    assert seconds("records", "record") == pytest.approx(60, abs=10)
    for name in ("results", "joins", "outcomes", "records"):
        indexes = database[f"ekiden.{name}"].index_information()
        assert [each["key"] for each in indexes.values() if each.get("expireAfterSeconds") == 0] == [[("x", 1)]]


def test_what_is_kept_for_ever_has_a_date_that_never_comes(
    store: MongoDBBackend, database: Database[dict[str, Any]]
) -> None:
    store.put([success("a", expires=None), success("b", expires=1e300), success("c", expires=1e300)])
    store.put([StoredResult("c", "SUCCESS", 0, b"", None)])
    store.write("record", b"1")

    assert database["ekiden.results"].distinct("u") == [expiring.FOREVER]
    assert database["ekiden.records"].distinct("u") == [expiring.FOREVER]
    assert None not in store.get(["a", "b", "c"])


def test_forgetting_leaves_nothing(store: MongoDBBackend, database: Database[dict[str, Any]]) -> None:
    results = [success() for _ in range(250)]
    store.begin([Start(result.task_id, 0, "message", DAY) for result in results])
    store.put(results)
    store.write("a", b"1")

    store.forget([result.task_id for result in results])
    store.write("a", None)

    assert database["ekiden.results"].count_documents({}) == 0
    assert database["ekiden.records"].count_documents({}) == 0


# Joins and records.


def test_joins_whose_ids_look_alike_do_not_mix(store: MongoDBBackend) -> None:
    ids = ["1", "1:1", "1:1:1", "1:1:a", ":", "::", "3:1:1"]
    for join_id in ids:
        outcomes = {member: f"{join_id}|{member}".encode() for member in ("1", "1:1", ":", "a")}
        told = [store.join(join_id, member, outcomes[member], size=4, expires=DAY) for member in outcomes]

        assert told[-1].outcomes == outcomes


def test_outcomes_may_be_larger_together_than_a_document(store: MongoDBBackend) -> None:
    outcomes = {member: member.encode() * (9 * 2**20) for member in "ab"}

    told = [store.join("join", member, outcome, size=2, expires=DAY) for member, outcome in outcomes.items()]

    assert told[-1].outcomes == outcomes


@pytest.mark.slow
def test_outcomes_live_as_long_as_members_arrive(store: MongoDBBackend) -> None:
    """Here for several times as long as each member asks for."""
    for number in range(11):
        store.join("join", f"member-{number}", b"%d" % number, size=12, expires=1.0)
        let_it_wait(0.3)

    told = store.join("join", "member-11", b"11", size=12, expires=1.0)

    assert told.outcomes == {f"member-{number}": b"%d" % number for number in range(12)}


def test_of_writers_without_a_version_none_is_lost(store: MongoDBBackend, waiter: MongoDBBackend) -> None:
    with ThreadPoolExecutor(8) as threads:
        versions = list(threads.map(lambda number: (store, waiter)[number % 2].write("key", b""), range(80)))

    assert sorted(version or 0 for version in versions) == list(range(1, 81))


# Waiting.


def test_many_threads_wait_with_one_thread_that_is_told(store: MongoDBBackend, waiter: MongoDBBackend) -> None:
    results = [success() for _ in range(40)]
    with ThreadPoolExecutor(40) as threads:
        waiting = [threads.submit(waiter.wait, [result.task_id], 30) for result in results]
        eventually(lambda: len(threads_named(THREAD)) == 1, what="somebody is told")
        let_it_wait(0.3)
        assert len(threads_named(THREAD)) == 1
        store.put(results)

        assert [brief(future.result()) for future in waiting] == [brief([result]) for result in results]


def test_a_result_that_nobody_was_told_of_is_found_all_the_same(
    store: MongoDBBackend, waiter: MongoDBBackend, database: Database[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "LOOK_AGAIN_SECONDS", 0.2)
    monkeypatch.setattr(watching, "AWAIT_SECONDS", 0.2)
    with opened_at_once(waiter) as eager, ThreadPoolExecutor() as threads:
        waiting = threads.submit(eager.wait, ["task"], 30)
        let_it_wait(0.5)
        store.put([success("other")])
        document = database["ekiden.results"].find_one({"_id": "other"})
        assert document is not None
        database["ekiden.results"].insert_one({**document, "_id": "task"})

        assert brief(waiting.result()) == [("task", b"1")]


def opened_at_once(waiter: MongoDBBackend) -> MongoDBBackend:
    """The same store opened anew, with the patched times."""
    return MongoDBBackend(parse_url(waiter._client.place.text + "&timeout=5"))


def test_when_nobody_waits_any_more_the_thread_ends(
    store: MongoDBBackend, waiter: MongoDBBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "LINGER_SECONDS", 0.1)
    monkeypatch.setattr(watching, "AWAIT_SECONDS", 0.1)
    result = success()
    with opened_at_once(waiter) as eager:
        assert eager.wait([result.task_id], 0.3) == []

        eventually(lambda: not threads_named(THREAD), what="the thread has ended")

        store.put([result])
        assert brief(eager.wait([result.task_id], 5)) == brief([result])


def test_closing_ends_the_thread_although_somebody_waits(server: MongoDBServer) -> None:
    store = opened(server)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(store.wait, [new_id()], 30)
        eventually(lambda: threads_named(THREAD), what="somebody waits")
        let_it_wait(0.3)
        started = time.monotonic()
        store.close()

        assert waiting.result() == []
        assert_quick(time.monotonic() - started, 2)
    assert not threads_named(THREAD)


def test_a_server_that_is_gone_is_told_in_bounded_time() -> None:
    with opened_at("mongodb://127.0.0.1:9/?directConnection=true", timeout=0.5) as waiter:
        started = time.monotonic()

        with pytest.raises(BackendError, match="cannot be reached"):
            waiter.wait([new_id()], 30)
        with pytest.raises(BackendError, match="cannot be reached"):
            waiter.wait([new_id()], 0.1)

        assert time.monotonic() - started < 5


@pytest.mark.slow
def test_who_waits_when_the_server_vanishes_is_told_in_bounded_time(tmp_path: Path) -> None:
    with (
        running(lambda: MongoDBServer(tmp_path)) as server,
        opened(server, timeout=1) as waiter,
        ThreadPoolExecutor() as threads,
    ):
        waiting = threads.submit(waiter.wait, [new_id()], 60)
        eventually(lambda: threads_named(THREAD), what="somebody waits")
        let_it_wait(0.3)

        with server.frozen(), pytest.raises(BackendError, match="did not answer"):
            waiting.result(20)


def test_a_child_that_was_forked_while_a_thread_waited_leaves_its_parent_alone(server: MongoDBServer) -> None:
    program = """
        import os, sys, threading, time
        from ekiden.results import StoredResult
        from ekiden.urls import parse_url
        from ekiden_mongodb import MongoDBBackend

        store = MongoDBBackend(parse_url(sys.argv[1]))
        found = []
        thread = threading.Thread(target=lambda: found.extend(store.wait(["parent"], 20)))
        thread.start()
        while not store._waits._is_following:
            time.sleep(0.01)
        child = os.fork()
        if not child:
            store.forget_connections()
            store.put([StoredResult("child", "SUCCESS", 0, b"", 60.0)])
            assert len(store.wait(["child"], 5)) == 1
            store.close()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        store.put([StoredResult("parent", "SUCCESS", 0, b"", 60.0)])
        began = time.monotonic()
        thread.join(5)
        woken_after = time.monotonic() - began
        store.close()
        sys.exit(status or len(found) != 1 or woken_after > 2)
    """

    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), f"{server.url_as(None, None, direct=True)}&prefix={new_id()}"],
        timeout=30,
        check=False,
        capture_output=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )

    assert (ran.returncode, ran.stderr) == (0, b"")


# Bad input.


def test_a_result_that_is_too_large_is_refused_and_the_store_goes_on(store: MongoDBBackend) -> None:
    with pytest.raises(BackendError, match="16 MiB"):
        store.put([success(body=b"x" * (17 * 2**20))])

    assert store.put([success()]) == [True]


@pytest.mark.slow
def test_a_wrong_password_is_told_without_it(tmp_path: Path) -> None:
    with (
        running(lambda: MongoDBServer(tmp_path, username="admin", password="the-right-one")) as server,
        opened_at(server.url_as("admin", "the-wrong-one", direct=True)) as store,
    ):
        asked: list[Callable[[], object]] = [
            lambda: store.put([success()]),
            lambda: store.wait([new_id()], 0.0),
            lambda: store.wait([new_id()], 30.0),
            lambda: store.scan(""),
        ]
        for ask in asked:
            started = time.monotonic()
            with pytest.raises(BackendError, match="password") as caught:
                ask()
            assert "the-wrong-one" not in repr(caught.value) + str(caught.value.__cause__)
            assert_quick(time.monotonic() - started, 2.0)


@pytest.mark.slow
def test_a_user_needs_readwrite_and_no_more(tmp_path: Path) -> None:
    with running(lambda: MongoDBServer(tmp_path, username="admin", password="admin")) as server:
        server.add_user("reader", "x", "read")
        with opened_at(server.url_as("reader", "x", direct=True)) as store:
            with pytest.raises(BackendError, match="readWrite"):
                store.put([success()])
            store.warnings()
        server.add_user("writer", "x", "readWrite")
        with opened_at(server.url_as("writer", "x", direct=True)) as store:
            assert store.put([success()]) == [True]
            assert store.wait([new_id()], 0.5) == []
            assert store._waits.watch.degraded == []
            assert store.warnings() == []


# What an operator should change.


WRITING = ["insert", "update", "remove", "createCollection", "createIndex"]
READING = ["find", "listCollections", "changeStream"]


@pytest.mark.parametrize(
    ("resource", "actions", "missing"),
    [
        ({"db": "shop", "collection": ""}, READING + WRITING, []),
        ({"db": "", "collection": ""}, READING + WRITING, []),
        ({"anyResource": True}, ["anyAction"], []),
        ({"db": "shop", "collection": "ekiden.results"}, READING + WRITING, []),
        ({"db": "shop", "collection": ""}, READING, WRITING),
        ({"db": "another", "collection": ""}, READING + WRITING, ["find", *WRITING, "listCollections"]),
        ({"db": "shop", "collection": "another"}, READING + WRITING, ["find", *WRITING, "listCollections"]),
        ({"cluster": True}, READING + WRITING, ["find", *WRITING, "listCollections"]),
    ],
)
def test_rights_that_are_missing_are_named(resource: dict[str, Any], actions: list[str], missing: list[str]) -> None:
    privileges = [
        {"resource": resource, "actions": actions},
        {"resource": {"db": "shop", "collection": "system.js"}, "actions": ["find"]},
    ]

    assert missing_rights(privileges, "shop", "ekiden") == missing


def test_a_replica_set_is_fine(store: MongoDBBackend) -> None:
    store.put([success()])
    store.write("a", b"")

    assert store.warnings() == []


def test_one_server_alone_is_warned_about(tmp_path: Path) -> None:
    with (
        running(lambda: MongoDBServer(tmp_path, standalone=True)) as server,
        opened(server) as store,
    ):
        (warning,) = store.warnings()

        assert "not a replica set" in warning
        assert "--replSet" in warning


def test_a_missing_ttl_index_is_warned_about(store: MongoDBBackend, database: Database[dict[str, Any]]) -> None:
    store.put([success()])
    database["ekiden.results"].drop_indexes()

    (warning,) = store.warnings()

    assert "ekiden.results has no TTL index" in warning


def test_a_clock_that_is_wrong_is_warned_about(store: MongoDBBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    right_time = time.time
    monkeypatch.setattr(time, "time", lambda: right_time() + 100.0)

    (warning,) = store.warnings()

    assert "differ by 100 s" in warning
