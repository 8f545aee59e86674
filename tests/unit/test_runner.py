"""The runner of a worker by itself: what it has been given and has not started."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from ekiden import Ekiden, Task
from ekiden.codec import decode_call
from ekiden.job import Job, Work
from ekiden.message import Delivery
from ekiden.outcomes import Revoked, Succeeded
from ekiden.request import Request
from ekiden.runner import Runner

from tests.working import Gate, Notes, eventually


@pytest.fixture
def ended() -> list[Job]:
    return []


@pytest.fixture
def runner(ekiden_app: Ekiden, ended: list[Job]) -> Iterator[Runner]:
    def fail(error: BaseException) -> None:
        raise error

    runner = Runner(
        ekiden_app,
        name="runner",
        threads=1,
        async_concurrency=1,
        target=None,
        settle_first=lambda _job: True,
        started=lambda _job: None,
        ended=ended.append,
        failed=fail,
    )
    runner.start()
    yield runner
    assert runner.close(5.0)


def job(app: Ekiden, task: Task[..., Any], *args: Any) -> Job:
    task.apply_async(args)
    seen = app.transport.browse("default", limit=1000)[-1]
    call = decode_call(seen.message.body, {})
    work = Work(call, task, app.policy(task), Request(call))
    return Job(Delivery(seen.message, 1, 1), taken=time.monotonic(), call=call, work=work)


@pytest.mark.parametrize("is_async", [False, True])
def test_what_has_not_started_is_not_started_once_it_is_terminated(
    ekiden_app: Ekiden, runner: Runner, ended: list[Job], is_async: bool
) -> None:
    gate, notes = Gate(), Notes()

    def body(name: str) -> None:
        notes.take(name)
        if name == "first":
            gate.pass_through()

    async def async_body(name: str) -> None:
        body(name)

    task = ekiden_app.task(name="body")(async_body if is_async else body)
    first, second, third = (job(ekiden_app, task, name) for name in ("first", "second", "third"))
    runner.submit([first, second, third])
    assert gate.arrived.wait(5)

    runner.terminate(second)
    gate.open.set()

    eventually(lambda: len(ended) == 3, what="all have ended")
    assert [each.outcome for each in (second,)] == [Revoked(terminated=True)]
    assert isinstance(third.outcome, Succeeded)
    assert notes.taken == ["first", "third"]


@pytest.mark.parametrize("is_async", [False, True])
def test_what_has_not_started_can_be_taken_back_in_its_order(
    ekiden_app: Ekiden, runner: Runner, ended: list[Job], is_async: bool
) -> None:
    gate = Gate()

    def body() -> None:
        gate.pass_through()

    async def async_body() -> None:
        gate.pass_through()

    task = ekiden_app.task(name="body")(async_body if is_async else body)
    jobs = [job(ekiden_app, task) for _ in range(5)]
    runner.submit(jobs)
    assert gate.arrived.wait(5)

    assert runner.take_back() == jobs[1:]
    assert runner.take_back() == []
    gate.open.set()
    eventually(lambda: ended == jobs[:1], what="the one that had started ends")
