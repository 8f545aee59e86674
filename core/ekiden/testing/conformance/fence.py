"""The fence: of all copies of one step of a task, one may go."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ekiden.message import new_id
from ekiden.results import Backend, BeginOutcome, Begun, Start
from ekiden.states import RETRY, STARTED, SUCCESS
from ekiden.testing.conformance.fixtures import A_USERS_OWN_STATE, DAY, BackendFixtures, a_result, eventually

GO, SECOND_COPY, ENDED = BeginOutcome.GO, BeginOutcome.SECOND_COPY, BeginOutcome.ENDED


class Fence(BackendFixtures):
    """What ``begin`` answers, to one and to many."""

    @pytest.mark.parametrize(
        ("stored", "begun", "asked_step", "asked_message", "expected"),
        [
            # Nothing noted, or an earlier step: GO.
            (None, None, 0, "a", GO),
            (None, None, 2, "a", GO),
            (None, (0, "a"), 1, "b", GO),
            ((RETRY, 0), (0, "a"), 1, "b", GO),
            ((STARTED, 0), None, 0, "a", GO),
            ((STARTED, 0), None, 1, "b", GO),
            (("PROGRESS", 0), (0, "a"), 1, "b", GO),
            # A later step noted or stored: SECOND_COPY.
            (None, (1, "b"), 0, "a", SECOND_COPY),
            ((RETRY, 1), None, 0, "a", SECOND_COPY),
            ((STARTED, 1), None, 0, "a", SECOND_COPY),
            ((SUCCESS, 1), None, 0, "a", SECOND_COPY),
            ((RETRY, 0), (1, "b"), 0, "a", SECOND_COPY),
            # This step has ended: ENDED.
            ((RETRY, 1), (1, "a"), 1, "a", ENDED),
            ((RETRY, 1), (1, "a"), 1, "b", ENDED),
            ((SUCCESS, 1), (1, "a"), 1, "a", ENDED),
            (("FAILURE", 0), (0, "a"), 0, "b", ENDED),
            (("REVOKED", 0), None, 0, "a", ENDED),
            (("EXPIRED", 0), None, 0, "a", ENDED),
            # Begun out of another message: SECOND_COPY. Out of this one, which was handed out again: GO.
            (None, (1, "a"), 1, "b", SECOND_COPY),
            ((STARTED, 1), (1, "a"), 1, "b", SECOND_COPY),
            ((A_USERS_OWN_STATE, 1), (1, "a"), 1, "b", SECOND_COPY),
            (None, (1, "a"), 1, "a", GO),
            ((STARTED, 1), (1, "a"), 1, "a", GO),
            ((RETRY, 0), (1, "a"), 1, "a", GO),
            # A final state at an earlier step: ENDED.
            ((SUCCESS, 0), None, 1, "a", ENDED),
            (("REVOKED", 0), (0, "a"), 2, "b", ENDED),
        ],
    )
    def test_the_fence_lets_one_pass(  # noqa: PLR0917
        self,
        backend: Backend,
        other: Backend,
        stored: tuple[str, int] | None,
        begun: tuple[int, str] | None,
        asked_step: int,
        asked_message: str,
        expected: BeginOutcome,
    ) -> None:
        task_id = new_id()
        if begun is not None:
            assert backend.begin([Start(task_id, *begun, DAY)]) == [Begun(GO)]
        if stored is not None:
            assert backend.put([a_result(stored[0], task_id=task_id, step=stored[1], body=b"outcome")]) == [True]

        (answer,) = other.begin([Start(task_id, asked_step, asked_message, DAY)])

        assert answer.outcome is expected
        if expected is ENDED:
            assert answer.result is not None
            assert stored is not None
            assert (answer.result.state, answer.result.step, answer.result.body) == (*stored, b"outcome")
        else:
            assert answer.result is None

    def test_the_fence_notes_who_passed(self, backend: Backend, other: Backend) -> None:
        task_id = new_id()

        first, second = backend.begin([Start(task_id, 1, "a", DAY), Start(task_id, 1, "b", DAY)])

        assert (first.outcome, second.outcome) == (GO, SECOND_COPY)
        assert other.begin([Start(task_id, 1, "b", DAY)]) == [Begun(SECOND_COPY)]
        assert other.begin([Start(task_id, 1, "a", DAY)]) == [Begun(GO)]

    def test_a_batch_of_starts_is_answered_one_by_one(self, backend: Backend) -> None:
        ended = a_result(body=b"outcome")
        backend.put([ended])
        begun = new_id()
        backend.begin([Start(begun, 0, "a", DAY)])

        answers = backend.begin(
            [Start(new_id(), 0, "x", DAY), Start(ended.task_id, 0, "x", DAY), Start(begun, 0, "x", DAY)]
        )

        assert [answer.outcome for answer in answers] == [GO, ENDED, SECOND_COPY]
        assert answers[1].result is not None
        assert answers[1].result.body == b"outcome"

    def test_a_task_that_has_begun_is_told_as_started(self, backend: Backend, other: Backend) -> None:
        task_id = new_id()
        backend.begin([Start(task_id, 2, "a", DAY)])

        found = other.get([task_id])[0]

        assert found is not None
        assert (found.task_id, found.state, found.step, found.body) == (task_id, STARTED, 2, b"")
        assert backend.wait([task_id], 0) == []

    def test_what_has_begun_can_still_be_stored(self, backend: Backend) -> None:
        task_id = new_id()
        backend.begin([Start(task_id, 1, "a", DAY)])

        assert backend.put([a_result(RETRY, task_id=task_id, step=1), a_result(task_id=task_id, step=2)]) == [
            True,
            True,
        ]

    def test_a_note_of_the_fence_expires(self, backend: Backend) -> None:
        task_id = new_id()
        backend.begin([Start(task_id, 0, "a", 0.3)])

        eventually(lambda: backend.get([task_id]) == [None], what="the note is gone")

        assert backend.begin([Start(task_id, 0, "b", DAY)]) == [Begun(GO)]

    def test_of_many_who_begin_at_once_one_may_go(self, backend: Backend, other: Backend) -> None:
        for _ in range(20):
            task_id = new_id()
            together = threading.Barrier(8)

            def begin(number: int, task_id: str = task_id, together: threading.Barrier = together) -> BeginOutcome:
                asked = backend if number % 2 else other
                together.wait()
                return asked.begin([Start(task_id, 0, f"message-{number}", DAY)])[0].outcome

            with ThreadPoolExecutor(8) as threads:
                outcomes = list(threads.map(begin, range(8)))

            assert sorted(outcomes, key=str) == [GO] + [SECOND_COPY] * 7
