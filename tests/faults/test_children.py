"""What a task has started does not outlive its limit, its termination or its worker; what has detached itself does."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.ground import Ground, RunningWorker, eventually, on_one_broker, wait_until_gone

ATTACHED = ("popen", "shell", "fork", "orphan", "multiprocessing", "own group", "no environment", "deaf")
DETACHED = ("session", "daemon")

pytestmark = [
    on_one_broker,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="children are found in /proc"),
]


@pytest.fixture
def worker(ground: Ground) -> Iterator[RunningWorker]:
    yield ground.start("children:app")
    for entry in ground.ledger.entries("child"):
        if is_alive(entry["number"]):
            os.kill(entry["number"], signal.SIGKILL)


@pytest.mark.parametrize("how", ATTACHED)
def test_no_child_outlives_the_hard_limit_of_its_task(ground: Ground, worker: RunningWorker, how: str) -> None:
    result = ground.app.send_task("limited", (how,))

    child = ground.ledger.wait("child")[0]["number"]
    eventually(result.ready, what="the limit ends it")

    assert result.state == "FAILURE"
    assert "time_limit of 2 s" in str(result.result)
    wait_until_gone(child)


@pytest.mark.parametrize("how", DETACHED)
def test_what_has_detached_itself_outlives_the_limit_and_holds_nobody_up(
    ground: Ground, worker: RunningWorker, how: str
) -> None:
    result = ground.app.send_task("limited", (how,))

    child = ground.ledger.wait("child")[0]["number"]
    eventually(result.ready, what="the limit ends it")
    assert "time_limit of 2 s" in str(result.result)
    assert worker.stop() == 0

    assert is_alive(child)


@pytest.mark.parametrize("how", ATTACHED)
def test_no_child_outlives_the_termination_of_its_task(ground: Ground, worker: RunningWorker, how: str) -> None:
    result = ground.app.send_task("endless", (how,))
    entry = ground.ledger.wait("child")[0]

    result.revoke(terminate=True)

    eventually(lambda: result.state == "REVOKED", what="it is terminated")
    wait_until_gone(entry["number"])
    wait_until_gone(entry["body"])


@pytest.mark.parametrize("task", ["leave", "leave_apart"])
@pytest.mark.parametrize("how", ATTACHED)
def test_no_child_outlives_its_worker(ground: Ground, worker: RunningWorker, task: str, how: str) -> None:
    ground.app.send_task(task, (how,)).get(20)
    child = ground.ledger.wait("child")[0]["number"]
    assert is_alive(child)

    assert worker.stop() == 0

    wait_until_gone(child)


@pytest.mark.parametrize("task", ["leave", "leave_apart"])
@pytest.mark.parametrize("how", [how for how in ATTACHED if how != "no environment"])
def test_no_child_outlives_a_worker_that_is_killed(ground: Ground, worker: RunningWorker, task: str, how: str) -> None:
    """Without its parent, a process that was started with another environment looks like anybody's."""
    ground.app.send_task(task, (how,)).get(20)
    child = ground.ledger.wait("child")[0]["number"]

    os.kill(worker.worker_pids()[0], signal.SIGKILL)

    wait_until_gone(child)
    worker.wait_until_it_says("is ready", 2)


@pytest.mark.parametrize("task", ["leave", "leave_apart"])
def test_children_end_with_a_worker_that_drains_because_its_supervisor_died(
    ground: Ground, worker: RunningWorker, task: str
) -> None:
    ground.app.send_task(task, ("popen",)).get(20)
    child = ground.ledger.wait("child")[0]["number"]
    (process,) = worker.worker_pids()

    worker.signal(signal.SIGKILL)

    wait_until_gone(process)
    wait_until_gone(child)


def test_when_a_body_process_is_killed_from_outside_its_children_end(ground: Ground, worker: RunningWorker) -> None:
    ground.app.send_task("endless", ("popen",))
    entry = ground.ledger.wait("child")[0]

    os.kill(entry["body"], signal.SIGKILL)

    wait_until_gone(entry["number"])
    ground.ledger.wait("child", 2)  # it is handed out again


def test_one_workers_end_leaves_the_others_children_alone(ground: Ground) -> None:
    worker = ground.start("children:app", processes=2, threads=1)
    for _ in range(20):
        ground.app.send_task("leave", ("popen",))
    entries = eventually(lambda: from_both(ground), what="both processes have started children")
    victim = entries[0]["body"]

    os.kill(victim, signal.SIGKILL)

    for entry in entries:
        if entry["body"] == victim:
            wait_until_gone(entry["number"])
    assert all(is_alive(entry["number"]) for entry in entries if entry["body"] != victim)
    assert worker.stop() == 0


def from_both(ground: Ground) -> list[dict[str, int]]:
    entries = ground.ledger.entries("child")
    return entries if len({entry["body"] for entry in entries}) == 2 and len(entries) == 20 else []


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
