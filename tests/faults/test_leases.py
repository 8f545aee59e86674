"""Tasks that outlive their lease, and workers that outsleep theirs."""

import os
import signal
import time

import pytest

from tests.faults.ground import PATIENCE, Ground, eventually

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def lease(ground: Ground) -> float:
    """A short one (seconds)."""
    return ground.lease(0.6)


@pytest.mark.slow
def test_a_task_of_ten_leases_runs_once(ground: Ground, lease: float) -> None:
    ground.start(processes=2, lease=lease)

    tasks = ["long", "long_apart", "long_async", "holds_interpreter_apart"]
    results = [ground.app.send_task(task, (10 * lease,)) for task in tasks]
    ground.wait_until_empty(within=PATIENCE + 10 * lease)

    assert [result.state for result in results] == ["SUCCESS"] * 4
    assert len(ground.ledger.entries("begun")) == 4
    assert len(ground.ledger.entries("work")) == 4
    assert ground.dead() == []


@pytest.mark.slow
def test_a_task_that_holds_the_interpreter_in_a_thread_is_named(ground: Ground, lease: float) -> None:
    worker = ground.start(lease=lease)

    guilty: list[str] = []
    for count in range(1, 4):  # one that begins while a request to the broker is under way is taken for a slow answer
        guilty.append(ground.app.send_task("holds_interpreter", (3 * lease,)).id)
        ground.ledger.wait("work", count)
        if worker.said("leases were renewed .* late"):
            break

    (warning, *_) = worker.wait_until_it_says("leases were renewed .* late")
    assert "WARNING" in warning
    assert any(f"holds_interpreter[{task_id}]" in warning for task_id in guilty)
    assert "pool='process'" in warning


def test_a_stopped_worker_that_wakes_late_settles_nothing(ground: Ground, lease: float) -> None:
    stopped = ground.start(lease=lease)
    results = [
        ground.app.send_task(kind, (1,), link=ground.app.signature("follow", (kind,)))
        for kind in ("gated", "gated_apart", "gated_async")
    ]
    ground.ledger.wait("begun", 3)
    for pid in stopped.worker_pids():
        os.kill(pid, signal.SIGSTOP)

    ground.start(lease=lease)
    ground.ledger.wait("begun", 6)
    ground.open()
    assert [result.get(10) for result in results] == [1, 1, 1]
    ground.ledger.wait("follow", 3)
    ground.wait_until_empty()
    winners = [result.worker for result in results]
    for pid in stopped.worker_pids():
        os.kill(pid, signal.SIGCONT)
    for result in results:
        stopped.wait_until_it_says(f"{result.id}\\] was lost")

    assert ground.app.send_task("work", (2,)).get(10) == 2
    ground.wait_until_empty()
    assert len(ground.ledger.entries("follow")) == 3
    assert [result.worker for result in results] == winners
    assert ground.dead() == []


@pytest.mark.parametrize("wakes", ["before the other one has ended", "after that"])
def test_a_stopped_worker_that_wakes_late_reports_no_failure_of_its_own(
    ground: Ground, wakes: str, lease: float
) -> None:
    stopped = ground.start(lease=lease)
    result = ground.app.send_task("fails_first", link=ground.app.signature("follow", ("fails_first",)))
    ground.ledger.wait("begun")
    (pid,) = stopped.worker_pids()
    os.kill(pid, signal.SIGSTOP)
    ground.start(lease=lease)
    ground.ledger.wait("begun", 2)

    if wakes == "after that":
        ground.open("second")
        assert result.get(10) == 2
    ground.open("first")
    os.kill(pid, signal.SIGCONT)
    stopped.wait_until_it_says("was lost")
    ground.open("second")

    assert result.get(10) == 2
    ground.wait_until_empty()
    assert len(ground.ledger.wait("follow")) == 1
    assert ground.app.AsyncResult(result.id).state == "SUCCESS"
    assert ground.dead() == []


@pytest.mark.slow
def test_a_lease_is_kept_while_the_broker_cannot_be_asked_for_less_than_a_lease(ground: Ground) -> None:
    worker = ground.start(lease=ground.lease(3.0))
    ground.app.send_task("gated", (1,))
    ground.ledger.wait("begun")
    (pid,) = worker.worker_pids()

    os.kill(pid, signal.SIGSTOP)
    paused = time.monotonic()
    eventually(lambda: time.monotonic() > paused + 1.5, what="half a lease is over")
    os.kill(pid, signal.SIGCONT)
    ground.open()

    ground.wait_until_empty()
    assert ground.ledger.done() == {1: 1}
    assert not worker.said("was lost")
