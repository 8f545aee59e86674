"""A worker in this process, end to end: the verdict table, retries, results, links, handlers, signals, queues."""

import itertools
import json
import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ekiden import AsyncResult, Ekiden, Ignore, Reject, Task, TaskError, TaskSet, signals
from ekiden.codec import decode_call
from ekiden.errors import (
    ConfigurationError,
    MaxRetriesExceededError,
    MisuseError,
    NotRegistered,
    TaskArgumentsError,
    TaskExpired,
    TaskRejected,
    TaskRevoked,
    WorkerLostError,
)
from ekiden.message import Message, new_id
from ekiden.settings import Settings
from ekiden.testing.plugin import StartWorker, throw_away_url

from tests.working import (
    PATIENCE,
    Gate,
    Notes,
    dead_letters,
    eventually,
    hand_out_and_lose,
    is_empty,
    the_dead_letter,
    the_message,
    wait_until_settled,
)


@pytest.fixture(params=["memory", pytest.param("sqlite", marks=pytest.mark.slow)])
def ekiden_broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return throw_away_url(f"{request.param}://", tmp_path)


in_memory = pytest.mark.parametrize("ekiden_broker_url", ["memory"], indirect=True)
"""For what takes long, or has many cases, and has nothing to do with the broker."""


@pytest.fixture
def app(ekiden_app: Ekiden) -> Ekiden:
    return ekiden_app


@pytest.fixture
def notes() -> Notes:
    return Notes()


def publish(app: Ekiden, body: bytes, **fields: Any) -> str:
    """Put a message into the default queue without a task."""
    message = Message(fields.pop("id", None) or new_id(), "default", body, **fields)
    app.transport.publish([message])
    return message.id


# What happened: returned a value.


