"""Where calls go by the setting task_routes, in every form that Celery takes."""

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ekiden import Ekiden
from ekiden.errors import ConfigurationError
from ekiden.message import new_id
from ekiden.routes import find_route, queues_named


def by_argument(
    name: str, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any], task: Any = None, **kw: Any
) -> Any:
    """A router as Celery's documentation has it."""
    if name == "mail.send":
        return {"queue": "urgent" if kwargs.get("urgent") else "mail", "priority": 7 if args else 3}
    return None


PATH = f"{__name__}.by_argument"
NAMES = ("mail.send", "feed.import", "video.encode", "shop.add")


def queues(routes: object) -> list[str | None]:
    return [getattr(find_route(routes, name), "queue", None) for name in NAMES]


@pytest.mark.parametrize(
    "routes",
    [
        {"mail.*": "mail", "feed.*": {"queue": "feeds"}, re.compile(r"(video|image)\..*"): {"queue": "media"}},
        [("mail.*", "mail"), ("feed.*", {"queue": "feeds"}), (re.compile(r"(video|image)\..*"), {"queue": "media"})],
        ([("mail.*", "mail"), ("feed.*", {"queue": "feeds"})], {re.compile(r"(video|image)\."): "media"}),
        ({"mail.send": {"queue": "mail"}}, {"mail.*": "other", "feed.*": "feeds", "video.*": "media"}),
        {"mail.*": {"queue": "mail", "routing_key": "mail"}, "feed.*": {"routing_key": "feeds"}, "video.*": "media"},
        {
            "mail.*": {"queue": "mail", "exchange": "x", "exchange_type": "direct"},
            "feed.*": "feeds",
            "video.*": "media",
        },
        {"mail.*": {"queue": SimpleNamespace(name="mail")}, "feed.*": "feeds", "video.*": "media"},
        (by_argument, {"feed.*": "feeds", "video.*": "media"}),
        [by_argument, {"feed.*": "feeds"}, ("video.*", "media")],
    ],
)
def test_every_form_of_routes_is_understood(routes: object) -> None:
    app = Ekiden("shop", broker="memory://", task_routes=routes)

    assert queues(app.conf.task_routes) == ["mail", "feeds", "media", None]


@pytest.mark.parametrize("router", [by_argument, (by_argument,), [by_argument, {"*": "rest"}]])
def test_a_function_sees_the_calls_arguments(router: object) -> None:
    app = Ekiden("shop", broker=f"memory://routes-{new_id()}", task_routes=router)

    app.send_task("mail.send", kwargs={"urgent": True})
    app.send_task("mail.send", ("ann",))

    (urgent,) = app.transport.browse("urgent")
    (other,) = app.transport.browse("mail")
    assert (urgent.message.priority, other.message.priority) == (3, 7)
    app.close()


def test_a_function_may_be_named_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "routers_of_a_project", SimpleNamespace(route=by_argument))

    app = Ekiden("shop", broker="memory://", task_routes=("routers_of_a_project.route", {"*": "rest"}))

    assert queues(app.conf.task_routes) == ["mail", "rest", "rest", "rest"]
    with pytest.raises(ConfigurationError, match=r"task_routes: there is no module 'no_such_router'"):
        find_route(["no_such_router.route"], "mail.send")


def test_the_queues_of_entries_are_known_and_those_of_functions_not() -> None:
    routes = [by_argument, {"feed.*": "feeds", "video.*": {"priority": 3}}, ("a.*", "letters")]

    assert list(queues_named(routes)) == ["feeds", "letters"]
    assert Ekiden("shop", broker="memory://", task_routes=routes).queues() == ["default", "feeds", "letters"]


@pytest.mark.parametrize(
    ("routes", "said"),
    [
        ({"a": 5}, "task_routes['a']: a route is a queue name, or has queue and priority, unlike 5"),
        ([("a", {"queue": "q", "colour": 1})], "task_routes['a']: there is no 'colour'"),
        ({"a": {"queue": "q", "routing_key": "q.#"}}, "queues are addressed by name"),
        ({"a": {"queue": "q", "exchange_type": "topic"}}, "queues are addressed by name"),
        ({"a": {"priority": 11}}, "task_routes['a']"),
        ({5: "q"}, "5 is no task name, glob or compiled pattern"),
        ([5], "5 is no mapping of task names to queues"),
        (5, "5 is no mapping of task names to queues"),
    ],
)
def test_a_route_that_does_not_fit_is_named(routes: object, said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Ekiden("shop", broker="memory://", task_routes=routes)

    assert said in str(refused.value)
