"""Celery's settings: which mean the same here, which ask for what ekiden does anyway, and what to write for the rest.

    translated(name, value)   the setting that a Celery name means here, or None for one that needs nothing done

Names are those of Celery's page "Configuration and defaults" (5.7), lower-case; the upper-case names of before 4.0 and
names with the prefix ``CELERY_`` are understood as well. A setting that ekiden can ignore without anything being lost
or done differently is accepted; for each other one there is a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ekiden.errors import ConfigurationError
from ekiden.times import shown

_Accepts = Callable[[Any], bool]


def translated(name: str, value: Any) -> tuple[str, Any] | None:
    """What a setting of Celery's is here: a name and a value, or None where nothing needs to be done.

    ``name``: lower-case, of Celery 4 or later. Raises ConfigurationError with what to write instead, and LookupError
    for a name that Celery does not have.
    """
    if name in _SAME_MEANING:
        return _SAME_MEANING[name], value
    if name in _CONVERTED:
        try:
            return _CONVERTED[name](value)
        except TypeError as error:  # a value of a kind that Celery's setting has not, either
            raise ConfigurationError(f"it cannot be {shown(value)}: {error}") from error
    if name in _ACCEPTED:
        accepts, sentence = _ACCEPTED[name]
        if _is_accepted(accepts, value):
            return None
        raise ConfigurationError(sentence)
    if name in _REFUSED:
        raise ConfigurationError(_REFUSED[name])
    for prefix, advice in _BY_PREFIX.items():
        if name.startswith(prefix):
            if advice is None or value is None:
                return None
            raise ConfigurationError(advice)
    raise LookupError(name)


def unassigned(name: str) -> object:
    """What holds here of a setting that nobody has assigned. Raises LookupError where nothing of the kind does."""
    accepts, _ = _ACCEPTED[name]
    return _HOLDS[accepts]


def current_name(name: str) -> str:
    """The name that a setting has since Celery 4, lower-case; one that has no other name as it is."""
    lowered = name.lower()
    if lowered in _OLD_NAMES:
        return _OLD_NAMES[lowered]
    for old, new in _OLD_PREFIXES:
        current = new + lowered.removeprefix(old)
        if lowered.startswith(old) and (is_celerys(current) or current.startswith(tuple(_BY_PREFIX))):
            return current
    return lowered


def is_celerys(name: str) -> bool:
    """Whether Celery has a setting of this lower-case name."""
    return name in _SAME_MEANING or name in _CONVERTED or name in _ACCEPTED or name in _REFUSED or name in _SAME_NAME


def settings_of_celery() -> Iterable[tuple[str, str]]:
    """Each setting of Celery's and what it is here, for the documentation."""
    yield from ((name, "the same") for name in sorted(_SAME_NAME))
    yield from ((name, f"`{ours}`") for name, ours in _SAME_MEANING.items())
    yield from ((name, str(convert.__doc__)) for name, convert in _CONVERTED.items())
    for name, (accepts, sentence) in _ACCEPTED.items():
        yield name, "needs nothing; delete the line" if accepts is _anything else f"needs nothing; else: {sentence}"
    yield from _REFUSED.items()


def backend_url(value: str) -> str:
    """The URL for a backend that is named as Celery names it. Raises ConfigurationError for what ekiden has not."""
    name = value.partition("://")[0].partition("+")[0]
    if value in {"rpc", "amqp", "amqp://"}:
        return "rpc://"
    if name in _BACKENDS_REFUSED and (value == name or name not in _ALSO_SCHEMES):
        raise ConfigurationError(f"the setting result_backend: {_BACKENDS_REFUSED[name]}.")
    return value


# Names.

_SAME_NAME = {
    "broker_url",
    "include",
    "result_backend",
    "result_expires",
    "task_annotations",
    "task_default_priority",
    "task_default_queue",
    "task_default_rate_limit",
    "task_ignore_result",
    "task_publish_retry",
    "task_publish_retry_policy",
    "task_routes",
    "task_soft_time_limit",
    "task_time_limit",
    "task_track_started",
    "worker_pool",
}

