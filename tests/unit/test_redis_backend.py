"""What the Redis backend promises beyond the conformance kit: one subscription, no polling, nothing left behind."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from ekiden.errors import BackendError
from ekiden.message import new_id
from ekiden.results import BeginOutcome, Begun, Start, StoredResult
from ekiden.states import State, may_follow
from ekiden.testing.conformance.fixtures import let_it_wait
from ekiden.testing.conformance.pace import assert_quick
from ekiden.testing.interruptions import Signals
from ekiden.urls import parse_url
from ekiden_redis import RedisBackend, waits
from ekiden_redis.keys import slot_of
from ekiden_redis.store_keys import StoreKeys
from ekiden_redis.stored_results import encoded, follows, is_final, order

from tests.servers.redis import SLOTS, RedisClusterOfThree, RedisServer
from tests.servers.running import running
from tests.working import PATIENCE, eventually

DAY = 86400.0
SLOTS_OF_THREE = [SLOTS * number // 3 for number in (1, 2, 3)]
"""Behind the last slot of each server of a cluster."""

STATES = [*(state.value for state in State), "COMPILING"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A server that only these tests use: its commands, clients and keys can be counted."""
    with running(lambda: RedisServer(tmp_path_factory.mktemp("redis"))) as server:
        yield server


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    """For looking at the server, which is empty."""
    with server.client() as client:
        client.flushall()
        yield client


@pytest.fixture
def store(server: RedisServer, client: redis.Redis) -> Iterator[RedisBackend]:
    with opened(server.url) as store:
        yield store


@pytest.fixture
def waiter(server: RedisServer, client: redis.Redis) -> Iterator[RedisBackend]:
    """The same store in another process, as it were."""
    with opened(server.url) as store:
        yield store


def opened(url: str, **options: object) -> RedisBackend:
    query = "&".join(f"{name}={value}" for name, value in {"timeout": 5, **options}.items())
    return RedisBackend(parse_url(f"{url}?{query}"))


def success(task_id: str | None = None, *, body: bytes = b"1", expires: float | None = DAY) -> StoredResult:
    return StoredResult(task_id or new_id(), "SUCCESS", 0, body, expires)


def subscribers(client: redis.Redis) -> list[dict[str, str]]:
    """The connections that are subscribed to something."""
    return [each for each in client.client_list() if int(each["sub"]) or int(each.get("ssub", 0))]


def is_followed(client: redis.Redis, task_ids: list[str]) -> bool:
    """Whether somebody is told of all these tasks."""
    channels = [StoreKeys("ekiden", 0).channel(task_id) for task_id in task_ids]
    return all(count for _, count in client.pubsub_numsub(*channels))


def in_thread(call: Callable[[], list[StoredResult]]) -> tuple[threading.Thread, list[StoredResult]]:
    """Call it in a thread; the list is filled with what it returns."""
    found: list[StoredResult] = []
    thread = threading.Thread(target=lambda: found.extend(call()))
    thread.start()
    return thread, found


def in_thread_for(waiter: RedisBackend, result: StoredResult) -> tuple[threading.Thread, list[StoredResult]]:
    """Wait for it in a thread."""
    return in_thread(lambda: waiter.wait([result.task_id], 30))


def ended(threads: list[threading.Thread], within: float = PATIENCE) -> bool:
    """Whether they all end in time."""
    deadline = time.monotonic() + within
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


# What may follow what.


def test_the_rule_of_the_scripts_is_the_table_of_states() -> None:
    told = list(itertools.product(STATES, [0, 1, 2, 9, 10, 11, 12345]))

    for (old, old_step), (new, new_step) in itertools.product(told, told):
        allowed = follows(order(old, old_step), order(new, new_step))

        assert allowed == may_follow(old, old_step, new, new_step), (old, old_step, new, new_step)


@pytest.mark.parametrize("state", STATES)
def test_what_is_stored_begins_with_its_order(state: str) -> None:
    stored = encoded(StoredResult("task", state, 12345, b"body"))

    assert int(stored[:12]) == order(state, 12345)
    assert is_final(stored) == (state in {"SUCCESS", "FAILURE", "REVOKED", "EXPIRED"})


