"""How many starts are granted now, and how long the others wait."""

import threading

import pytest
from ekiden.memory import MemoryBackend
from ekiden.message import new_id
from ekiden.ratelimit import AHEAD_SECONDS, RateLimiter, RateState, grant
from ekiden.urls import parse_url

NOW = 1_800_000_000.0


def test_starts_are_granted_one_interval_apart() -> None:
    state, waits = grant(RateState(), rate=2.0, count=4, now=NOW)

    assert waits == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert (state.next_start, state.next_turn) == pytest.approx((NOW + 0.5, NOW + 2.0))


def test_a_fast_rate_is_granted_a_little_ahead() -> None:
    _, waits = grant(RateState(), rate=100.0, count=20, now=NOW)

    granted = sum(1 for wait in waits if wait == 0)
    assert granted == pytest.approx(100 * AHEAD_SECONDS, abs=1)
    assert waits[granted:] == sorted(waits[granted:])


def test_who_comes_at_its_turn_is_granted() -> None:
    state, waits = grant(RateState(), rate=1.0, count=5, now=NOW)

    for wait in waits[1:]:
        state, (again,) = grant(state, rate=1.0, count=1, now=NOW + wait)
        assert again == 0.0


def test_who_comes_before_its_turn_waits_again() -> None:
    state, _ = grant(RateState(), rate=1.0, count=1, now=NOW)

    _, (wait,) = grant(state, rate=1.0, count=1, now=NOW + 0.5)

    assert wait == pytest.approx(0.5)


def test_what_was_not_used_is_not_saved_up() -> None:
    state, _ = grant(RateState(), rate=1.0, count=1, now=NOW)

    _, waits = grant(state, rate=1.0, count=3, now=NOW + 1000)

    assert waits == pytest.approx([0.0, 1.0, 2.0])


def test_without_a_store_each_limiter_limits_by_itself() -> None:
    first, second = RateLimiter(None), RateLimiter(None)

    assert first.take("t", 1.0, 2, NOW) == pytest.approx([0.0, 1.0])
    assert second.take("t", 1.0, 1, NOW) == [0.0]


def test_tasks_do_not_share_a_limit() -> None:
    limiter = RateLimiter(None)

    assert [limiter.take(name, 1.0, 1, NOW) for name in ("a", "b")] == [[0.0], [0.0]]


def test_over_a_store_many_limiters_grant_together_what_one_would() -> None:
    url = parse_url(f"memory://{new_id()}")
    waits: list[float] = []
    mutex = threading.Lock()

    def take_some() -> None:
        with MemoryBackend(url) as backend:
            limiter = RateLimiter(backend)
            for _ in range(25):
                taken = limiter.take("t", 10.0, 2, NOW)
                with mutex:
                    waits.extend(taken)

    threads = [threading.Thread(target=take_some) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    granted = [wait for wait in waits if wait == 0]
    waiting = sorted(wait for wait in waits if wait > 0)
    assert len(waits) == 200
    assert len(granted) == pytest.approx(10 * AHEAD_SECONDS + 1, abs=1)
    assert waiting == pytest.approx([(len(granted) + index) / 10 for index in range(len(waiting))], abs=1e-3)


def test_the_state_of_a_slow_limit_is_kept_until_its_next_start() -> None:
    with MemoryBackend(parse_url(f"memory://{new_id()}")) as backend:
        limiter = RateLimiter(backend)
        limiter.take("t", 1 / 86400, 1, NOW)

        assert limiter.take("t", 1 / 86400, 1, NOW + 3600) == pytest.approx([86400 - 3600])