_SAME_MEANING = {
    "broker": "broker_url",
    "backend": "result_backend",
    "imports": "include",
    "worker_concurrency": "worker_processes",
    "worker_max_tasks_per_child": "worker_max_tasks_per_process",
    "worker_soft_shutdown_timeout": "worker_grace",
}

_OLD_PREFIXES = (("celeryd_", "worker_"), ("celerybeat_", "beat_"), ("celery_", ""), ("celery_", "task_"))
"""Where only the beginning of a name differs: a namespace, or before Celery 4 the part of the program."""

_OLD_NAMES = {
    "celery_accept_content": "accept_content",
    "celery_acks_late": "task_acks_late",
    "celery_always_eager": "task_always_eager",
    "celery_annotations": "task_annotations",
    "celery_backend": "result_backend",
    "celery_broadcast_exchange": "control_exchange",
    "celery_broadcast_queue": "control_queue",
    "celery_create_missing_queues": "task_create_missing_queues",
    "celery_default_delivery_mode": "task_default_delivery_mode",
    "celery_default_exchange": "task_default_exchange",
    "celery_default_exchange_type": "task_default_exchange_type",
    "celery_default_queue": "task_default_queue",
    "celery_default_rate_limit": "task_default_rate_limit",
    "celery_default_routing_key": "task_default_routing_key",
    "celery_disable_rate_limits": "worker_disable_rate_limits",
    "celery_eager_propagates_exceptions": "task_eager_propagates",
    "celery_enable_remote_control": "worker_enable_remote_control",
    "celery_enable_utc": "enable_utc",
    "celery_event_queue_expires": "event_queue_expires",
    "celery_event_queue_ttl": "event_queue_ttl",
    "celery_event_serializer": "event_serializer",
    "celery_ignore_result": "task_ignore_result",
    "celery_imports": "imports",
    "celery_include": "include",
    "celery_max_cached_results": "result_cache_max",
    "celery_message_compression": "task_compression",
    "celery_queue_ha_policy": "task_queue_ha_policy",
    "celery_queues": "task_queues",
    "celery_redirect_stdouts": "worker_redirect_stdouts",
    "celery_redirect_stdouts_level": "worker_redirect_stdouts_level",
    "celery_redis_max_connections": "redis_max_connections",
    "celery_result_backend": "result_backend",
    "celery_result_db_short_lived_sessions": "database_short_lived_sessions",
    "celery_result_db_tablenames": "database_table_names",
    "celery_result_dburi": "database_url",
    "celery_result_engine_options": "database_engine_options",
    "celery_result_exchange": "result_exchange",
    "celery_result_persistent": "result_persistent",
    "celery_result_serializer": "result_serializer",
    "celery_routes": "task_routes",
    "celery_send_events": "worker_send_task_events",
    "celery_send_task_error_emails": "task_send_error_emails",
    "celery_send_task_sent_event": "task_send_sent_event",
    "celery_store_errors_even_if_ignored": "task_store_errors_even_if_ignored",
    "celery_task_publish_retry": "task_publish_retry",
    "celery_task_publish_retry_policy": "task_publish_retry_policy",
    "celery_task_result_expires": "result_expires",
    "celery_task_serializer": "task_serializer",
    "celery_timezone": "timezone",
    "celery_track_started": "task_track_started",
    "celerybeat_max_loop_interval": "beat_max_loop_interval",
    "celerybeat_schedule": "beat_schedule",
    "celerybeat_schedule_filename": "beat_schedule_filename",
    "celerybeat_scheduler": "beat_scheduler",
    "celerybeat_sync_every": "beat_sync_every",
    "celeryd_concurrency": "worker_concurrency",
    "celeryd_force_execv": "worker_force_execv",
    "celeryd_hijack_root_logger": "worker_hijack_root_logger",
    "celeryd_log_color": "worker_log_color",
    "celeryd_log_format": "worker_log_format",
    "celeryd_max_tasks_per_child": "worker_max_tasks_per_child",
    "celeryd_pool": "worker_pool",
    "celeryd_pool_putlocks": "worker_pool_putlocks",
    "celeryd_pool_restarts": "worker_pool_restarts",
    "celeryd_prefetch_multiplier": "worker_prefetch_multiplier",
    "celeryd_state_db": "worker_state_db",
    "celeryd_task_log_format": "worker_task_log_format",
    "celeryd_task_soft_time_limit": "task_soft_time_limit",
    "celeryd_task_time_limit": "task_time_limit",
    "celeryd_worker_lost_wait": "worker_lost_wait",
}
"""The names of before Celery 4, by Celery's own table; the ``BROKER_`` ones differ in capitals only."""


