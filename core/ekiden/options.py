"""Options: what a task declares and a call says, merged into the settings of the app.

TaskOptions   what @app.task(...) declares for one task; UNSET where nothing was said
Sending       where a call goes: its own word, a route, the task's, the settings'
Publishing    how long its publish may take, and how it is tried again
Policy        what a worker needs to know of a task, settings merged in
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ekiden.bounds import Count, Tries
from ekiden.errors import ConfigurationError, TaskArgumentsError
from ekiden.message import (
    HIGHEST_PRIORITY,
    LONGEST_TASK_ID,
    LONGEST_TASK_NAME,
    LOWEST_PRIORITY,
    RESERVED_HEADER_PREFIX,
    HeaderValue,
)
from ekiden.routes import check_priority, check_queue_name, find_route
from ekiden.times import LONGEST_SECONDS, Offset, PositiveSeconds, Seconds, check_moment, check_seconds, shown

if TYPE_CHECKING:
    from ekiden.settings import Settings

Priority = Annotated[int, Meta(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)]
Acks = Literal["late", "early"]
PoolName = Literal["thread", "process"]
Annotations = Mapping[str, Mapping[str, Any]]
"""The setting ``task_annotations``: options of tasks by their names, and of all tasks by ``*``."""


# Tasks.


class TaskOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a task declares. UNSET: nothing was said, so the app's setting holds."""

    queue: str | UnsetType = UNSET
    priority: Priority | UnsetType = UNSET
    max_retries: Tries | UnsetType | None = UNSET
    default_retry_delay: Seconds | UnsetType = UNSET
    autoretry_for: tuple[type[BaseException], ...] = ()
    dont_autoretry_for: tuple[type[BaseException], ...] = ()
    retry_backoff: bool | Seconds | UnsetType = UNSET
    retry_backoff_max: PositiveSeconds = 600.0
    retry_jitter: bool = True
    throws: tuple[type[BaseException], ...] = ()
    rate_limit: str | float | UnsetType | None = UNSET
    time_limit: PositiveSeconds | UnsetType | None = UNSET
    soft_time_limit: PositiveSeconds | UnsetType | None = UNSET
    expires: PositiveSeconds | None = None
    acks: Acks | UnsetType = UNSET
    pool: PoolName | UnsetType = UNSET
    ignore_result: bool | UnsetType = UNSET
    track_started: bool | UnsetType = UNSET
    typing: bool | UnsetType = UNSET
    dead_letter: bool | UnsetType = UNSET
    max_deliveries: Count | UnsetType = UNSET


_TASK_INSTEAD = {
    "reject_on_worker_lost": "nothing: a message always comes back when its worker dies",
    "serializer": "nothing: messages are JSON",
    "compression": "nothing: messages are JSON",
    "exchange": "queue=",
    "routing_key": "queue=",
    "store_errors_even_if_ignored": "nothing: failed calls are kept in the dead letters",
    "send_events": "nothing: see ekiden.signals",
    "retries": "max_retries=",
    "retry": "max_retries= and autoretry_for=",
    "timeout": "time_limit=",
    "backend": "result_backend of the app",
    "trail": "nothing: results always know their children",
}


def declared_options(task_name: str, given: Mapping[str, object]) -> TaskOptions:
    """Check what ``@app.task`` was given. Raises ConfigurationError naming the task, the option and what was meant.

    Celery's ``acks_late`` is taken, because it means the same as ``acks``.
    """
    given = _celerys_taken(task_name, given)
    if "acks_late" in given:
        others = {name: value for name, value in given.items() if name != "acks_late"}
        given = {**others, "acks": "late" if given["acks_late"] else "early"}
    for name in given:
        if name not in TaskOptions.__struct_fields__:
            instead = f"; write {_TASK_INSTEAD[name]}" if name in _TASK_INSTEAD else None
            advice = f"{instead}." if instead else did_you_mean(name, TaskOptions.__struct_fields__)
            raise ConfigurationError(f"task {task_name}: there is no option {name!r}{advice}")
    exceptions: dict[str, Any] = {
        name: _exception_classes(task_name, name, given[name]) for name in _EXCEPTION_OPTIONS & given.keys()
    }
    plain = {name: value for name, value in given.items() if name not in exceptions}
    try:
        converted = msgspec.convert(plain, _PLAIN_TASK_OPTIONS)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"task {task_name}: an option does not fit: {error}.") from error
    checked: dict[str, Any] = {name: getattr(converted, name) for name in plain}
    options = TaskOptions(**checked, **exceptions)
    check_limits(f"task {task_name}", soft=options.soft_time_limit or None, hard=options.time_limit or None)
    if isinstance(options.queue, str):
        check_queue_name(options.queue)
    if options.rate_limit is not UNSET and options.rate_limit is not None:
        rate_per_second(options.rate_limit)
    return options


