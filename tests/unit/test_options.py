"""What a task declares and a call says, merged with routes and settings; rates, queue names, priorities."""

import math
from typing import Any

import pytest
from ekiden import Ekiden
from ekiden.errors import ConfigurationError
from ekiden.options import (
    Policy,
    TaskOptions,
    declared_options,
    merge,
    policy,
    rate_per_second,
)
from ekiden.routes import check_priority, check_queue_name, find_route, read_route
from ekiden.settings import Settings
from ekiden.signature import Signature

# Where a call goes: the call's own word, then a route, then the task's, then the setting.


@pytest.mark.parametrize("by_call", [None, "call"])
@pytest.mark.parametrize("by_route", [None, "route"])
@pytest.mark.parametrize("by_task", [None, "task"])
def test_who_says_the_queue(by_call: str | None, by_route: str | None, by_task: str | None) -> None:
    settings = Settings(
        task_default_queue="setting", task_routes={} if by_route is None else {"shop.add": {"queue": by_route}}
    )
    options = declared_options("shop.add", {} if by_task is None else {"queue": by_task})

    found = merge(settings, "shop.add", options, by_call, None)

    assert found.queue == (by_call or by_route or by_task or "setting")
    words = {"call": "this call", "route": "the route 'shop.add'", "task": "the task's declaration"}
    assert found.queue_from == words.get(found.queue, "the setting task_default_queue")


@pytest.mark.parametrize("by_call", [None, 9, 0])
@pytest.mark.parametrize("by_route", [None, 7, 0])
@pytest.mark.parametrize("by_task", [None, 2, 0])
def test_who_says_the_priority(by_call: int | None, by_route: int | None, by_task: int | None) -> None:
    settings = Settings(
        task_default_priority=5, task_routes={} if by_route is None else {"shop.*": {"priority": by_route}}
    )
    options = declared_options("shop.add", {} if by_task is None else {"priority": by_task})

    found = merge(settings, "shop.add", options, None, by_call)

    expected = next(each for each in (by_call, by_route, by_task, 5) if each is not None)
    assert (found.priority, found.queue) == (expected, "default")


def test_a_task_that_is_not_known_here_follows_routes_and_settings() -> None:
    settings = Settings(task_routes={"mail.*": "mails"})

    assert merge(settings, "mail.send", None, None, None).queue == "mails"
    assert merge(settings, "shop.add", None, None, None).queue == "default"


