"""Limits, terminating and dying bodies, in all three places where a body can run: a thread, the loop, a process."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ekiden import Ekiden, SoftTimeLimitExceeded, Task
from ekiden.errors import (
    MisuseError,
    TaskArgumentsError,
    TaskError,
    TaskRejected,
    TaskRevoked,
    TimeLimitExceeded,
    WorkerLostError,
)
from ekiden.testing.plugin import StartWorker

from tests.apps import bodies
from tests.working import (
    PATIENCE,
    dead_letters,
    eventually,
    hand_out_and_lose,
    is_empty,
    the_dead_letter,
    wait_until_settled,
)

PLACES = ["thread", "loop", "process"]


@pytest.fixture
def ekiden_app(ekiden_use_broker: Callable[[Ekiden], Ekiden]) -> Ekiden:
    app = ekiden_use_broker(bodies.app)
    app.conf.worker_grace = 3.0
    return app


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "notes")


def noted(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def wait_for_note(path: str, line: str) -> None:
    eventually(lambda: line in noted(path), what=f"a note {line!r}")


def task(name: str) -> Task[..., Any]:
    found = bodies.app.find_task(name)
    assert found is not None
    return found


# Where bodies run.


def test_bodies_run_where_they_are_declared_to(ekiden_worker: StartWorker) -> None:
    ekiden_worker()

    assert bodies.pid.delay().get(PATIENCE) == os.getpid()
    assert bodies.pid_async.delay().get(PATIENCE) == os.getpid()
    assert bodies.pid_in_process.delay().get(PATIENCE) != os.getpid()
    assert bodies.pid_with_limit.delay().get(PATIENCE) != os.getpid()
    assert bodies.pid.apply_async(time_limit=60).get(PATIENCE) != os.getpid()


def test_a_worker_can_run_every_def_body_in_a_process(ekiden_worker: StartWorker) -> None:
    ekiden_worker(pool="process")

    assert bodies.pid.delay().get(PATIENCE) != os.getpid()
    assert bodies.pid_async.delay().get(PATIENCE) == os.getpid()


@pytest.mark.parametrize("name", ["pid", "pid_async"])
@pytest.mark.slow
def test_what_was_handed_out_before_runs_in_a_process(ekiden_worker: StartWorker, name: str) -> None:
    result = task(f"tests.apps.bodies.{name}").delay()
    hand_out_and_lose(bodies.app, 1)
    ekiden_worker()

    assert result.get(PATIENCE) != os.getpid()


def test_a_body_process_is_used_again(ekiden_worker: StartWorker) -> None:
    ekiden_worker(threads=1)

    assert len({bodies.pid_in_process.delay().get(PATIENCE) for _ in range(3)}) == 1


@pytest.mark.parametrize("place", PLACES)
def test_a_body_can_do_the_same_everywhere(ekiden_worker: StartWorker, place: str) -> None:
    worker = ekiden_worker()
    result = task(f"everything.{place}").apply_async((1,), {"to": "ada"}, priority=6, headers={"trace": "abc"})

    found = result.get(PATIENCE)

    assert (found["id"], found["queue"], found["priority"], found["to"]) == (result.id, "default", 6, "ada")
    assert (found["headers"], found["hostname"]) == ({"trace": "abc"}, worker.worker.name)
    assert (found["state"], found["value"], found["children"]) == ("SENT", 2, 3)
    assert result.children[0].id == found["child"]
    assert len(result.children) == 3
    child = result.children[1]
    assert child.get(PATIENCE) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("reject", TaskRejected),
        ("fail", ValueError),
        ("exit", TaskError),
        ("object", MisuseError),
        ("unsendable", TaskArgumentsError),
        ("consume", MisuseError),
        ("retry", "again"),
        ("changed", "again"),
        ("plain", "plain"),
    ],
)
def test_each_outcome_is_the_same_out_of_a_process(ekiden_worker: StartWorker, what: str, expected: Any) -> None:
    ekiden_worker(threads=1)
    result = bodies.outcome.delay(what)

    if isinstance(expected, str):
        assert result.get(PATIENCE) == expected
    else:
        with pytest.raises(expected):
            result.get(PATIENCE)
    assert bodies.pid_in_process.delay().get(PATIENCE) != os.getpid()


@pytest.mark.slow
def test_a_large_value_comes_out_of_a_process(ekiden_worker: StartWorker) -> None:
    ekiden_worker(threads=1)

    assert len(bodies.outcome.delay("large").get(PATIENCE)) == 5_000_000


@pytest.mark.slow
def test_an_ignored_call_in_a_process_stores_nothing(ekiden_worker: StartWorker) -> None:
    ekiden_worker()
    result = bodies.outcome.delay("ignore")
    bodies.add.delay(1, 1).get(PATIENCE)
    wait_until_settled(bodies.app)

    assert result.state == "PENDING"


# Soft limits.


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.slow
def test_a_body_that_exceeds_its_soft_limit_can_tidy_up(ekiden_worker: StartWorker, place: str, path: str) -> None:
    ekiden_worker()

    assert task(f"tidy.{place}").delay(path).get(PATIENCE) == "tidied up"


@pytest.mark.parametrize("place", PLACES)
def test_a_body_that_does_not_catch_it_fails_by_its_soft_limit(
    ekiden_worker: StartWorker, place: str, path: str
) -> None:
    ekiden_worker()
    result = task(f"endless.{place}").apply_async((path,), soft_time_limit=0.2)

    with pytest.raises(SoftTimeLimitExceeded):
        result.get(PATIENCE)
    assert noted(path) == ["started", "on_failure SoftTimeLimitExceeded True"]


@pytest.mark.parametrize("place", ["thread", "loop"])
@pytest.mark.slow
def test_a_soft_limit_holds_for_what_was_handed_out_before(ekiden_worker: StartWorker, place: str, path: str) -> None:
    result = task(f"tidy.{place}").delay(path)
    hand_out_and_lose(bodies.app, 1)
    ekiden_worker()

    assert result.get(PATIENCE) == "tidied up"


def test_a_soft_limit_at_the_very_end_of_a_body_harms_nobody_else(ekiden_worker: StartWorker) -> None:
    worker = ekiden_worker(threads=4)
    results = bodies.at_the_end.enqueue_many((0.095 + 0.0005 * number,) for number in range(24))

    for result in results:
        try:
            assert result.get(PATIENCE) == "returned"
        except SoftTimeLimitExceeded:
            continue
    assert bodies.pid.delay().get(PATIENCE) == os.getpid()
    worker.stop()


# Hard limits.


@pytest.mark.parametrize("place", ["loop", "process"])
def test_a_body_that_exceeds_its_hard_limit_is_ended(ekiden_worker: StartWorker, place: str, path: str) -> None:
    ekiden_worker()

    with pytest.raises(TimeLimitExceeded, match=r"time_limit of 0\.3 s"):
        task(f"limited.{place}").delay(path).get(PATIENCE)
    wait_for_note(path, "on_failure TimeLimitExceeded True")
    assert bodies.pid.delay().get(PATIENCE) == os.getpid()


@pytest.mark.parametrize("place", ["loop", "process"])
@pytest.mark.slow
def test_a_call_can_bring_its_own_hard_limit(ekiden_worker: StartWorker, place: str, path: str) -> None:
    ekiden_worker()

    with pytest.raises(TimeLimitExceeded):
        task(f"endless.{place}").apply_async((path,), time_limit=0.2).get(PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["loop", "process"])
def test_a_body_that_was_ended_can_be_tried_again(ekiden_worker: StartWorker, place: str, path: str) -> None:
    ekiden_worker()

    with pytest.raises(TimeLimitExceeded):
        task(f"again.{place}").delay(path).get(PATIENCE)
    wait_for_note(path, "on_failure TimeLimitExceeded True")
    assert noted(path) == [
        "started",
        "on_retry TimeLimitExceeded True",
        "started",
        "on_failure TimeLimitExceeded True",
    ]


@pytest.mark.parametrize("place", ["loop", "process"])
@pytest.mark.slow
def test_a_hard_limit_cannot_be_caught(ekiden_worker: StartWorker, place: str, path: str) -> None:
    ekiden_worker()

    with pytest.raises(TimeLimitExceeded):
        task(f"tests.apps.bodies.stubborn_{place}").delay(path).get(PATIENCE)
    assert noted(path) == []


def test_a_hard_limit_in_the_loop_ends_what_the_body_started(ekiden_worker: StartWorker, path: str) -> None:
    ekiden_worker()

    with pytest.raises(TimeLimitExceeded):
        bodies.with_children.delay(path).get(PATIENCE)
    assert noted(path) == ["child ended"] * 2


def test_a_hard_limit_that_no_process_can_keep_is_refused(ekiden_broker_url: str) -> None:
    app = Ekiden("in no module", broker=ekiden_broker_url)

    @app.task
    def endless() -> None:
        bodies.work_for_ever()

    with app, app.worker(threads=1), pytest.raises(MisuseError, match="top level of a module"):
        endless.apply_async(time_limit=0.2).get(PATIENCE)


# Terminating.


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.slow
def test_a_running_body_is_terminated(ekiden_worker: StartWorker, place: str, path: str) -> None:
    ekiden_worker(threads=1)
    result = task(f"endless.{place}").delay(path)
    wait_for_note(path, "started")

    result.revoke(terminate=True)

    with pytest.raises(TaskRevoked, match="terminated"):
        result.get(PATIENCE)
    assert result.state == "REVOKED"
    wait_until_settled(bodies.app)
    assert bodies.pid.delay().get(PATIENCE) == os.getpid()


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_revoked_task_that_runs_goes_on_unless_it_is_terminated(
    ekiden_worker: StartWorker, place: str, path: str
) -> None:
    ekiden_worker()
    result = task(f"endless.{place}").apply_async((path,), soft_time_limit=0.5)
    wait_for_note(path, "started")

    result.revoke()

    with pytest.raises(SoftTimeLimitExceeded):
        result.get(PATIENCE)


def test_terminating_a_task_whose_handler_runs_lets_the_handler_finish(ekiden_worker: StartWorker, path: str) -> None:
    worker = ekiden_worker(threads=1)
    result = bodies.slow_handler.delay(path)
    wait_for_note(path, "handler")

    result.revoke(terminate=True)

    assert result.get(PATIENCE) == "returned"
    assert noted(path) == ["handler", "handled"]
    assert bodies.pid.delay().get(PATIENCE) == os.getpid()
    worker.stop()


def test_terminating_one_task_never_ends_another(ekiden_worker: StartWorker) -> None:
    ekiden_worker(threads=2)
    results = bodies.at_the_end.enqueue_many([(0.01,)] * 60, soft_time_limit=30)

    for result in results:
        result.revoke(terminate=True)

    for result in results:
        assert result.get(PATIENCE, propagate=False) == "returned" or result.state == "REVOKED"
    assert bodies.pid.delay().get(PATIENCE) == os.getpid()


# Processes that die.


def test_a_body_whose_process_dies_is_handed_out_again(ekiden_worker: StartWorker, path: str) -> None:
    ekiden_worker()

    assert bodies.die_once.delay(path).get(PATIENCE) == [2, 0]
    assert noted(path) == ["started", "started", "on_success [2, 0] True"]
    wait_until_settled(bodies.app)
    assert dead_letters(bodies.app) == []


@pytest.mark.slow
def test_a_message_that_kills_its_body_process_each_time_is_buried_after_five(
    ekiden_worker: StartWorker, path: str
) -> None:
    ekiden_worker()

    with pytest.raises(WorkerLostError, match=r"handed out 5 times; the last time .* ended by SIGKILL"):
        bodies.die.delay(path).get(PATIENCE)
    assert noted(path) == ["started"] * 5 + ["on_failure WorkerLostError True"]
    letter = the_dead_letter(bodies.app)
    assert letter.headers["ekiden-dead-attempts"] == 5
    assert letter.headers["ekiden-dead-reason"] == "WorkerLostError"
    assert bodies.pid_in_process.delay().get(PATIENCE) != os.getpid()


@pytest.mark.slow
def test_deaths_of_workers_and_of_body_processes_are_counted_together(ekiden_worker: StartWorker, path: str) -> None:
    result = bodies.die.delay(path)
    hand_out_and_lose(bodies.app, 3)
    ekiden_worker()

    with pytest.raises(WorkerLostError, match="handed out 5 times"):
        result.get(PATIENCE)
    assert noted(path) == ["started"] * 2 + ["on_failure WorkerLostError True"]


def test_a_settled_call_whose_process_dies_fails_at_once(ekiden_worker: StartWorker, path: str) -> None:
    ekiden_worker()

    with pytest.raises(WorkerLostError, match="ended by SIGKILL"):
        bodies.die_settled.delay(path).get(PATIENCE)
    assert noted(path) == ["started", "on_failure WorkerLostError True"]


@pytest.mark.slow
def test_what_was_handed_out_too_often_is_kept_whatever_its_task_says(ekiden_worker: StartWorker, path: str) -> None:
    result = bodies.die_async.delay(path)
    hand_out_and_lose(bodies.app, 1)  # from the second time on it runs in a body process
    ekiden_worker()

    with pytest.raises(WorkerLostError, match="handed out 2 times"):
        result.get(PATIENCE)
    assert noted(path) == ["started", "on_failure WorkerLostError True"]
    assert the_dead_letter(bodies.app).headers["ekiden-dead-attempts"] == 2


@pytest.mark.slow
def test_a_body_whose_process_dies_can_be_tried_again(ekiden_worker: StartWorker, path: str) -> None:
    ekiden_worker()

    assert bodies.die_first.delay(path).get(PATIENCE) == "alive"
    assert noted(path) == ["on_retry WorkerLostError True"] * 2 + ["on_success alive True"]


# Stopping.


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.slow
def test_what_still_runs_when_a_worker_ends_at_once_comes_back(
    ekiden_worker: StartWorker, place: str, path: str
) -> None:
    worker = ekiden_worker(threads=1)
    result = task(f"endless.{place}").apply_async((path,), soft_time_limit=8)
    wait_for_note(path, "started")
    began = time.monotonic()

    worker.stop(at_once=True)

    assert time.monotonic() - began < 4
    assert not result.ready()
    assert not is_empty(bodies.app)
    (seen,) = bodies.app.transport.browse("default")
    assert (seen.message.id, seen.attempt) == (result.id, 1)
    if place == "thread":
        eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("ekiden-body")], what="it ends")
