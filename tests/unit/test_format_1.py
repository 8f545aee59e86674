"""Messages and results of format 1, as they lie in brokers and stores: every later ekiden reads them, for ever.

Nothing in tests/corpus/format-1 is ever changed. A later format gets a directory of its own beside it.
"""

from pathlib import Path

import msgspec
import pytest
from ekiden import AsyncResult, Ekiden
from ekiden.codec import FailureRecord, OutcomeRecord, decode_call, decode_outcome, encode_call
from ekiden.message import Message, new_id
from ekiden.results import StoredResult
from ekiden.signature import Call, Step
from ekiden.testing.plugin import StartWorker

from tests.working import PATIENCE

FILES = Path(__file__).parents[1] / "corpus" / "format-1"
TASK_ID = "01a1f0c3b5d0a3f1c2d4e5f60718293a"

CALLS = {
    "call-minimal.json": Call("shop.add", TASK_ID, 1800000000.5),
    "call-full.json": Call(
        "shop.add",
        TASK_ID,
        1800000000.5,
        args=[1, "zwei", None, [3.5, True], {"a": {"b": []}}],
        kwargs={"größe": "世界", "n": 2**63 - 1},
        retries=2,
        eta=1800000060.0,
        expires=1800000120.25,
        root="root-id",
        parent="parent-id",
        on_success=(
            Step(
                "shop.then",
                (1,),
                {"x": 2},
                task_id="then-id",
                queue="mails",
                priority=9,
                countdown=5.0,
                expires=60.0,
                headers={"lang": "de", "n": 1, "f": 0.5, "b": True, "none": None},
                ignore_result=True,
                time_limit=30.0,
                soft_time_limit=20.0,
                immutable=True,
                on_success=(Step("shop.last"),),
                on_error=(Step("shop.sorry"),),
            ),
        ),
        on_error=(Step("shop.sorry", ("admin",)),),
        ignore_result=False,
        time_limit=30.0,
        soft_time_limit=20.0,
        fenced=True,
    ),
}
RESULTS = {
    "result-success.json": OutcomeRecord(
        value=msgspec.Raw(b'{"total":3,"items":["a",null]}'),
        task="shop.add",
        worker="host:1:1",
        retries=1,
        queue="default",
        done=1800000001.5,
        runtime=0.25,
        parent="parent-id",
        root="root-id",
        children=("c1", "c2"),
    ),
    "result-success-of-nothing.json": OutcomeRecord(
        task="shop.add", worker="host:1:1", queue="default", done=1800000001.5, runtime=0.25
    ),
    "result-failure.json": OutcomeRecord(
        failure=FailureRecord(
            "ValueError", "no such user", ("no such user", 42), "Traceback (most recent call last):\n  ..."
        ),
        task="shop.add",
        worker="host:1:1",
        retries=3,
        queue="default",
        done=1800000001.5,
        runtime=0.25,
    ),
    "result-failure-of-an-older-writer.json": OutcomeRecord(
        failure=FailureRecord("builtins.ValueError", "no such user", ("no such user",)), task="shop.add"
    ),
    "result-retry.json": OutcomeRecord(
        failure=FailureRecord("ConnectionError", "down", ("down",)),
        task="shop.add",
        args=[9],
        kwargs={"x": 1},
        worker="host:1:1",
        queue="default",
        due=1800000060.0,
        done=1800000001.5,
        runtime=0.25,
    ),
    "result-started.json": OutcomeRecord(task="shop.add", worker="host:1:1", queue="default"),
    "result-progress.json": OutcomeRecord(
        value=msgspec.Raw(b'{"done":3,"of":10}'), task="shop.add", worker="host:1:1", queue="default"
    ),
}


def test_each_file_has_its_meaning_here() -> None:
    assert {path.name for path in FILES.iterdir()} == CALLS.keys() | RESULTS.keys()


@pytest.mark.parametrize("name", CALLS)
def test_a_stored_message_is_read(name: str) -> None:
    assert decode_call((FILES / name).read_bytes(), {}) == CALLS[name]


@pytest.mark.parametrize("name", CALLS)
def test_a_message_is_still_written_so(name: str) -> None:
    body = (FILES / name).read_bytes()

    assert encode_call(decode_call(body, {})) == body


@pytest.mark.parametrize("name", RESULTS)
def test_a_stored_result_is_read(name: str) -> None:
    assert decode_outcome((FILES / name).read_bytes()) == RESULTS[name]


def test_a_stored_message_runs(ekiden_app: Ekiden, ekiden_worker: StartWorker) -> None:
    @ekiden_app.task(name="shop.add")
    def add(*_: object) -> str:
        return add.request.id

    ekiden_app.transport.publish([Message(new_id(), "default", (FILES / "call-minimal.json").read_bytes())])
    ekiden_worker()

    assert ekiden_app.AsyncResult(TASK_ID).get(PATIENCE) == TASK_ID


def stored(app: Ekiden, state: str, name: str) -> AsyncResult[object]:
    app.backend.put([StoredResult(TASK_ID, state, 0, (FILES / name).read_bytes())])
    return app.AsyncResult(TASK_ID)


def test_a_stored_success_is_told(ekiden_app: Ekiden) -> None:
    result = stored(ekiden_app, "SUCCESS", "result-success.json")

    assert result.get() == {"total": 3, "items": ["a", None]}
    assert (result.name, result.worker, result.retries, result.queue) == ("shop.add", "host:1:1", 1, "default")
    assert [child.id for child in result.children] == ["c1", "c2"]


@pytest.mark.parametrize("name", ["result-failure.json", "result-failure-of-an-older-writer.json"])
def test_a_stored_failure_is_raised(ekiden_app: Ekiden, name: str) -> None:
    with pytest.raises(ValueError, match="no such user"):
        stored(ekiden_app, "FAILURE", name).get()


def test_a_stored_progress_is_told(ekiden_app: Ekiden) -> None:
    assert stored(ekiden_app, "PROGRESS", "result-progress.json").info == {"done": 3, "of": 10}
