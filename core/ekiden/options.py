"""Settings of an app and options of a task: each defined once, here.

    Settings      app.conf: what holds for the whole app, each with its meaning
    TaskOptions   what @app.task(...) declares for one task; UNSET where nothing was said
    CallOptions   what apply_async(...) says for one call
    Sending       the three merged when a message is sent     Policy   the first two merged for the worker

CLI flags, environment names, docs and error messages are derived from these classes.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ekiden.errors import ConfigurationError
from ekiden.message import (
    DEAD_SUFFIX,
    DEFAULT_PRIORITY,
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    MAX_QUEUE_NAME_LENGTH,
    REPLY_PREFIX,
)

Seconds = Annotated[float, Meta(ge=0)]
PositiveSeconds = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Priority = Annotated[int, Meta(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)]
Acks = Literal["late", "early"]
PoolName = Literal["thread", "process"]
Routes = Mapping[str, str | Mapping[str, Any]]

ENVIRONMENT_PREFIX = "EKIDEN_"


def setting(default: Any, meaning: str) -> Any:
    """A field of Settings: its default, and what the docs say of it."""
    if default == {}:
        return field(default_factory=dict, metadata={"doc": meaning})
    return field(default=default, metadata={"doc": meaning})


@dataclass(slots=True)
class Settings:
    """What holds for a whole app: ``app.conf``. Values are checked when they are assigned.

    Sources, later ones winning: the defaults below, ``[tool.ekiden]`` in the project's pyproject.toml, the
    environment (``EKIDEN_`` and the name in capitals), keyword arguments of ``Ekiden(...)``, and what the program
    assigns to ``app.conf`` or loads with ``config_from_object``.
    """

    broker_url: str | None = setting(None, "The broker. Without one: a SQLite file in `.ekiden/` of the project.")
    result_backend: str | None = setting(
        None,
        "Where results are stored. Without one: at the broker, where it stores results.",
    )
    include: tuple[str, ...] = setting((), "Modules that a worker imports so that their tasks are known.")
    task_default_queue: str = setting(
        "default",
        "The queue of calls that neither the call, a route nor the task sends elsewhere.",
    )
    task_default_priority: Priority = setting(DEFAULT_PRIORITY, "0 to 9; 9 is most urgent.")
    task_routes: Routes = setting(
        {},
        'Task names or globs, each to a queue name or `{"queue": ..., "priority": ...}`. An exact name wins, '
        "then the first glob that fits.",
    )
    task_ignore_result: bool = setting(False, "Store no results, except of tasks that say `ignore_result=False`.")
    task_track_started: bool = setting(False, "Also store when a task starts (state STARTED).")
    task_acks: Acks = setting(
        "late",
        "`late`: a message is settled after its task ended (at least once). `early`: before it starts (at most once).",
    )
    task_max_retries: Annotated[int, Meta(ge=0)] | None = setting(
        3,
        "Tries after the first, for `self.retry` and `autoretry_for`; `None` is without end.",
    )
    task_default_retry_delay: Seconds = setting(
        180.0,
        "Seconds until the next try where neither the call nor a backoff says.",
    )
    task_default_rate_limit: str | float | None = setting(
        None,
        "Starts per time of each task over all workers, such as `10/s`, `100/m`, `5/h`.",
    )
    task_time_limit: PositiveSeconds | None = setting(
        None,
        "Seconds after which a body is ended, its process killed if need be.",
    )
    task_soft_time_limit: PositiveSeconds | None = setting(
        None,
        "Seconds after which `SoftTimeLimitExceeded` is raised in a body.",
    )
    task_max_deliveries: Count = setting(
        5,
        "Hand-outs of one message, each ended by its worker's death, before it goes to the dead letters.",
    )
    task_dead_letter: bool = setting(
        True,
        "Keep a copy of failed calls in `<queue>.dead`. What could not be processed at all is always kept.",
    )
    task_typing: bool = setting(True, "Check and convert arguments by the function's annotations.")
    task_publish_timeout: PositiveSeconds = setting(
        10.0,
        "Seconds that a publish may take in all: connecting, sending, confirming, and trying again.",
    )
    task_publish_retry: bool = setting(True, "Try again within the publish timeout when the broker is unavailable.")
    task_publish_retry_policy: Mapping[str, Any] = setting(
        {},
        "How it is tried again: `max_retries`, `interval_start`, `interval_step`, `interval_max` (seconds).",
    )
    unknown_task_grace: Seconds = setting(
        600.0,
        "Seconds for which a message of an unknown task is given back, because a deploy may be rolling.",
    )
    lease: PositiveSeconds = setting(
        60.0,
        "Seconds for which a delivery is a worker's; renewed at a third while the task runs.",
    )
    result_expires: PositiveSeconds | None = setting(86400.0, "Seconds for which results are kept; `None` is for ever.")
    result_max_bytes: Count = setting(16 * 1024 * 1024, "The largest encoded result; a larger one fails its task.")
    worker_queues: tuple[str, ...] = setting(
        (),
        "Queues that a worker serves; without any: every queue that the app's tasks and routes name.",
    )
    worker_processes: Count | None = setting(None, "Worker processes; without a number: as many as cores.")
    worker_threads: Count = setting(8, "Threads for `def` tasks, and body processes at most, in each worker process.")
    worker_async_concurrency: Count = setting(100, "`async def` tasks at once in each worker process.")
    worker_pool: PoolName = setting("thread", "Where bodies of `def` tasks run that say nothing themselves.")
    worker_prefetch: Count = setting(
        512,
        "Deliveries in hand at most in each worker process; far fewer where tasks are slow.",
    )
    worker_grace: Seconds = setting(30.0, "Seconds that running tasks get to finish when a worker stops.")
    worker_max_tasks_per_process: Count | None = setting(None, "Replace a worker process after so many tasks.")
    worker_max_memory_per_process: PositiveSeconds | None = setting(
        None,
        "Replace a worker process that has grown beyond so many MB.",
    )
    worker_liveness_file: str | None = setting(
        None,
        "A file whose modification time says when the worker last was alive, for probes.",
    )

    def __setattr__(self, name: str, value: object) -> None:
        known_name, known_value = translated_setting(name, value)
        object.__setattr__(self, known_name, checked_setting(known_name, known_value))

    def update(self, values: Mapping[str, object] | None = None, **more: object) -> None:
        """Assign several settings at once. Celery's names are taken where they mean the same."""
        for name, value in {**(values or {}), **more}.items():
            setattr(self, name, value)