# What has to be converted.


def _acks_late(value: Any) -> tuple[str, Any]:
    """`task_acks`: `True` is `late`, `False` is `early`"""
    return "task_acks", "late" if value else "early"


def _kilobytes(value: Any) -> tuple[str, Any]:
    """`worker_max_memory_per_process`, in MB instead of KB"""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return "worker_max_memory_per_process", value / 1000 if is_number else value


def _queues(value: Any) -> tuple[str, Any]:
    """`worker_queues`: their names; a routing key has to be its queue's name"""
    named = value.items() if isinstance(value, Mapping) else ((None, each) for each in value or ())
    return "worker_queues", tuple(_queue_name(name, queue) for name, queue in named)


def _queue_name(name: str | None, queue: Any) -> str:
    """The name of a queue that is given as a string, as a kombu.Queue, or as a name with its properties."""
    if isinstance(queue, str):
        return name or queue
    if isinstance(queue, Mapping):
        key, kind = queue.get("routing_key") or queue.get("binding_key"), queue.get("exchange_type")
    else:
        name, key = getattr(queue, "name", None), getattr(queue, "routing_key", None)
        kind = getattr(getattr(queue, "exchange", None), "type", None)
    if not isinstance(name, str):
        raise ConfigurationError(
            f"a queue is a name or has one, unlike {queue!r}; ekiden needs no declarations of queues"
        )
    if kind not in {None, "", "direct"} or (key and key != name):
        raise ConfigurationError(
            f"queues are addressed by name, and {name!r} is bound by {key or kind!r}: write worker_queues = [{name!r}] "
            "and name it in task_routes"
        )
    return name


def _result_backend_options(value: Any) -> None:
    """needs nothing, for what is about timeouts and retries; else options in the URL of the backend"""
    _check_transport_options(value, "result_backend")


def _broker_options(value: Any) -> None:
    """needs nothing, for what is about timeouts and retries; else options in the URL of the broker"""
    _check_transport_options(value, "broker_url")


_TRANSPORT_OPTIONS_IGNORED = {
    "client_name",
    "confirm_publish",
    "connect_retries_timeout",
    "consumer_timeout",
    "errback",
    "fanout_patterns",
    "fanout_prefix",
    "health_check_interval",
    "interval_max",
    "interval_start",
    "interval_step",
    "max_connections",
    "max_retries",
    "polling_interval",
    "priority_steps",
    "queue_order_strategy",
    "retry_on_timeout",
    "retry_policy",
    "sep",
    "socket_connect_timeout",
    "socket_keepalive",
    "socket_keepalive_options",
    "socket_timeout",
    "unacked_restore_limit",
    "visibility_timeout",
    "wait_time_seconds",
}


def _check_transport_options(value: Any, setting: str) -> None:
    unknown = sorted(set(value or {}) - _TRANSPORT_OPTIONS_IGNORED)
    if unknown:
        raise ConfigurationError(f"write {', '.join(map(str, unknown))} into {setting}, as options after ?")


_CONVERTED: dict[str, Callable[[Any], tuple[str, Any] | None]] = {
    "task_acks_late": _acks_late,
    "task_queues": _queues,
    "worker_max_memory_per_child": _kilobytes,
    "broker_transport_options": _broker_options,
    "result_backend_transport_options": _result_backend_options,
}


# What asks for what is done anyway.


def _is_accepted(accepts: _Accepts, value: Any) -> bool:
    try:
        return accepts(value)
    except TypeError:  # a value of a kind that Celery's setting has not, either
        return False


def _anything(_value: Any) -> bool:
    return True


