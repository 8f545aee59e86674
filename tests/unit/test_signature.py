"""Signatures: changed copies, steps, and times that are said in different ways."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from ekiden import Signature
from ekiden.errors import MisuseError
from ekiden.signature import seconds_until

NOW = datetime(2026, 1, 2, tzinfo=UTC)
BASE = Signature("shop.add", (1,), {"a": 1}, {"queue": "mails"})


def test_a_clone_has_arguments_before_and_the_rest_over_its_own() -> None:
    clone = BASE.clone((0,), {"a": 2, "b": 3}, priority=9)

    assert clone == Signature("shop.add", (0, 1), {"a": 2, "b": 3}, {"queue": "mails", "priority": 9})
    assert Signature("shop.add", (1,), {"a": 1}, {"queue": "mails"}) == BASE


def test_a_clone_of_an_immutable_one_takes_options_only() -> None:
    clone = BASE.set(immutable=True).clone((0,), {"a": 2}, priority=9)

    assert (clone.args, clone.kwargs, clone.options) == ((1,), {"a": 1}, {"queue": "mails", "priority": 9})


def test_each_change_is_a_copy() -> None:
    changed = [BASE.set(queue="x"), BASE.link(BASE), BASE.link_error(BASE), BASE.set(immutable=True)]

    assert all(each != BASE for each in changed)
    assert BASE.options == {"queue": "mails"}


def test_links_add_up() -> None:
    then, also = Signature("then"), Signature("also")

    assert BASE.link(then).link(also).on_success == (then, also)
    assert BASE.link_error(then, also).on_error == (then, also)


def test_a_step_holds_what_was_said() -> None:
    signature = BASE.set(
        task_id="mine",
        priority=9,
        countdown=5,
        expires=60,
        headers={"a": 1},
        ignore_result=True,
        time_limit=3,
        soft_time_limit=2,
        immutable=True,
        link=Signature("linked"),
    ).link(Signature("then").link(Signature("last")))

    step = signature.step(NOW.timestamp())

    assert (step.task, step.args, step.kwargs, step.task_id) == ("shop.add", (1,), {"a": 1}, "mine")
    assert (step.queue, step.priority, step.countdown, step.expires) == ("mails", 9, 5, 60)
    assert (step.headers, step.ignore_result, step.time_limit, step.soft_time_limit) == ({"a": 1}, True, 3, 2)
    assert step.immutable
    assert {each.task for each in step.on_success} == {"linked", "then"}
    assert [each.on_success[0].task for each in step.on_success if each.task == "then"] == ["last"]


def test_a_steps_times_are_seconds_from_when_it_is_sent() -> None:
    step = BASE.set(eta=NOW + timedelta(seconds=90), expires=NOW + timedelta(minutes=5)).step(NOW.timestamp())

    assert (step.countdown, step.expires) == (90, 300)


@pytest.mark.parametrize(
    ("moment", "seconds"),
    [
        (None, None),
        (5, 5),
        (0.5, 0.5),
        (NOW + timedelta(hours=1), 3600),
        ((NOW + timedelta(hours=1)).astimezone(timezone(timedelta(hours=-7))), 3600),
        (NOW - timedelta(seconds=1), -1),
    ],
)
def test_a_moment_is_seconds_or_a_time_in_any_zone(moment: float | datetime | None, seconds: float | None) -> None:
    assert seconds_until(moment, NOW.timestamp()) == seconds


def test_a_time_without_its_zone_is_refused() -> None:
    with pytest.raises(MisuseError, match="does not say its time zone"):
        seconds_until(datetime(2026, 1, 2), 0.0)  # noqa: DTZ001 - that is the mistake


def test_a_task_id_that_was_set_is_the_signatures_id() -> None:
    assert (BASE.id, BASE.set(task_id="mine").id) == (None, "mine")
