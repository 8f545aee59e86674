"""What a backend keeps: results that never move back, the fence, joins and records."""

from __future__ import annotations

import itertools
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from ekiden.errors import ConfigurationError
from ekiden.message import new_id
from ekiden.results import Backend, BeginOutcome, Begun, Record, Start, StoredResult
from ekiden.states import RETRY, STARTED, SUCCESS, State, is_final, may_follow
from ekiden.testing.conformance.fixtures import PATIENCE, BackendFixtures, eventually, let_it_wait

DAY = 86_400.0
A_USERS_OWN_STATE = "COMPILING"

STATES = [*(state.value for state in State), A_USERS_OWN_STATE]
STEPS = [0, 1]
EVERY_PAIR = list(itertools.product(itertools.product(STATES, STEPS), repeat=2))

GO, SECOND_COPY, ENDED = BeginOutcome.GO, BeginOutcome.SECOND_COPY, BeginOutcome.ENDED

ODD_KEYS = ["a b", "a/b", "a%b", "a_b", "a*b", "a?b", "a[b]", "a'b\"c", "größe-世界", "a:b:c", "A", "a\\b", "k" * 300]


def a_result(
    state: str = SUCCESS, *, task_id: str | None = None, step: int = 0, body: bytes = b"1", expires: float | None = DAY
) -> StoredResult:
    """A result of a task of its own."""
    return StoredResult(task_id or new_id(), state, step, body, expires)