def test_a_value_that_was_returned_is_the_result(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    ekiden_worker()
    result = add.delay(1, y=2)

    assert result.get(PATIENCE) == 3
    assert (result.state, result.successful(), result.ready(), result.failed()) == ("SUCCESS", True, True, False)
    assert (result.name, result.queue, result.retries) == (add.name, "default", 0)
    assert result.runtime is not None
    assert result.date_done is not None
    wait_until_settled(app)


def test_an_async_body_runs_too(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task
    async def add(x: int, y: int) -> int:
        return x + y

    ekiden_worker()

    assert add.delay(1, 2).get(PATIENCE) == 3


def test_what_is_linked_is_called_with_the_value(app: Ekiden, ekiden_worker: StartWorker, notes: Notes) -> None:
    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    @app.task
    def note(*args: Any) -> None:
        notes.take(args)

    ekiden_worker()
    result = add.apply_async((1, 2), link=[note.s("a"), note.si("b"), add.s(10).link(note.s("c"))])

    assert sorted(notes.wait_for(3), key=str) == sorted([(3, "a"), ("b",), (13, "c")], key=str)
    assert len(result.children) == 3


# Raised, tries left, or asked to be tried again.


def test_an_error_that_the_task_names_is_tried_again(app: Ekiden, ekiden_worker: StartWorker) -> None:
    tries = []

    @app.task(autoretry_for=ConnectionError, default_retry_delay=0, max_retries=3)
    def fetch() -> str:
        tries.append(fetch.request.retries)
        if len(tries) < 3:
            raise ConnectionError("not yet")
        return "got it"

    ekiden_worker()

    assert fetch.delay().get(PATIENCE) == "got it"
    assert tries == [0, 1, 2]


@pytest.mark.parametrize("bind", [True, False])
def test_a_body_can_ask_to_be_tried_again(app: Ekiden, ekiden_worker: StartWorker, bind: bool) -> None:
    @app.task(bind=True, name="bound")
    def bound(self: Task[..., Any]) -> int:
        if self.request.retries < 2:
            self.retry(countdown=0)
        return self.request.retries

    @app.task(name="free")
    def free() -> int:
        if free.request.retries < 2:
            free.retry(countdown=0)
        return free.request.retries

    ekiden_worker()

    assert (bound if bind else free).delay().get(PATIENCE) == 2


def test_while_it_waits_for_its_next_try_it_says_so(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task(bind=True)
    def later(self: Task[..., Any]) -> None:
        self.retry(exc=ConnectionError("down"), countdown=3600)

    ekiden_worker()
    result = later.delay()

    eventually(lambda: result.state == "RETRY", what="RETRY")
    assert repr(result.result) == "ConnectionError('down')"
    eventually(lambda: app.transport.depth("default").delayed == 1, what="the next try is delayed")
    seen = the_message(app)
    assert seen.message.due == pytest.approx(time.time() + 3600, abs=10)
    assert decode_call(seen.message.body, {}).retries == 1
    assert not result.ready()


def test_the_next_try_can_have_other_arguments(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task(bind=True)
    def halve(self: Task[..., Any], number: int, *, steps: int = 0) -> int:
        if number > 1:
            self.retry((number // 2,), {"steps": steps + 1}, countdown=0, max_retries=None)
        return steps

    ekiden_worker()

    assert halve.delay(1024).get(PATIENCE) == 10


def test_a_next_try_whose_arguments_cannot_be_sent_fails_the_task(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task(bind=True)
    def wrong(self: Task[..., Any], what: Any = None) -> None:
        self.retry((object(),), countdown=0)

    ekiden_worker()

    with pytest.raises(TaskArgumentsError, match="cannot be carried"):
        wrong.delay().get(PATIENCE)


def test_a_next_try_at_a_time_without_its_zone_fails_the_task(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task(bind=True)
    def wrong(self: Task[..., Any]) -> None:
        self.retry(eta=datetime(2030, 1, 1))  # noqa: DTZ001 - that is the mistake

    ekiden_worker(threads=1)

    for _ in range(2):
        with pytest.raises(MisuseError, match="time zone"):
            wrong.delay().get(PATIENCE)


def test_a_backoff_doubles_the_time_between_tries(app: Ekiden, ekiden_worker: StartWorker) -> None:
    began = []

    @app.task(autoretry_for=(ValueError,), retry_backoff=0.1, retry_jitter=False, max_retries=2)
    def fail() -> None:
        began.append(time.monotonic())
        raise ValueError("no")

    ekiden_worker()
    with pytest.raises(ValueError, match="no"):
        fail.delay().get(PATIENCE)

    first, second = (later - earlier for earlier, later in itertools.pairwise(began))
    assert 0.1 <= first < 0.1 + 2
    assert 0.2 <= second < 0.2 + 2
    assert second > first


def test_an_error_that_the_task_excepts_is_not_tried_again(app: Ekiden, ekiden_worker: StartWorker) -> None:
    tries = []

    @app.task(autoretry_for=(OSError,), dont_autoretry_for=(FileNotFoundError,), default_retry_delay=0)
    def read() -> None:
        tries.append(1)
        raise FileNotFoundError("gone")

    ekiden_worker()
    with pytest.raises(FileNotFoundError):
        read.delay().get(PATIENCE)

    assert len(tries) == 1


def test_without_tries_left_asking_for_one_raises_what_went_wrong(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task(bind=True, max_retries=1)
    def with_cause(self: Task[..., Any]) -> None:
        self.retry(exc=KeyError("cause"), countdown=0)

    @app.task(bind=True, max_retries=0)
    def without(self: Task[..., Any]) -> None:
        self.retry(countdown=0)

    ekiden_worker()

    with pytest.raises(KeyError, match="cause"):
        with_cause.delay().get(PATIENCE)
    with pytest.raises(MaxRetriesExceededError, match="tried 1 times"):
        without.delay().get(PATIENCE)


# Raised, no tries left.


def test_a_failure_is_told_to_whoever_waits(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task
    def fail(reason: str) -> None:
        raise ValueError(reason, 42)

    ekiden_worker()
    result = fail.delay("no such user")

    with pytest.raises(ValueError, match="no such user") as caught:
        result.get(PATIENCE)
    assert caught.value.args == ("no such user", 42)
    assert "In the worker" in caught.value.__notes__[0]
    assert "raise ValueError(reason, 42)" in (result.traceback or "")
    assert "core/ekiden" not in (result.traceback or "")
    assert isinstance(result.get(PATIENCE, propagate=False), ValueError)
    assert (result.state, result.failed()) == ("FAILURE", True)


def test_a_failed_call_is_kept_in_the_dead_letters(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task
    def fail() -> None:
        raise ValueError("no such user")

    ekiden_worker()
    result = fail.apply_async(headers={"trace": "abc"}, priority=7)

    dead = the_dead_letter(app)
    assert decode_call(dead.body, {}).id == result.id
    assert (dead.headers["trace"], dead.headers["ekiden-dead-reason"], dead.headers["ekiden-dead-error"]) == (
        "abc",
        "ValueError",
        "no such user",
    )
    assert (dead.headers["ekiden-dead-queue"], dead.headers["ekiden-dead-attempts"]) == ("default", 1)
    assert is_empty(app)


def test_a_task_may_want_no_dead_letters(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task(dead_letter=False)
    def fail() -> None:
        raise ValueError("no")

    ekiden_worker()
    with pytest.raises(ValueError, match="no"):
        fail.delay().get(PATIENCE)
    wait_until_settled(app)

    assert dead_letters(app) == []


def test_what_is_linked_to_an_error_is_called_with_the_task_id(
    app: Ekiden, ekiden_worker: StartWorker, notes: Notes
) -> None:
    @app.task
    def fail() -> None:
        raise ValueError

    @app.task
    def sorry(task_id: str, to: str) -> None:
        notes.take((task_id, to, app.AsyncResult(task_id).state))

    ekiden_worker()
    result = fail.apply_async(link_error=sorry.s("admin"), link=sorry.s("nobody"))

    assert notes.wait_for(1) == [(result.id, "admin", "FAILURE")]


@pytest.mark.parametrize(
    "value",
    [object(), float("nan"), {1: {2}, 3: print}, "\ud800"],
    ids=["object", "nan", "function in a dict", "surrogate"],
)
def test_a_value_that_cannot_be_stored_fails_the_task_and_is_not_tried_again(
    app: Ekiden, ekiden_worker: StartWorker, value: Any
) -> None:
    tries = []

    @app.task(autoretry_for=(Exception,), default_retry_delay=0)
    def odd():  # type: ignore[no-untyped-def]
        tries.append(1)
        return value

    ekiden_worker()

    with pytest.raises(MisuseError, match="its result cannot be stored"):
        odd.delay().get(PATIENCE)
    assert len(tries) == 1


def test_a_value_that_is_too_large_fails_the_task(app: Ekiden, ekiden_worker: StartWorker) -> None:
    app.conf.result_max_bytes = 1000

    @app.task
    def large(length: int) -> str:
        return "x" * length

    ekiden_worker()

    assert len(large.delay(998).get(PATIENCE)) == 998
    with pytest.raises(MisuseError, match="result_max_bytes allows 1000"):
        large.delay(999).get(PATIENCE)


# Unknown, undecodable, misfits.


def test_a_young_message_of_an_unknown_task_waits_for_a_newer_worker(app: Ekiden, ekiden_worker: StartWorker) -> None:
    app.conf.unknown_task_grace = 60
    result = app.send_task("of.tomorrow")
    ekiden_worker()

    eventually(lambda: app.transport.depth("default").delayed == 1, what="it is given back")

    seen = the_message(app)
    assert (seen.message.id, seen.attempt) == (result.id, 0)
    assert result.state == "PENDING"
    assert dead_letters(app) == []


def test_an_old_message_of_an_unknown_task_is_dead(app: Ekiden, ekiden_worker: StartWorker) -> None:
    app.conf.unknown_task_grace = 0
    ekiden_worker()

    with pytest.raises(NotRegistered, match=r"of\.yesterday is not a task of this worker"):
        app.send_task("of.yesterday").get(PATIENCE)
    assert the_dead_letter(app).headers["ekiden-dead-reason"] == "NotRegistered"


def test_a_message_from_the_far_future_is_no_reason_to_wait(app: Ekiden, ekiden_worker: StartWorker) -> None:
    ekiden_worker()
    publish(app, b'{"v":1,"task":"unknown","id":"x","sent":1e300}')
    publish(app, b'{"v":99}', id="ffffffffffff")

    eventually(lambda: len(dead_letters(app)) == 2, what="both are dead")


def test_a_young_message_of_a_newer_format_waits_for_a_newer_worker(app: Ekiden, ekiden_worker: StartWorker) -> None:
    ekiden_worker()
    publish(app, b'{"v":2,"what":"nobody knows yet"}')

    eventually(lambda: app.transport.depth("default").delayed == 1, what="it is given back")
    assert the_message(app).attempt == 0


def test_an_old_message_of_a_newer_format_is_dead(app: Ekiden, ekiden_worker: StartWorker) -> None:
    app.conf.unknown_task_grace = 0
    ekiden_worker()
    publish(app, b'{"v":2,"what":"nobody knows yet"}')

    dead = the_dead_letter(app)
    assert dead.headers["ekiden-dead-reason"] == "NewerFormat"
    assert dead.body == b'{"v":2,"what":"nobody knows yet"}'


@pytest.mark.parametrize(("args", "kwargs"), [((1,), {}), ((1, 2, 3), {}), ((1, 2), {"z": 3}), (("one", 2), {})])
def test_arguments_that_do_not_fit_fail_the_task_and_are_not_tried_again(
    app: Ekiden, ekiden_worker: StartWorker, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    @app.task(autoretry_for=(Exception,), default_retry_delay=0)
    def add(x: int, y: int) -> int:
        return x + y

    ekiden_worker()

    with pytest.raises(TaskArgumentsError, match=r"declared as add\(x: int, y: int\)"):
        app.send_task(add.name, args, kwargs).get(PATIENCE)
    assert the_dead_letter(app).headers["ekiden-dead-reason"] == "TaskArgumentsError"


def test_without_typing_arguments_arrive_as_json_has_them(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task(typing=False)
    def kind_of(x: int) -> str:
        return type(x).__name__

    ekiden_worker()

    assert kind_of.delay("text").get(PATIENCE) == "str"  # type: ignore[arg-type]


# Ignore, Reject, SystemExit.


def test_a_body_can_have_its_call_ignored(app: Ekiden, ekiden_worker: StartWorker, notes: Notes) -> None:
    @app.task
    def ignored() -> None:
        raise Ignore

    @app.task
    def note(*args: Any) -> None:
        notes.take(args)

    ekiden_worker()
    result = ignored.apply_async(link=note.s(), link_error=note.s())
    note.delay("done").get(PATIENCE)
    wait_until_settled(app)

    assert result.state == "PENDING"
    assert notes.taken == [("done",)]
    assert dead_letters(app) == []


def test_a_body_can_reject_its_call(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task
    def rejected() -> None:
        raise Reject("not mine")

    ekiden_worker()

    with pytest.raises(TaskRejected, match="not mine"):
        rejected.delay().get(PATIENCE)
    assert the_dead_letter(app).headers["ekiden-dead-reason"] == "TaskRejected"


@in_memory
def test_a_body_can_give_its_call_back(app: Ekiden, ekiden_worker: StartWorker) -> None:
    redelivered = []

    @app.task
    def shy() -> str:
        redelivered.append(shy.request.delivery_info["redelivered"])
        if not redelivered[-1]:
            raise Reject(requeue=True)
        return "now"

    ekiden_worker()

    assert shy.delay().get(PATIENCE) == "now"
    assert redelivered == [False, True]


@in_memory
@pytest.mark.parametrize("often", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_body_that_always_gives_its_call_back_is_dead_in_the_end(
    app: Ekiden, ekiden_worker: StartWorker, notes: Notes, often: int
) -> None:
    @app.task(max_deliveries=often)
    def shy() -> None:
        notes.take("ran")
        raise Reject("not now", requeue=True)

    ekiden_worker()

    with pytest.raises(TaskRejected, match=rf"not now; it was handed out {often} times, .* self.retry\(\)"):
        shy.delay().get(PATIENCE)
    assert the_dead_letter(app).headers["ekiden-dead-attempts"] == often
    assert notes.taken == ["ran"] * often


@in_memory
@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("is_async", [False, True])
def test_what_would_end_a_program_fails_the_task_only(
    app: Ekiden, ekiden_worker: StartWorker, kind: type[BaseException], is_async: bool
) -> None:
    @app.task
    def end() -> None:
        raise kind("stop")

    @app.task
    async def end_async() -> None:
        raise kind("stop")

    @app.task
    def fine() -> str:
        return "fine"

    @app.task
    async def fine_async() -> str:
        return "fine"

    ekiden_worker(threads=1)
    result = (end_async if is_async else end).delay()

    with pytest.raises(TaskError, match="stop") as caught:
        result.get(PATIENCE)
    assert caught.value.type_name == kind.__name__
    assert (fine_async if is_async else fine).delay().get(PATIENCE) == "fine"


# Expired and revoked.


@pytest.mark.parametrize("expires", [0.01, datetime.now(UTC) - timedelta(seconds=1)], ids=["seconds", "datetime"])
def test_what_has_expired_is_not_run(
    app: Ekiden, ekiden_worker: StartWorker, notes: Notes, expires: float | datetime
) -> None:
    @app.task
    def note(*args: Any) -> None:
        notes.take(args)

    result = note.apply_async(("too late",), expires=expires, link_error=note.s("told"))
    eventually(lambda: time.time() > the_message(app).message.headers.get("x", 0), what="time passes")
    time.sleep(0.02)  # what is waited for here is the clock
    ekiden_worker()

    with pytest.raises(TaskExpired):
        result.get(PATIENCE)
    assert result.state == "EXPIRED"
    assert notes.wait_for(1) == [(result.id, "told")]


def test_a_declared_expiry_holds_for_every_call(app: Ekiden) -> None:
    @app.task(expires=60)
    def note() -> None: ...

    note.delay()
    note.apply_async(expires=5)

    expiries = [decode_call(seen.message.body, {}).expires for seen in app.transport.browse("default")]
    assert [each and each - time.time() for each in expiries] == pytest.approx([60, 5], abs=3)


def test_what_was_revoked_is_not_run(app: Ekiden, ekiden_worker: StartWorker, notes: Notes) -> None:
    @app.task
    def note(*args: Any) -> None:
        notes.take(args)

    first, second, third = (note.apply_async((n,), link_error=note.s("told")) for n in range(3))
    first.revoke()
    app.control.revoke([second.id])
    ekiden_worker()

    for result in (first, second):
        with pytest.raises(TaskRevoked):
            result.get(PATIENCE)
        assert result.state == "REVOKED"
    third.get(PATIENCE)
    assert set(notes.wait_for(3)) == {(2,), (first.id, "told"), (second.id, "told")}


# Handed out too often; handed out again.


def test_a_message_that_was_handed_out_too_often_is_dead(app: Ekiden, ekiden_worker: StartWorker, notes: Notes) -> None:
    @app.task(max_deliveries=2)
    def poison() -> None:
        notes.take("ran")

    result = poison.delay()
    hand_out_and_lose(app, 2)
    ekiden_worker()

    with pytest.raises(WorkerLostError, match="handed out 2 times"):
        result.get(PATIENCE)
    assert the_dead_letter(app).headers["ekiden-dead-attempts"] == 3
    assert notes.taken == []


def test_a_message_that_was_handed_out_before_runs_and_knows_it(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task
    def attempt() -> list[Any]:
        return [attempt.request.attempt, attempt.request.delivery_info["redelivered"]]

    result = attempt.delay()
    hand_out_and_lose(app, 1)
    ekiden_worker()

    assert result.get(PATIENCE) == [2, True]


def test_what_had_ended_before_its_worker_died_is_not_run_again(
    app: Ekiden, ekiden_worker: StartWorker, notes: Notes
) -> None:
    @app.task
    def note(*args: Any) -> str:
        notes.take(args)
        return "value"

    app.conf.task_default_queue = "first"
    result = note.apply_async((1,), link=note.s("after").set(queue="second"))
    lost = the_message(app, "first").message
    ekiden_worker(queues=["first", "second"])
    notes.wait_for(2)
    wait_until_settled(app, "first")
    wait_until_settled(app, "second")

    # The same message, handed out for the second time, as if its worker had died between storing and settling.
    app.transport.publish([Message(lost.id, "third", lost.body, {}, lost.priority)])
    hand_out_and_lose(app, 1, "third")
    ekiden_worker(queues=["second", "third"])
    wait_until_settled(app, "third")
    wait_until_settled(app, "second")

    assert notes.taken == [(1,), ("value", "after")]
    assert result.get() == "value"


# Results on request.


def test_a_result_may_be_ignored(app: Ekiden, ekiden_worker: StartWorker, notes: Notes) -> None:
    @app.task(ignore_result=True, track_started=True)
    def note(what: str) -> str:
        notes.take(what)
        return what

    ekiden_worker()
    ignored = note.delay("a")
    wanted = note.apply_async(("b",), ignore_result=False)

    assert wanted.get(PATIENCE) == "b"
    notes.wait_for(2)
    wait_until_settled(app)
    assert app.backend.get([ignored.id]) == [None]


def test_a_start_can_be_tracked(app: Ekiden, ekiden_worker: StartWorker) -> None:
    gate = Gate()

    @app.task(track_started=True)
    def work() -> None:
        gate.pass_through()

    worker = ekiden_worker()
    result = work.delay()

    eventually(lambda: result.state == "STARTED", what="STARTED")
    assert (result.name, result.worker) == (work.name, worker.worker.name)
    gate.open.set()
    result.get(PATIENCE)


def test_a_body_can_tell_how_far_it_is(app: Ekiden, ekiden_worker: StartWorker) -> None:
    gate = Gate()

    @app.task(bind=True)
    def work(self: Task[..., Any]) -> str:
        self.update_state(state="COMPILING", meta={"done": 3})
        gate.pass_through()
        return "all"

    ekiden_worker()
    result = work.delay()

    assert gate.arrived.wait(PATIENCE)
    assert (result.state, result.info) == ("COMPILING", {"done": 3})
    gate.open.set()
    assert result.get(PATIENCE) == "all"


def test_the_tasks_that_a_body_sent_are_its_children(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task
    def leaf(x: int) -> int:
        return x

    @app.task
    def root() -> str:
        leaf.enqueue_many([(2,), (3,)])
        return leaf.delay(1).id

    ekiden_worker()
    result = root.delay()
    result.get(PATIENCE)

    assert [value for _, value in result.collect(PATIENCE)][1:] == [2, 3, 1]
    calls = [each.id for each in result.children]
    assert calls[-1] == result.get()
    assert app.AsyncResult(calls[0]).get(PATIENCE) == 2


def test_waiting_for_a_task_inside_a_task_is_refused(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task
    def inner() -> int:
        return 1

    @app.task
    def outer(allow: bool) -> int:
        return inner.delay().get(PATIENCE, allow_join=allow)

    ekiden_worker()

    with pytest.raises(MisuseError, match="waits for the result of another task"):
        outer.delay(False).get(PATIENCE)
    assert outer.delay(True).get(PATIENCE) == 1


# Settled before it starts.


@pytest.mark.parametrize("is_async", [False, True])
def test_an_early_task_is_settled_before_it_starts(app: Ekiden, ekiden_worker: StartWorker, is_async: bool) -> None:
    seen = []

    @app.task(acks="early")
    def once(x: int) -> int:
        seen.append(is_empty(app))
        return x

    @app.task(acks="early")
    async def once_async(x: int) -> int:
        seen.append(is_empty(app))
        return x

    ekiden_worker()

    assert (once_async if is_async else once).delay(7).get(PATIENCE) == 7
    assert seen == [True]


def test_what_follows_an_early_task_is_published_all_the_same(
    app: Ekiden, ekiden_worker: StartWorker, notes: Notes
) -> None:
    @app.task(acks="early", autoretry_for=(ValueError,), max_retries=1, default_retry_delay=0)
    def once() -> None:
        raise ValueError

    @app.task
    def sorry(task_id: str) -> None:
        notes.take(task_id)

    ekiden_worker()
    result = once.apply_async(link_error=sorry.s())

    assert notes.wait_for(1) == [result.id]
    assert result.retries == 1
    assert decode_call(the_dead_letter(app).body, {}).retries == 1


# Handlers and signals.


class Recording(Task[..., Any]):
    notes: list[tuple[Any, ...]]

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None:
        self.notes.append(("before_start", list(args), kwargs))

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        self.notes.append(("on_success", retval, list(args), kwargs))

    def on_failure(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self.notes.append(("on_failure", repr(exc), "Traceback" in str(einfo)))

    def on_retry(self, exc: BaseException, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        self.notes.append(("on_retry", repr(exc)))

    def after_return(self, status: str, retval: Any, *_: Any) -> None:
        self.notes.append(("after_return", status, repr(retval)))


def test_the_handlers_of_a_tasks_class_are_called(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task(base=Recording, bind=True, max_retries=1)
    def divide(self: Recording, x: int, *, by: int) -> float:
        if by == 0:
            self.retry(exc=ZeroDivisionError("by zero"), countdown=0)
        return x / by

    divide.notes = []
    ekiden_worker()
    divide.delay(1, by=2).get(PATIENCE)
    succeeded, divide.notes = divide.notes, []
    with pytest.raises(ZeroDivisionError):
        divide.delay(1, by=0).get(PATIENCE)

    assert succeeded == [
        ("before_start", [1], {"by": 2}),
        ("on_success", 0.5, [1], {"by": 2}),
        ("after_return", "SUCCESS", "0.5"),
    ]
    assert divide.notes == [
        ("before_start", [1], {"by": 0}),
        ("on_retry", "ZeroDivisionError('by zero')"),
        ("after_return", "RETRY", "Retry(None, ZeroDivisionError('by zero'), 0.0)"),
        ("before_start", [1], {"by": 0}),
        ("on_failure", "ZeroDivisionError('by zero')", True),
        ("after_return", "FAILURE", "ZeroDivisionError('by zero')"),
    ]


@in_memory
@pytest.mark.parametrize("handler", ["before_start", "on_success", "on_failure", "on_retry", "after_return"])
@pytest.mark.parametrize("kind", [ValueError, SystemExit])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_handler_that_fails_fails_its_task_and_nothing_else(
    app: Ekiden, ekiden_worker: StartWorker, handler: str, kind: type[BaseException], is_async: bool
) -> None:
    def failing(self: Any, *args: Any) -> None:
        raise kind("in the handler")

    base: Any = type("Failing", (Task,), {handler: failing})

    def body(self: Task[..., Any]) -> None:
        if handler == "on_retry":
            self.retry(countdown=0)
        if handler == "on_failure":
            raise KeyError("in the body")

    async def async_body(self: Task[..., Any]) -> None:
        body(self)

    failing_task = app.task(base=base, bind=True, name="failing")(async_body if is_async else body)

    @app.task
    def fine() -> str:
        return "fine"

    @app.task
    async def fine_async() -> str:
        return "fine"

    ekiden_worker(threads=1)

    with pytest.raises((TaskError, ValueError), match="in the handler"):
        failing_task.delay().get(PATIENCE)
    assert (fine_async if is_async else fine).delay().get(PATIENCE) == "fine"


@pytest.fixture
def heard() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """Everything that every signal says, in order."""
    heard: list[tuple[str, dict[str, Any]]] = []
    names = [name for name in signals.__all__ if name != "Signal"]
    receivers: list[tuple[signals.Signal, Any]] = []
    for name in names:

        def receive(sender: Any, _name: str = name, **fields: Any) -> None:
            heard.append((_name, {"sender": sender, **fields}))

        signal: signals.Signal = getattr(signals, name)
        receivers.append((signal, signal.connect(receive)))
    yield heard
    for signal, receiver in receivers:
        signal.disconnect(receiver)


def test_signals_tell_a_tasks_story(
    app: Ekiden, ekiden_worker: StartWorker, heard: list[tuple[str, dict[str, Any]]]
) -> None:
    @app.task(bind=True, max_retries=1)
    def story(self: Task[..., Any]) -> None:
        self.retry(exc=KeyError("x"), countdown=0)

    result = story.delay()
    worker = ekiden_worker()
    with pytest.raises(KeyError):
        result.get(PATIENCE)
    worker.stop()

    assert [name for name, _ in heard] == [
        "before_task_publish",
        "after_task_publish",
        "worker_init",
        "worker_process_init",
        "worker_ready",
        "task_received",
        "task_prerun",
        "task_retry",
        "task_postrun",
        "task_received",
        "task_prerun",
        "task_failure",
        "task_postrun",
        "worker_shutting_down",
        "worker_process_shutdown",
        "worker_shutdown",
    ]
    for name, fields in heard:
        signal: signals.Signal = getattr(signals, name)
        assert set(fields) - {"sender"} == set(signal.fields), name
    assert heard[0][1]["sender"] == story.name
    assert heard[4][1]["sender"] == worker.worker.name
    assert heard[5][1]["sender"] is heard[6][1]["sender"] is story


@pytest.mark.parametrize("is_async", [False, True])
def test_sending_from_async_code_sends_the_same_signals(
    app: Ekiden, heard: list[tuple[str, dict[str, Any]]], is_async: bool
) -> None:
    import asyncio

    @app.task
    def add(x: int) -> None: ...

    if is_async:
        asyncio.run(add.adelay(1))  # type: ignore[arg-type]
    else:
        add.delay(1)

    assert [name for name, _ in heard] == ["before_task_publish", "after_task_publish"]


def test_the_signal_of_a_revoked_task(
    app: Ekiden, ekiden_worker: StartWorker, heard: list[tuple[str, dict[str, Any]]]
) -> None:
    @app.task
    def never() -> None: ...

    revoked = never.delay()
    revoked.revoke()
    expired = never.apply_async(expires=datetime.now(UTC) - timedelta(1))
    ekiden_worker()
    for result in (revoked, expired):
        with pytest.raises(TaskError):
            result.get(PATIENCE)

    told = [fields for name, fields in heard if name == "task_revoked"]
    assert sorted((each["request"].id, each["terminated"], each["expired"]) for each in told) == sorted(
        [(revoked.id, False, False), (expired.id, False, True)]
    )


def test_a_receiver_that_fails_is_logged_and_breaks_nothing(
    app: Ekiden, ekiden_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(sender: Any, **fields: Any) -> None:
        raise RuntimeError("a bystander fell over")

    @app.task
    def add(x: int) -> int:
        return x

    every = [getattr(signals, name) for name in signals.__all__ if name != "Signal"]
    for signal in every:
        signal.connect(failing)
    try:
        ekiden_worker()
        assert add.delay(1).get(PATIENCE) == 1
    finally:
        for signal in every:
            signal.disconnect(failing)

    assert "the receiver" in caplog.text
    assert "a bystander fell over" in caplog.text


# Follow-ups that no broker takes.


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"queue": "x" * 300}, {"queue": ""}, {"queue": "line\nbreak"}],
    ids=["long", "empty", "break"],
)
def test_a_follow_up_that_the_broker_refuses_fails_its_task_and_holds_up_nobody(
    app: Ekiden, ekiden_worker: StartWorker, options: dict[str, Any], early: bool
) -> None:
    @app.task(acks="early" if early else "late")
    def add(x: int, y: int) -> int:
        return x + y

    step = {"task": add.name, "args": [1], **options}
    publish(
        app,
        json.dumps(
            {"v": 1, "task": add.name, "id": "first", "sent": time.time(), "args": [1, 2], "on_success": [step]}
        ).encode(),
    )
    ekiden_worker()

    assert add.delay(3, 4).get(PATIENCE) == 7
    eventually(lambda: app.AsyncResult("first").ready(), what="the first one has ended")
    eventually(lambda: dead_letters(app), what="a dead letter")
    wait_until_settled(app)


def test_a_follow_up_that_is_too_large_for_the_broker_fails_its_task(tmp_path: Path) -> None:
    app = Ekiden("small", broker=throw_away_url("memory://?max_message_bytes=2000", tmp_path))

    @app.task
    def large(*_: Any) -> str:
        return "x" * 5000

    with app, app.worker():
        result = large.apply_async(link=large.s())
        eventually(result.ready, what="it has ended")
        the_dead_letter(app)
        wait_until_settled(app)


# Queues and priorities.


def test_urgent_tasks_run_first(app: Ekiden, ekiden_worker: StartWorker, notes: Notes) -> None:
    @app.task
    def note(what: int) -> None:
        notes.take(what)

    for priority in (0, 9, 4, 5, 9, 0):
        note.apply_async((priority,), priority=priority)
    ekiden_worker(threads=1)

    assert notes.wait_for(6) == [9, 9, 5, 4, 0, 0]


def test_a_busy_queue_starves_no_other(app: Ekiden, ekiden_worker: StartWorker, notes: Notes) -> None:
    @app.task
    def note(what: str) -> None:
        notes.take(what)

    for _ in range(300):
        note.apply_async(("busy",), queue="busy")
    note.apply_async(("quiet",), queue="quiet")
    ekiden_worker(queues=["busy", "quiet"], threads=1, prefetch=10)

    assert notes.wait_for(301).index("quiet") < 150


def test_a_strict_order_of_queues_is_kept(app: Ekiden, ekiden_worker: StartWorker, notes: Notes) -> None:
    @app.task
    def note(what: str) -> None:
        notes.take(what)

    for _ in range(5):
        note.apply_async(("later",), queue="later")
        note.apply_async(("sooner",), queue="sooner")
    ekiden_worker(queues=["sooner", "later"], strict=True, threads=1)

    assert notes.wait_for(10) == ["sooner"] * 5 + ["later"] * 5


def test_a_worker_serves_every_queue_that_its_app_names(app: Ekiden, ekiden_worker: StartWorker) -> None:
    app.conf.task_routes = {"mail.*": "mails", "slow": {"queue": "slow", "priority": 1}}

    @app.task(queue="special")
    def special() -> str:
        return special.request.queue or ""

    @app.task(name="mail.send")
    def send() -> str:
        return send.request.queue or ""

    worker = ekiden_worker()

    assert worker.worker.queues == ("default", "mails", "slow", "special")
    assert (special.delay().get(PATIENCE), send.delay().get(PATIENCE)) == ("special", "mails")


def test_one_queue_may_be_given_as_text(app: Ekiden, ekiden_worker: StartWorker) -> None:
    assert ekiden_worker(queues="emails").worker.queues == ("emails",)


@pytest.mark.parametrize("queue", ["default.dead", "reply.x", "a b", "x" * 198])
def test_a_queue_that_no_worker_can_serve_is_refused(app: Ekiden, queue: str) -> None:
    with pytest.raises(ConfigurationError, match=r"queue|dead letters"):
        app.worker(queues=[queue])


def test_a_workers_pool_is_not_the_apps(app: Ekiden) -> None:
    @app.task
    def add() -> None: ...

    with pytest.raises(ConfigurationError, match="top level of a module"):
        app.worker(pool="process")

    assert app.conf.worker_pool == Settings().worker_pool


# Concurrency.


def test_as_many_async_tasks_as_allowed_run_at_once(app: Ekiden, ekiden_worker: StartWorker) -> None:
    import asyncio

    running = 0
    most = 0

    @app.task
    async def wait_for_the_others() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        deadline = time.monotonic() + PATIENCE
        while most < 50 and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        running -= 1

    ekiden_worker(threads=2, async_concurrency=50)
    results = wait_for_the_others.enqueue_many(() for _ in range(120))
    for result in results:
        result.get(PATIENCE)

    assert most == 50


def test_as_many_def_tasks_as_threads_run_at_once(app: Ekiden, ekiden_worker: StartWorker) -> None:
    barrier = threading.Barrier(5)

    @app.task
    def meet() -> int:
        return barrier.wait(PATIENCE)

    ekiden_worker(threads=5)

    assert sorted(result.get(PATIENCE) for result in meet.enqueue_many(() for _ in range(5))) == [0, 1, 2, 3, 4]


# Starting and stopping.


def test_a_stopping_worker_gives_back_what_it_has_not_started(app: Ekiden, ekiden_worker: StartWorker) -> None:
    gate = Gate()

    @app.task
    def work() -> None:
        gate.pass_through()

    worker = ekiden_worker(threads=1)
    first = work.delay()
    assert gate.arrived.wait(PATIENCE)
    others = [work.delay() for _ in range(10)]
    worker.worker.stop()
    eventually(lambda: app.transport.depth("default").ready == 10, what="the others are ready again")
    gate.open.set()
    worker.stop()

    assert first.state == "SUCCESS"
    assert [seen.attempt for seen in app.transport.browse("default")] == [0] * 10
    assert {seen.message.id for seen in app.transport.browse("default")} == {each.id for each in others}


@in_memory
def test_a_stopping_worker_lets_what_runs_finish(app: Ekiden, ekiden_worker: StartWorker) -> None:
    gate = Gate()

    @app.task(track_started=True)
    def work() -> str:
        gate.pass_through()
        return "finished"

    worker = ekiden_worker(threads=1)
    result = work.delay()
    assert gate.arrived.wait(PATIENCE)
    worker.worker.stop()
    threading.Timer(1.5, gate.open.set).start()  # longer than threads get that are to end at once
    worker.stop()

    assert result.state == "SUCCESS"
    assert is_empty(app)


def test_a_burst_ends_when_nothing_is_left(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task
    def again(depth: int) -> None:
        if depth:
            again.delay(depth - 1)

    for _ in range(20):
        again.delay(3)
    worker = ekiden_worker(burst=True)
    worker._thread.join(PATIENCE)

    assert is_empty(app)


def test_a_worker_that_cannot_start_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    app = Ekiden("unreachable", broker=f"sqlite:///{tmp_path}/missing/broker.db")

    with pytest.raises(ConfigurationError, match="there is no directory"):
        app.worker().start()

    assert set(threading.enumerate()) == before


def test_closing_the_app_ends_its_worker_in_peace(
    app: Ekiden, ekiden_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task
    def double(x: int) -> int:
        return 2 * x

    ekiden_worker()
    assert double.delay(2).get(10) == 4
    app.close()

    eventually(lambda: "ends: its app was closed in this process" in caplog.text, what="the worker ended")
    assert [record.levelname for record in caplog.records if record.levelname == "CRITICAL"] == []

    with app.worker():
        assert double.delay(3).get(10) == 6


def test_a_tasks_set_runs_in_the_app_that_included_it(app: Ekiden, ekiden_worker: StartWorker) -> None:
    tasks = TaskSet("shop")

    @tasks.task(bind=True, base=Recording)
    def whose(self: Recording) -> str:
        return str(self.app.name)  # type: ignore[attr-defined]

    app.include_tasks(tasks)
    app.tasks[whose.name].notes = []  # type: ignore[attr-defined]
    ekiden_worker()

    assert whose.delay().get(PATIENCE) == app.name
    assert [note[0] for note in app.tasks[whose.name].notes] == [  # type: ignore[attr-defined]
        "before_start",
        "on_success",
        "after_return",
    ]


# Rate limits.


@pytest.mark.slow
def test_a_rate_limit_holds_over_all_workers(app: Ekiden, ekiden_worker: StartWorker) -> None:
    began = []
    attempts = set()

    @app.task(rate_limit="20/s")
    def limited() -> None:
        began.append(time.monotonic())
        attempts.add(limited.request.attempt)

    @app.task
    def free() -> str:
        return "free"

    ekiden_worker(threads=4)
    ekiden_worker(threads=4)
    limited.enqueue_many(() for _ in range(30))
    assert free.delay().get(PATIENCE) == "free"
    eventually(lambda: len(began) == 30, what="all have run")

    began.sort()
    for start in range(len(began) - 10):
        assert began[start + 10] - began[start] >= 10 / 20 - 0.25
    assert began[-1] - began[0] >= 29 / 20 - 0.25
    assert attempts == {1}  # what had to wait was given back with its attempt


# Logs.


def test_an_expected_error_is_no_alarm(
    app: Ekiden, ekiden_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    @app.task(throws=(KeyError,))
    def known(key: str) -> None:
        raise KeyError(key)

    caplog.set_level(logging.INFO, "ekiden")
    ekiden_worker()
    with pytest.raises(KeyError):
        known.delay("x").get(PATIENCE)
    eventually(lambda: "failed as declared" in caplog.text, what="a line in the log")

    assert not [record for record in caplog.records if record.levelno > logging.INFO]


def test_what_goes_to_the_dead_letters_is_at_least_a_warning(
    app: Ekiden, ekiden_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    ekiden_worker()
    publish(app, b"garbage")
    the_dead_letter(app)

    assert [record.levelname for record in caplog.records if "dead letters" in record.getMessage()] == ["WARNING"]


def test_a_workers_result_is_an_async_result(app: Ekiden) -> None:
    @app.task
    def add() -> int:
        return 1

    assert isinstance(add.delay(), AsyncResult)


@pytest.mark.parametrize("name", ["a\nb", "caf\udce9", "a\x1b[2J", "n" * 201])
def test_a_worker_is_called_by_printable_characters(app: Ekiden, name: str) -> None:
    with pytest.raises(ConfigurationError, match="no name of a worker"):
        app.worker(name=name)
