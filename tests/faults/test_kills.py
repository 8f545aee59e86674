"""Processes are killed: no message is lost, and none is done again but what was in hand."""

import os
import random
import signal
import time
from collections import Counter

import psutil
import pytest
from ekiden.testing.conformance.pace import assert_quick

from tests.faults.ground import UNLUCKY, Ground, eventually, wait_a_while_for, wait_until_gone


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_storm_of_kills_loses_no_message(ground: Ground) -> None:
    prefetch, count = 50, ground.backlog(5000)
    between_kills = count * 6 // 100
    ground.send_many("quick", count)
    worker = ground.start(processes=3, prefetch=prefetch, lease=ground.lease(5.0), threads=2, environment=UNLUCKY)
    chance = random.Random(1)
    kills = 0

    while (so_far := ground.ledger.length()) < count * 9 // 10:
        worker.kill_one(chance)
        kills += 1
        eventually(
            lambda so_far=so_far: ground.ledger.length() >= so_far + between_kills, what="more is done", within=60
        )
    ground.wait_until_empty(within=120)

    done = ground.ledger.done()
    assert ground.dead() == []
    assert kills >= 5
    assert set(done) == set(range(count))
    assert done.total() - count <= kills * prefetch


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_storm_of_kills_loses_no_follow_up_and_no_result(ground: Ground) -> None:
    count = ground.backlog(600)
    worker = ground.start(processes=3, lease=ground.lease(5.0), threads=2, environment=UNLUCKY)
    chance = random.Random(2)
    follow = ground.app.signature("follow", ("work",))
    results = [ground.app.send_task("work", (number, 0.01), link=follow) for number in range(count)]

    while (done := ground.ledger.length()) < 2 * count * 9 // 10:
        worker.kill_one(chance)
        eventually(lambda done=done: ground.ledger.length() >= done + count // 6, what="more is done", within=60)
    ground.wait_until_empty(within=120)

    assert ground.dead() == []
    assert [result.get(5) for result in results] == list(range(count))
    assert {each["number"] for each in ground.ledger.entries("follow")} == set(range(count))


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("by_signal", [False, True], ids=["by itself", "SIGKILL"])
@pytest.mark.parametrize("task", ["poison", "poison_async"])
def test_one_poison_at_the_head_makes_one_dead_letter_and_harms_nobody_else(
    ground: Ground, task: str, by_signal: bool
) -> None:
    others = ground.backlog(300)
    poison = ground.app.send_task(task, kwargs={"by_signal": by_signal})
    ground.send_many("work", others)
    worker = ground.start(processes=2)

    ground.wait_until_empty(within=60)

    dead = ground.dead()
    assert len(dead) == 1
    assert dead[0].message.headers["ekiden-dead-reason"] == "WorkerLostError"
    assert poison.state == "FAILURE"
    assert set(ground.ledger.done()) == set(range(others))
    assert len(worker.said("worker process .* died")) == 1


def test_a_killed_worker_process_is_replaced_and_its_messages_come_back_at_once(ground: Ground) -> None:
    worker = ground.start(lease=60.0)
    ground.app.send_task("gated", (1,))
    ground.ledger.wait("begun")
    started = time.monotonic()

    os.kill(worker.worker_pids()[0], signal.SIGKILL)

    again = ground.ledger.wait("begun", 2)[1]
    assert time.monotonic() - started < 10
    assert again["attempt"] == 2
    ground.open()
    ground.wait_until_empty()
    assert ground.ledger.done() == {1: 1}


@pytest.mark.slow
def test_when_the_supervisor_is_killed_no_process_is_left_after_one_grace(ground: Ground) -> None:
    worker = ground.start(processes=2, grace=2.0)
    results = [ground.app.send_task(name, (1,)) for name in ("gated", "gated_apart")]
    ground.ledger.wait("begun", 2)
    pids = worker.worker_pids() + worker.body_pids()
    assert len(pids) == 3
    killed = time.monotonic()

    worker.signal(signal.SIGKILL)

    for pid in pids:
        wait_until_gone(pid)
    assert_quick(time.monotonic() - killed, 2.0 + 2.0)
    assert ground.depth().ready == len(results)  # what was running is back in the queue, not held by the dead


def test_a_body_process_ends_at_once_with_its_worker(ground: Ground) -> None:
    worker = ground.start()
    ground.app.send_task("gated_apart", (1,))
    ground.ledger.wait("begun")
    (body,) = worker.body_pids()

    os.kill(worker.worker_pids()[0], signal.SIGKILL)

    wait_until_gone(body, within=2.0)


def test_a_body_process_that_holds_the_interpreter_ends_at_once_with_its_worker(ground: Ground) -> None:
    worker = ground.start()
    ground.app.send_task("holds_interpreter_apart", (30.0,))
    ground.ledger.wait("begun")
    (body,) = worker.body_pids()

    os.kill(worker.worker_pids()[0], signal.SIGKILL)

    wait_until_gone(body, within=2.0)


def test_the_task_of_a_killed_body_process_runs_again_and_no_other_does(ground: Ground) -> None:
    worker = ground.start()
    killed = ground.app.send_task("gated_apart", (1,))
    ground.ledger.wait("begun")
    other = ground.app.send_task("gated", (2,))
    ground.ledger.wait("begun", 2)
    (pid,) = worker.worker_pids()

    os.kill(worker.body_pids()[0], signal.SIGKILL)

    ground.ledger.wait("begun", 3)
    ground.open()
    assert killed.get(10) == 1
    assert other.get(10) == 2
    ground.wait_until_empty()
    assert [each["number"] for each in ground.ledger.entries("begun")] == [1, 2, 1]
    assert ground.dead() == []
    assert worker.worker_pids() == [pid]
    assert len(worker.said("is handed out again, attempt 1 of it counts: .* SIGKILL")) == 1


def test_a_body_process_that_is_killed_each_time_is_buried_after_five(ground: Ground) -> None:
    worker = ground.start()
    killed = ground.app.send_task("gated_apart", (1,))

    for count in range(1, 6):
        pid = ground.ledger.wait("begun", count)[-1]["pid"]
        os.kill(pid, signal.SIGKILL)

    eventually(killed.ready, what="the task whose process was killed ends")
    assert killed.state == "FAILURE"
    assert "SIGKILL" in str(killed.result)
    ground.wait_until_empty()
    (letter,) = ground.dead()
    assert letter.message.headers["ekiden-dead-reason"] == "WorkerLostError"
    assert letter.message.headers["ekiden-dead-attempts"] == 5
    assert len(ground.ledger.entries("begun")) == 5
    assert len(worker.worker_pids()) == 1


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_was_merely_in_hand_when_its_workers_died_is_not_buried(ground: Ground) -> None:
    ground.app.send_task("gated", (0,))
    worker = ground.start(threads=1, prefetch=20)
    ground.ledger.wait("begun")
    for number in range(1, 11):  # one thread is busy, but this app has room for async tasks: they are in hand
        ground.app.send_task("work", (number,))

    for count in range(1, 6):
        ground.ledger.wait("begun", count)
        wait_a_while_for(lambda: ground.depth().leased == 11)
        os.kill(worker.worker_pids()[0], signal.SIGKILL)

    ground.wait_until_empty(within=60)
    assert set(ground.ledger.done()) == set(range(1, 11))
    assert len(ground.ledger.entries("begun")) == 5
    (letter,) = ground.dead()
    assert letter.message.headers["ekiden-dead-reason"] == "WorkerLostError"
    assert letter.message.headers["ekiden-dead-attempts"] == 6


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_bystanders_of_a_message_that_kills_its_worker_five_times_run(ground: Ground) -> None:
    count = ground.backlog(40)
    poison = ground.app.send_task("kills_worker")
    ground.send_many("work", count)

    ground.start(processes=2, threads=4)

    ground.wait_until_empty(within=120)
    assert set(ground.ledger.done()) == set(range(count))
    assert [each["attempt"] for each in ground.ledger.entries("poison")] == [1, 2, 3, 4, 5]
    assert len(ground.dead()) == 1
    assert poison.state == "FAILURE"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_storm_of_kills_among_all_processes_buries_no_innocent(ground: Ground) -> None:
    count = ground.backlog(600)
    worker = ground.start(processes=2, lease=ground.lease(5.0), threads=3)
    chance = random.Random(3)
    for number in range(count):
        ground.app.send_task("work_apart" if number % 3 == 0 else "work", (number, 0.005))

    for kills in range(1, 13):
        worker.kill_any(chance)
        eventually(lambda kills=kills: ground.ledger.length() >= count * kills // 14, what="more is done", within=60)
    ground.wait_until_empty(within=120)

    assert set(ground.ledger.done()) == set(range(count))
    assert ground.dead() == []


@pytest.mark.slow
def test_a_task_that_asked_for_it_is_tried_again_when_its_process_dies(ground: Ground) -> None:
    ground.start()

    result = ground.app.send_task("dies_twice")

    assert result.get(20) == "alive"
    assert [each["retries"] for each in ground.ledger.entries("dies")] == [0, 1, 2]
    assert ground.dead() == []


def test_a_hard_time_limit_kills_the_body_process(ground: Ground) -> None:
    worker = ground.start()

    result = ground.app.send_task("endless")
    ground.ledger.wait("begun")
    (body,) = worker.body_pids()

    eventually(result.ready, what="the task is ended")
    assert "time_limit of 0.5 s" in str(result.result)
    wait_until_gone(body, within=2.0)


def test_an_at_most_once_task_that_is_killed_is_not_run_again(ground: Ground) -> None:
    worker = ground.start()
    ground.app.send_task("gated_early", (1,))
    ground.ledger.wait("begun")
    assert ground.depth().leased == 0

    os.kill(worker.worker_pids()[0], signal.SIGKILL)
    worker.wait_until_ready(2)

    assert ground.app.send_task("work", (2,)).get(10) == 2
    assert len(ground.ledger.entries("begun")) == 1
    assert ground.dead() == []


@pytest.mark.parametrize("first", ["first", "fails"])
def test_what_follows_is_published_once_when_a_worker_dies_between_storing_and_settling(
    storing_ground: Ground, first: str
) -> None:
    ground = storing_ground
    after = ground.app.signature("after")
    result = ground.app.send_task(first, link=after)

    worker = ground.start("dies_after_storing:app", ready=False)

    ground.ledger.wait("after")
    ground.wait_until_empty()
    assert len(worker.said("was ended by SIGKILL")) == 1
    entries = Counter(each["what"] for each in ground.ledger.entries())
    assert entries == {first: 1 if first == "first" else 2, "after": 1}
    assert result.get(5) in {"first", "second try"}


def test_a_stopped_worker_leaves_no_process_behind(ground: Ground) -> None:
    worker = ground.start(processes=2)
    ground.app.send_task("gated_apart", (1,))
    ground.ledger.wait("begun")
    ground.open()
    ground.wait_until_empty()
    everything = [psutil.Process(pid) for pid in [*worker.worker_pids(), *worker.body_pids()]]

    assert worker.stop() == 0

    assert not [process for process in everything if process.is_running()]
