"""Celery's settings under their names: taken, accepted without a word, or refused with what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ekiden import Ekiden
from ekiden.celery_settings import settings_of_celery
from ekiden.errors import ConfigurationError
from ekiden.settings import Settings

ACCEPTED = {
    "accept_content": ["json", "application/json"],
    "broker_connection_max_retries": 10,
    "broker_connection_retry": True,
    "broker_connection_retry_on_startup": True,
    "broker_heartbeat": 30,
    "broker_pool_limit": None,
    "broker_transport_options": {"visibility_timeout": 3600, "socket_keepalive": True},
    "enable_utc": True,
    "event_queue_expires": 60,
    "redis_max_connections": 20,
    "result_accept_content": ["json"],
    "result_backend_transport_options": {"retry_policy": {"timeout": 5.0}},
    "result_extended": True,
    "result_persistent": True,
    "result_serializer": "json",
    "task_acks_on_failure_or_timeout": True,
    "task_always_eager": False,
    "task_create_missing_queues": True,
    "task_default_delivery_mode": "persistent",
    "task_default_exchange": "tasks",
    "task_default_exchange_type": "direct",
    "task_default_routing_key": "tasks",
    "task_eager_propagates": True,
    "task_protocol": 2,
    "task_queue_max_priority": 10,
    "task_reject_on_worker_lost": True,
    "task_remote_tracebacks": True,
    "task_send_sent_event": True,
    "task_serializer": "json",
    "timezone": "Europe/Amsterdam",
    "worker_cancel_long_running_tasks_on_connection_loss": True,
    "worker_disable_rate_limits": False,
    "worker_enable_remote_control": True,
    "worker_hijack_root_logger": False,
    "worker_prefetch_multiplier": 1,
    "worker_proc_alive_timeout": 60,
    "worker_redirect_stdouts": False,
    "worker_send_task_events": True,
    "worker_state_db": "/var/run/worker.db",
}

REFUSED = {
    "accept_content": (["json", "pickle"], "messages and results are JSON"),
    "task_serializer": ("pickle", "messages and results are JSON"),
    "result_serializer": ("yaml", "messages and results are JSON"),
    "enable_utc": (False, "times are always UTC inside"),
    "timezone": ("Mars/Olympus", "no time zone is called that"),
    "task_always_eager": (True, "there is no eager mode"),
    "task_default_exchange_type": ("topic", "queues are addressed by name"),
    "task_queue_max_priority": (255, "priorities 0 to 9"),
    "task_queues": ([SimpleNamespace(name="q", routing_key="q.#")], "queues are addressed by name"),
    "broker_transport_options": ({"master_name": "m"}, "write master_name into broker_url"),
    "broker_use_ssl": ({}, "say it in broker_url"),
    "worker_redirect_stdouts": (True, "the worker leaves standard output alone"),
    "worker_log_format": ("%(message)s", "--log-format"),
    "beat_schedule": ({"x": {"task": "t", "schedule": 1}}, "schedules"),
    "security_key": ("k", "JSON"),
    "cache_backend": ("memory", "say it in its URL"),
    "result_compression": ("gzip", "results are not compressed"),
    "task_cls": ("a:B", "task_cls="),
}

TAKEN: list[tuple[str, Any, str, Any]] = [
    ("worker_concurrency", 4, "worker_processes", 4),
    ("worker_max_tasks_per_child", 100, "worker_max_tasks_per_process", 100),
    ("worker_max_memory_per_child", 512_000, "worker_max_memory_per_process", 512.0),
    ("worker_pool", "prefork", "worker_pool", "thread"),
    ("worker_pool", "threads", "worker_pool", "thread"),
    ("worker_soft_shutdown_timeout", 10.0, "worker_grace", 10.0),
    ("imports", ["a", "b"], "include", ("a", "b")),
    ("imports", "a", "include", ("a",)),
    ("result_expires", timedelta(days=2), "result_expires", 172_800.0),
    ("result_expires", 0, "result_expires", None),
    ("task_time_limit", timedelta(minutes=5), "task_time_limit", 300.0),
    ("task_acks_late", True, "task_acks", "late"),
    ("task_acks_late", False, "task_acks", "early"),
    ("task_queues", ["a", "b"], "worker_queues", ("a", "b")),
    ("task_queues", {"a": {"routing_key": "a"}, "b": {}}, "worker_queues", ("a", "b")),
    (
        "task_queues",
        (
            SimpleNamespace(name="a", routing_key="a", exchange=SimpleNamespace(type="direct")),
            SimpleNamespace(name="b"),
        ),
        "worker_queues",
        ("a", "b"),
    ),
    ("result_backend", "rpc", "result_backend", "rpc://"),
    ("CELERYD_CONCURRENCY", 3, "worker_processes", 3),
    ("CELERY_IMPORTS", ("a",), "include", ("a",)),
    ("CELERY_DEFAULT_QUEUE", "q", "task_default_queue", "q"),
    ("CELERY_TASK_RESULT_EXPIRES", 60, "result_expires", 60.0),
    ("CELERYD_TASK_SOFT_TIME_LIMIT", 9, "task_soft_time_limit", 9.0),
    ("CELERY_TASK_TIME_LIMIT", 8, "task_time_limit", 8.0),
    ("BROKER_URL", "memory://x", "broker_url", "memory://x"),
    ("CELERY_ACKS_LATE", True, "task_acks", "late"),
]


@pytest.mark.parametrize(("name", "value"), ACCEPTED.items())
def test_what_is_done_anyway_is_accepted_and_remembered(name: str, value: object) -> None:
    for spelling in (name, name.upper(), f"CELERY_{name.upper()}"):
        conf = Settings()

        conf.update({spelling: value})

        assert conf.get(spelling) in (value, None)
        assert {**conf.taken_for_granted} in ({spelling.lower(): value}, {})


@pytest.mark.parametrize(("name", "value", "said"), [(name, *rest) for name, rest in REFUSED.items()])
def test_what_cannot_be_had_says_what_to_write(name: str, value: object, said: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"ekiden has no setting '{name}': .*{said}"):
        setattr(Settings(), name, value)


@pytest.mark.parametrize(("name", "value", "ours", "found"), TAKEN)
def test_what_means_the_same_is_taken(name: str, value: object, ours: str, found: object) -> None:
    conf = Settings()

    conf[name] = value

    assert conf[ours] == found
    if name.lower() not in {"task_acks_late", "celery_acks_late", "worker_max_memory_per_child"}:
        assert conf[name] == found


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("redis", "redis://HOST:6379/0"),
        ("django-db", "django-celery-results is not needed"),
        ("django-cache", "results are not kept in Django's cache"),
        ("cache+memcached://127.0.0.1:11211/", "there is no cache backend"),
        ("db+postgresql://u:secret@h/db", "results are not kept in a SQL database"),
        ("file:///var/results", "sqlite:///PATH"),
        ("disabled", "task_ignore_result = True"),
    ],
)
def test_a_backend_of_celerys_is_answered_with_what_to_write(backend: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Ekiden("shop", broker="memory://", backend=backend)

    assert said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_all_refusals_of_one_load_come_in_one_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "settings_with_refusals.py").write_text(
        "broker_url = 'memory://x'\ntask_serializer = 'pickle'\n\n\ntask_always_eager = True\ntask_time_limt = 5\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    app = Ekiden("shop", broker="memory://")

    with pytest.raises(ConfigurationError) as refused:
        app.config_from_object("settings_with_refusals")

    head, *lines = str(refused.value).splitlines()
    assert head == "3 settings cannot be taken:"
    assert {tuple(line.split(": ")[0].rpartition("/")[2].split(":")) for line in lines} == {
        ("settings_with_refusals.py", "2"),
        ("settings_with_refusals.py", "5"),
        ("settings_with_refusals.py", "6"),
    }
    assert "did you mean 'task_time_limit'" in str(refused.value)
    with pytest.raises(ConfigurationError, match=r"(?s)^2 settings cannot be taken:.*'nonsense'.*'task_serializer'"):
        app.conf.update(nonsense=1, task_serializer="pickle", task_time_limit=7)
    assert app.conf.task_time_limit == 7


class ProjectSettings:
    """A Django project's: names of its own beside Celery's."""

    DEBUG = True
    CELERY_BROKER_URL = "memory://django"
    CELERY_TASK_SERIALIZER = "json"
    CELERY_RESULTS_PER_PAGE = 20
    CELERY_OWN_HELPER = "x"
    celery_lower_case = 1


def test_a_namespace_leaves_a_projects_own_names_alone() -> None:
    app = Ekiden("web", broker="memory://")

    app.config_from_object(ProjectSettings, namespace="CELERY")

    assert app.conf.broker_url == "memory://django"
    assert app.conf["task_serializer"] == "json"


def test_a_misspelt_name_behind_a_namespace_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'task_time_limit'"):
        Ekiden("web").config_from_object({"CELERY_TASK_TIME_LIMT": 3}, namespace="CELERY")


def test_settings_are_read_as_celerys_users_do() -> None:
    conf = Settings(task_acks="late")
    conf.update(timezone="UTC", worker_concurrency=3)

    assert (conf["timezone"], conf.get("timezone"), conf.timezone) == ("UTC", "UTC", "UTC")  # type: ignore[attr-defined]
    assert (conf.get("worker_concurrency"), conf["task_acks_late"], conf.get("result_extended", 5)) == (3, True, 5)
    assert "task_time_limit" in conf
    assert "task_send_error_emails" not in conf
    with pytest.raises(AttributeError, match="one broker: broker_url"):
        _ = conf.broker_read_url  # type: ignore[attr-defined]
    with pytest.raises(KeyError, match="did you mean 'task_time_limit'"):
        _ = conf["task_time_limt"]


@pytest.mark.parametrize(
    "annotations",
    [
        {"shop.mail": {"rate_limit": "10/s", "time_limit": 3}, "*": {"max_retries": 1, "acks_late": False}},
        [
            {"shop.mail": {"rate_limit": "10/s"}, "*": {"max_retries": 1}},
            {"shop.mail": {"time_limit": 3, "acks": "early"}},
        ],
    ],
)
def test_annotations_win_over_the_declaration(annotations: Any) -> None:
    app = Ekiden("shop", broker="memory://", task_annotations=annotations)

    @app.task(name="shop.mail", max_retries=5, time_limit=60)
    def mail() -> None: ...

    @app.task(name="shop.other", time_limit=60)
    def other() -> None: ...

    assert (app.policy(mail).rate, app.policy(mail).time_limit, app.policy(mail).acks_early) == (10.0, 3.0, True)
    assert (mail.max_retries, app.policy(mail).max_retries, app.policy(other).max_retries) == (1, 1, 1)
    assert app.policy(other).time_limit == 60


def test_an_annotation_says_where_calls_go() -> None:
    app = Ekiden("shop", broker="memory://annotated", task_annotations={"*": {"queue": "annotated", "priority": 8}})

    @app.task(queue="declared")
    def mail() -> None: ...

    mail.delay()

    (seen,) = app.transport.browse("annotated")
    assert seen.message.priority == 8
    app.close()


@pytest.mark.parametrize(
    ("annotations", "said"),
    [
        ({"shop.mail": {"rate_limt": 5}}, "task_annotations: task shop.mail: there is no option 'rate_limt'"),
        ({"shop.mail": 5}, "task_annotations['shop.mail']: 5 is no mapping of options"),
        ([5], "task_annotations: 5 is no mapping of task names to options"),
    ],
)
def test_an_annotation_that_does_not_fit_is_named(annotations: Any, said: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Ekiden("shop", broker="memory://", task_annotations=annotations)

    assert said in str(refused.value)


def test_the_documentation_lists_each_setting_once() -> None:
    names = [name for name, _ in settings_of_celery()]

    assert len(names) == len(set(names))
    assert {"task_always_eager", "worker_concurrency", "broker_url", "task_cls"} <= set(names)


def test_settings_of_the_environment_are_celerys_too(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: Mapping[str, str] = {"EKIDEN_WORKER_CONCURRENCY": "3", "EKIDEN_TASK_SERIALIZER": "json"}
    for name, value in wanted.items():
        monkeypatch.setenv(name, value)

    assert Ekiden("shop", broker="memory://").conf.worker_processes == 3
