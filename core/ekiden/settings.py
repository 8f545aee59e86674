"""Settings: what holds for a whole app, each with its type, default and meaning; and what Celery's settings are here.

The environment names, the CLI's defaults, the docs and the error messages are derived from the class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_type_hints

import msgspec
from msgspec import Meta

from ekiden.errors import ConfigurationError
from ekiden.message import (
    DEFAULT_PRIORITY,
)
from ekiden.options import (
    Acks,
    Count,
    PoolName,
    PositiveSeconds,
    Priority,
    Routes,
    Seconds,
    check_queue_name,
    did_you_mean,
    rate_per_second,
    read_publish_retry_policy,
    read_route,
)

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
        "Where results are stored. Without one: at the broker, where it stores results, else `rpc://`.",
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
        10,
        "Tries after the first, for `self.retry` and `autoretry_for`; `None` is without end.",
    )
    task_default_retry_delay: Seconds | None = setting(
        None,
        "Seconds until the next try where neither the call nor a backoff says; `None`: tries back off, from 1 s on.",
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
    result_max_bytes: Count = setting(5 * 1024 * 1024, "The largest encoded result; a larger one fails its task.")
    worker_queues: tuple[str, ...] = setting(
        (),
        "Queues that a worker serves; without any: every queue that the app's tasks and routes name.",
    )
    worker_processes: Count | None = setting(None, "Worker processes; without a number: one for each CPU it may use.")
    worker_threads: Count = setting(8, "Threads for `def` tasks, and body processes at most, in each worker process.")
    worker_async_concurrency: Count = setting(100, "`async def` tasks at once in each worker process.")
    worker_pool: PoolName = setting("thread", "Where bodies of `def` tasks run that say nothing themselves.")
    worker_prefetch: Count = setting(
        512,
        "Deliveries in hand at most in each worker process; far fewer where tasks are slow.",
    )
    worker_grace: Seconds = setting(25.0, "Seconds that running tasks get to finish when a worker stops.")
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
    "worker_state_db": "revocations are records in the backend, where it stores; delete the line",
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
    return next(by_prefix, did_you_mean(name, _SETTING_TYPES))


def checked_setting(name: str, value: object, *, from_text: bool = False) -> object:
    """``value`` as the type of setting ``name``; from text (environment), numbers and lists are read out of it."""
    kind = _SETTING_TYPES.get(name)
    if kind is None:
        raise ConfigurationError(f"ekiden has no setting {name!r}{did_you_mean(name, _SETTING_TYPES)}")
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


_SETTING_TYPES: dict[str, Any] = get_type_hints(Settings, include_extras=True)
_TUPLE_SETTINGS = {name for name, kind in _SETTING_TYPES.items() if str(kind).startswith("tuple")}