def _is_off(value: Any) -> bool:
    return not value


def _is_on(value: Any) -> bool:
    return bool(value)


def _is_unsaid(value: Any) -> bool:
    return value is None


def _is_on_or_unsaid(value: Any) -> bool:
    return value is None or bool(value)


def _is_json(value: Any) -> bool:
    return value in {None, "json", "application/json"}


def _is_only_json(value: Any) -> bool:
    return value is None or all(_is_json(each) for each in ([value] if isinstance(value, str) else value))


def _is_direct(value: Any) -> bool:
    return value in {None, "", "direct"}


def _is_time_zone(value: Any) -> bool:
    import zoneinfo  # only for programs that name a time zone

    try:
        return not isinstance(value, str) or bool(zoneinfo.ZoneInfo(value).key)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError):
        return False


_FAILED_ARE_KEPT = "failed calls are settled and kept in the dead letters: task_dead_letter"
_ONLY_JSON = "messages and results are JSON, and nothing else is accepted: write 'json', or delete the line"
_EAGER = "there is no eager mode; use the pytest plugin's worker, or task.apply(): both run the worker's own code path"
_LOGGING = "use --log-format text or json, or configure logging in a receiver of signals.setup_logging"

_ACCEPTED: dict[str, tuple[_Accepts, str]] = {
    "accept_content": (_is_only_json, _ONLY_JSON),
    "result_accept_content": (_is_only_json, _ONLY_JSON),
    "task_serializer": (_is_json, _ONLY_JSON),
    "result_serializer": (_is_json, _ONLY_JSON),
    "event_serializer": (_is_json, _ONLY_JSON),
    "enable_utc": (_is_on, "times are always UTC inside; delete the line"),
    "timezone": (
        _is_time_zone,
        "no time zone is called that; write one of the IANA database, such as 'Europe/Amsterdam'",
    ),
    "broker_connection_retry": (_is_on, "transports always reconnect; delete the line"),
    "broker_connection_retry_on_startup": (_is_on, "a worker starts again until its broker answers; delete the line"),
    "broker_connection_max_retries": (_anything, ""),
    "broker_connection_timeout": (_anything, ""),
    "broker_channel_error_retry": (_anything, ""),
    "broker_failover_strategy": (_anything, ""),
    "broker_heartbeat": (_anything, ""),
    "broker_heartbeat_checkrate": (_anything, ""),
    "broker_login_method": (_anything, ""),
    "broker_native_delayed_delivery_queue_type": (_anything, ""),
    "broker_pool_acquire_timeout": (_anything, ""),
    "broker_pool_limit": (_anything, ""),
    "result_backend_always_retry": (_is_on, "backends always reconnect; delete the line"),
    "result_backend_base_sleep_between_retries_ms": (_anything, ""),
    "result_backend_max_sleep_between_retries_ms": (_anything, ""),
    "result_backend_max_retries": (_anything, ""),
    "result_backend_thread_safe": (_anything, ""),
    "result_cache_max": (_anything, ""),
    "result_chord_expires": (_anything, ""),
    "result_chord_join_timeout": (_anything, ""),
    "result_chord_retry_interval": (_anything, ""),
    "result_compression": (_is_off, "results are not compressed; delete the line"),
    "result_extended": (_anything, ""),
    "result_failure_expires": (_is_unsaid, "results of failures are kept as long as all others: result_expires"),
    "result_persistent": (_anything, ""),
    "task_acks_on_failure": (_is_on_or_unsaid, _FAILED_ARE_KEPT),
    "task_acks_on_failure_or_timeout": (_is_on, _FAILED_ARE_KEPT),
    "task_acks_on_timeout": (_is_on_or_unsaid, _FAILED_ARE_KEPT),
    "task_allow_error_cb_on_chord_header": (_anything, ""),
    "task_always_eager": (_is_off, _EAGER),
    "task_compression": (_is_off, "messages are not compressed; delete the line"),
    "task_create_missing_queues": (_is_on, "queues come to be when first used; delete the line"),
    "task_create_missing_queue_type": (_anything, ""),
    "task_create_missing_queue_exchange_type": (_is_direct, "queues are addressed by name; delete the line"),
    "task_default_delivery_mode": (_anything, ""),
    "task_default_exchange": (_anything, ""),
    "task_default_exchange_type": (_is_direct, "queues are addressed by name; delete the line"),
    "task_default_queue_type": (_anything, ""),
    "task_default_routing_key": (_anything, ""),
    "task_eager_propagates": (_anything, ""),
    "task_inherit_parent_priority": (_is_off, "give priority= to the call"),
    "task_protocol": (_anything, ""),
    "task_queue_ha_policy": (_anything, ""),
    "task_queue_max_priority": (
        lambda value: value is None or (isinstance(value, int) and value <= _MOST_PRIORITIES),
        "every queue has the priorities 0 to 9; give calls one of these, and delete the line",
    ),
    "task_reject_on_worker_lost": (_is_on, "a message always comes back when its worker dies: see task_max_deliveries"),
    "task_remote_tracebacks": (_anything, ""),
    "task_repr_maxlevels": (_anything, ""),
    "task_retry_on_worker_lost": (_anything, ""),
    "task_send_sent_event": (_anything, ""),
    "task_store_eager_result": (_anything, ""),
    "task_store_errors_even_if_ignored": (_is_off, "failed calls are kept in the dead letters: see task_dead_letter"),
    "worker_cancel_long_running_tasks_on_connection_loss": (_anything, ""),
    "worker_deduplicate_successful_tasks": (_anything, ""),
    "worker_detect_quorum_queues": (_anything, ""),
    "worker_direct": (_is_off, "name the queue with --queues on the one worker that is to serve it"),
    "worker_disable_prefetch": (_anything, ""),
    "worker_disable_rate_limits": (_is_off, "tasks without rate_limit have none; delete the line"),
    "worker_enable_prefetch_count_reduction": (_anything, ""),
    "worker_enable_remote_control": (_anything, ""),
    "worker_enable_soft_shutdown_on_idle": (_anything, ""),
    "worker_eta_task_limit": (_anything, ""),
    "worker_force_execv": (_anything, ""),
    "worker_hijack_root_logger": (
        _is_off,
        "the worker leaves the root logger alone where it has a handler; delete the line",
    ),
    "worker_log_color": (_anything, ""),
    "worker_log_datefmt": (_is_off, _LOGGING),
    "worker_log_format": (_is_off, _LOGGING),
    "worker_lost_wait": (_anything, ""),
    "worker_pool_putlocks": (_anything, ""),
    "worker_pool_restarts": (_anything, ""),
    "worker_pool_start_method": (_anything, ""),
    "worker_prefetch_multiplier": (_anything, ""),
    "worker_proc_alive_timeout": (_anything, ""),
    "worker_redirect_stdouts": (
        _is_off,
        "the worker leaves standard output alone: print() is not logged; delete the line",
    ),
    "worker_redirect_stdouts_level": (_anything, ""),
    "worker_send_task_events": (_anything, ""),
    "worker_state_db": (_anything, ""),
    "worker_task_log_datefmt": (_is_off, _LOGGING),
    "worker_task_log_format": (_is_off, _LOGGING),
    "worker_timer_precision": (_anything, ""),
    "beat_schedule": (_is_off, "there are no schedules yet; have a timer of the system send the calls: `ekiden call`"),
    "beat_scheduler": (_is_off, "there are no schedules yet; have a timer of the system send the calls: `ekiden call`"),
}
"""By name: for which values nothing needs to be done, and what to do about the others."""

