"""What a worker looks at before it runs a message, and in which order; and what it takes in hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ekiden import Ekiden
from ekiden.codec import OutcomeRecord, decode_call, encode_call, encode_outcome
from ekiden.errors import NotRegistered, TaskExpired, TaskRevoked, WorkerLostError
from ekiden.message import Condition, Message, derived_id, new_id
from ekiden.results import StoredResult
from ekiden.signature import Call, Step
from ekiden.states import SUCCESS
from ekiden.testing.plugin import StartWorker

from tests.apps import bodies
from tests.working import (
    PATIENCE,
    Notes,
    dead_letters,
    eventually,
    hand_out_and_lose,
    the_dead_letter,
    the_message,
    wait_until_settled,
)


@pytest.fixture
def app(ekiden_app: Ekiden) -> Ekiden:
    return ekiden_app


@pytest.fixture
def notes() -> Notes:
    return Notes()


def publish(app: Ekiden, call: Call, **fields: Any) -> None:
    """Put a call into the default queue without a task."""
    app.transport.publish([Message(fields.pop("id", call.id), "default", encode_call(call), **fields)])


def has_succeeded(app: Ekiden, task_id: str) -> None:
    """Store a success, as a worker does that dies before it settles."""
    stored = StoredResult(task_id, SUCCESS, 0, encode_outcome(OutcomeRecord(value=msgspec.Raw(b"1"))), 60.0)
    assert app.backend.put([stored]) == [True]


# A call whose result is stored has ended, whatever else could be said of it by now.


@pytest.mark.parametrize("why", ["handed out too often", "revoked", "expired", "of an unknown task"])
@pytest.mark.parametrize("fenced", [False, True])
def test_a_call_that_has_ended_stays_what_it_is(
    app: Ekiden, ekiden_worker: StartWorker, notes: Notes, why: str, fenced: bool
) -> None:
    app.conf.unknown_task_grace = 0

    @app.task(name="work")
    def work() -> None:
        notes.take("ran")

    @app.task(name="then")
    def then(value: int) -> None:
        notes.take(f"then {value}")

    @app.task(name="sorry")
    def sorry(task_id: str) -> None:
        notes.take(f"sorry {task_id}")

    now = time.time()
    call = Call(
        task="gone" if why == "of an unknown task" else "work",
        id=new_id(),
        sent=now - 60,
        expires=now - 1 if why == "expired" else None,
        on_success=(Step("then"),),
        on_error=(Step("sorry"),),
        fenced=fenced,
    )
    publish(app, call)
    hand_out_and_lose(app, 6 if why == "handed out too often" else 1)
    has_succeeded(app, call.id)
    if why == "revoked":
        app.revoke(call.id)

    ekiden_worker()
    notes.wait_for(1)
    wait_until_settled(app)

    assert notes.taken == ["then 1"]
    assert dead_letters(app) == []
    assert app.AsyncResult(call.id).get() == 1


@pytest.mark.parametrize("is_known", [True, False])
def test_what_has_expired_is_expired_whether_its_task_is_known_or_not(
    app: Ekiden, ekiden_worker: StartWorker, is_known: bool
) -> None:
    if is_known:
        app.task(name="work")(lambda: None)
    call = Call(task="work", id=new_id(), sent=time.time() - 10, expires=time.time() - 1)
    publish(app, call)

    ekiden_worker()

    with pytest.raises(TaskExpired):
        app.AsyncResult(call.id).get(PATIENCE)
    assert dead_letters(app) == []


def test_what_is_revoked_does_not_wait_for_its_task_to_be_known(app: Ekiden, ekiden_worker: StartWorker) -> None:
    call = Call(task="gone", id=new_id(), sent=time.time())
    publish(app, call)
    app.revoke(call.id)

    ekiden_worker()

    with pytest.raises(TaskRevoked):
        app.AsyncResult(call.id).get(PATIENCE)


def test_what_is_revoked_is_no_dead_letter_however_often_it_was_handed_out(
    app: Ekiden, ekiden_worker: StartWorker
) -> None:
    app.task(name="work")(lambda: None)
    call = Call(task="work", id=new_id(), sent=time.time())
    publish(app, call)
    hand_out_and_lose(app, 6)
    app.revoke(call.id)

    ekiden_worker()

    with pytest.raises(TaskRevoked):
        app.AsyncResult(call.id).get(PATIENCE)
    wait_until_settled(app)
    assert dead_letters(app) == []


# The grace for unknown tasks.


def test_a_delayed_call_of_an_unknown_task_waits_from_when_it_is_due(app: Ekiden, ekiden_worker: StartWorker) -> None:
    app.conf.unknown_task_grace = 60
    now = time.time()
    publish(app, Call(task="new", id=new_id(), sent=now - 86400, eta=now - 1), due=now - 1)
    publish(app, Call(task="new", id=new_id(), sent=now - 86400, eta=now - 86000))

    ekiden_worker()

    eventually(lambda: dead_letters(app), what="the other one is dead")
    (waiting,) = app.transport.browse("default")
    assert decode_call(waiting.message.body, {}).eta == pytest.approx(now - 1)
    assert len(dead_letters(app)) == 1


def test_a_next_try_whose_task_is_gone_waits_from_when_it_is_due(app: Ekiden, ekiden_worker: StartWorker) -> None:
    app.conf.unknown_task_grace = 60
    now = time.time()
    call = Call(task="gone", id=new_id(), sent=now - 86400, eta=now - 1, retries=1, fenced=True, last_error="OSError")
    publish(app, call, id=derived_id(call.id, "retry"), due=now - 1)

    ekiden_worker()

    eventually(lambda: the_message(app).message.due is not None, what="it waits")
    assert dead_letters(app) == []
    assert app.AsyncResult(call.id).state == "PENDING"  # it has not begun


def test_a_delayed_message_of_a_newer_format_waits_from_when_it_is_due(app: Ekiden, ekiden_worker: StartWorker) -> None:
    app.conf.unknown_task_grace = 60
    now = time.time()
    old_id = f"{int((now - 86400) * 1000):012x}{'0' * 20}"
    app.transport.publish(
        [
            Message(old_id, "default", b'{"v":2}', due=now - 1),
            Message(derived_id(old_id, "x"), "default", b'{"v":2}'),
        ]
    )

    ekiden_worker()

    eventually(lambda: dead_letters(app), what="the other one is dead")
    assert the_message(app).message.id == old_id
    assert len(dead_letters(app)) == 1


# What ends without having run tells what its last try raised.


def test_what_expires_between_two_tries_tells_the_last_error(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task(autoretry_for=(ValueError,), max_retries=5, retry_backoff=0, default_retry_delay=1.2)
    def fails() -> None:
        raise ValueError("no such user")

    ekiden_worker()
    result = fails.apply_async(expires=1.0)

    with pytest.raises(
        TaskExpired, match=r"^expired before a worker could start it; try 1 of it had failed: ValueError: no such user$"
    ):
        result.get(PATIENCE)


def test_what_is_revoked_between_two_tries_tells_the_last_error(app: Ekiden, ekiden_worker: StartWorker) -> None:
    @app.task(autoretry_for=(ValueError,), max_retries=5, retry_backoff=0, default_retry_delay=0.5)
    def fails() -> None:
        raise ValueError("no such user")

    ekiden_worker()
    result = fails.delay()
    eventually(lambda: result.state == "RETRY", what="it has been tried")
    result.revoke()

    with pytest.raises(TaskRevoked, match="try 1 of it had failed: ValueError: no such user"):
        result.get(PATIENCE)


@pytest.mark.parametrize("task", ["gone", "work"])
def test_what_is_buried_between_two_tries_tells_the_last_error(
    app: Ekiden, ekiden_worker: StartWorker, task: str
) -> None:
    app.conf.unknown_task_grace = 0
    app.task(name="work")(lambda: None)
    call = Call(task=task, id=new_id(), sent=0.0, retries=4, fenced=True, last_error="ValueError: no such user")
    publish(app, call)
    hand_out_and_lose(app, 6)

    ekiden_worker()

    with pytest.raises((NotRegistered, WorkerLostError), match="try 4 of it had failed: ValueError: no such user"):
        app.AsyncResult(call.id).get(PATIENCE)
    assert str(the_dead_letter(app).headers["ekiden-dead-error"]).endswith("no such user")


def test_what_expires_after_a_death_says_that_it_was_handed_out(app: Ekiden, ekiden_worker: StartWorker) -> None:
    app.task(name="work")(lambda: None)
    call = Call(task="work", id=new_id(), sent=time.time(), expires=time.time() + 0.2)
    publish(app, call)
    hand_out_and_lose(app, 2)
    eventually(lambda: time.time() > (call.expires or 0.0), what="it has expired")

    ekiden_worker()

    with pytest.raises(TaskExpired, match="handed out 2 times before"):
        app.AsyncResult(call.id).get(PATIENCE)


# From its second hand-out on, a message is in hand only when it starts.


class TestSecondHandOuts:
    """With an app whose bodies can run in processes."""

    @pytest.fixture
    def ekiden_app(self, ekiden_use_broker: Callable[[Ekiden], Ekiden]) -> Ekiden:
        return ekiden_use_broker(bodies.app)

    @pytest.mark.slow
    def test_what_cannot_start_at_once_gives_its_attempt_back(self, ekiden_worker: StartWorker, tmp_path: Path) -> None:
        gate = tmp_path / "gate"
        held = bodies.wait_for_file.delay(str(gate))
        others = [bodies.add.delay(number, 1) for number in range(20)]
        hand_out_and_lose(bodies.app, 1)

        ekiden_worker(threads=1)

        eventually(lambda: Path(f"{gate}.begun").exists(), what="the first one runs")
        eventually(lambda: bodies.app.transport.depth("default").leased == 1, what="nothing else is in hand")
        counts = {seen.message.id: seen.attempt for seen in bodies.app.transport.browse("default")}
        assert counts.pop(held.id) == 2
        assert set(counts.values()) <= {1}  # where the first one came back late, some of the others have run before it
        gate.touch()
        assert held.get(PATIENCE) is None
        assert [other.get(PATIENCE) for other in others] == list(range(1, 21))
        assert dead_letters(bodies.app) == []

    @pytest.mark.slow
    def test_of_messages_with_which_two_workers_died_one_is_in_hand_at_a_time(
        self, ekiden_worker: StartWorker, tmp_path: Path
    ) -> None:
        gates = [tmp_path / name for name in ("one", "two")]
        results = [bodies.wait_for_file.delay(str(gate)) for gate in gates]
        hand_out_and_lose(bodies.app, 2)

        ekiden_worker(threads=2)

        def begun() -> list[Path]:
            return [gate for gate in gates if Path(f"{gate}.begun").exists()]

        eventually(begun, what="one runs")
        enough = time.monotonic() + 2.0  # a process for the other one is ready long before
        eventually(lambda: time.monotonic() > enough, what="the other one could have started")
        assert len(begun()) == 1
        for gate in gates:
            gate.touch()
        assert [result.get(PATIENCE) for result in results] == [None, None]
        assert dead_letters(bodies.app) == []

    def waits_again(self, task_id: str) -> bool:
        """Whether it was claimed and given back: it waits for a moment, as if nobody had had it."""
        found = {seen.message.id: seen for seen in bodies.app.transport.browse("default")}[task_id]
        return (found.condition, found.attempt) == (Condition.DELAYED, 0)

    @pytest.mark.slow
    def test_many_that_come_back_are_worked_off_beside_new_ones(self, ekiden_worker: StartWorker) -> None:
        back = [bodies.add.delay(number, 1) for number in range(200)]
        hand_out_and_lose(bodies.app, 1)
        hand_out_and_lose(bodies.app, 1)

        ekiden_worker(threads=4)
        new = [bodies.add.delay(number, 2) for number in range(200)]

        assert [result.get(30) for result in new] == list(range(2, 202))
        assert [result.get(30) for result in back] == list(range(1, 201))
        assert dead_letters(bodies.app) == []

    def test_a_message_that_may_start_once_only_is_held_only_when_it_starts(
        self, ekiden_worker: StartWorker, tmp_path: Path
    ) -> None:
        gate = tmp_path / "gate"
        held = bodies.wait_for_file.delay(str(gate))
        ekiden_worker(threads=1)
        eventually(lambda: Path(f"{gate}.begun").exists(), what="the first one runs")

        once = bodies.once.delay()

        eventually(lambda: self.waits_again(once.id), what="it is given back, with its attempt")
        gate.touch()
        assert held.get(PATIENCE) is None
        assert once.get(PATIENCE) == 1
