"""A result now or later: asked for, waited for, awaited, called back."""

import asyncio
import logging
import threading
import time
from datetime import UTC, date, datetime
from typing import Any

import msgspec
import pytest
from ekiden import AsyncResult, Ekiden, Ignore, Reject, Task
from ekiden.codec import OutcomeRecord, encode_outcome, encode_value
from ekiden.errors import (
    BackendError,
    BackendRefused,
    MessageError,
    MisuseError,
    ResultTimeout,
    Retry,
    TaskError,
    UnknownResult,
)
from ekiden.failures import failure_record, type_name
from ekiden.results import StoredResult
from ekiden.testing.plugin import StartWorker
from msgspec import Raw

from tests.working import PATIENCE, Gate, eventually


@pytest.fixture
def app(ekiden_app: Ekiden) -> Ekiden:
    return ekiden_app


def store(app: Ekiden, task_id: str, state: str = "SUCCESS", value: Any = None, **fields: Any) -> AsyncResult[Any]:
    record = OutcomeRecord(value=Raw(encode_value(value)), **fields)
    app.backend.put([StoredResult(task_id, state, 0, encode_outcome(record))])
    return app.AsyncResult(task_id)


# Asking.


def test_nobody_has_heard_of_it(app: Ekiden) -> None:
    result = app.AsyncResult("unknown")

    assert (result.state, result.status, result.result, result.ready()) == ("PENDING", "PENDING", None, False)
    assert (result.name, result.worker, result.traceback, result.date_done, result.children) == (
        None,
        None,
        None,
        None,
        [],
    )


def test_a_success_tells_its_value(app: Ekiden) -> None:
    result = store(app, "x", value=[1, {"a": None}], task="shop.add", done=1_800_000_000.0, children=("c",))

    assert (result.state, result.result, result.info, result.get()) == ("SUCCESS", *[[1, {"a": None}]] * 3)
    assert result.date_done == datetime.fromtimestamp(1_800_000_000, UTC)
    assert [(child.id, child.parent) for child in result.children] == [("c", result)]


def test_a_failure_tells_its_exception(app: Ekiden) -> None:
    result = store(app, "x", "FAILURE", failure=failure_record(KeyError("k"), "Traceback: there"))

    assert isinstance(result.result, KeyError)
    assert result.traceback == "Traceback: there"
    assert isinstance(result.get(propagate=False), KeyError)
    with pytest.raises(KeyError) as caught:
        result.get()
    assert caught.value.__notes__ == ["In the worker:\nTraceback: there"]
    with pytest.raises(KeyError):
        result.maybe_throw()


@pytest.mark.parametrize("state", ["REVOKED", "EXPIRED", "FAILURE"])
def test_an_ending_without_an_exception_raises_all_the_same(app: Ekiden, state: str) -> None:
    with pytest.raises(TaskError, match=f"x is {state}"):
        store(app, "x", state).get()


def test_results_are_equal_by_their_ids(app: Ekiden) -> None:
    first, second = app.AsyncResult("x"), app.AsyncResult("x")

    assert first == second
    assert len({first, second, app.AsyncResult("y")}) == 2
    assert first != "x"
    assert (str(first), first.task_id, repr(first)) == ("x", "x", "<AsyncResult x>")


def test_a_final_state_is_asked_for_once(app: Ekiden) -> None:
    result = store(app, "x", value=1)
    assert result.ready()

    app.backend.forget(["x"])

    assert result.get() == 1
    assert app.AsyncResult("x").state == "PENDING"


def test_what_was_forgotten_is_unknown(app: Ekiden) -> None:
    result = store(app, "x", value=1)
    assert result.ready()

    result.forget()

    assert result.state == "PENDING"


def test_a_value_is_read_as_its_task_is_annotated(app: Ekiden) -> None:
    @app.task(name="day")
    def day() -> date:
        return date(2026, 1, 2)

    assert store(app, "x", value="2026-01-02", task="day").get() == date(2026, 1, 2)
    assert day.AsyncResult("x").get() == date(2026, 1, 2)


@pytest.mark.parametrize("value", ["not a day", 5, {"a": 1}])
def test_a_value_that_is_not_what_its_task_is_annotated_with_comes_as_it_is(app: Ekiden, value: Any) -> None:
    @app.task(name="day")
    def day() -> date:
        return value  # type: ignore[no-any-return]

    assert store(app, "x", value=value, task="day").get() == value


# Waiting.


def test_waiting_ends_at_its_timeout_and_says_what_is_known(app: Ekiden) -> None:
    store(app, "x", "PROGRESS")
    began = time.monotonic()

    with pytest.raises(ResultTimeout, match=r"had not ended after 0\.1 s; it is PROGRESS") as caught:
        app.AsyncResult("x").get(timeout=0.1)

    assert isinstance(caught.value, TimeoutError)
    assert 0.1 <= time.monotonic() - began < 5


@pytest.mark.parametrize("timeout", [0, -1])
def test_waiting_for_no_time_is_looking(app: Ekiden, timeout: float) -> None:
    assert store(app, "x", value=1).get(timeout=timeout) == 1
    with pytest.raises(ResultTimeout):
        app.AsyncResult("y").get(timeout=timeout)