def setting_docs() -> Iterable[tuple[str, str, object, str]]:
    """Every setting as (name, type, default, meaning), in the order of the class."""
    defaults = Settings()
    for each in fields(Settings):
        yield each.name, str(each.type), getattr(defaults, each.name), each.metadata["doc"]


# What stands where a Celery setting means the same, and what to write instead where it does not.

_SAME_MEANING = {
    "broker": "broker_url",
    "backend": "result_backend",
    "imports": "include",
    "worker_max_tasks_per_child": "worker_max_tasks_per_process",
}
_INSTEAD = {
    "worker_concurrency": "worker_processes and worker_threads",
    "task_serializer": "messages are JSON; delete the line",
    "result_serializer": "results are JSON; delete the line",
    "accept_content": "only JSON is accepted; delete the line",
    "result_accept_content": "only JSON is accepted; delete the line",
    "worker_prefetch_multiplier": "prefetch adapts to how long tasks take; worker_prefetch bounds it",
    "worker_max_memory_per_child": "worker_max_memory_per_process, in MB instead of KB",
    "task_always_eager": "use the pytest plugin's worker, or task.apply(): both run the worker's own code path",
    "task_eager_propagates": "use the pytest plugin's worker, or task.apply(): both run the worker's own code path",
    "task_reject_on_worker_lost": "a message always comes back when its worker dies; task_max_deliveries bounds it",
    "task_acks_on_failure_or_timeout": "failed calls are settled and kept in the dead letters; see task_dead_letter",
    "broker_connection_retry": "transports always reconnect; delete the line",
    "broker_connection_retry_on_startup": "transports always reconnect; delete the line",
    "broker_connection_timeout": "give it to the broker in its URL; task_publish_timeout bounds a publish",
    "broker_transport_options": "write the options into the broker's URL, after ?",
    "result_backend_transport_options": "write the options into the backend's URL, after ?",
    "broker_pool_limit": "an app has one connection per process; delete the line",
    "visibility_timeout": "lease, in seconds; it is renewed while a task runs",
    "task_create_missing_queues": "queues come to be when first used; delete the line",
    "task_queues": "queues need no declaration; task_routes chooses them, worker_queues or --queues serves them",
    "task_queue_max_priority": "every queue has priorities 0 to 9; delete the line",
    "task_default_exchange": "queues are addressed by name; delete the line",
    "task_default_exchange_type": "queues are addressed by name; delete the line",
    "task_default_routing_key": "queues are addressed by name; delete the line",
    "task_annotations": "say it where the task is declared",
    "task_send_sent_event": "use ekiden.signals",
    "worker_send_task_events": "use ekiden.signals",
    "enable_utc": "times are always UTC inside; delete the line",
    "result_extended": "results always tell task, queue and worker; delete the line",
    "result_persistent": "results are as durable as their backend; delete the line",
    "worker_hijack_root_logger": "the root logger is left alone if it has a handler; delete the line",
    "timezone": "times are UTC inside, and eta takes a datetime that says its time zone; delete the line",
    "task_cls": "give each task base=",
    "task_store_errors_even_if_ignored": "failed calls are kept in the dead letters; see task_dead_letter",
    "task_compression": "messages are not compressed; delete the line",
    "task_default_delivery_mode": "messages are as durable as their broker; delete the line",
    "task_inherit_parent_priority": "give priority= to the call",
    "task_protocol": "there is one format; delete the line",
    "task_remote_tracebacks": "an exception that get() raises always carries the worker's traceback; delete the line",
    "task_store_eager_result": "what apply() returns is the result; delete the line",
    "broker_read_url": "broker_url",
    "broker_write_url": "broker_url",
    "broker_use_ssl": "say it in the broker's URL: its scheme, and options after ?",
    "result_compression": "results are not compressed; delete the line",
    "worker_disable_rate_limits": "tasks without rate_limit have none; delete the line",
    "worker_eta_task_limit": "the broker holds what is not due, and workers hold none of it; delete the line",
    "worker_log_format": "--log-format text or json; or configure logging before the worker does",
    "worker_task_log_format": "--log-format text or json; or configure logging before the worker does",
    "worker_redirect_stdouts": "standard output is left alone; delete the line",
    "worker_soft_shutdown_timeout": "worker_grace: what has not ended by then comes back",
    "worker_state_db": "revocations are records in the backend; delete the line",
}
_INSTEAD_BY_PREFIX = {
    "beat_": "there are no schedules yet; have a timer of the system send the task",
    "broker_": "say it in broker_url, as options after ?",
    "result_backend_": "say it in result_backend, as options after ?",
    "control_": "revocations are records in the backend; delete the line",
    "event_": "use ekiden.signals",
    "security_": "messages are JSON and run no code; who may write them is the broker's to say",
}
_INSTEAD_BY_PREFIX |= dict.fromkeys(
    (
        "arangodb_",
        "azureblockblob_",
        "cache_",
        "cassandra_",
        "cosmosdbsql_",
        "couchbase_",
        "database_",
        "elasticsearch_",
        "gcs_",
        "mongodb_",
        "redis_",
        "s3_",
    ),
    "say it in its URL: result_backend, with options after ?",
)


