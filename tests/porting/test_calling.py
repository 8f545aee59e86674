"""Ways to call a task."""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from ekiden.exceptions import ConfigurationError, MisuseError, TaskExpired
from ekiden.testing.conformance.fixtures import eventually

from tests.porting.conftest import Start
from tests.porting.programs import calling
from tests.porting.programs.calling import add, app, fail, fan_out, hold, note, note_failed, started_at, where


@pytest.fixture(autouse=True)
def fresh() -> None:
    calling.seen.clear()
    calling.opened.clear()


def test_delay_and_apply_async_send_the_same_call(work: Start) -> None:
    work(app)

    results = [
        add.delay(1, 2),
        add.delay(1, y=2),
        add.apply_async((1, 2)),
        add.apply_async(args=[1], kwargs={"y": 2}),
        app.send_task(add.name, args=[1, 2]),
        app.send_task(add.name, (1,), {"y": 2}, countdown=0),
        add.s(1, 2).delay(),
        add.s(2).apply_async((1,)),
        add.si(1, 2).apply_async(),
        add.signature((1, 2), countdown=0).apply_async(),
        app.signature(add.name, args=(1, 2)).delay(),
    ]

    assert [result.get(timeout=10) for result in results] == [3] * len(results)


def test_what_is_linked_is_called_with_the_result(work: Start) -> None:
    work(app)

    result = add.apply_async((2, 2), link=[add.s(16), note.s()])

    assert result.get(timeout=10) == 4
    assert sorted(child.get(timeout=10) for child in result.children) == [4, 20]
    assert sorted(value for _, value in result.collect(timeout=10)) == [4, 4, 20]
    assert calling.seen == [4]
    assert {child.id for child in result.children} == {each.id for each, _ in result.collect()} - {result.id}


def test_an_immutable_link_is_called_with_its_own_arguments_only(work: Start) -> None:
    work(app)

    result = add.apply_async((2, 2), link=note.si("done"))

    result.get(timeout=10)
    assert result.children[0].get(timeout=10) == "done"


def test_what_is_linked_to_an_error_is_called_with_the_task_id(work: Start) -> None:
    work(app)

    result = fail.apply_async(("no",), link=note.s(), link_error=note_failed.s())

    result.get(timeout=10, propagate=False)
    result.children[0].get(timeout=10)
    assert calling.seen == [(result.id, "FAILURE", "no")]


def test_options_of_a_signature_are_set_in_a_copy(work: Start) -> None:
    work(app, queues=("default", "errands"))

    signature = where.s().set(queue="errands", priority=7)

    assert signature.delay().get(timeout=10)["queue"] == "errands"
    assert signature.delay().get(timeout=10)["priority"] == 7


def test_countdown_and_eta_are_kept(work: Start) -> None:
    work(app)
    began = time.time()

    by_countdown = started_at.apply_async(countdown=0.2)
    by_eta = started_at.apply_async(eta=datetime.now(UTC) + timedelta(seconds=0.2))

    for result in (by_countdown, by_eta):
        assert result.get(timeout=10)["now"] >= began + 0.2
        assert result.get()["eta"] is not None


def test_an_eta_without_a_time_zone_is_refused(use: Callable[..., object]) -> None:
    use(app)

    with pytest.raises(MisuseError, match="does not say its time zone"):
        add.apply_async((1, 2), eta=datetime(2030, 1, 1))  # noqa: DTZ001 - the mistake that is tested


@pytest.mark.parametrize(
    "expires", [0.05, pytest.param(lambda: datetime.now(UTC) + timedelta(seconds=0.05), id="datetime")]
)
def test_what_has_expired_is_not_run(work: Start, expires: object) -> None:
    work(app, threads=1)
    holding = hold.delay()

    result = note.apply_async(("late",), expires=expires() if callable(expires) else expires)
    eventually(lambda: time.time() > int(result.id[:12], 16) / 1000 + 0.05, what="it has expired")
    calling.opened.set()

    with pytest.raises(TaskExpired):
        result.get(timeout=10)
    assert holding.get(timeout=10) is None
    assert calling.seen == []


