"""Retry delays, rate limits, derived ids and merged options, for whatever numbers and words there are."""

from itertools import pairwise

from ekiden.message import derived_id, new_id
from ekiden.options import TaskOptions, declared_options, merge, policy
from ekiden.ratelimit import AHEAD_SECONDS, RateState, grant
from ekiden.retry import retry_delay
from ekiden.settings import Settings
from hypothesis import given
from hypothesis import strategies as st

NOW = 1_800_000_000.0
seconds = st.floats(0.001, 1e6)
names = st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,8})?", fullmatch=True).filter(
    lambda name: not name.endswith(".dead") and not name.startswith("reply.")
)


@given(
    base=seconds,
    most=seconds,
    retries=st.integers(0, 2**31),
    chance=st.floats(0, 1, exclude_max=True),
    jitter=st.booleans(),
)
def test_a_backoff_is_never_negative_nor_above_its_most(
    base: float, most: float, retries: int, chance: float, *, jitter: bool
) -> None:
    options = declared_options("t", {"retry_backoff": base, "retry_backoff_max": most, "retry_jitter": jitter})

    delay = retry_delay(policy(Settings(), options), retries, chance)

    assert 0 <= delay <= most


@given(base=seconds, most=seconds, retries=st.integers(0, 1000))
def test_a_backoff_never_gets_shorter(base: float, most: float, retries: int) -> None:
    declared = policy(
        Settings(), declared_options("t", {"retry_backoff": base, "retry_backoff_max": most, "retry_jitter": False})
    )

    assert retry_delay(declared, retries, 0.5) <= retry_delay(declared, retries + 1, 0.5)


requests = st.lists(st.tuples(st.floats(0, 5), st.integers(1, 30)), min_size=1, max_size=20)


@given(rate=st.floats(0.1, 1000), requests=requests)
def test_no_stretch_of_time_has_more_starts_than_its_rate_allows(
    rate: float, requests: list[tuple[float, int]]
) -> None:
    state, now = RateState(), NOW
    starts: list[float] = []
    for pause, count in requests:
        now += pause
        state, waits = grant(state, rate, count, now)
        assert len(waits) == count
        assert all(wait >= 0 for wait in waits)
        starts += [now for wait in waits if wait == 0]

    for first, begin in enumerate(starts):
        for last in range(first, len(starts)):
            stretch = starts[last] - begin + AHEAD_SECONDS
            assert last - first <= stretch * rate * (1 + 1e-6) + 1


@given(rate=st.floats(0.1, 1000), requests=requests)
def test_no_two_that_wait_are_given_the_same_turn(rate: float, requests: list[tuple[float, int]]) -> None:
    state, now = RateState(), NOW
    turns: list[float] = []
    for pause, count in requests:
        now += pause
        state, waits = grant(state, rate, count, now)
        turns += [now + wait for wait in waits if wait > 0]

    assert all(later - earlier >= (1 / rate) * (1 - 1e-3) - 1e-5 for earlier, later in pairwise(turns))


@given(st.lists(st.text(max_size=10), min_size=1, max_size=50))
def test_whatever_steps_are_taken_no_id_comes_twice(steps: list[str]) -> None:
    ids = [new_id()]
    for step in steps:
        ids.append(derived_id(ids[-1], step))

    assert len(set(ids)) == len(ids)


@given(st.text(max_size=50), st.text(max_size=50), st.text(max_size=50), st.text(max_size=50))
def test_derived_ids_are_the_same_only_for_the_same_step_of_the_same_message(a: str, b: str, c: str, d: str) -> None:
    assert (derived_id(a, b) == derived_id(c, d)) == ((a, b) == (c, d) or f"{a}\n{b}" == f"{c}\n{d}")


@given(
    task=names,
    by_call=names | st.none(),
    by_route=names | st.none(),
    by_task=names | st.none(),
    default=names,
    priorities=st.tuples(*[st.integers(0, 9) | st.none()] * 3),
)
def test_the_nearest_word_wins(
    *,
    task: str,
    by_call: str | None,
    by_route: str | None,
    by_task: str | None,
    default: str,
    priorities: tuple[int | None, int | None, int | None],
) -> None:
    call_priority, route_priority, task_priority = priorities
    route = {name: value for name, value in (("queue", by_route), ("priority", route_priority)) if value is not None}
    declared = {name: value for name, value in (("queue", by_task), ("priority", task_priority)) if value is not None}
    settings = Settings(task_default_queue=default, task_routes={task: route} if route else {})
    options: TaskOptions = declared_options(task, declared)

    found = merge(settings, task, options, by_call, call_priority)

    assert found.queue == next(each for each in (by_call, by_route, by_task, default) if each is not None)
    assert found.priority == next(
        each for each in (call_priority, route_priority, task_priority, 4) if each is not None
    )