def test_whoever_waits_is_woken(app: Ekiden) -> None:
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(app.AsyncResult("x").get(PATIENCE))) for _ in range(5)]
    for thread in threads:
        thread.start()

    store(app, "x", value=7)

    for thread in threads:
        thread.join(PATIENCE)
    assert got == [7] * 5


# Awaiting.


def test_awaiting_blocks_nobody(app: Ekiden, ekiden_worker: StartWorker) -> None:
    gate = Gate()

    @app.task
    def slow() -> str:
        gate.pass_through()
        return "done"

    async def main() -> tuple[bool, str]:
        waiting = asyncio.ensure_future(_awaited(await slow.adelay()))
        while not gate.arrived.is_set():
            await asyncio.sleep(0.001)
        was_waiting = not waiting.done()
        gate.open.set()
        return was_waiting, await waiting

    ekiden_worker()

    assert asyncio.run(main()) == (True, "done")


async def _awaited(result: AsyncResult[Any]) -> Any:
    return await result


def test_awaiting_raises_what_the_task_raised(app: Ekiden) -> None:
    result = store(app, "x", "FAILURE", failure=failure_record(KeyError("k"), None))

    with pytest.raises(KeyError):
        asyncio.run(_awaited(result))


def test_one_await_may_give_up_without_harm_to_another(app: Ekiden) -> None:
    async def main() -> Any:
        impatient = asyncio.ensure_future(_awaited(app.AsyncResult("x")))
        patient = asyncio.ensure_future(_awaited(app.AsyncResult("x")))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(impatient, 0.05)
        await asyncio.to_thread(store, app, "x", value=7)
        return await asyncio.wait_for(patient, PATIENCE)

    assert asyncio.run(main()) == 7


def test_a_loop_that_was_closed_while_it_awaited_harms_no_other(app: Ekiden) -> None:
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_awaited(app.AsyncResult("x")), 0.02)

    asyncio.run(give_up())
    store(app, "x", value=1)
    store(app, "y", value=2)

    assert asyncio.run(_awaited(app.AsyncResult("y"))) == 2


def test_who_awaits_when_the_app_is_closed_is_told(app: Ekiden) -> None:
    async def main() -> None:
        waiting = asyncio.ensure_future(_awaited(app.AsyncResult("x")))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(app.close)
        await asyncio.wait_for(waiting, PATIENCE)

    with pytest.raises(MisuseError, match="closed while"):
        asyncio.run(main())
    assert not [thread for thread in threading.enumerate() if thread.name == "ekiden-results"]


# Being called back.


def test_a_callback_is_called_once_it_is_ready(app: Ekiden) -> None:
    called = threading.Event()
    values: list[Any] = []

    def callback(result: AsyncResult[Any]) -> None:
        values.append(result.get())
        called.set()

    result = app.AsyncResult("x").then(callback)
    store(app, "x", value=3)

    assert called.wait(PATIENCE)
    assert (values, result.id) == ([3], "x")


def test_a_callback_for_what_is_ready_already_is_called_too(app: Ekiden) -> None:
    called = threading.Event()

    store(app, "x").then(lambda _result: called.set())

    assert called.wait(PATIENCE)


