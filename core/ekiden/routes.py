"""Where calls go: names of queues, priorities, and the setting ``task_routes``.

``task_routes`` maps task names, globs or compiled patterns to routes; or it is a list of such mappings, of pairs, and
of functions (or their dotted paths) that are called as Celery's: ``route(name, args, kwargs, options, task=None)``.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from ekiden.errors import ConfigurationError
from ekiden.message import (
    DEAD_SUFFIX,
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    MAX_QUEUE_NAME_LENGTH,
    REPLY_PREFIX,
    is_priority,
)
from ekiden.times import shown

_LEGAL_QUEUE_NAME = re.compile(r"[^\x00-\x1f\x7f/\\\s,>]+\Z")
RouteFunction = Callable[..., Any]

_WORDS = frozenset({"queue", "priority", "routing_key", "exchange", "exchange_type"})


class Route(msgspec.Struct, frozen=True):
    """One entry of ``task_routes``, read; ``pattern`` is how it was written."""

    pattern: str
    queue: str | None = None
    priority: int | None = None


def check_queue_name(name: object) -> None:
    """Raise ConfigurationError for what no broker could call a queue."""
    longest = MAX_QUEUE_NAME_LENGTH - len(DEAD_SUFFIX)
    if not isinstance(name, str) or not _LEGAL_QUEUE_NAME.match(name) or len(name) > longest or not name.isprintable():
        raise ConfigurationError(
            f"{shown(name)} is not a queue name: it must be 1 to {longest} printable characters without spaces, "
            "slashes, commas or >."
        )
    if name.endswith(DEAD_SUFFIX):
        raise ConfigurationError(
            f"{name!r} is not a queue for tasks: it holds dead letters; `ekiden dead retry` sends them back."
        )
    if name.startswith(REPLY_PREFIX):
        raise ConfigurationError(
            f"{name!r} is not a queue for tasks: {REPLY_PREFIX}* queues vanish with their consumer."
        )


def check_priority(priority: object) -> None:
    """Raise ConfigurationError unless ``priority`` is a whole number from 0 to 9."""
    if not is_priority(priority):
        raise ConfigurationError(
            f"{shown(priority)} is not a priority; it must be a whole number from {LOWEST_PRIORITY} to "
            f"{HIGHEST_PRIORITY} (most urgent)."
        )


def check_routes(routes: Any) -> Any:
    """``task_routes`` as it was assigned. Raises ConfigurationError that names the entry that does not fit."""
    if not routes:
        return {}
    for _ in _routes_named(routes):
        continue
    return routes


def queues_named(routes: Any) -> Iterator[str]:
    """The queues that entries name; what functions will answer is not known."""
    for route in _routes_named(routes):
        if route.queue is not None:
            yield route.queue


def find_route(
    routes: Any, task_name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Route | None:
    """The route for a call: a mapping's exact name, else its first pattern that fits; a list's first answer."""
    if isinstance(routes, Mapping):
        if task_name in routes:
            return read_route(task_name, routes[task_name])
        return next(
            (read_route(pattern, target) for pattern, target in routes.items() if _fits(pattern, task_name)), None
        )
    if _is_pair(routes):
        pattern, target = routes
        return read_route(pattern, target) if _fits(pattern, task_name) else None
    if isinstance(routes, str) or callable(routes):
        answer = _function(routes)(task_name, args, kwargs or {}, {}, task=None)
        return None if answer is None else read_route(_shown(routes), answer)
    found = (find_route(each, task_name, args, kwargs) for each in routes)
    return next((route for route in found if route is not None), None)


def read_route(pattern: str | re.Pattern[str], target: Any) -> Route:
    """Check one entry. Raises ConfigurationError that names the entry."""
    place = f"task_routes[{_shown(pattern)!r}]"
    if isinstance(target, str):
        target = {"queue": target}
    if not isinstance(target, Mapping):
        raise ConfigurationError(f"{place}: a route is a queue name, or has queue and priority, unlike {target!r}.")
    said = _without_exchange(place, target)
    unknown = set(said) - {"queue", "priority"}
    if unknown:
        raise ConfigurationError(
            f"{place}: there is no {sorted(unknown)[0]!r}; a route is a queue name, or has queue and priority."
        )
    try:
        route = msgspec.convert({**said, "pattern": _shown(pattern)}, Route)
        if route.priority is not None:
            check_priority(route.priority)
        if route.queue is not None:
            check_queue_name(route.queue)
    except (msgspec.ValidationError, ConfigurationError) as error:
        raise ConfigurationError(f"{place}: {error}") from error
    return route


def _without_exchange(place: str, target: Mapping[str, Any]) -> dict[str, Any]:
    """A route without AMQP's words, where these say no more than the queue's name."""
    said = dict(target)
    key, kind = said.pop("routing_key", None), said.pop("exchange_type", None)
    said.pop("exchange", None)
    queue = said.get("queue")
    if queue is not None and not isinstance(queue, str) and isinstance(name := getattr(queue, "name", None), str):
        queue = said["queue"] = name  # a kombu.Queue, or what looks like one
    if key is not None and queue is None:
        queue = said["queue"] = key
    if (key is not None and key != queue) or kind not in {None, "direct"}:
        raise ConfigurationError(
            f"{place}: queues are addressed by name: leave out routing_key={key!r} and exchange_type={kind!r}, and "
            "name the queue."
        )
    return said


def _routes_named(routes: Any) -> Iterator[Route]:
    """Every entry, checked, except those of functions."""
    if isinstance(routes, Mapping):
        for pattern, target in routes.items():
            if not isinstance(pattern, str | re.Pattern):
                raise ConfigurationError(f"task_routes: {pattern!r} is no task name, glob or compiled pattern.")
            yield read_route(pattern, target)
    elif _is_pair(routes):
        yield read_route(*routes)
    elif isinstance(routes, list | tuple):
        for each in routes:
            yield from _routes_named(each)
    elif not isinstance(routes, str) and not callable(routes):
        raise ConfigurationError(
            f"task_routes: {routes!r} is no mapping of task names to queues, no list of such mappings, and no function."
        )


def _is_pair(routes: Any) -> bool:
    """Whether this is (name or pattern, route) rather than a list of two routers."""
    if not isinstance(routes, list | tuple) or len(routes) != 2:
        return False
    pattern, target = routes
    is_route = isinstance(target, str) or (isinstance(target, Mapping) and not _WORDS.isdisjoint(target))
    return isinstance(pattern, str | re.Pattern) and is_route


def _fits(pattern: str | re.Pattern[str], task_name: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.match(task_name) is not None
    return fnmatch.fnmatchcase(task_name, pattern)


def _function(router: str | RouteFunction) -> RouteFunction:
    """The function, imported where its dotted path is given."""
    if not isinstance(router, str):
        return router
    from ekiden.modules import import_object  # only for routers that are named

    module_name, _, attribute = router.rpartition(".")
    found = import_object(router if ":" in router else f"{module_name}:{attribute}", "task_routes")
    if not callable(found):
        raise ConfigurationError(f"task_routes: {router} is {found!r}, not a function.")
    return found


def _shown(pattern: Any) -> str:
    if isinstance(pattern, re.Pattern):
        return str(pattern.pattern)
    return pattern if isinstance(pattern, str) else str(getattr(pattern, "__qualname__", pattern))
