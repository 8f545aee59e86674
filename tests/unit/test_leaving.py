"""What ends a program ends no worker: SystemExit, KeyboardInterrupt and the like in what async bodies start."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from ekiden import AsyncResult, TaskError
from ekiden.body_frames import Answer, Ask, Run
from ekiden.body_process import BodyProcess
from ekiden.codec import encode_call
from ekiden.message import Message, new_id
from ekiden.outcomes import Failed, Succeeded
from ekiden.signature import Call

from tests.apps import leaving
from tests.working import PATIENCE

CASES = [
    (how, kind)
    for how in (*leaving.SEEN_BY_THE_BODY, *leaving.SEEN_BY_NOBODY)
    for kind in leaving.KINDS
    # asyncio takes a GeneratorExit for its own where a generator is closed.
    if not (kind == "GeneratorExit" and how in {"finalizer"})
]


@pytest.fixture
def worker() -> Iterator[None]:
    with leaving.app, leaving.app.worker(threads=1):
        yield


@pytest.fixture(scope="module")
def process() -> Iterator[BodyProcess]:
    process = BodyProcess("tests.apps.leaving:app")
    process.wait_until_ready()
    yield process
    process.kill()
    process.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("how", "kind"), CASES)
def test_the_event_loop_goes_on_whatever_leaves_it(worker: None, how: str, kind: str) -> None:
    result: AsyncResult[str] = leaving.leave.delay(how, kind)
    meanwhile = leaving.fine.delay(1)

    if how in leaving.SEEN_BY_THE_BODY:
        with pytest.raises((TaskError, RuntimeError)):
            result.get(PATIENCE)
        assert "leaving" in str(result.traceback)
    else:
        assert result.get(PATIENCE) == how
    assert meanwhile.get(PATIENCE) == 1
    assert leaving.fine.delay(2).get(PATIENCE) == 2
    assert "ekiden-loop" in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(("how", "kind"), CASES)
def test_a_body_process_goes_on_whatever_leaves_its_loop(process: BodyProcess, how: str, kind: str) -> None:
    outcome = process.run(frame("leaving.leave", how, kind), refuse)

    if how in leaving.SEEN_BY_THE_BODY:
        assert isinstance(outcome, Failed)
        assert "leaving" in repr(outcome.failure)
    else:
        assert isinstance(outcome, Succeeded), outcome
    assert isinstance(process.run(frame("leaving.fine", 3), refuse), Succeeded)


def frame(task: str, *args: Any) -> Run:
    call = Call(task, new_id(), time.time(), args=args)
    return Run(Message(call.id, "default", encode_call(call)), 2, "worker", None)


def refuse(_ask: Ask) -> Answer:
    raise AssertionError("these bodies ask for nothing")
