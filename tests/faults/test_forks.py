"""A program that forks while its threads publish and wait loses nothing, on either side."""

import subprocess
import sys

import pytest

from tests.faults.ground import APPS, Ground


@pytest.mark.slow
@pytest.mark.parametrize("task", ["pool_of_processes", "pool_of_processes_apart"])
def test_a_task_may_fork_processes_of_its_own(ground: Ground, task: str) -> None:
    worker = ground.start()

    assert ground.app.send_task(task, (10,)).get(20) == list(range(10))

    assert ground.app.send_task("work", (1,)).get(20) == 1
    assert worker.stop() == 0
    assert not worker.said("Traceback|died")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_sending_and_waiting_go_on_after_forks_in_the_parent_and_in_the_children(ground: Ground) -> None:
    forks = 40
    ground.start(processes=1)
    ground.open()

    program = subprocess.run(
        [sys.executable, "forker.py", str(forks)],
        cwd=APPS,
        env=ground.environment(),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    ground.wait_until_empty()

    assert program.returncode == 0, program.stderr
    assert program.stderr == ""
    done = ground.ledger.done()
    assert set(done.values()) == {1}
    by_the_thread = int(program.stdout)
    assert by_the_thread > 0
    # Two that were awaited, two at the gate, and seven by each child.
    assert len(done) == by_the_thread + 2 + 2 + 7 * forks