class BackendConformance(BackendFixtures):
    """What every backend that stores promises."""

    # Results.

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

    @pytest.mark.parametrize("task_id", ["task-1", "größe 世界", "a/b", "a%b*c?", "t" * 200])
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

    # Waiting.

    def test_waiting_for_what_is_final_returns_at_once(self, backend: Backend) -> None:
        done = [a_result(), a_result("FAILURE")]
        backend.put([*done, a_result(STARTED)])
        started = time.monotonic()

        found = backend.wait([done[0].task_id, new_id(), done[1].task_id], 5)

        assert {result.task_id for result in found} == {result.task_id for result in done}
        assert time.monotonic() - started < 1

    def test_waiting_ends_with_its_timeout(self, backend: Backend) -> None:
        unfinished = a_result(STARTED)
        backend.put([unfinished])
        started = time.monotonic()

        found = backend.wait([unfinished.task_id, new_id()], 0.3)

        assert found == []
        assert 0.25 < time.monotonic() - started < 1.5

    @pytest.mark.parametrize("state", [state for state in STATES if is_final(state)])
    def test_a_final_result_wakes_who_waits_for_it(self, backend: Backend, other: Backend, state: str) -> None:
        result = a_result(state)
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(self.wait_for_one, other, [new_id(), result.task_id])
            let_it_wait()
            stored = time.monotonic()
            backend.put([a_result(STARTED, task_id=result.task_id), a_result()])
            backend.put([result])
            found = waiting.result()
            woken_after = time.monotonic() - stored

        assert [one.task_id for one in found] == [result.task_id]
        assert woken_after < 0.5

    def test_waking_takes_milliseconds(self, backend: Backend, other: Backend) -> None:
        delays = []
        with ThreadPoolExecutor() as threads:
            for _ in range(20):
                result = a_result()
                waiting = threads.submit(self.wait_for_one, other, [result.task_id])
                let_it_wait(0.02)
                stored = time.monotonic()
                backend.put([result])
                assert len(waiting.result()) == 1
                delays.append(time.monotonic() - stored)

        assert sorted(delays)[10] < 0.1, delays

    def test_many_threads_wait_each_for_its_own(self, backend: Backend, other: Backend) -> None:
        results = [a_result() for _ in range(30)]
        with ThreadPoolExecutor(30) as threads:
            waiting = [threads.submit(self.wait_for_one, other, [result.task_id]) for result in results]
            let_it_wait()
            for result in results:
                backend.put([result])
            found = [future.result() for future in waiting]

        assert [one[0].task_id for one in found] == [result.task_id for result in results]

    def test_waiting_scales_to_ten_thousand_tasks(self, backend: Backend) -> None:
        results = [a_result() for _ in range(10_000)]
        waited_for = {result.task_id for result in results}
        started = time.monotonic()

        with ThreadPoolExecutor() as threads:
            storing = threads.submit(self.put_in_batches, backend, results, 500)
            while waited_for and time.monotonic() < started + 30:
                waited_for -= {result.task_id for result in backend.wait(list(waited_for), 5)}
            storing.result()

        assert waited_for == set()
        assert time.monotonic() - started < 20

    def test_wake_ends_every_wait_of_this_process(self, backend: Backend) -> None:
        with ThreadPoolExecutor() as threads:
            waiting = [threads.submit(backend.wait, [new_id()], 30) for _ in range(5)]
            let_it_wait()
            # A thread that has not begun to wait yet needs another one.
            eventually(lambda: self.wake_and_look(backend, waiting), what="every wait ended")

        assert [wait.result() for wait in waiting] == [[]] * 5

    def test_closing_wakes_who_waits(self, url: str) -> None:
        backend = self.open_backend(url)
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(backend.wait, [new_id()], 30)
            let_it_wait(0.3)
            backend.close()
            assert waiting.result(timeout=5) == []

        backend.close()

    def test_an_unknown_option_is_refused_by_its_name(self, url: str) -> None:
        separator = "&" if "?" in url else "?"

        with pytest.raises(ConfigurationError, match="no_such_option"):
            self.open_backend(f"{url}{separator}no_such_option=1")

    # The fence.

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

    # Joins.

    def test_a_join_is_complete_when_every_member_has_arrived(self, backend: Backend, other: Backend) -> None:
        join_id = new_id()

        first = backend.join(join_id, "a", b"1", size=3, expires=DAY)
        second = other.join(join_id, "b", bytes(range(256)), size=3, expires=DAY)
        third = backend.join(join_id, "c", b"", size=3, expires=DAY)

        assert (first.arrived, first.complete, first.outcomes) == (1, False, {})
        assert (second.arrived, second.complete, second.outcomes) == (2, False, {})
        assert (third.arrived, third.complete) == (3, True)
        assert third.outcomes == {"a": b"1", "b": bytes(range(256)), "c": b""}

    def test_a_member_counts_once_and_its_first_outcome_stays(self, backend: Backend) -> None:
        join_id = new_id()

        answers = [backend.join(join_id, "a", outcome, size=2, expires=DAY) for outcome in (b"first", b"second")]
        complete = backend.join(join_id, "b", b"other", size=2, expires=DAY)

        assert [(answer.arrived, answer.complete) for answer in answers] == [(1, False), (1, False)]
        assert complete.outcomes == {"a": b"first", "b": b"other"}

    def test_complete_is_told_to_everyone_who_asks_later(self, backend: Backend, other: Backend) -> None:
        join_id = new_id()
        backend.join(join_id, "a", b"1", size=2, expires=DAY)
        backend.join(join_id, "b", b"2", size=2, expires=DAY)

        again = other.join(join_id, "a", b"1", size=2, expires=DAY)

        assert (again.arrived, again.complete, again.outcomes) == (2, True, {"a": b"1", "b": b"2"})

    def test_joins_do_not_mix(self, backend: Backend) -> None:
        join_id = new_id()
        backend.join(join_id, "a", b"1", size=2, expires=DAY)

        assert backend.join(f"{join_id}-2", "a", b"1", size=2, expires=None).arrived == 1

    def test_of_members_that_arrive_at_once_none_is_lost(self, backend: Backend, other: Backend) -> None:
        join_id = new_id()
        together = threading.Barrier(8)

        def arrive(number: int) -> int:
            asked = backend if number % 2 else other
            together.wait()
            told = [asked.join(join_id, f"{number}-{n}", b"%d" % n, size=80, expires=DAY) for n in range(10)]
            return sum(answer.complete for answer in told)

        with ThreadPoolExecutor(8) as threads:
            completions = sum(threads.map(arrive, range(8)))

        assert completions == 1
        final = backend.join(join_id, "0-0", b"0", size=80, expires=DAY)
        assert (final.arrived, final.complete, len(final.outcomes)) == (80, True, 80)

    def test_a_join_expires(self, backend: Backend) -> None:
        join_id = new_id()
        backend.join(join_id, "a", b"1", size=2, expires=0.2)
        let_it_wait(0.6)

        assert backend.join(join_id, "b", b"2", size=2, expires=DAY).arrived == 1

    # Records.

    def test_a_record_is_read_as_it_was_written(self, backend: Backend, other: Backend) -> None:
        key = new_id()

        version = backend.write(key, bytes(range(256)))

        assert version == 1
        assert other.read([key, new_id()]) == [Record(key, bytes(range(256)), 1), None]

    def test_the_version_rises_with_every_write(self, backend: Backend) -> None:
        key = new_id()

        versions = [backend.write(key, b"%d" % number) for number in range(3)]

        assert versions == [1, 2, 3]
        assert backend.read([key]) == [Record(key, b"2", 3)]

    def test_a_record_is_written_only_at_the_expected_version(self, backend: Backend, other: Backend) -> None:
        key = new_id()

        assert backend.write(key, b"x", expected_version=1) is None
        assert backend.read([key]) == [None]
        assert backend.write(key, b"first", expected_version=0) == 1
        assert other.write(key, b"second", expected_version=0) is None
        assert other.write(key, b"second", expected_version=1) == 2
        assert backend.write(key, b"third", expected_version=1) is None
        assert backend.read([key]) == [Record(key, b"second", 2)]

    def test_a_record_is_deleted(self, backend: Backend) -> None:
        key = new_id()
        backend.write(key, b"x")

        assert backend.write(key, None, expected_version=2) is None
        assert backend.write(key, None, expected_version=1) == 0
        assert backend.read([key]) == [None]
        assert backend.write(key, None) == 0
        assert backend.write(key, b"new", expected_version=0) == 1

    def test_a_record_expires(self, backend: Backend) -> None:
        key = new_id()
        backend.write(key, b"brief", expires=0.4)
        assert backend.read([key]) == [Record(key, b"brief", 1)]

        eventually(lambda: backend.read([key]) == [None], what="the record is gone")

        assert backend.scan(key) == []
        assert backend.write(key, b"new", expected_version=0) == 1

    def test_a_later_write_moves_the_expiry(self, backend: Backend) -> None:
        key, brief = new_id(), new_id()
        backend.write(key, b"brief", expires=0.3)
        backend.write(brief, b"brief", expires=0.6)
        backend.write(key, b"lasting", expires=DAY)

        eventually(lambda: backend.read([brief]) == [None], what="the other record is gone")

        assert backend.read([key]) == [Record(key, b"lasting", 2)]

    @pytest.mark.parametrize("key", ODD_KEYS)
    def test_every_key_is_told_apart(self, backend: Backend, key: str) -> None:
        prefix = new_id()
        backend.write(prefix + key, b"mine")
        backend.write(f"{prefix}{key[:-1]}!", b"the neighbour's")

        assert backend.read([prefix + key]) == [Record(prefix + key, b"mine", 1)]

    def test_scan_returns_what_begins_with_a_prefix_sorted(self, backend: Backend, other: Backend) -> None:
        prefix = f"{new_id()}:"
        for key in ["b", "a", "c/1", "c/2", *ODD_KEYS]:
            backend.write(prefix + key, key.encode())
        backend.write(f"{prefix[:-1]};", b"just behind")

        found = other.scan(prefix)

        assert [record.key for record in found] == sorted(prefix + key for key in {"b", "a", "c/1", "c/2", *ODD_KEYS})
        assert [record.value for record in found] == [record.key.removeprefix(prefix).encode() for record in found]
        assert [record.key for record in other.scan(f"{prefix}c/")] == [f"{prefix}c/1", f"{prefix}c/2"]

    @pytest.mark.parametrize("odd", ["%", "_", "*", "?", "[a]", "\\", "'", "世", "\U0010ffff"])
    def test_a_prefix_is_no_pattern(self, backend: Backend, odd: str) -> None:
        prefix = new_id()
        backend.write(f"{prefix}{odd}-yes", b"")
        backend.write(f"{prefix}a-no", b"")

        assert [record.key for record in backend.scan(prefix + odd)] == [f"{prefix}{odd}-yes"]

    def test_of_many_who_write_at_one_version_one_wins(self, backend: Backend, other: Backend) -> None:
        key = new_id()
        backend.write(key, b"0")

        def increment(number: int) -> None:
            asked = backend if number % 2 else other
            for _ in range(10):
                eventually(lambda: self.increment_once(asked, key), what="an increment got through", within=30)

        with ThreadPoolExecutor(6) as threads:
            list(threads.map(increment, range(6)))

        assert backend.read([key]) == [Record(key, b"60", 61)]

    def increment_once(self, backend: Backend, key: str) -> bool:
        """Read, add one, write; False when somebody else was faster."""
        (record,) = backend.read([key])
        assert record is not None
        return backend.write(key, b"%d" % (int(record.value) + 1), expected_version=record.version) is not None

    def wake_and_look(self, backend: Backend, waiting: list[Future[list[StoredResult]]]) -> bool:
        """Wake, and say whether every wait has ended."""
        backend.wake()
        return all(wait.done() for wait in waiting)

    def wait_for_one(self, backend: Backend, task_ids: list[str]) -> list[StoredResult]:
        """Wait until one is final; a wait may end early with none."""
        give_up = time.monotonic() + PATIENCE
        found: list[StoredResult] = []
        while not found and time.monotonic() < give_up:
            found = backend.wait(task_ids, max(0.0, give_up - time.monotonic()))
        return found

    def put_in_batches(self, backend: Backend, results: list[StoredResult], size: int) -> None:
        """Store ``results``, ``size`` at a time."""
        for start in range(0, len(results), size):
            backend.put(results[start : start + size])

    def assert_same(self, found: StoredResult | None, put: StoredResult) -> None:
        """All but the time of expiry, which a backend need not tell."""
        assert found is not None
        assert (found.task_id, found.state, found.step, found.body) == (put.task_id, put.state, put.step, put.body)