def translated_setting(name: str, value: object) -> tuple[str, object]:
    """The setting that ``name`` means here, and its value; a Celery name is taken where it means the same.

    Raises ConfigurationError for an unknown name, with what was probably meant or what to write instead.
    """
    lowered = name.lower()
    if lowered == "task_acks_late":
        return "task_acks", "late" if value else "early"
    known = _SAME_MEANING.get(lowered, lowered)
    if known not in _SETTING_TYPES:
        raise ConfigurationError(f"ekiden has no setting {name!r}{_instead_of_setting(lowered)}")
    return known, value


def _instead_of_setting(name: str) -> str:
    if name in _INSTEAD:
        return f": {_INSTEAD[name]}."
    by_prefix = (f": {advice}." for prefix, advice in _INSTEAD_BY_PREFIX.items() if name.startswith(prefix))
    return next(by_prefix, _did_you_mean(name, _SETTING_TYPES))


def checked_setting(name: str, value: object, *, from_text: bool = False) -> object:
    """``value`` as the type of setting ``name``; from text (environment), numbers and lists are read out of it."""
    kind = _SETTING_TYPES.get(name)
    if kind is None:
        raise ConfigurationError(f"ekiden has no setting {name!r}{_did_you_mean(name, _SETTING_TYPES)}")
    if from_text and isinstance(value, str):
        value = _read_text(name, value)
    if isinstance(value, list | set):
        value = tuple(value)
    try:
        found = msgspec.convert(value, kind, strict=not from_text)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"the setting {name} cannot be {_shown(name, value)}: {error}.") from error
    _check_meaning(name, found)
    return found


def _read_text(name: str, text: str) -> object:
    if name in {"task_routes", "task_publish_retry_policy"}:
        try:
            return msgspec.json.decode(text)
        except msgspec.DecodeError as error:
            raise ConfigurationError(f"the setting {name} must be a JSON object, not {text!r}: {error}.") from error
    if name in _TUPLE_SETTINGS:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return None if text == "" else text