def _celerys_taken(task_name: str, given: Mapping[str, object]) -> dict[str, object]:
    """Options of Celery's that say what ekiden has under another name, or does anyway."""
    options = dict(given)
    for name in ("pydantic", "pydantic_context", "pydantic_strict", "pydantic_dump_kwargs", "trail"):
        options.pop(name, None)  # arguments are converted by their annotations anyway
    if options.get("serializer") in {"json", None}:
        options.pop("serializer", None)
    if options.get("reject_on_worker_lost") in {True, None}:
        options.pop("reject_on_worker_lost", None)  # a message always comes back when its worker dies
    for name in ("compression", "exchange", "routing_key", "send_events", "store_errors_even_if_ignored"):
        if not options.get(name, True):
            del options[name]  # nothing was asked for
    retry = options.pop("retry_kwargs", None) or {}
    if not isinstance(retry, Mapping) or not set(retry) <= {"max_retries", "countdown"}:
        raise ConfigurationError(f"task {task_name}: retry_kwargs takes max_retries and countdown, not {retry!r}.")
    renamed = {"max_retries": "max_retries", "countdown": "default_retry_delay"}
    return {**{renamed[name]: value for name, value in retry.items()}, **options}


def read_annotations(given: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Annotations:
    """Check ``task_annotations``. Raises ConfigurationError that names the entry."""
    merged: dict[str, Mapping[str, Any]] = {}
    if not isinstance(given, Mapping | list | tuple):
        raise ConfigurationError(f"task_annotations: {given!r} is no mapping of task names to options.")
    for each in [given] if isinstance(given, Mapping) else given:
        if not isinstance(each, Mapping):
            raise ConfigurationError(f"task_annotations: {each!r} is no mapping of task names to options.")
        for name, said in each.items():
            if not isinstance(said, Mapping):
                raise ConfigurationError(f"task_annotations[{name!r}]: {said!r} is no mapping of options.")
            try:
                declared_options(name, said)
            except ConfigurationError as error:
                raise ConfigurationError(f"task_annotations: {error}") from error
            merged[name] = {**merged.get(name, {}), **said}
    return merged


def annotated(annotations: Annotations, task_name: str, options: TaskOptions) -> TaskOptions:
    """A task's options with what ``task_annotations`` says of it, and of all tasks, instead."""
    said = {**annotations.get("*", {}), **annotations.get(task_name, {})}
    if not said:
        return options
    checked = declared_options(task_name, said)
    names = {"acks" if name == "acks_late" else name for name in said}
    return msgspec.structs.replace(options, **{name: getattr(checked, name) for name in names})


def options_of_class(kind: type, below: type) -> dict[str, object]:
    """What ``kind`` and the classes between it and ``below`` say of their tasks: attributes named like options."""
    said: dict[str, object] = {}
    for each in reversed(kind.__mro__):
        if each is not below and issubclass(each, below):
            said |= _named_like_options(each)
    return said


def options_of_object(task: object, below: type) -> dict[str, object]:
    """The same of an object, whose own attributes go over those of its class."""
    return {**options_of_class(type(task), below), **_named_like_options(task)}


def _named_like_options(holder: object) -> dict[str, object]:
    names = {*TaskOptions.__struct_fields__, "acks_late"}
    return {name: value for name, value in vars(holder).items() if name in names and not hasattr(value, "__get__")}


_EXCEPTION_OPTIONS = {"autoretry_for", "dont_autoretry_for", "throws"}


def _exception_classes(task_name: str, option: str, given: object) -> tuple[type[BaseException], ...]:
    classes: tuple[Any, ...] = tuple(given) if isinstance(given, tuple | list | set | frozenset) else (given,)
    for each in classes:
        if not (isinstance(each, type) and issubclass(each, BaseException)):
            raise ConfigurationError(f"task {task_name}: {option} takes exception classes, not {each!r}.")
    return classes


# Calls.

_NO_WORKFLOWS = "ekiden has no workflows yet; link=, link_error= and signatures are there"
_CALL_INSTEAD = {
    "routing_key": "write queue=",
    "exchange": "write queue=",
    "serializer": "messages are JSON; leave it out",
    "compression": "messages are not compressed; leave it out",
    "connection": "an app has one connection per process; leave it out",
    "producer": "an app has one connection per process; leave it out",
    "publisher": "an app has one connection per process; leave it out",
    "shadow": "a task has one name; leave it out",
    "add_to_parent": "results always know their children; leave it out",
    "root_id": "ekiden sets it; leave it out",
    "parent_id": "ekiden sets it; leave it out",
    "reply_to": "results come from the backend; leave it out",
    "delivery_mode": "messages are as durable as their broker; leave it out",
    "mandatory": "queues come to be when first used; leave it out",
    "max_retries": "write it where the task is declared",
    "app_id": "ekiden sets its own headers; give it one of yours in headers=",
    "argsrepr": "no log shows arguments; leave it out",
    "chain": _NO_WORKFLOWS,
    "chord": _NO_WORKFLOWS,
    "content_encoding": "messages are JSON; leave it out",
    "content_type": "messages are JSON; leave it out",
    "correlation_id": "it is the task id; write task_id=",
    "declare": "queues come to be when first used; leave it out",
    "expiration": "write expires=",
    "group_id": _NO_WORKFLOWS,
    "group_index": _NO_WORKFLOWS,
    "immediate": "queues come to be when first used; leave it out",
    "immutable": "it is a signature's: task.si(...)",
    "kwargsrepr": "no log shows arguments; leave it out",
    "message_id": "it is the task id; write task_id=",
    "origin": "give it a header: headers={...}",
    "router": "routes are a setting: task_routes; or write queue=",
    "stamped_headers": "calls have no stamps; write headers=",
    "task_type": "the task is the one that is called; leave it out",
    "timeout": "write time_limit= for the body, publish_timeout= for the sending",
}


class CallOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What ``apply_async`` says of one call; its docstring tells what each means."""

    countdown: float | None = None
    eta: datetime | None = None
    expires: float | datetime | None = None
    queue: str | None = None
    priority: int | None = None
    task_id: str | None = None
    headers: Mapping[str, HeaderValue] | None = None
    link: Any = ()
    link_error: Any = ()
    ignore_result: bool | None = None
    time_limit: float | None = None
    soft_time_limit: float | None = None
    retry: bool | None = None
    retry_policy: Mapping[str, Any] | None = None
    publish_timeout: float | None = None

    def chosen_ids(self) -> tuple[str, ...]:
        """The task id, if it is one of the user's own."""
        return () if self.task_id is None else (self.task_id,)

    def publishing(self, settings: Settings) -> Publishing:
        """How this call is published."""
        if self is NOTHING_SAID:
            return _published_as_set(settings)
        return publishing(settings, timeout=self.publish_timeout, retry=self.retry, retry_policy=self.retry_policy)


def call_options(task_name: str, given: Mapping[str, Any]) -> CallOptions:
    """Check the names of options; those of Celery's that ask for what is done anyway are left out.

    Raises ConfigurationError naming the unknown one.
    """
    if not given:
        return NOTHING_SAID
    accepted = set()
    for name, value in given.items():
        if name not in CallOptions.__struct_fields__:
            if not _is_done_anyway(name, value):
                raise unknown_call_option(task_name, name, CallOptions.__struct_fields__)
            accepted.add(name)
    if accepted:
        given = {name: value for name, value in given.items() if name not in accepted}
    return CallOptions(**given)


def _is_done_anyway(name: str, value: object) -> bool:
    match name:
        case "argsrepr" | "kwargsrepr":  # no log shows arguments
            return isinstance(value, str | None)
        case "serializer":
            return value in ("json", None)
        case "add_to_parent":
            return value in (True, None)
        case "compression" | "connection" | "producer" | "publisher" | "shadow":
            return value is None
        case _:
            return False


NOTHING_SAID = CallOptions()


def check_task_name(name: object) -> None:
    """Raise ConfigurationError for what no task can be called."""
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_TASK_NAME or not name.isprintable():
        raise ConfigurationError(
            f"{shown(name)} is no name of a task; that is text of 1 to {LONGEST_TASK_NAME} printable characters."
        )


class _CallOptionTypes(msgspec.Struct):
    """What kind of value each option of a call must have; the others are checked one by one."""

    countdown: Offset | None
    eta: datetime | None
    expires: Offset | datetime | None
    queue: str | None
    task_id: Annotated[str, Meta(min_length=1, max_length=LONGEST_TASK_ID)] | None
    ignore_result: bool | None
    time_limit: PositiveSeconds | None
    soft_time_limit: PositiveSeconds | None
    retry: bool | None
    publish_timeout: PositiveSeconds | None


def check_call_options(task_name: str, options: CallOptions) -> None:
    """Raise for a value that an option cannot have, in its own words or those of the option's check."""
    for name in ("countdown", "expires", "time_limit", "soft_time_limit", "publish_timeout"):
        seconds = getattr(options, name)
        if seconds is not None and not (name == "expires" and isinstance(seconds, datetime)):
            may_be_past = name in {"countdown", "expires"}
            check_seconds(f"{task_name}: {name}", seconds, least=-LONGEST_SECONDS if may_be_past else 0.0)
    try:
        msgspec.convert(options, _CallOptionTypes, from_attributes=True, builtin_types=(datetime,))
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{task_name}: an option of the call does not fit: {error}.") from error
    for name, moment in (("eta", options.eta), ("expires", options.expires)):
        if isinstance(moment, datetime) and moment.tzinfo is not None:
            check_moment(f"{task_name}: {name}", moment)
    check_limits(task_name, soft=options.soft_time_limit, hard=options.time_limit)
    if options.task_id is not None and not options.task_id.isprintable():
        raise ConfigurationError(f"{task_name}: the task_id {options.task_id!r} has characters that cannot be printed.")
    if options.queue is not None:
        check_queue_name(options.queue)
    if options.priority is not None:
        check_priority(options.priority)
    if options.headers is not None:
        _check_headers(task_name, options.headers)


def check_limits(where: str, *, soft: object, hard: object) -> None:
    """Raise ConfigurationError for a soft time limit above the hard one: it would never come. None: there is none."""
    if isinstance(soft, int | float) and isinstance(hard, int | float) and soft > hard:
        raise ConfigurationError(
            f"{where}: soft_time_limit={soft:g} is above time_limit={hard:g}, so the body would be ended before it is "
            "asked to end; make it smaller, or time_limit larger."
        )


def check_limits_of_call(
    settings: Settings, task_name: str, declared: TaskOptions | None, options: CallOptions
) -> None:
    """The same, for what one call says together with what its task and the settings say."""
    task = TaskOptions() if declared is None else declared
    check_limits(
        task_name,
        soft=options.soft_time_limit or _said(task.soft_time_limit, settings.task_soft_time_limit),
        hard=options.time_limit or _said(task.time_limit, settings.task_time_limit),
    )


def _check_headers(task_name: str, headers: Mapping[Any, Any]) -> None:
    if not isinstance(headers, Mapping):
        raise TaskArgumentsError(f"{task_name}: headers is a mapping of text to values, not {headers!r}.")
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str | int | float | bool | None):
            raise TaskArgumentsError(
                f"{task_name}: the header {name!r} cannot carry {value!r}; headers are text, numbers, booleans or None."
            )
        if name.startswith(RESERVED_HEADER_PREFIX) or name == "content-type":
            raise TaskArgumentsError(f"{task_name}: the header {name!r} is ekiden's own; choose another name.")


