"""What a result store will never take: it says so, and harms nothing beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ekiden.errors import BackendRefused
from ekiden.message import new_id
from ekiden.results import Backend, BeginOutcome, Record, Start, each_apart
from ekiden.settings import Settings
from ekiden.testing.conformance.fixtures import DAY, BackendFixtures, a_result

RECORD_BYTES = 64 * 1024
"""A stored result says more than its value: names, times, children."""

NO_TEXT = ["caf\udce9", "a\0b"]


class Refusals(BackendFixtures):
    """What no store can hold is refused for good, and told apart from trouble."""

    @pytest.mark.parametrize("odd", NO_TEXT, ids=["surrogate", "zero"])
    def test_an_id_or_key_that_is_no_text_is_refused_for_good(self, backend: Backend, odd: str) -> None:
        asked: list[Callable[[], object]] = [
            lambda: backend.put([a_result(), a_result(task_id=odd)]),
            lambda: backend.get([new_id(), odd]),
            lambda: backend.wait([odd], 0.0),
            lambda: backend.forget([odd]),
            lambda: backend.begin([Start(odd, 0, "message", DAY)]),
            lambda: backend.join(odd, "a", b"", size=1, expires=DAY),
            lambda: backend.join(new_id(), odd, b"", size=1, expires=DAY),
            lambda: backend.read([odd]),
            lambda: backend.write(odd, b""),
            lambda: backend.scan(odd),
        ]

        for ask in asked:
            with pytest.raises(BackendRefused):
                ask()

    def test_the_others_of_a_refused_batch_are_stored_apart(self, backend: Backend, other: Backend) -> None:
        results = [a_result(body=b"%d" % number) for number in range(9)]
        results[4] = a_result(task_id="caf\udce9")

        answers = each_apart(backend.put, results)

        assert isinstance(answers.pop(4), BackendRefused)
        assert [bool(answer) for answer in answers] == [True] * 8
        del results[4]
        found = other.get([result.task_id for result in results])
        assert [each and each.body for each in found] == [result.body for result in results]

    def test_the_others_of_a_refused_batch_begin_apart(self, backend: Backend) -> None:
        starts = [Start(new_id(), 0, "message", DAY) for _ in range(5)]
        starts[3] = Start("caf\udce9", 0, "message", DAY)

        answers = each_apart(backend.begin, starts)

        assert isinstance(answers.pop(3), BackendRefused)
        assert [not isinstance(each, BackendRefused) and each.outcome for each in answers] == [BeginOutcome.GO] * 4

    def test_the_largest_result_that_the_defaults_allow_is_kept(self, backend: Backend, other: Backend) -> None:
        largest = a_result(body=b"x" * (Settings().result_max_bytes + RECORD_BYTES))

        assert backend.put([largest]) == [True]

        self.assert_same(other.get([largest.task_id])[0], largest)


class BackendLimitConformance(BackendFixtures):
    """A value larger than the store takes is refused for good."""

    @pytest.fixture
    def too_large(self) -> int:
        """So many bytes the store of ``url`` does not take as one value: override this."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture 'too_large'.")

    @pytest.mark.timeout(180)
    def test_a_result_that_is_too_large_is_refused_and_the_others_are_stored(
        self, backend: Backend, other: Backend, too_large: int
    ) -> None:
        results = [a_result(body=b"before"), a_result(body=b"x" * too_large), a_result(body=b"after")]

        with pytest.raises(BackendRefused):
            backend.put(results)
        answers = each_apart(backend.put, results)

        assert isinstance(answers[1], BackendRefused)
        found = other.get([result.task_id for result in results])
        assert found[1] is None
        self.assert_same(found[0], results[0])
        self.assert_same(found[2], results[2])

    @pytest.mark.timeout(180)
    def test_a_batch_that_is_too_large_only_as_a_whole_is_stored(
        self, backend: Backend, other: Backend, too_large: int
    ) -> None:
        results = [a_result(body=b"%d" % number * (too_large // 3)) for number in range(7)]

        assert backend.put(results) == [True] * 7

        for result in results:
            self.assert_same(other.get([result.task_id])[0], result)

    @pytest.mark.timeout(180)
    def test_a_record_or_outcome_that_is_too_large_is_refused(self, backend: Backend, too_large: int) -> None:
        key = new_id()
        backend.write(key, b"kept")

        with pytest.raises(BackendRefused):
            backend.write(key, b"x" * too_large)
        with pytest.raises(BackendRefused):
            backend.join(new_id(), "a", b"x" * too_large, size=2, expires=DAY)

        assert backend.read([key]) == [Record(key, b"kept", 1)]
