"""A second call under an id of the user's own: it does not run while the first is there, on any broker with a store."""

from __future__ import annotations

import pytest

from tests.faults.ground import Ground, eventually


def test_of_two_calls_under_one_id_that_wait_one_runs(storing_ground: Ground) -> None:
    ground = storing_ground
    for _ in range(3):
        result = ground.app.send_task("work", (1,), task_id="mine")

    ground.start(processes=2)

    assert result.get(20) == 1
    ground.wait_until_empty()
    assert ground.ledger.done() == {1: 1}
    assert ground.app.send_task("work", (2,), task_id="mine").get(20) == 2  # that one has ended, so this one is new
    ground.wait_until_empty()
    assert ground.ledger.done() == {1: 1, 2: 1}
    assert ground.dead() == []


@pytest.mark.parametrize("task", ["gated", "gated_apart"])
def test_a_second_call_under_the_id_of_a_running_one_does_not_run(storing_ground: Ground, task: str) -> None:
    ground = storing_ground
    ground.start()
    result = ground.app.send_task(task, (1,), task_id="mine")
    ground.ledger.wait("begun")

    ground.app.send_task(task, (1,), task_id="mine")
    assert ground.app.send_task("work", (2,)).get(20) == 2  # it was sent after the second one
    ground.open()

    assert result.get(20) == 1
    ground.wait_until_empty()
    assert ground.ledger.done() == {1: 1, 2: 1}
    assert len(ground.ledger.entries("begun")) == 1


def test_a_second_call_does_not_run_beside_the_next_try_of_the_first(storing_ground: Ground) -> None:
    ground = storing_ground
    for _ in range(2):
        result = ground.app.send_task("fails_once", task_id="mine", priority=5)

    ground.start()

    assert result.get(20) == "tried 1 times before"
    ground.wait_until_empty()
    assert [each["retries"] for each in ground.ledger.entries("fails")] == [0, 1]
    eventually(lambda: ground.dead() == [], what="nothing is dead")