def test_a_callback_that_fails_is_logged_and_keeps_nobody_waiting(
    app: Ekiden, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(_result: AsyncResult[Any]) -> None:
        raise RuntimeError("a callback fell over")

    called = threading.Event()
    with caplog.at_level(logging.ERROR):
        store(app, "x").then(failing)
        store(app, "y").then(lambda _result: called.set())
        assert called.wait(PATIENCE)

    assert asyncio.run(_awaited(app.AsyncResult("y"))) is None
    eventually(lambda: "a callback fell over" in caplog.text, what="it is logged")


def test_a_callback_that_will_not_be_called_is_logged(app: Ekiden, caplog: pytest.LogCaptureFixture) -> None:
    app.AsyncResult("x").then(lambda _result: None)

    app.waiting_thread()._finish_all(BackendError("the store is away"))

    assert "x: the callback" in caplog.text
    assert "will not be called: the store is away" in caplog.text


# Children.


def test_collecting_walks_the_tree_breadth_first(app: Ekiden) -> None:
    store(app, "root", value=0, children=("a", "b"))
    store(app, "a", value=1, children=("c",))
    store(app, "b", value=2)
    store(app, "c", value=3)

    assert [(result.id, value) for result, value in app.AsyncResult("root").collect(PATIENCE)] == [
        ("root", 0),
        ("a", 1),
        ("b", 2),
        ("c", 3),
    ]


def test_collecting_shares_one_timeout(app: Ekiden) -> None:
    store(app, "root", value=0, children=("never", "neither"))
    began = time.monotonic()

    with pytest.raises(ResultTimeout):
        list(app.AsyncResult("root").collect(0.1))

    assert time.monotonic() - began < 5


def test_an_applied_result_needs_no_store(app: Ekiden) -> None:
    @app.task
    def add(x: int) -> int:
        return x

    result = add.apply((1,))
    result.forget()
    result.revoke()

    assert (result.get(), asyncio.run(_awaited(result)), result.state) == (1, 1, "SUCCESS")
    assert isinstance(add, Task)


# What an exception out of get() would say to the caller's own program.

MEANS_SOMETHING_ELSE = [
    StopIteration("over"),
    StopAsyncIteration("over"),
    GeneratorExit("over"),
    KeyboardInterrupt("over"),
    SystemExit("over"),
    asyncio.CancelledError("over"),
    Reject("over"),
    Ignore("over"),
    Retry("over"),
    ResultTimeout("over"),
    BackendError("over"),
    UnknownResult("over"),
]


@pytest.mark.parametrize("error", MEANS_SOMETHING_ELSE, ids=lambda error: type(error).__name__)
def test_what_would_speak_to_the_callers_own_program_is_a_task_error(app: Ekiden, error: BaseException) -> None:
    result = store(app, "x", "FAILURE", failure=failure_record(error, None))

    with pytest.raises(TaskError, match="over") as caught:
        list(map(AsyncResult.get, [result]))
    assert caught.value.type_name == type_name(type(error))
    with pytest.raises(TaskError):
        next(each.get() for each in [result])
    with pytest.raises(TaskError):
        asyncio.run(awaited(result))
    assert isinstance(result.get(propagate=False), TaskError)
    assert isinstance(result.result, TaskError)


class OddStop(StopIteration):
    pass


def test_a_kind_of_stop_iteration_is_one_too(app: Ekiden) -> None:
    result = store(app, "x", "FAILURE", failure=failure_record(OddStop(5), "Traceback: there"))

    with pytest.raises(TaskError) as caught:
        result.get()
    assert caught.value.type_name == f"{__name__}.OddStop"
    assert caught.value.traceback_text == "Traceback: there"


async def awaited(result: AsyncResult[Any]) -> Any:
    return await result


GARBAGE = [
    b"x",
    b"\xff",
    b"[]",
    b'{"v":2}',
    b'{"v":1,"value":',
    b'{"v":1,"failure":5}',
    b'{"v":1,"children":5}',
    b"[" * 100_000,
    b'{"v":1,"value":' + b"[" * 100_000,
]


@pytest.mark.parametrize("body", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "REVOKED"])
def test_a_stored_result_that_cannot_be_read_says_so(app: Ekiden, state: str, body: bytes) -> None:
    app.backend.put([StoredResult("x", state, 0, body)])
    result = app.AsyncResult("x")

    for ask in (result.get, lambda: result.result, lambda: result.children, lambda: asyncio.run(awaited(result))):
        with pytest.raises(MessageError, match="cannot be read"):
            ask()
    assert result.state == state
    assert result.ready()


def test_an_id_that_no_store_could_hold_spoils_no_others_wait(app: Ekiden) -> None:
    async def wait_for_three() -> list[Any]:
        asked = [app.AsyncResult(each) for each in ("a", "caf\udce9", "b")]
        return await asyncio.gather(*map(awaited, asked), return_exceptions=True)

    store(app, "a", value=1)
    store(app, "b", value=2)
    found = asyncio.run(wait_for_three())

    assert (found[0], found[2]) == (1, 2)
    assert isinstance(found[1], BackendRefused)
    with pytest.raises(BackendRefused, match="lone surrogate"):
        app.AsyncResult("caf\udce9").get(1)


FAILURES = [
    {"type": "builtins.print", "message": ""},
    {"type": "sys.exit", "message": "", "args": [1]},
    {"type": "builtins.BaseException", "message": ""},
    {"type": "", "message": ""},
    {"type": "." * 5000, "message": ""},
    {"type": "\x00", "message": "\x00"},
    {"type": "tests.apps.hostile.NamelessError", "message": "x"},
    {"type": "tests.unit.test_results.ExitsWhenMade", "message": "x", "args": ["x"]},
    {"type": "tests.unit.test_results.MakesSomethingElse", "message": "x", "args": ["x"]},
    {"type": "UnicodeDecodeError", "message": "x", "args": [1]},
    {"type": "ExceptionGroup", "message": "x", "args": [], "exceptions": [{"type": "StopIteration", "message": ""}]},
]


class ExitsWhenMade(Exception):
    def __init__(self, *_: object) -> None:
        raise SystemExit(3)


class MakesSomethingElse(Exception):
    def __new__(cls, *_: object) -> Any:
        return 5


@pytest.mark.parametrize("failure", FAILURES, ids=range(len(FAILURES)))
def test_a_failure_that_somebody_made_up_is_raised_as_an_exception(app: Ekiden, failure: dict[str, Any]) -> None:
    body = msgspec.json.encode({"v": 1, "failure": failure})
    app.backend.put([StoredResult("x", "FAILURE", 0, body)])

    error = app.AsyncResult("x").get(propagate=False)

    assert isinstance(error, Exception)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whichever it is
        app.AsyncResult("x").get()
