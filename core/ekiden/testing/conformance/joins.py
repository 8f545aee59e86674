"""Joins: every member counts once, and all hear that it is complete."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from ekiden.message import new_id
from ekiden.results import Backend, Joined
from ekiden.testing.conformance.fixtures import DAY, BackendFixtures, let_it_wait


class Joins(BackendFixtures):
    """What ``join`` answers, to one and to many."""

    many_members = 2000
    """Of the largest join that is tried; a store that takes long for each may have fewer."""

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

    @pytest.mark.slow
    def test_a_join_may_have_thousands_of_members(self, backend: Backend) -> None:
        join_id = new_id()
        outcomes = {f"member-{number}": b"%d" % number for number in range(self.many_members)}

        answers = [
            backend.join(join_id, member, outcome, size=self.many_members, expires=DAY)
            for member, outcome in outcomes.items()
        ]

        assert [answer.arrived for answer in answers] == list(range(1, self.many_members + 1))
        assert not any(answer.complete for answer in answers[:-1])
        assert answers[-1] == Joined(self.many_members, complete=True, outcomes=outcomes)

    def test_a_join_expires(self, backend: Backend) -> None:
        join_id = new_id()
        backend.join(join_id, "a", b"1", size=2, expires=0.2)
        let_it_wait(0.6)

        assert backend.join(join_id, "b", b"2", size=2, expires=DAY).arrived == 1