def _check_meaning(name: str, value: object) -> None:
    if name == "task_default_rate_limit" and value is not None:
        rate_per_second(value)
    if name == "task_publish_retry_policy" and isinstance(value, Mapping):
        read_publish_retry_policy(value)
    if name == "task_default_queue":
        check_queue_name(value)
    if name == "task_routes" and isinstance(value, Mapping):
        for pattern, target in value.items():
            read_route(pattern, target)


def _shown(name: str, value: object) -> str:
    return "that value" if name in {"broker_url", "result_backend"} else repr(value)


# Tasks.


class TaskOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a task declares. UNSET: nothing was said, so the app's setting holds."""

    queue: str | UnsetType = UNSET
    priority: Priority | UnsetType = UNSET
    max_retries: Annotated[int, Meta(ge=0)] | UnsetType | None = UNSET
    default_retry_delay: Seconds | UnsetType = UNSET
    autoretry_for: tuple[type[BaseException], ...] = ()
    dont_autoretry_for: tuple[type[BaseException], ...] = ()
    retry_backoff: bool | float = False
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
    "retry_kwargs": "max_retries= and default_retry_delay=",
    "send_events": "nothing: see ekiden.signals",
    "retries": "max_retries=",
    "retry": "max_retries= and autoretry_for=",
    "timeout": "time_limit=",
    "pydantic": "nothing: arguments are converted by their annotations",
    "backend": "result_backend of the app",
    "trail": "nothing: results always know their children",
}


def declared_options(task_name: str, given: Mapping[str, object]) -> TaskOptions:
    """Check what ``@app.task`` was given. Raises ConfigurationError naming the task, the option and what was meant.

    Celery's ``acks_late`` is taken, because it means the same as ``acks``.
    """
    if "acks_late" in given:
        others = {name: value for name, value in given.items() if name != "acks_late"}
        given = {**others, "acks": "late" if given["acks_late"] else "early"}
    for name in given:
        if name not in TaskOptions.__struct_fields__:
            instead = f"; write {_TASK_INSTEAD[name]}" if name in _TASK_INSTEAD else None
            advice = f"{instead}." if instead else _did_you_mean(name, TaskOptions.__struct_fields__)
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
    if isinstance(options.queue, str):
        check_queue_name(options.queue)
    if options.rate_limit is not UNSET and options.rate_limit is not None:
        rate_per_second(options.rate_limit)
    return options


def options_of_class(kind: type, below: type) -> dict[str, object]:
    """What ``kind`` and the classes between it and ``below`` say of their tasks: attributes named like options."""
    names = {*TaskOptions.__struct_fields__, "acks_late"}
    said: dict[str, object] = {}
    for each in reversed(kind.__mro__):
        if each is not below and issubclass(each, below):
            said |= {
                name: value for name, value in vars(each).items() if name in names and not hasattr(value, "__get__")
            }
    return said


_EXCEPTION_OPTIONS = {"autoretry_for", "dont_autoretry_for", "throws"}


def _exception_classes(task_name: str, option: str, given: object) -> tuple[type[BaseException], ...]:
    classes = tuple(given) if isinstance(given, tuple | list | set | frozenset) else (given,)
    for each in classes:
        if not (isinstance(each, type) and issubclass(each, BaseException)):
            raise ConfigurationError(f"task {task_name}: {option} takes exception classes, not {each!r}.")
    return classes


# Calls.

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
}


def unknown_call_option(task_name: str, name: str, known: Sequence[str]) -> ConfigurationError:
    """The error for an option that no call has; what to write instead of one of Celery's."""
    if name in _CALL_INSTEAD:
        return ConfigurationError(f"{task_name}: there is no call option {name!r}: {_CALL_INSTEAD[name]}.")
    meant = _did_you_mean(name, known)
    advice = meant if meant != "." else f"; there are {', '.join(known)}."
    return ConfigurationError(f"{task_name}: there is no call option {name!r}{advice}")


class Sending(msgspec.Struct, frozen=True):
    """Where a call goes and how, after merging; and for ``explain``, who said so."""

    queue: str
    priority: int
    queue_from: str
    priority_from: str


def merge(
    settings: Settings, task_name: str, task: TaskOptions | None, queue: str | None, priority: int | None
) -> Sending:
    """Where a call of ``task_name`` goes: the call's own word, then a route, then the task's, then the setting."""
    queue_from = priority_from = "this call"
    if queue is None or priority is None:
        route = find_route(settings.task_routes, task_name) if settings.task_routes else None
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


