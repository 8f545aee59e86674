"""What a body returns, raises or tells ends its own call, in every place where bodies run; and harms nothing else."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ekiden import Ekiden, Task
from ekiden.codec import decode_outcome
from ekiden.hooks import task_failure, task_postrun, task_prerun, task_retry, task_success
from ekiden.results import AsyncResult
from ekiden.testing.plugin import StartWorker, throw_away_url

from tests.apps import hostile
from tests.working import PATIENCE, dead_letters, eventually, is_empty

PLACES = ["thread", pytest.param("loop", marks=pytest.mark.slow), pytest.param("process", marks=pytest.mark.slow)]
LONGER = 3 * PATIENCE
RECORD_BYTES = 64 * 1024
"""What a stored result says besides its failure: names, times, children."""

CASES = (
    [("return", name) for name in hostile.RETURNED]
    + [("raise", name) for name in hostile.RAISED]
    + [("tell", name) for name in hostile.TOLD]
    + [("handler", name) for name in hostile.RAISED]
)


@pytest.fixture(params=["memory", pytest.param("sqlite", marks=pytest.mark.slow)])
def ekiden_broker_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return throw_away_url(f"{request.param}://", tmp_path)


@pytest.fixture
def ekiden_app(ekiden_use_broker: Callable[[Ekiden], Ekiden]) -> Iterator[Ekiden]:
    app = ekiden_use_broker(hostile.app)
    app.conf.worker_grace = 3.0
    hostile.RUNS.clear()
    limit = app.conf.result_max_bytes
    yield app
    app.conf.result_max_bytes = limit


def task(place: str) -> Task[..., Any]:
    found = hostile.app.find_task(f"hostile.{place}")
    assert found is not None
    return found


def stored_bytes(app: Ekiden, result: AsyncResult[Any]) -> int:
    """How much is stored of a task."""
    (stored,) = app.backend.get([result.id])
    return 0 if stored is None else len(stored.body)


@pytest.fixture(params=["with receivers", pytest.param("alone", marks=pytest.mark.slow)])
def receivers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Somebody listens to what becomes of bodies, or nobody does."""

    def receive(**_: Any) -> None:
        raise hostile.CauselessError("a receiver's own")

    signals = (task_prerun, task_postrun, task_success, task_failure, task_retry)
    for signal in signals if request.param == "with receivers" else ():
        signal.connect(receive)
    yield
    for signal in signals:
        signal.disconnect(receive)


@pytest.mark.usefixtures("receivers")
@pytest.mark.parametrize("place", PLACES)
def test_each_ends_as_a_failure_with_a_sentence_and_the_others_run_once(
    ekiden_app: Ekiden, ekiden_worker: StartWorker, place: str
) -> None:
    worker = ekiden_worker(threads=2)
    innocents, ended = [], {}
    for number, case in enumerate(CASES):
        ended[case] = task(place).delay(*case)
        innocents.append(hostile.innocent.delay(number))

    for case, result in ended.items():
        error = eventually(lambda result=result: result.ready() and result, what=f"{case} has ended", within=LONGER)
        failure = decode_outcome(ekiden_app.backend.get([result.id])[0].body).failure  # type: ignore[union-attr]
        assert (case, result.state) == (case, "FAILURE")
        assert failure is not None
        assert failure.type, case
        assert isinstance(result.get(propagate=False), BaseException), case
        assert stored_bytes(ekiden_app, error) <= ekiden_app.conf.result_max_bytes + RECORD_BYTES, case
    assert [each.get(LONGER) for each in innocents] == list(range(len(CASES)))
    eventually(lambda: is_empty(ekiden_app), what="everything is settled")
    assert sorted(hostile.RUNS) == list(range(len(CASES)))
    assert {each.headers["ekiden-dead-attempts"] for each in dead_letters(ekiden_app)} == {1}
    assert worker._thread.is_alive()


def test_a_failure_is_no_larger_than_a_result_may_be(ekiden_app: Ekiden, ekiden_worker: StartWorker) -> None:
    ekiden_app.conf.result_max_bytes = 1000
    ekiden_worker(threads=1)

    for what in ("large", "loud", "many arguments", "chain", "reject, large", "notes"):
        result = task("thread").delay("raise", what)
        eventually(result.ready, what=f"{what} has ended", within=LONGER)
        assert result.state == "FAILURE"
        assert stored_bytes(ekiden_app, result) <= 2000
        assert str(result.result)


@pytest.mark.slow  # a process for each
def test_what_a_body_writes_into_its_pipe_is_its_own_failure(ekiden_app: Ekiden, ekiden_worker: StartWorker) -> None:
    worker = ekiden_worker(threads=2)
    spoilers, innocents = [], []
    for number, what in enumerate(hostile.GARBAGE):
        innocents.append(hostile.in_process.delay(number))
        spoilers.append(hostile.spoil.delay(what))

    for what, result in zip(hostile.GARBAGE, spoilers, strict=True):
        eventually(result.ready, what=f"{what!r} has ended", within=LONGER)
        assert (what, result.state) == (what, "FAILURE")
        assert "body process" in str(result.result), what
    assert [each.get(LONGER) for each in innocents] == list(range(len(innocents)))
    eventually(lambda: is_empty(ekiden_app), what="everything is settled")
    assert {each.headers["ekiden-dead-attempts"] for each in dead_letters(ekiden_app)} == {1}
    assert worker._thread.is_alive()
