"""The fence: ``Backend.begin`` as its docstring states it, walked over every history of one task."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from ekiden.message import new_id
from ekiden.plugins import open_backend
from ekiden.results import Backend, BeginOutcome, Start, StoredResult
from ekiden.states import READY_STATES

GO, SECOND_COPY, ENDED = BeginOutcome.GO, BeginOutcome.SECOND_COPY, BeginOutcome.ENDED
STEP = 1
STEPS = [0, 1, 2]
NOTED = [None, *itertools.product(STEPS, ["ours", "another"])]
STORED = [None, *itertools.product(["STARTED", "COMPILING", "RETRY", "SUCCESS", "FAILURE", "REVOKED"], STEPS)]


@pytest.fixture(params=["memory", "sqlite"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    url = f"memory://{new_id()}" if request.param == "memory" else f"sqlite:///{tmp_path}/results.db"
    with open_backend(url) as backend:
        yield backend


def expected(noted: tuple[int, str] | None, stored: tuple[str, int] | None) -> BeginOutcome:
    """The docstring of ``Backend.begin``, sentence by sentence, for a start of ``STEP`` out of the message "ours"."""
    if stored is not None and stored[0] in READY_STATES and stored[1] < STEP:
        return ENDED  # "A final state stored at any earlier step is ENDED too."
    if (noted is not None and noted[0] > STEP) or (stored is not None and stored[1] > STEP):
        return SECOND_COPY  # "A later step noted or stored: SECOND_COPY."
    if stored is not None and stored[1] == STEP and (stored[0] in READY_STATES or stored[0] == "RETRY"):
        return ENDED  # "This step: ENDED when a RETRY or final state is stored for it;"
    if noted == (STEP, "another"):
        return SECOND_COPY  # "else SECOND_COPY when it was begun out of another message;"
    return GO  # "else GO"; "Nothing noted for this task, or an earlier step: noted, GO."


def test_every_history(backend: Backend) -> None:
    for noted, stored in itertools.product(NOTED, STORED):
        if noted is not None and stored is not None and stored[1] < noted[0] and stored[0] in READY_STATES:
            continue  # nothing begins a later step of a task that has ended
        task_id = new_id()
        if noted is not None:
            backend.begin([Start(task_id, noted[0], noted[1])])
        if stored is not None:
            backend.put([StoredResult(task_id, stored[0], stored[1], b"{}")])

        (begun,) = backend.begin([Start(task_id, STEP, "ours")])

        assert begun.outcome is expected(noted, stored), (noted, stored)
        assert (begun.result is not None) == (begun.outcome is ENDED)
        if begun.result is not None and stored is not None:
            assert (begun.result.state, begun.result.step) == stored


def test_of_two_messages_of_one_step_only_the_first_goes_however_often_they_ask(backend: Backend) -> None:
    first, second = Start("task", 0, "first"), Start("task", 0, "second")

    answers = [backend.begin([each])[0].outcome for each in (first, second, first, second)]

    assert answers == [GO, SECOND_COPY, GO, SECOND_COPY]


def test_each_step_begins_once(backend: Backend) -> None:
    answers = [backend.begin([Start("task", step, f"message {step}")])[0].outcome for step in (0, 1, 0, 2, 1)]

    assert answers == [GO, GO, SECOND_COPY, GO, SECOND_COPY]


def test_a_batch_is_answered_one_by_one_in_order(backend: Backend) -> None:
    backend.put([StoredResult("ended", "SUCCESS", 0, b"{}")])
    starts = [Start("ended", 0, "a"), Start("new", 0, "a"), Start("new", 0, "b"), Start("other", 0, "a")]

    assert [each.outcome for each in backend.begin(starts)] == [ENDED, GO, SECOND_COPY, GO]
