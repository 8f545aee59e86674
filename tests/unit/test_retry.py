"""When the next try is, and whether there is one."""

import pytest
from ekiden.options import Policy, TaskOptions, declared_options, policy
from ekiden.retry import is_retried, retry_delay, tries_left
from ekiden.settings import Settings


def of(**options: object) -> Policy:
    return policy(Settings(), declared_options("t", options))


@pytest.mark.parametrize(
    ("limit", "retries", "left"),
    [(0, 0, False), (1, 0, True), (1, 1, False), (3, 2, True), (3, 4, False), (None, 10**6, True)],
)
def test_tries_end_at_their_limit(limit: int | None, retries: int, left: bool) -> None:
    assert tries_left(limit, retries) is left


def test_only_the_errors_that_a_task_names_are_tried_again() -> None:
    declared = of(autoretry_for=(OSError, KeyError), dont_autoretry_for=(FileNotFoundError,))

    tried = [
        is_retried(declared, error)
        for error in (OSError(), ConnectionError(), KeyError(), FileNotFoundError(), ValueError())
    ]

    assert tried == [True, True, True, False, False]
    assert not is_retried(policy(Settings(), TaskOptions()), Exception())


def test_without_a_backoff_the_delay_is_always_the_same() -> None:
    assert [retry_delay(of(default_retry_delay=7), retries, 0.5) for retries in (0, 1, 50)] == [7, 7, 7]


def test_tries_back_off_where_nothing_is_declared() -> None:
    declared = of()

    assert [retry_delay(declared, retries, 0.5) for retries in (0, 1, 2, 9, 30)] == [0.5, 1.0, 2.0, 256.0, 300.0]
    assert [tries_left(declared.max_retries, retries) for retries in (9, 10)] == [True, False]


def test_a_delay_that_the_settings_name_is_no_backoff() -> None:
    declared = policy(Settings(task_default_retry_delay=7.0), declared_options("t", {}))

    assert [retry_delay(declared, retries, 0.5) for retries in (0, 9)] == [7.0, 7.0]


def test_a_backoff_beats_a_delay_and_can_be_switched_off() -> None:
    both = of(default_retry_delay=7, retry_backoff=2, retry_jitter=False)

    assert retry_delay(both, 1, 0.5) == 4.0
    assert [retry_delay(of(retry_backoff=False), retries, 0.5) for retries in (0, 9)] == [180.0, 180.0]


def test_a_backoff_doubles_up_to_its_most() -> None:
    declared = of(retry_backoff=2, retry_backoff_max=30, retry_jitter=False)

    assert [retry_delay(declared, retries, 0.5) for retries in range(7)] == [2, 4, 8, 16, 30, 30, 30]


def test_a_backoff_that_is_only_switched_on_begins_with_a_second() -> None:
    assert retry_delay(of(retry_backoff=True, retry_jitter=False), 0, 0.5) == 1.0


@pytest.mark.parametrize("chance", [0.0, 0.25, 0.999])
def test_jitter_takes_a_random_part_of_it(chance: float) -> None:
    assert retry_delay(of(retry_backoff=8), 1, chance) == 16 * chance


def test_any_number_of_tries_can_be_reckoned_with() -> None:
    assert retry_delay(of(retry_backoff=1, retry_jitter=False), 10**9, 0.5) == 600.0