def test_a_later_try_outranks_an_earlier_one_also_beyond_ten(store: RedisBackend) -> None:
    task_id = new_id()

    answers = [store.put([StoredResult(task_id, "RETRY", step, b"", DAY)]) for step in (8, 9, 10, 11, 100, 99)]

    assert answers == [[True]] * 5 + [[False]]


# Nothing is left behind.


def test_forgetting_leaves_nothing(store: RedisBackend, client: redis.Redis) -> None:
    results = [success() for _ in range(600)]
    store.begin([Start(result.task_id, 0, "message", DAY) for result in results])
    store.put(results)
    store.write("a", b"1")
    store.write("b", b"1", expires=DAY)
    assert client.dbsize() == 1200 + 4

    store.forget([result.task_id for result in results])
    store.write("a", None)
    store.write("b", None)

    assert client.dbsize() == 0


def test_what_expires_leaves_nothing(store: RedisBackend, client: redis.Redis) -> None:
    for number in range(60):
        task_id = new_id()
        store.begin([Start(task_id, 0, "message", 0.3)])
        store.put([success(task_id, expires=0.3)])
        store.join(task_id, "a", b"1", size=2, expires=0.3)
        store.write(f"record-{number}", b"1", expires=0.3)

    eventually(lambda: client.dbsize() == 0 and not client.keys(), what="no key is left")


def test_records_that_last_do_not_keep_the_names_of_those_that_expired(
    store: RedisBackend, client: redis.Redis
) -> None:
    index = StoreKeys("ekiden", 0).record_keys
    store.write("lasting", b"1")
    for number in range(200):
        store.write(f"brief-{number:03}", b"1", expires=0.2)
    eventually(lambda: store.read(["brief-199"]) == [None], what="all brief ones have expired")

    for number in range(10):
        store.write(f"lasting-{number}", b"1")

    assert client.zcard(index) == 11
    assert client.ttl(index) == -1


def test_scan_clears_the_names_of_what_has_expired(store: RedisBackend, client: redis.Redis) -> None:
    index = StoreKeys("ekiden", 0).record_keys
    store.write("lasting", b"1")
    for number in range(30):
        store.write(f"brief-{number:03}", b"1", expires=0.2)
    eventually(lambda: store.read(["brief-029"]) == [None], what="all brief ones have expired")

    def is_clear() -> bool:
        return [record.key for record in store.scan("")] == ["lasting"] and client.zcard(index) == 1

    eventually(is_clear, what="only the names of records are left")


def test_a_record_that_lasts_after_all_stays_found(store: RedisBackend) -> None:
    store.write("a", b"1", expires=0.2)
    store.write("b", b"1", expires=0.2)
    store.write("a", b"2")
    eventually(lambda: store.read(["b"]) == [None], what="the other has expired")

    assert [(record.key, record.version) for record in store.scan("")] == [("a", 2)]


# Scripts.


def test_scripts_that_the_server_has_forgotten_are_sent_again(store: RedisBackend, client: redis.Redis) -> None:
    for _ in range(3):
        task_id = new_id()
        assert store.begin([Start(task_id, 0, "message", DAY)]) == [Begun(BeginOutcome.GO)]
        client.script_flush()
        assert store.put([success(task_id), success(task_id), *(success() for _ in range(600))])[:3] == [
            True,
            False,
            True,
        ]
        client.script_flush()
        assert store.join(task_id, "a", b"1", size=1, expires=DAY).complete
        client.script_flush()
        assert store.write(task_id, b"1", expected_version=0) == 1
        client.script_flush()
        assert [record.key for record in store.scan(task_id)] == [task_id]


def test_a_batch_of_results_is_one_trip_and_few_scripts(store: RedisBackend, client: redis.Redis) -> None:
    store.put([success()])
    before = calls(client, "evalsha")

    store.put([success() for _ in range(1000)])

    assert calls(client, "evalsha") - before == 4


