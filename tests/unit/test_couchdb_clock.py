"""How the server's clock is measured by the dates of its answers."""

from __future__ import annotations

import math
import time
from email.utils import formatdate

import pytest
from ekiden_couchdb.clock import DRIFT, RENEWED_SECONDS, ServerClock
from hypothesis import given
from hypothesis import strategies as st


def date_at(seconds: float, *, phase: float = 0.0) -> str:
    """What a server whose clock shows ``seconds`` writes, if it renews the date so long after each full second."""
    return formatdate(math.floor(seconds - phase), usegmt=True)


class Server:
    """A server whose clock runs ``ahead`` of our monotonic one, with the ``phase`` of its dates."""

    def __init__(self, ahead: float = 1_800_000_000.25, *, phase: float = 0.0) -> None:
        self.ahead = ahead
        self.phase = phase

    def answer(self, clock: ServerClock, at: float, *, took: float = 0.002) -> None:
        """Answer in the middle of a request that took so many seconds and ended at ``at`` (monotonic)."""
        clock.note(date_at(at - took / 2 + self.ahead, phase=self.phase), at - took, at)


def test_it_is_not_known_before_an_answer() -> None:
    assert not ServerClock().is_known


@pytest.mark.parametrize("phase", [0.0, 0.08, 0.49, 0.99])
def test_one_answer_tells_it_to_two_seconds(phase: float) -> None:
    clock, server = ServerClock(), Server(phase=phase)

    server.answer(clock, time.monotonic())

    assert clock.earliest() <= time.monotonic() + server.ahead <= clock.latest() + 0.001
    assert 2.0 <= clock.error < 2.1


@pytest.mark.parametrize("phase", [0.0, 0.08, 0.49, 0.99])
def test_answers_at_the_moments_that_tell_most_leave_the_phase_unknown(phase: float) -> None:
    clock, server = ServerClock(), Server(phase=phase)
    now = time.monotonic()
    server.answer(clock, now)

    for _ in range(8):
        server.answer(clock, clock.tells_most_at(), took=0.0)

    assert RENEWED_SECONDS <= clock.error < RENEWED_SECONDS + 0.05
    now = time.monotonic() + server.ahead
    assert clock.earliest() - 0.1 <= now <= clock.latest() + 0.1  # the answers were of moments to come


@given(
    ahead=st.floats(0, 4e9),
    moments=st.lists(st.tuples(st.floats(0.001, 5.0), st.floats(0.0, 2.0)), min_size=1, max_size=30),
    share=st.floats(0, 1),
    phase=st.floats(0, 0.999),
)
def test_the_true_time_is_always_between_the_two(
    ahead: float, moments: list[tuple[float, float]], share: float, phase: float
) -> None:
    clock = ServerClock()
    at = time.monotonic() - 200.0
    for pause, took in moments:
        asked, at = at + pause, at + pause + took
        clock.note(date_at(asked + share * took + ahead, phase=phase), asked, at)

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


@given(st.lists(st.floats(0.001, 3.0), min_size=2, max_size=30), st.floats(-10.0, 10.0), st.floats(0, 0.999))
def test_the_nearest_time_never_goes_back_while_it_is_measured(pauses: list[float], ours: float, phase: float) -> None:
    """``ours``: so wrong is our own clock."""
    clock, server = ServerClock(), Server(phase=phase)
    at = time.monotonic() - 100.0
    told: list[float] = []
    for pause in pauses:
        at += pause
        server.answer(clock, at)
        told.append(clock.nearest(time.monotonic() + server.ahead + ours))

    assert told == sorted(told)


def test_the_nearest_time_follows_a_clock_that_was_set_back() -> None:
    clock = ServerClock()
    now = time.monotonic()
    Server(1_800_003_600.0).answer(clock, now)
    before = clock.nearest(0.0)

    Server(1_800_000_000.0).answer(clock, now)

    assert clock.nearest(0.0) < before - 3000.0


def test_what_was_measured_long_ago_is_believed_less() -> None:
    clock, server = ServerClock(), Server()
    server.answer(clock, time.monotonic() - 100.0)

    assert clock.error > 1.0 + 2 * 100 * DRIFT - 0.01


def test_what_is_no_date_is_passed_over() -> None:
    clock = ServerClock()

    clock.note("yesterday", 0.0, 1.0)

    assert not clock.is_known
