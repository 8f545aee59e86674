"""Workers are stopped, restarted, recycled and reloaded: what runs finishes, what waits is untouched."""

import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from ekiden.testing.conformance.pace import assert_quick

from tests.faults.ground import Ground, eventually, on_one_broker, wait_until_gone

KINDS = ["gated", "gated_apart", "gated_async"]
"""A task in a thread, one in a body process, one in the event loop."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_lets_running_tasks_finish_and_gives_back_the_others_untouched(
    ground: Ground, number: signal.Signals
) -> None:
    worker = ground.start(threads=2)
    for task in KINDS:
        ground.app.send_task(task, (0,))
    ground.ledger.wait("begun", 3)
    ground.send_many("work", 20)

    worker.signal(number)
    worker.wait_until_it_says("stopping")
    ground.wait_until_ready_again(20)
    ground.open()

    assert worker.wait() == 0
    assert ground.ledger.done() == {0: 3}
    assert ground.attempts() == {0: 20}


def test_a_second_stop_ends_at_once_and_gives_back_what_was_running(ground: Ground) -> None:
    worker = ground.start(threads=8)
    ground.send_many("gated", 8)
    ground.ledger.wait("begun", 8)

    worker.signal(signal.SIGTERM)
    worker.wait_until_it_says("stopping")
    began = time.monotonic()
    worker.signal(signal.SIGTERM)

    worker.wait()
    assert_quick(time.monotonic() - began, 2.5)
    assert not worker.said("is killed")
    assert (ground.depth().ready, ground.depth().leased) == (8, 0)


@pytest.mark.slow
def test_when_the_grace_is_over_what_still_runs_is_given_back(ground: Ground) -> None:
    worker = ground.start(threads=8, grace=0.5)
    ground.send_many("gated", 6)
    for task in ("gated_apart", "gated_async"):
        ground.app.send_task(task, (9,))
    ground.ledger.wait("begun", 8)
    began = time.monotonic()

    worker.stop()

    assert_quick(time.monotonic() - began, 3.0)
    assert (ground.depth().ready, ground.depth().leased) == (8, 0)
    assert ground.dead() == []


def test_ctrl_c_reaches_every_process_and_means_one_stop(ground: Ground) -> None:
    worker = ground.start(processes=2)
    for task in KINDS:
        ground.app.send_task(task, (0,))
    ground.ledger.wait("begun", 3)

    worker.signal_everyone(signal.SIGINT)
    worker.wait_until_it_says("stopping")
    ground.open()

    assert worker.wait() == 0
    assert ground.ledger.done() == {0: 3}
    assert not worker.said("Traceback|KeyboardInterrupt")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(ground: Ground) -> None:
    worker = ground.start(processes=2)
    for task in KINDS:
        ground.app.send_task(task, (0,))
    ground.ledger.wait("begun", 3)

    worker.signal_everyone(signal.SIGINT)
    worker.wait_until_it_says("stopping")
    began = time.monotonic()
    worker.signal_everyone(signal.SIGINT)

    worker.wait()
    assert_quick(time.monotonic() - began, 2.5)
    assert (ground.depth().ready, ground.depth().leased) == (3, 0)
    assert not worker.said("Traceback|KeyboardInterrupt")


@pytest.mark.parametrize("begun", [False, True], ids=["while it starts", "when its processes start"])
def test_ctrl_c_at_the_start_is_a_stop_without_a_traceback(ground: Ground, begun: bool) -> None:
    worker = ground.start(processes=2, ready=False)
    if begun:
        eventually(worker.worker_pids, what="a worker process")
    else:
        eventually(lambda: obeys(worker.pid, signal.SIGTERM), what="the supervisor obeys signals")

    worker.signal_everyone(signal.SIGINT)

    assert worker.wait() == 0
    assert not worker.said("Traceback|KeyboardInterrupt")


def test_a_term_signal_to_every_process_is_one_stop(ground: Ground) -> None:
    """It is what systemd sends to all processes of a service; body processes get it, too."""
    worker = ground.start(processes=2)
    for task in KINDS:
        ground.app.send_task(task, (0,))
    ground.ledger.wait("begun", 3)

    worker.signal_everyone(signal.SIGTERM)
    worker.wait_until_it_says("stopping")
    ground.open()

    assert worker.wait() == 0
    assert ground.ledger.done() == {0: 3}
    assert ground.dead() == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ten_rolling_restarts_in_the_middle_of_a_backlog_cost_no_message_an_attempt(ground: Ground) -> None:
    count = ground.backlog(400)
    for number in range(count):
        ground.app.send_task("work" if number % 2 else "work_async", (number, 0.2))

    for _ in range(10):
        done = ground.ledger.done().total()
        worker = ground.start(processes=2, threads=2, async_concurrency=2)
        eventually(lambda done=done: ground.ledger.done().total() >= done + 15, what="15 more are done")
        assert worker.stop() == 0
        assert ground.looking_counts or set(ground.attempts()) == {0}
    assert ground.depth().ready == count - ground.ledger.done().total() > 0
    ground.start(processes=2)
    ground.wait_until_empty(within=60)

    assert ground.ledger.done() == dict.fromkeys(range(count), 1)
    assert {each["attempt"] for each in ground.ledger.entries("work")} == {1}


@pytest.mark.slow
def test_worker_processes_are_recycled_after_so_many_tasks(ground: Ground) -> None:
    ground.send_many("work", 200)

    worker = ground.start(max_tasks_per_process=50, threads=2)
    ground.wait_until_empty(within=50)

    done = ground.ledger.entries("work")
    assert ground.ledger.done() == dict.fromkeys(range(200), 1)
    assert {each["attempt"] for each in done} == {1}
    assert list(Counter(each["pid"] for each in done).values()) == [50, 50, 50, 50]
    assert not worker.said("died")


@pytest.mark.slow
def test_a_recycled_process_is_replaced_although_its_threads_never_end(ground: Ground) -> None:
    worker = ground.start(max_tasks_per_process=1)

    ground.app.send_task("leave_a_thread").get(10)

    assert ground.app.send_task("work", (1,)).get(20) == 1
    assert not worker.said("died")


@pytest.mark.slow
def test_worker_processes_are_recycled_when_they_have_grown(ground: Ground) -> None:
    worker = ground.start(max_memory_per_process=150)
    first = worker.worker_pids()

    assert ground.app.send_task("grow", (1, 200)).get(20) is None

    worker.wait_until_it_says("is ready", 2)
    assert worker.worker_pids() != first
    assert ground.app.send_task("work", (2,)).get(20) == 2
    assert not worker.said("died")


@on_one_broker
@pytest.mark.slow
def test_the_memory_of_body_processes_counts_as_their_workers(ground: Ground) -> None:
    worker = ground.start(max_memory_per_process=250)
    first = worker.worker_pids()
    assert ground.app.send_task("grow_apart", (1, 10)).get(20) is None
    bodies = worker.body_pids()

    assert ground.app.send_task("grow_apart", (2, 250)).get(20) is None

    worker.wait_until_it_says("is ready", 2)
    assert worker.worker_pids() != first
    for pid in bodies:
        wait_until_gone(pid)
    assert ground.app.send_task("grow_apart", (3, 10)).get(20) is None
    assert len(worker.said("is ready")) == 2
    assert not worker.said("died")


@on_one_broker
@pytest.mark.slow
def test_a_changed_file_restarts_the_processes_and_running_tasks_finish(ground: Ground) -> None:
    module = ground.directory / "watched.py"
    module.write_text("from tasks import app\nfrom ledger import note\nnote('imported', version=1)\n")
    worker = ground.start("watched:app", reload=ground.directory, environment=beside(ground.directory))
    running = ground.app.send_task("gated", (1,))
    ground.ledger.wait("begun")
    begun = module.read_text()

    eventually(lambda: touched_until_seen(module, begun, worker.said), what="the change is seen")
    ground.open()

    assert running.get(20) == 1
    worker.wait_until_it_says("is ready", 2)
    assert ground.ledger.done() == {1: 1}
    assert ground.ledger.entries("imported")[-1]["version"] > 1


@on_one_broker
@pytest.mark.slow
def test_a_file_saved_with_a_mistake_is_waited_out_until_it_is_corrected(ground: Ground) -> None:
    module = ground.directory / "watched.py"
    right = "from tasks import app\n"
    module.write_text(right)
    worker = ground.start("watched:app", reload=ground.directory, environment=beside(ground.directory))

    eventually(lambda: touched_until_seen(module, "from tasks import\n", worker.said), what="the change is seen")
    worker.wait_until_it_says("cannot be imported")
    module.write_text(right)

    worker.wait_until_it_says("is ready", 2)
    assert ground.app.send_task("work", (2,)).get(20) == 2


def beside(directory: Path) -> dict[str, str]:
    """The environment in which modules of ``directory`` can be imported, too."""
    return {"PYTHONPATH": os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])}


def touched_until_seen(module: Path, text: str, said) -> bool:
    """Write a module, and again until the worker has seen it: the watch may begin a moment after the start."""
    module.write_text(f"{text}\n# {time.monotonic()}\n".replace("version=1", "version=2"))
    return bool(said("changed"))


def obeys(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1], 16)
    return bool(caught >> (number - 1) & 1)