def calls(client: redis.Redis, command: str) -> int:
    """How often the server was sent a command."""
    return int(client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


def test_something_else_under_a_results_key_is_told_by_its_task(store: RedisBackend, client: redis.Redis) -> None:
    task_id = new_id()
    client.set(StoreKeys("ekiden", 0).result(task_id), b"000000000009 what is this?")

    with pytest.raises(BackendError, match=task_id):
        store.get([task_id])


# Waiting.


def test_many_threads_wait_over_one_subscription_and_poll_nothing(
    store: RedisBackend, waiter: RedisBackend, client: redis.Redis
) -> None:
    results = [success() for _ in range(40)]
    waiting = [in_thread_for(waiter, result) for result in results]
    eventually(lambda: is_followed(client, [result.task_id for result in results]), what="all are followed")

    assert len(subscribers(client)) == 1
    before = client.info("stats")["total_commands_processed"]
    let_it_wait(1.0)
    assert client.info("stats")["total_commands_processed"] - before <= 2  # these two questions
    store.put(results)
    assert ended([thread for thread, _ in waiting])
    assert [found for _, found in waiting] == [[result] for result in results]


def test_a_killed_subscription_is_noticed_and_nobody_misses_anything(
    store: RedisBackend, waiter: RedisBackend, client: redis.Redis
) -> None:
    results = [success() for _ in range(20)]
    waiting = [in_thread_for(waiter, result) for result in results]
    eventually(lambda: is_followed(client, [result.task_id for result in results]), what="all are followed")

    for result in results:
        for subscriber in subscribers(client):
            client.client_kill_filter(_id=subscriber["id"])
        store.put([result])

    assert ended([thread for thread, _ in waiting], within=3.0)
    assert [found for _, found in waiting] == [[result] for result in results]


def test_a_result_that_nobody_was_told_of_is_found_all_the_same(
    waiter: RedisBackend, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "LOOK_AGAIN_SECONDS", 0.2)
    result = success()
    thread, found = in_thread(lambda: waiter.wait([result.task_id], 30))
    eventually(lambda: is_followed(client, [result.task_id]), what="it is followed")

    client.set(StoreKeys("ekiden", 0).result(result.task_id), encoded(result))

    assert ended([thread], within=3.0)
    assert found == [result]


def test_a_server_that_vanishes_without_a_word_is_noticed(
    server: RedisServer, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "LOOK_AGAIN_SECONDS", 0.2)
    with opened(server.url, timeout=1) as waiter, ThreadPoolExecutor() as threads:
        task_id = new_id()
        waiting = threads.submit(waiter.wait, [task_id], 30)
        eventually(lambda: is_followed(client, [task_id]), what="it is followed")

        with server.frozen(), pytest.raises(BackendError, match="did not answer"):
            waiting.result(10)


def test_a_server_that_is_gone_is_told_in_bounded_time(server: RedisServer) -> None:
    with opened(f"redis://127.0.0.1:{server.port + 10_000}", timeout=0.5) as waiter:
        started = time.monotonic()

        with pytest.raises(BackendError, match="cannot be reached"):
            waiter.wait([new_id()], 30)
        with pytest.raises(BackendError, match="cannot be reached"):
            waiter.wait([new_id()], 0.1)

        assert time.monotonic() - started < 5


def test_who_waits_after_the_server_has_come_back_is_told(tmp_path: Path) -> None:
    with (
        running(lambda: RedisServer(tmp_path)) as server,
        opened(server.url, timeout=0.3) as waiter,
        opened(server.url) as store,
    ):
        server.kill()
        with pytest.raises(BackendError, match="cannot be reached"):
            waiter.wait([new_id()], 0.1)
        server.start()  # which takes longer than the timeout
        result = success()
        thread, found = in_thread(lambda: waiter.wait([result.task_id], 10))
        eventually(lambda: store.put([result]), what="stored")

        assert ended([thread], within=3.0)
        assert found == [result]


def test_when_the_thread_that_reads_for_all_is_interrupted_the_others_are_told(
    store: RedisBackend, waiter: RedisBackend, client: redis.Redis
) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted

    results = [success() for _ in range(3)]
    usual = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        threads: list[tuple[threading.Thread, list[StoredResult]]] = []
        timer = threading.Timer(0.1, lambda: threads.extend(in_thread_for(waiter, result) for result in results))
        timer.start()
        with pytest.raises(Interrupted):
            waiter.wait([new_id()], 10)  # it came first, so it reads
        timer.join()
    finally:
        signal.signal(signal.SIGALRM, usual)
    store.put(results)

    assert ended([thread for thread, _ in threads], within=3.0)
    assert [found for _, found in threads] == [[result] for result in results]


def test_channels_are_left_again(store: RedisBackend, waiter: RedisBackend, client: redis.Redis) -> None:
    for _ in range(200):
        result = success()
        store.put([result])
        assert waiter.wait([result.task_id], 10) == [result]

    assert len(client.pubsub_channels()) <= 65


def test_when_nobody_waits_any_more_the_subscription_is_given_up(
    store: RedisBackend, waiter: RedisBackend, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "HANG_UP_SECONDS", 0.1)
    result = success()

    assert waiter.wait([result.task_id], 0.05) == []

    eventually(lambda: not subscribers(client), what="nobody is subscribed")
    eventually(lambda: not any(each.name == "ekiden-redis-hang-up" for each in threading.enumerate()), what="it ended")
    store.put([result])
    assert waiter.wait([result.task_id], 5) == [result]


def test_the_timer_that_hangs_up_keeps_nobody_from_reading(
    store: RedisBackend, waiter: RedisBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "HANG_UP_SECONDS", 0.000_1)
    slowest = 0.0
    for _ in range(100):
        results = [success() for _ in range(3)]
        assert waiter.wait([new_id()], 0.001) == []
        threads = [in_thread_for(waiter, result)[0] for result in results]
        stored = time.monotonic()
        for result in results:
            store.put([result])
        assert ended(threads)
        slowest = max(slowest, time.monotonic() - stored)

    assert slowest < 3.0


def test_ids_that_nobody_waits_for_any_more_are_left(
    waiter: RedisBackend, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waits, "LOOK_AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(waits, "FOLLOWED_SECONDS", 0.1)
    assert waiter.wait([new_id() for _ in range(500)], 0.05) == []
    thread, _ = in_thread(lambda: waiter.wait([new_id()], 30))
    assert len(client.pubsub_channels()) >= 500

    def has_left() -> bool:
        waiter.wait([new_id()], 0.02)  # what is left is told with what is asked next
        return len(client.pubsub_channels()) < 200

    eventually(has_left, what="they are left")
    waiter.wake()
    assert ended([thread])


def test_databases_do_not_hear_each_other(server: RedisServer, client: redis.Redis) -> None:
    here, there = f"{server.url}", f"redis://127.0.0.1:{server.port}/1"
    with opened(here) as store, opened(there) as other:
        task_id = new_id()
        thread, found = in_thread(lambda: other.wait([task_id], 30))
        eventually(lambda: len(client.pubsub_channels()) == 1, what="it is followed")

        store.put([success(task_id, body=b"here")])
        other.put([success(task_id, body=b"there")])

        assert ended([thread])
        assert [result.body for result in found] == [b"there"]


def test_a_child_that_was_forked_while_a_thread_waited_leaves_its_parent_alone(
    server: RedisServer, client: redis.Redis
) -> None:
    program = """
        import os, sys, threading, time
        from ekiden.results import StoredResult
        from ekiden.urls import parse_url
        from ekiden_redis import RedisBackend

        store = RedisBackend(parse_url(sys.argv[1]))
        found = []
        thread = threading.Thread(target=lambda: found.extend(store.wait(["parent"], 20)))
        thread.start()
        while not store._waits._subscriptions:
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
        thread.join(5)
        store.close()
        sys.exit(status or len(found) != 1)
    """

    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), server.url],
        timeout=30,
        check=False,
        capture_output=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )

    assert (ran.returncode, ran.stderr) == (0, b"")