def unknown_call_option(task_name: str, name: str, known: Sequence[str]) -> ConfigurationError:
    """The error for an option that no call has; what to write instead of one of Celery's."""
    if name in _CALL_INSTEAD:
        return ConfigurationError(f"{task_name}: there is no call option {name!r}: {_CALL_INSTEAD[name]}.")
    meant = did_you_mean(name, known)
    advice = meant if meant != "." else f"; there are {', '.join(known)}."
    return ConfigurationError(f"{task_name}: there is no call option {name!r}{advice}")


class Sending(msgspec.Struct, frozen=True):
    """Where a call goes and how, after merging; and for ``explain``, who said so."""

    queue: str
    priority: int
    queue_from: str
    priority_from: str


def merge(  # noqa: PLR0917 - a keyword costs time, and each call comes here
    settings: Settings,
    task_name: str,
    task: TaskOptions | None,
    queue: str | None,
    priority: int | None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Sending:
    """Where a call of ``task_name`` goes: the call's own word, then a route, then the task's, then the setting."""
    queue_from = priority_from = "this call"
    if queue is None or priority is None:
        route = find_route(settings.task_routes, task_name, args, kwargs) if settings.task_routes else None
        if queue is None:
            if route is not None and route.queue is not None:
                queue, queue_from = route.queue, f"the route {route.pattern!r}"
            elif task is not None and task.queue is not UNSET:
                queue, queue_from = task.queue, "the task's declaration"
            else:
                queue, queue_from = settings.task_default_queue, "the setting task_default_queue"
        if priority is None:
            if route is not None and route.priority is not None:
                priority, priority_from = route.priority, f"the route {route.pattern!r}"
            elif task is not None and task.priority is not UNSET:
                priority, priority_from = task.priority, "the task's declaration"
            else:
                priority, priority_from = settings.task_default_priority, "the setting task_default_priority"
    return Sending(queue, priority, queue_from, priority_from)


# Publishing.


class PublishRetryPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a publish is tried again while the broker is unavailable. The names are Celery's; times in seconds.

    The pause after the first failure is ``interval_start``, each further one ``interval_step`` longer, none longer
    than ``interval_max``. ``max_retries``: None is as often as the publish timeout allows.
    """

    max_retries: Tries | None = None
    interval_start: Seconds = 0.05
    interval_step: Seconds = 0.1
    interval_max: PositiveSeconds = 1.0

    def pause(self, tries: int) -> float:
        """Seconds to wait after ``tries`` failures (1 is the first)."""
        return min(self.interval_max, self.interval_start + (tries - 1) * self.interval_step)


class Publishing(msgspec.Struct, frozen=True):
    """How long a publish may take in all (seconds), and how it is tried again, if it is."""

    timeout: float
    retry: PublishRetryPolicy | None


def publishing(
    settings: Settings,
    *,
    timeout: float | None = None,
    retry: bool | None = None,
    retry_policy: Mapping[str, Any] | None = None,
) -> Publishing:
    """Merge what one call says about its publishing into the settings."""
    tries_again = settings.task_publish_retry if retry is None else retry
    return Publishing(
        settings.task_publish_timeout if timeout is None else timeout,
        read_publish_retry_policy(retry_policy or settings.task_publish_retry_policy) if tries_again else None,
    )


_DEFAULT_PUBLISH_RETRY_POLICY = PublishRetryPolicy()


def _published_as_set(settings: Settings) -> Publishing:
    """``publishing`` of a call that says nothing of it, without asking for each word of its."""
    policy = settings.task_publish_retry_policy
    return Publishing(
        settings.task_publish_timeout,
        None
        if not settings.task_publish_retry
        else read_publish_retry_policy(policy)
        if policy
        else _DEFAULT_PUBLISH_RETRY_POLICY,
    )


def read_publish_retry_policy(given: Mapping[str, Any]) -> PublishRetryPolicy:
    """Check a retry policy. Raises ConfigurationError naming what it does not know or what does not fit."""
    if not given:
        return _DEFAULT_PUBLISH_RETRY_POLICY
    try:
        return msgspec.convert(dict(given), PublishRetryPolicy)
    except msgspec.ValidationError as error:
        fields = ", ".join(PublishRetryPolicy.__struct_fields__)
        raise ConfigurationError(f"the retry policy for publishing does not fit: {error}; it has {fields}.") from error


# Workers.


_UNSAID_RETRY_DELAY = 180.0
"""Seconds to the next try of a task that says ``retry_backoff=False`` and no delay: what Celery takes."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the worker needs to know of one task's options, settings merged in."""

    max_retries: int | None
    default_retry_delay: float
    autoretry_for: tuple[type[BaseException], ...]
    dont_autoretry_for: tuple[type[BaseException], ...]
    retry_backoff: float
    retry_backoff_max: float
    retry_jitter: bool
    throws: tuple[type[BaseException], ...]
    rate: float | None
    time_limit: float | None
    soft_time_limit: float | None
    acks_early: bool
    pool: str
    ignore_result: bool
    track_started: bool
    typing: bool
    dead_letter: bool
    max_deliveries: int
    result_max_bytes: int


def policy(settings: Settings, task: TaskOptions) -> Policy:
    """Merge a task's declaration into the settings; ``rate`` becomes starts per second, a backoff its first seconds.

    Tries back off from one second on where neither a backoff nor a delay is declared.
    """
    rate_limit = _said(task.rate_limit, settings.task_default_rate_limit)
    retry_delay = _said(task.default_retry_delay, settings.task_default_retry_delay)
    backs_off = retry_delay is None if task.retry_backoff is UNSET else task.retry_backoff
    return Policy(
        max_retries=_said(task.max_retries, settings.task_max_retries),
        default_retry_delay=_UNSAID_RETRY_DELAY if retry_delay is None else retry_delay,
        autoretry_for=task.autoretry_for,
        dont_autoretry_for=task.dont_autoretry_for,
        retry_backoff=float(backs_off),
        retry_backoff_max=task.retry_backoff_max,
        retry_jitter=task.retry_jitter,
        throws=task.throws,
        rate=None if rate_limit is None else rate_per_second(rate_limit),
        time_limit=_said(task.time_limit, settings.task_time_limit),
        soft_time_limit=_said(task.soft_time_limit, settings.task_soft_time_limit),
        acks_early=_said(task.acks, settings.task_acks) == "early",
        pool=_said(task.pool, settings.worker_pool),
        ignore_result=_said(task.ignore_result, settings.task_ignore_result),
        track_started=_said(task.track_started, settings.task_track_started),
        typing=_said(task.typing, settings.task_typing),
        dead_letter=_said(task.dead_letter, settings.task_dead_letter),
        max_deliveries=_said(task.max_deliveries, settings.task_max_deliveries),
        result_max_bytes=settings.result_max_bytes,
    )


def _said(by_task: Any, by_settings: Any) -> Any:
    return by_settings if by_task is UNSET else by_task


# Single values.

_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:/\s*([smhd]))?\s*\Z")
_RATE_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SLOWEST_RATE, _FASTEST_RATE = 1 / (366 * 86400), 1e6


def rate_per_second(limit: object) -> float:
    """``"10/m"``, ``"5/s"``, ``2`` (per second) as starts per second. Raises ConfigurationError for anything else."""
    rate: float | None = None
    if isinstance(limit, int | float) and not isinstance(limit, bool):
        rate = limit
    elif isinstance(limit, str) and (match := _RATE.match(limit)) is not None:
        rate = float(match[1]) / _RATE_SECONDS[match[2] or "s"]
    if rate is None or not _SLOWEST_RATE <= rate <= _FASTEST_RATE:
        raise ConfigurationError(
            f"{shown(limit)} is not a rate limit; write 10/s, 100/m, 5/h, 1/d or a number per second, between once a "
            "year and a million a second."
        )
    return float(rate)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    import difflib  # only to help with a mistake

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


_PLAIN_TASK_OPTIONS = msgspec.defstruct(
    "PlainTaskOptions",
    [
        (name, kind, UNSET)
        for name, kind in get_type_hints(TaskOptions, include_extras=True).items()
        if name not in _EXCEPTION_OPTIONS
    ],
)