class Route(msgspec.Struct, frozen=True):
    """One entry of ``task_routes``, read."""

    pattern: str
    queue: str | None = None
    priority: int | None = None


def read_route(pattern: str, target: str | Mapping[str, Any]) -> Route:
    """Check one entry of ``task_routes``. Raises ConfigurationError that names the entry."""
    if isinstance(target, str):
        target = {"queue": target}
    unknown = set(target) - {"queue", "priority"}
    if unknown:
        raise ConfigurationError(
            f"task_routes[{pattern!r}]: there is no {sorted(unknown)[0]!r}; a route is a queue name, or has queue and "
            "priority."
        )
    try:
        route = msgspec.convert({**target, "pattern": pattern}, Route)
        if route.priority is not None:
            check_priority(route.priority)
        if route.queue is not None:
            check_queue_name(route.queue)
    except (msgspec.ValidationError, ConfigurationError) as error:
        raise ConfigurationError(f"task_routes[{pattern!r}]: {error}") from error
    return route


def find_route(routes: Routes, task_name: str) -> Route | None:
    """The route for a task: its exact name, else the first glob that fits, else None."""
    if task_name in routes:
        return read_route(task_name, routes[task_name])
    for pattern, target in routes.items():
        if fnmatch.fnmatchcase(task_name, pattern):
            return read_route(pattern, target)
    return None


# Publishing.


class PublishRetryPolicy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a publish is tried again while the broker is unavailable. The names are Celery's; times in seconds.

    The pause after the first failure is ``interval_start``, each further one ``interval_step`` longer, none longer
    than ``interval_max``. ``max_retries``: None is as often as the publish timeout allows.
    """

    max_retries: Annotated[int, Meta(ge=0)] | None = None
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
    """Merge a task's declaration into the settings; ``rate`` becomes starts per second, a backoff its first seconds."""
    rate_limit = _said(task.rate_limit, settings.task_default_rate_limit)
    return Policy(
        max_retries=_said(task.max_retries, settings.task_max_retries),
        default_retry_delay=_said(task.default_retry_delay, settings.task_default_retry_delay),
        autoretry_for=task.autoretry_for,
        dont_autoretry_for=task.dont_autoretry_for,
        retry_backoff=float(task.retry_backoff),
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
_LEGAL_QUEUE_NAME = re.compile(r"[^\x00-\x1f\x7f/\\\s,>]+\Z")


def rate_per_second(limit: object) -> float:
    """``"10/m"``, ``"5/s"``, ``2`` (per second) as starts per second. Raises ConfigurationError for anything else."""
    if isinstance(limit, int | float) and not isinstance(limit, bool) and limit > 0 and math.isfinite(limit):
        return float(limit)
    match = _RATE.match(limit) if isinstance(limit, str) else None
    if match is None or float(match[1]) == 0:
        raise ConfigurationError(f"{limit!r} is not a rate limit; write 10/s, 100/m, 5/h, 1/d or a number per second.")
    return float(match[1]) / _RATE_SECONDS[match[2] or "s"]


def check_queue_name(name: object) -> None:
    """Raise ConfigurationError for what no broker could call a queue."""
    longest = MAX_QUEUE_NAME_LENGTH - len(DEAD_SUFFIX)
    if not isinstance(name, str) or not _LEGAL_QUEUE_NAME.match(name) or len(name) > longest:
        raise ConfigurationError(
            f"{name!r} is not a queue name: it must be 1 to {longest} characters without spaces, slashes, commas or >."
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
    if (
        isinstance(priority, bool)
        or not isinstance(priority, int)
        or not LOWEST_PRIORITY <= priority <= HIGHEST_PRIORITY
    ):
        raise ConfigurationError(
            f"{priority!r} is not a priority; it must be a whole number from {LOWEST_PRIORITY} to {HIGHEST_PRIORITY} "
            "(most urgent)."
        )


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    import difflib  # only to help with a mistake

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


_SETTING_TYPES: dict[str, Any] = get_type_hints(Settings, include_extras=True)
_TUPLE_SETTINGS = {name for name, kind in _SETTING_TYPES.items() if str(kind).startswith("tuple")}
_PLAIN_TASK_OPTIONS = msgspec.defstruct(
    "PlainTaskOptions",
    [
        (name, kind, UNSET)
        for name, kind in get_type_hints(TaskOptions, include_extras=True).items()
        if name not in _EXCEPTION_OPTIONS
    ],
)