_HOLDS: dict[_Accepts, object] = {
    _is_direct: "direct",
    _is_json: "json",
    _is_off: False,
    _is_on: True,
    _is_on_or_unsaid: True,
    _is_only_json: ["json"],
    _is_time_zone: "UTC",
    _is_unsaid: None,
}
"""By what is accepted: what a program that reads such a setting is told."""

_MOST_PRIORITIES = 10

_IN_BROKER_URL = "say it in broker_url: redis://USER:PASSWORD@HOST:PORT/NAME"
_JSON_RUNS_NO_CODE = "messages are JSON and run no code; who may write them is the broker's to say"

_REFUSED = {
    "broker_host": _IN_BROKER_URL,
    "broker_password": _IN_BROKER_URL,
    "broker_port": _IN_BROKER_URL,
    "broker_read_url": "an app has one broker: broker_url",
    "broker_transport": _IN_BROKER_URL,
    "broker_user": _IN_BROKER_URL,
    "broker_vhost": _IN_BROKER_URL,
    "broker_write_url": "an app has one broker: broker_url",
    "broker_use_ssl": "say it in broker_url: its scheme (rediss://, amqps://), and options after ?",
    "database_create_tables_at_setup": "results are kept at the broker, or where result_backend says",
    "override_backends": "a backend is a plugin, found by the scheme of its URL: see docs/writing-a-transport.md",
    "redis_backend_use_ssl": "say it in result_backend: rediss://, and options after ?",
    **dict.fromkeys(
        ("security_cert_store", "security_certificate", "security_digest", "security_key", "security_key_password"),
        _JSON_RUNS_NO_CODE,
    ),
    "task_cls": "give the app task_cls= where it is made",
    "task_queue_expires": "queues are not deleted by themselves",
    "task_send_error_emails": "connect to signals.task_failure and send the mail yourself",
    "worker_agent": "there is nothing to replace; delete the line",
    "worker_autoscaler": "worker processes and threads do not change; delete the line",
    "worker_consumer": "there is nothing to replace; delete the line",
    "worker_logfile": "have the shell or the service manager put standard error into a file",
    "worker_timer": "there is nothing to replace; delete the line",
}

