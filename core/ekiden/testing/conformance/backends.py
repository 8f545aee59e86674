"""What every backend keeps: results whose states never move back."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from ekiden.errors import BackendError, ConfigurationError
from ekiden.message import new_id
from ekiden.results import Backend, Start
from ekiden.states import RETRY, STARTED, SUCCESS, may_follow
from ekiden.testing.conformance.fixtures import DAY, PATIENCE, STATES, BackendFixtures, a_result, eventually

STEPS = [0, 1]
EVERY_PAIR = list(itertools.product(itertools.product(STATES, STEPS), repeat=2))


class Results(BackendFixtures):
    """What is put is got, until it expires or is forgotten."""

    def test_what_is_put_is_got(self, backend: Backend, other: Backend) -> None:
        results = [a_result(body=bytes(range(256))), a_result(STARTED, body=b""), a_result(RETRY, step=3)]

        answers = backend.put(results)

        assert answers == [True, True, True]
        found = other.get([results[2].task_id, new_id(), results[0].task_id, results[1].task_id])
        self.assert_same(found[0], results[2])
        assert found[1] is None
        self.assert_same(found[2], results[0])
        self.assert_same(found[3], results[1])

    def test_nothing_is_answered_with_nothing(self, backend: Backend) -> None:
        assert backend.put([]) == []
        assert backend.get([]) == []
        assert backend.begin([]) == []
        assert backend.read([]) == []
        assert backend.wait([], 0) == []
        backend.forget([])

    @pytest.mark.parametrize(
        "task_id", ["task-1", "größe 世界", "a/b", "a%b*c?", "t" * 200, "a}b{c", "a\nb", "a:begun"]
    )
    def test_every_task_id_is_told_apart(self, backend: Backend, task_id: str) -> None:
        prefix = new_id()
        backend.put([a_result(task_id=prefix + task_id, body=b"mine"), a_result(task_id=f"{prefix}{task_id}!")])

        (found,) = backend.get([prefix + task_id])

        assert found is not None
        assert found.task_id == prefix + task_id
        assert found.body == b"mine"

    def test_a_large_body_is_kept(self, backend: Backend) -> None:
        result = a_result(body=bytes(range(256)) * 4096)
        backend.put([result])

        self.assert_same(backend.get([result.task_id])[0], result)

    def test_a_batch_may_be_as_large_as_it_likes(self, backend: Backend) -> None:
        results = [a_result(body=b"%d" % number) for number in range(2500)]
        task_ids = [result.task_id for result in results]

        assert backend.put(results) == [True] * 2500
        found = backend.get(task_ids)
        assert [result.body for result in found if result is not None] == [result.body for result in results]
        assert len(backend.wait(task_ids, 0)) == 2500
        begun = backend.begin([Start(task_id, 0, "message", DAY) for task_id in task_ids])
        assert [answer.result.body for answer in begun if answer.result] == [result.body for result in results]
        backend.forget(task_ids)
        assert backend.get(task_ids) == [None] * 2500

    def test_what_a_batch_holds_of_one_task_is_stored_in_its_order_however_far_apart(self, backend: Backend) -> None:
        task_id = new_id()
        others = [a_result() for _ in range(1000)]

        answers = backend.put([a_result(STARTED, task_id=task_id), *others, a_result(task_id=task_id, body=b"done")])

        assert answers == [True] * 1002
        found = backend.get([task_id])[0]
        assert found is not None
        assert found.body == b"done"

    def test_a_state_follows_another_only_where_the_table_says_so(self, backend: Backend) -> None:
        pairs = [(new_id(), old, new) for old, new in EVERY_PAIR]
        assert all(backend.put([a_result(old[0], task_id=i, step=old[1], body=b"old") for i, old, _ in pairs]))

        answers = backend.put([a_result(new[0], task_id=i, step=new[1], body=b"new") for i, _, new in pairs])

        expected = [may_follow(*old, *new) for _, old, new in pairs]
        assert answers == expected
        stored = backend.get([task_id for task_id, _, _ in pairs])
        for result, (_, old, new), allowed in zip(stored, pairs, expected, strict=True):
            assert result is not None
            state, step, body = (*new, b"new") if allowed else (*old, b"old")
            assert (result.state, result.step, result.body) == (state, step, body)

    def test_a_batch_is_stored_in_its_order(self, backend: Backend) -> None:
        task_id = new_id()

        answers = backend.put(
            [
                a_result(STARTED, task_id=task_id),
                a_result(SUCCESS, task_id=task_id, body=b"done"),
                a_result("FAILURE", task_id=task_id, body=b"late"),
                a_result(SUCCESS, body=b"another task's"),
            ]
        )

        assert answers == [True, True, False, True]
        found = backend.get([task_id])[0]
        assert found is not None
        assert found.body == b"done"

    def test_putting_the_same_again_is_harmless(self, backend: Backend) -> None:
        result = a_result()
        backend.put([result])

        backend.put([result])

        self.assert_same(backend.get([result.task_id])[0], result)

    def test_a_result_vanishes_when_it_expires(self, backend: Backend) -> None:
        brief, lasting, eternal = a_result(expires=0.5), a_result(), a_result(expires=None)
        backend.put([brief, lasting, eternal])
        assert None not in backend.get([brief.task_id, lasting.task_id, eternal.task_id])

        eventually(lambda: backend.get([brief.task_id]) == [None], what="the brief result is gone")

        assert None not in backend.get([lasting.task_id, eternal.task_id])
        assert backend.wait([brief.task_id], 0) == []

    def test_an_expired_result_does_not_stand_in_the_way(self, backend: Backend) -> None:
        task_id = new_id()
        backend.put([a_result(task_id=task_id, expires=0.2)])
        eventually(lambda: backend.get([task_id]) == [None], what="the result is gone")

        assert backend.put([a_result(STARTED, task_id=task_id)]) == [True]

    def test_what_is_forgotten_is_gone(self, backend: Backend, other: Backend) -> None:
        forgotten, kept = a_result(), a_result()
        backend.begin([Start(forgotten.task_id, 0, "message", DAY)])
        backend.put([forgotten, kept])

        backend.forget([forgotten.task_id, new_id()])

        found = other.get([forgotten.task_id, kept.task_id])
        assert found[0] is None
        assert found[1] is not None

    def test_what_is_asked_after_closing_is_refused(self, url: str) -> None:
        backend = self.open_backend(url)
        backend.put([a_result()])
        backend.close()

        asked: list[Callable[[], object]] = [
            lambda: backend.put([a_result()]),
            lambda: backend.get([new_id()]),
            lambda: backend.wait([new_id()], 0.0),
            lambda: backend.wait([new_id()], PATIENCE),
            lambda: backend.forget([new_id()]),
            lambda: backend.begin([Start(new_id(), 0, "message", DAY)]),
            lambda: backend.join(new_id(), "a", b"", size=1, expires=DAY),
            lambda: backend.read([new_id()]),
            lambda: backend.write(new_id(), b""),
            lambda: backend.scan(new_id()),
        ]
        for ask in asked:
            with pytest.raises(BackendError, match="closed"):
                ask()
        backend.wake()
        backend.close()

    def test_an_unknown_option_is_refused_by_its_name(self, url: str) -> None:
        separator = "&" if "?" in url else "?"

        with pytest.raises(ConfigurationError, match="no_such_option"):
            self.open_backend(f"{url}{separator}no_such_option=1")
