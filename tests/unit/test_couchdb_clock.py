"""How the server's clock is measured by the dates of its answers."""

from __future__ import annotations

import time
from email.utils import formatdate

import pytest
from ekiden_couchdb.clock import DRIFT, ServerClock
from hypothesis import given
from hypothesis import strategies as st


def date_at(seconds: float) -> str:
    """What a server whose clock shows ``seconds`` writes."""
    return formatdate(int(seconds), usegmt=True)


class Server:
    """A server whose clock runs ``ahead`` of our monotonic one."""

    def __init__(self, ahead: float = 1_800_000_000.25) -> None:
        self.ahead = ahead

    def answer(self, clock: ServerClock, at: float, *, took: float = 0.002) -> None:
        """Answer in the middle of a request that took so many seconds and ended at ``at`` (monotonic)."""
        clock.note(date_at(at - took / 2 + self.ahead), at - took, at)


def test_it_is_not_known_before_an_answer() -> None:
    assert not ServerClock().is_known


def test_one_answer_tells_it_to_a_second() -> None:
    clock, server = ServerClock(), Server()

    server.answer(clock, time.monotonic())

    assert clock.earliest() <= time.monotonic() + server.ahead <= clock.latest() + 0.001
    assert 1.0 <= clock.error < 1.1


def test_answers_at_the_moments_that_tell_most_make_it_exact() -> None:
    clock, server = ServerClock(), Server()
    now = time.monotonic()
    server.answer(clock, now)

    for _ in range(8):
        server.answer(clock, clock.tells_most_at(), took=0.0)

    assert clock.error < 0.05


@given(
    ahead=st.floats(0, 4e9),
    moments=st.lists(st.tuples(st.floats(0.001, 5.0), st.floats(0.0, 2.0)), min_size=1, max_size=30),
    share=st.floats(0, 1),
)
def test_the_true_time_is_always_between_the_two(
    ahead: float, moments: list[tuple[float, float]], share: float
) -> None:
    clock = ServerClock()
    at = time.monotonic() - 200.0
    for pause, took in moments:
        asked, at = at + pause, at + pause + took
        clock.note(date_at(asked + share * took + ahead), asked, at)

        low, high = clock.earliest(), clock.latest()
        now = time.monotonic()
        assert low <= now + ahead + 1e-5
        assert now + ahead <= high + 0.01


def test_a_clock_that_was_set_is_believed_anew() -> None:
    clock = ServerClock()
    now = time.monotonic()
    Server(1_800_000_000.0).answer(clock, now - 1.0)
    moved = Server(1_800_003_600.0)

    moved.answer(clock, now)

    assert clock.earliest() == pytest.approx(time.monotonic() + moved.ahead, abs=1.1)


def test_what_was_measured_long_ago_is_believed_less() -> None:
    clock, server = ServerClock(), Server()
    server.answer(clock, time.monotonic() - 100.0)

    assert clock.error > 1.0 + 2 * 100 * DRIFT - 0.01


def test_what_is_no_date_is_passed_over() -> None:
    clock = ServerClock()

    clock.note("yesterday", 0.0, 1.0)

    assert not clock.is_known