_AT_THE_BROKER = "leave it out, and results are kept at the broker where it stores any"
_SAY_WHERE = "say where it is, as a URL: {}"
_ALSO_SCHEMES = {"redis", "rediss", "mongodb", "couchdb", "sqlite"}
_BACKENDS_REFUSED = {
    "cache": f"there is no cache backend; {_AT_THE_BROKER}",
    "couchdb": _SAY_WHERE.format("couchdb://HOST:5984"),
    "db": f"results are not kept in a SQL database by SQLAlchemy; {_AT_THE_BROKER}",
    "database": f"results are not kept in a SQL database by SQLAlchemy; {_AT_THE_BROKER}",
    "disabled": "write task_ignore_result = True instead",
    "django-cache": f"results are not kept in Django's cache; {_AT_THE_BROKER}",
    "django-db": f"django-celery-results is not needed; {_AT_THE_BROKER}",
    "file": f"results are not kept as files; write sqlite:///PATH, or {_AT_THE_BROKER}",
    "mongodb": _SAY_WHERE.format("mongodb://HOST/DATABASE"),
    "redis": _SAY_WHERE.format("redis://HOST:6379/0"),
    "rediss": _SAY_WHERE.format("rediss://HOST:6379/0"),
    "sqlite": _SAY_WHERE.format("sqlite:///PATH"),
}
"""By the name of a backend of Celery's, what to write; of the schemes that ekiden has too, only the bare name."""

_IN_ITS_URL = "say it in its URL: result_backend, with options after ?"
_BY_PREFIX: dict[str, str | None] = {
    "beat_": None,  # how often a scheduler looks, and where it keeps its notes
    "control_": None,
    "event_": None,
    "redis_max_connections": None,
    "redis_socket_": None,
    "redis_retry_on_timeout": None,
    "redis_backend_health_check_interval": None,
    "result_exchange": None,
    "broker_": "say it in broker_url, as options after ?",
    "result_backend_": "say it in result_backend, as options after ?",
    "security_": _JSON_RUNS_NO_CODE,
    **dict.fromkeys(
        (
            "arangodb_",
            "azureblockblob_",
            "cache_",
            "cassandra_",
            "cosmosdbsql_",
            "couchbase_",
            "database_",
            "elasticsearch_",
            "filesystem_",
            "gcs_",
            "mongodb_",
            "redis_",
            "riak_",
            "s3_",
        ),
        _IN_ITS_URL,
    ),
}
"""By how a name begins: what to write instead; None where nothing needs to be done. The first one that fits holds."""