def test_the_queue_is_the_calls_the_routes_or_the_default(work: Start) -> None:
    work(app, queues=("default", "feeds", "priority.high"))
    routes = app.conf.task_routes

    app.conf.task_routes = {"*.where": {"queue": "feeds", "priority": 2}}
    try:
        by_route = where.delay().get(timeout=10)
        by_call = where.apply_async(queue="priority.high").get(timeout=10)
    finally:
        app.conf.task_routes = routes

    assert (by_route["queue"], by_route["priority"]) == ("feeds", 2)
    assert by_call["routing_key"] == "priority.high"
    assert where.delay().get(timeout=10)["queue"] == "default"


def test_headers_travel_beside_the_arguments(work: Start) -> None:
    work(app)

    result = where.apply_async(headers={"tenant": "north", "page": 7})

    assert result.get(timeout=10)["headers"] == {"tenant": "north", "page": 7}


def test_a_task_id_can_be_chosen(work: Start) -> None:
    work(app)

    result = add.apply_async((1, 1), task_id="first-order")

    assert result.id == "first-order"
    assert app.AsyncResult("first-order").get(timeout=10) == 2


def test_the_result_of_one_call_can_be_ignored(work: Start) -> None:
    work(app)

    ignored = note.apply_async(("x",), ignore_result=True)

    eventually(lambda: calling.seen == ["x"], what="the body ran")
    assert note.delay("y").get(timeout=10) == "y"
    assert ignored.state == "PENDING"


def test_calls_made_in_a_body_are_children_of_its_result(work: Start) -> None:
    work(app)

    result = fan_out.delay(3)

    assert result.get(timeout=10) == [child.id for child in result.children]
    assert [child.get(timeout=10) for child in result.children] == [0, 2, 4]


def test_apply_runs_here_and_now() -> None:
    result = add.apply((2, 2))

    assert result.get() == 4
    assert result.state == "SUCCESS"
    assert isinstance(fail.apply(("no",)).result, ValueError)


@pytest.mark.parametrize(
    ("option", "value", "advice"),
    [
        ("serializer", "pickle", "messages are JSON"),
        ("compression", "zlib", "leave it out"),
        ("routing_key", "feed.import", "queue="),
        ("exchange", "feeds", "queue="),
        ("connection", object(), "leave it out"),
        ("shadow", "other", "leave it out"),
    ],
)
def test_a_call_option_that_is_not_here_says_what_to_write_instead(option: str, value: object, advice: str) -> None:
    calls = [
        lambda: add.apply_async((1, 2), **{option: value}),
        lambda: add.signature((1, 2), **{option: value}),
        lambda: app.send_task(add.name, (1, 2), **{option: value}),
    ]
    for call in calls:
        with pytest.raises(ConfigurationError, match=option) as refused:
            call()
        assert advice in str(refused.value)


def test_every_option_of_a_signature_counts_when_it_is_linked(work: Start) -> None:
    work(app, queues=("default", "errands"))
    following = where.signature(
        (), immutable=True, queue="errands", priority=8, headers={"page": 1}, soft_time_limit=30, link=note.si("last")
    ).link(note.si("also"))

    result = add.apply_async((1, 2), link=following)

    result.get(timeout=10)
    found = result.children[0]
    assert (found.get(timeout=10)["queue"], found.get()["priority"]) == ("errands", 8)
    assert found.get()["headers"] == {"page": 1}
    assert found.get()["soft_time_limit"] == 30
    assert sorted(child.get(timeout=10) for child in found.children) == ["also", "last"]


def test_every_option_of_a_signature_counts_when_it_is_sent(work: Start) -> None:
    work(app)
    result = where.signature((), link=note.si("first")).link(note.si("second")).delay()

    result.get(timeout=10)

    assert sorted(child.get(timeout=10) for child in result.children) == ["first", "second"]