def test_an_exact_name_wins_over_globs_and_the_first_glob_over_the_others() -> None:
    routes = {"shop.*": "first", "shop.a*": "second", "shop.add": "exact"}

    assert [getattr(find_route(routes, name), "queue", None) for name in ("shop.add", "shop.all", "x", "shop.ADD")] == [
        "exact",
        "first",
        None,
        "first",
    ]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"que": "x"}, "there is no 'que'"),
        ({"queue": "a b"}, "not a queue name"),
        ({"priority": 12}, "not a priority"),
        ({"priority": "high"}, "priority"),
        ("x.dead", "dead letters"),
    ],
)
def test_a_wrong_route_is_named(target: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_route("shop.add", target)

    assert "shop.add" in str(caught.value)


# What the worker knows of a task.


def test_a_policy_is_the_settings_where_the_task_says_nothing() -> None:
    settings = Settings(
        task_max_retries=7,
        task_default_retry_delay=11,
        task_default_rate_limit="6/m",
        task_time_limit=13,
        task_soft_time_limit=12,
        task_acks="early",
        worker_pool="process",
        task_ignore_result=True,
        task_track_started=True,
        task_typing=False,
        task_dead_letter=False,
        task_max_deliveries=3,
        result_max_bytes=99,
    )

    found = policy(settings, TaskOptions())

    assert found == Policy(
        max_retries=7,
        default_retry_delay=11,
        autoretry_for=(),
        dont_autoretry_for=(),
        retry_backoff=0.0,
        retry_backoff_max=600.0,
        retry_jitter=True,
        throws=(),
        rate=0.1,
        time_limit=13,
        soft_time_limit=12,
        acks_early=True,
        pool="process",
        ignore_result=True,
        track_started=True,
        typing=False,
        dead_letter=False,
        max_deliveries=3,
        result_max_bytes=99,
    )


def test_a_policy_is_the_tasks_word_where_it_says_something() -> None:
    settings = Settings(task_max_retries=7, task_default_rate_limit="6/m", task_time_limit=13, task_ignore_result=True)
    options = declared_options(
        "t",
        {
            "max_retries": None,
            "rate_limit": None,
            "time_limit": None,
            "ignore_result": False,
            "retry_backoff": True,
            "autoretry_for": ValueError,
            "acks": "early",
        },
    )

    found = policy(settings, options)

    assert (found.max_retries, found.rate, found.time_limit, found.ignore_result) == (None, None, None, False)
    assert (found.retry_backoff, found.autoretry_for, found.acks_early) == (1.0, (ValueError,), True)


# Single values.


@pytest.mark.parametrize(
    ("limit", "rate"),
    [
        ("10/s", 10),
        ("100/m", 100 / 60),
        ("5/h", 5 / 3600),
        ("1/d", 1 / 86400),
        ("7", 7),
        (2, 2),
        (0.5, 0.5),
        (" 3 / s ", 3),
        ("0.5/s", 0.5),
    ],
)
def test_a_rate_limit_is_starts_per_second(limit: object, rate: float) -> None:
    assert rate_per_second(limit) == pytest.approx(rate)


@pytest.mark.parametrize(
    "limit", ["", "fast", "10/y", "-1/s", "0/s", "1/s/s", "/s", 0, -1, math.inf, math.nan, True, None, [1], b"1/s"]
)
def test_what_is_no_rate_limit_is_told_how_to_write_one(limit: object) -> None:
    with pytest.raises(ConfigurationError, match="write 10/s, 100/m"):
        rate_per_second(limit)


@pytest.mark.parametrize("name", ["a", "default", "größe", "a.b-c_d:e", "x" * 195, "dead", "a.deadly"])
def test_a_queue_can_be_called(name: str) -> None:
    check_queue_name(name)


@pytest.mark.parametrize(
    "name",
    ["", " ", "a b", "a/b", "a\\b", "a,b", "a>b", "a\nb", "a\x00", "x" * 196, "a.dead", "reply.x", 5, None, b"a"],
)
def test_a_queue_cannot_be_called(name: object) -> None:
    with pytest.raises(ConfigurationError, match="is not a queue"):
        check_queue_name(name)


@pytest.mark.parametrize("priority", range(10))
def test_a_priority_is_a_digit(priority: int) -> None:
    check_priority(priority)


@pytest.mark.parametrize("priority", [-1, 10, 4.0, "4", True, None])
def test_anything_else_is_no_priority(priority: object) -> None:
    with pytest.raises(ConfigurationError, match="is not a priority"):
        check_priority(priority)


NO_NAMES: list[Any] = ["", "x" * 501, "a\nb", "caf\udce9", "a\x1b[2J", 5, None, b"x"]


@pytest.mark.parametrize("name", NO_NAMES, ids=lambda name: ascii(name)[:12])
def test_what_no_task_can_be_called_is_refused_where_it_is_said(ekiden_app: Ekiden, name: Any) -> None:
    @ekiden_app.task
    def known() -> None:
        """A task with a name."""

    with pytest.raises(ConfigurationError, match="no name of a task"):
        ekiden_app.send_task(name)
    with pytest.raises(ConfigurationError, match="no name of a task"):
        known.apply_async(link=Signature(name))
    if isinstance(name, str) and name:
        with pytest.raises(ConfigurationError, match="no name of a task"):
            ekiden_app.task(name=name)(lambda: None)


@pytest.mark.parametrize("queue", ["a\x85b", "caf\udce9", "a\u2028b", "a\u202eb", "a\x9bb", "a\ufeffb"])
def test_a_queue_is_called_by_printable_characters(ekiden_app: Ekiden, queue: str) -> None:
    with pytest.raises(ConfigurationError, match="printable"):
        ekiden_app.send_task("known", queue=queue)
    with pytest.raises(ConfigurationError, match="printable"):
        ekiden_app.worker(queues=(queue,))