# Bad input.


def test_a_wrong_password_is_told_without_it(tmp_path: Path) -> None:
    with (
        running(lambda: RedisServer(tmp_path, password="the-right-one")) as server,
        opened(server.url_as(None, "the-wrong-one")) as store,
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
            assert_quick(time.monotonic() - started, 2)


def test_a_user_who_may_not_subscribe_is_told_so(server: RedisServer, client: redis.Redis) -> None:
    client.acl_setuser("deaf", enabled=True, passwords=["+x"], keys=["*"], commands=["+@all"], reset_channels=True)
    with opened(server.url_as("deaf", "x")) as store:
        started = time.monotonic()

        with pytest.raises(BackendError, match="does not permit"):
            store.wait([new_id()], 30)

        assert_quick(time.monotonic() - started, 2)


# What an operator should change.


def test_a_server_that_deletes_what_it_likes_and_keeps_nothing_is_warned_about(
    tmp_path: Path,
) -> None:
    with (
        running(
            lambda: RedisServer(tmp_path, options={"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"})
        ) as server,
        opened(server.url) as store,
    ):
        persistence, eviction = store.warnings()

    assert "keeps nothing on disk" in persistence
    assert "results" in persistence
    assert "deletes results" in eviction
    assert "noeviction" in eviction


def test_a_server_that_keeps_everything_is_not_warned_about(tmp_path: Path) -> None:
    with running(lambda: RedisServer(tmp_path, append_only=True)) as server, opened(server.url) as store:
        assert store.warnings() == []


# A cluster.


@pytest.mark.slow
def test_a_task_whose_slot_moves_to_another_server_is_still_told(tmp_path: Path) -> None:
    with (
        running(lambda: RedisClusterOfThree(tmp_path)) as cluster,
        opened(cluster.url) as store,
        opened(cluster.url) as waiter,
    ):
        results = [success() for _ in range(30)]
        waiting = [in_thread_for(waiter, result) for result in results]
        eventually(lambda: shard_channels(cluster) == 30, what="all are followed")

        for result in results[:5]:
            move(cluster, slot_of(StoreKeys("ekiden", 0).result(result.task_id)))
        assert store.put(results) == [True] * 30

        assert ended([thread for thread, _ in waiting])
        assert [found for _, found in waiting] == [[result] for result in results]


@pytest.mark.slow
def test_who_waits_while_a_slot_is_on_its_way_is_told_when_it_has_arrived(tmp_path: Path) -> None:
    with (
        running(lambda: RedisClusterOfThree(tmp_path)) as cluster,
        opened(cluster.url) as store,
        opened(cluster.url, timeout=1) as waiter,
    ):
        result = success()
        slot = slot_of(StoreKeys("ekiden", 0).result(result.task_id))
        giver, taker, names = owners(cluster, slot)
        with giver.client() as giving, taker.client() as taking:
            taking.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", names[giver.port])
            giving.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", names[taker.port])
        assert waiter.wait([result.task_id], 1.5) == []
        thread, found = in_thread_for(waiter, result)
        eventually(lambda: shard_channels(cluster) == 1, what="it is followed")

        assert store.put([result]) == [True]  # at the server where the slot is going
        move(cluster, slot)

        assert ended([thread])
        assert found == [result]


def shard_channels(cluster: RedisClusterOfThree) -> int:
    """How many channels somebody is subscribed to, on all servers."""
    channels = 0
    for node in cluster.nodes:
        with node.client() as client:
            channels += len(client.execute_command("PUBSUB SHARDCHANNELS"))
    return channels


def move(cluster: RedisClusterOfThree, slot: int) -> None:
    """Give an empty slot to the server that comes after the one that has it."""
    _, taker, names = owners(cluster, slot)
    for node in [taker, *(node for node in cluster.nodes if node is not taker)]:
        with node.client() as client:
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", names[taker.port])


def owners(cluster: RedisClusterOfThree, slot: int) -> tuple[RedisServer, RedisServer, dict[int, str]]:
    """The server that has a slot of a new cluster, the one after it, and the cluster's names of all, by their ports."""
    names = {}
    for node in cluster.nodes:
        with node.client() as client:
            names[node.port] = client.execute_command("CLUSTER MYID")
    owner = SLOTS_OF_THREE.index(next(bound for bound in SLOTS_OF_THREE if slot < bound))
    return cluster.nodes[owner], cluster.nodes[(owner + 1) % 3], names


@pytest.mark.slow
def test_a_wait_that_is_interrupted_anywhere_holds_up_nobody(store: RedisBackend) -> None:
    signals = Signals()
    place, was_interrupted = 0, None
    store.wait([new_id()], 0.01)  # whatever it needs is there
    with signals.handled(), ThreadPoolExecutor(1) as another:
        while place == 0 or was_interrupted is not None:
            place += 1
            was_interrupted = signals.interrupt(
                lambda: store.wait([new_id()], 0.001), place, within=waits.__file__, lines=True
            )

            result = StoredResult(new_id(), "SUCCESS", 0, b"1", DAY)
            waiting = another.submit(store.wait, [result.task_id], PATIENCE)
            let_it_wait()
            store.put([result])
            assert [each.task_id for each in waiting.result(PATIENCE)] == [result.task_id]
            assert len(store._waits._waiting) == 0
    assert place > 50
