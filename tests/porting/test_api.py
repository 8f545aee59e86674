"""Celery's API beyond sending and running: classes of tasks, signals, results by id, retries elsewhere."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner
from ekiden import Ekiden as Celery
from ekiden import Task, shared_task
from ekiden.cli import ekiden
from ekiden.exceptions import ImproperlyConfigured, MaxRetriesExceededError, MisuseError, Reject, TaskRejected
from ekiden.logs import configure_logging, get_task_logger
from ekiden.message import new_id
from ekiden.modules import import_module
from ekiden.result import AsyncResult
from ekiden.results import known_sources
from ekiden.signals import (
    after_setup_logger,
    before_task_publish,
    setup_logging,
    task_received,
    worker_process_init,
    worker_process_shutdown,
    worker_shutdown,
)


@pytest.fixture
def app() -> Iterator[Celery]:
    with Celery("shop", broker=f"memory://{new_id()}") as found:
        yield found


class ContextTask(Task[..., Any]):
    """As Flask's documentation has it."""

    entered: ClassVar[list[str]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.entered.append(self.name)
        return self.run(*args, **kwargs)


@pytest.mark.parametrize("task_cls", [ContextTask, f"{__name__}.ContextTask", f"{__name__}:ContextTask"])
def test_an_app_gives_its_tasks_their_class(task_cls: Any) -> None:
    sys.modules[__name__].ContextTask = ContextTask  # type: ignore[attr-defined]
    app = Celery("flask", broker=f"memory://{new_id()}", task_cls=task_cls)
    ContextTask.entered.clear()

    @app.task(name="inside")
    def inside() -> int:
        return 1

    assert isinstance(inside, ContextTask)
    assert inside.apply().get() == 1
    assert ContextTask.entered == ["inside"]


def test_the_class_of_tasks_can_be_subclassed_and_replaced(app: Celery) -> None:
    class Counting(app.Task):  # type: ignore[name-defined, misc]
        calls = 0

        def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
            type(self).calls += 1
            return super().apply_async(args, kwargs, queue="counted", **options)

    app.Task = Counting

    @app.task
    def add(x: int, y: int) -> int:
        return x + y

    add.delay(1, 2)

    assert Counting.calls == 1
    assert app.transport.depth("counted").ready == 1


@pytest.mark.parametrize("wrong", ["shop.Nothing", "sys:path", 5, dict])
def test_what_is_no_class_of_tasks_is_refused(wrong: Any) -> None:
    with pytest.raises(ImproperlyConfigured):
        Celery("flask", broker="memory://", task_cls=wrong)


class Adder(Task[..., Any]):
    """A task as a class, from the days before functions."""

    name = "adder"
    max_retries = 7
    ignore_result = False

    def __init__(self) -> None:
        self.calls = 0

    def run(self, x: int, y: int = 1) -> int:
        self.calls += 1
        return x + y


@pytest.mark.parametrize("given", [Adder, Adder()])
def test_a_class_with_a_run_method_is_registered(app: Celery, given: Any) -> None:
    adder = app.register_task(given)

    with app.worker(threads=1):
        assert adder.delay(2).get(timeout=10) == 3
        assert app.tasks["adder"].apply_async((2,), {"y": 5}).get(timeout=10) == 7
    assert (adder.name, adder.max_retries, adder.calls) == ("adder", 7, 2)  # type: ignore[attr-defined]
    assert adder(1, 1) == 2


def test_objects_of_one_class_are_tasks_of_their_own(app: Celery) -> None:
    class Mail(Task[..., Any]):
        queue = "default"

        def __init__(self, name: str, queue: str) -> None:
            self.name, self.queue = name, queue

        def run(self) -> str:
            return f"{self.name} {self.request.queue}"

    first, second = (app.register_task(Mail(name, f"of-{name}")) for name in ("one", "two"))
    third = app.register_task(Mail("", "of-three"), name="three")

    assert list(app.tasks) == ["one", "two", "three"]
    assert [each.apply().get() for each in (first, second, third)] == ["one of-one", "two of-two", "three of-three"]
    with pytest.raises(ImproperlyConfigured, match="two tasks are called 'one'"):
        app.register_task(Mail("one", "default"))


def test_a_class_without_run_is_refused(app: Celery) -> None:
    class Empty(Task[..., Any]):
        pass

    with pytest.raises(ImproperlyConfigured, match="has no run method"):
        app.register_task(Empty)


def test_a_result_is_found_by_its_id_where_there_is_one_app(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    @app.task(name="one")
    def one() -> int:
        return 1

    for each in list(known_sources):
        known_sources.discard(each)
    with pytest.raises(MisuseError, match=r"there is none: write app\.AsyncResult\(id\)"):
        AsyncResult("x")
    known_sources.add(app)
    with app.worker(threads=1):
        sent = one.delay()
        assert AsyncResult(sent.id).get(timeout=10) == 1
    other = Celery("other", broker="memory://")
    with pytest.raises(MisuseError, match="there are 2"):
        AsyncResult(sent.id)
    known_sources.discard(other)


def test_a_retry_may_be_sent_elsewhere(app: Celery) -> None:
    @app.task(bind=True, name="again", queue="here")
    def again(self: Task[..., Any]) -> list[Any]:
        if self.request.retries == 0:
            raise self.retry(
                countdown=0, queue="there", priority=9, expires=60, headers={"a": 1}, time_limit=50, soft_time_limit=40
            )
        request = self.request
        return [
            request.delivery_info["queue"],
            request.priority,
            request.headers["a"],
            request.time_limit,
            request.soft_time_limit,
            request.expires is not None,
        ]

    assert again.apply().get() == ["there", 9, 1, 50, 40, True]


@pytest.mark.parametrize(("options", "said"), [({"queu": "x"}, "did you mean 'queue'"), ({"link": ()}, "not 'link'")])
def test_a_retry_that_cannot_be_sent_so_fails(app: Celery, options: dict[str, Any], said: str) -> None:
    @app.task(bind=True, name="again")
    def again(self: Task[..., Any]) -> None:
        raise self.retry(countdown=0, **options)

    with pytest.raises(Exception, match=said):
        again.apply().get()


def test_the_request_tells_limits_and_arguments(app: Celery) -> None:
    @app.task(bind=True, name="told", soft_time_limit=7)
    def told(self: Task[..., Any], x: int, y: int = 0) -> list[Any]:
        request = self.request
        return [
            request.timelimit,
            request.soft_time_limit,
            request.argsrepr,
            request.kwargsrepr,
            request.delivery_info["redelivered"],
            bool(request.hostname),
        ]

    with app.worker(threads=1):
        found = told.apply_async((1,), {"y": 2}, time_limit=None).get(timeout=10)

    assert found == [[None, 7.0], 7.0, "(1,)", "{'y': 2}", False, True]


def test_a_publishing_receiver_sees_the_id_and_the_task_in_the_headers(app: Celery) -> None:
    seen: list[Any] = []

    @before_task_publish.connect(weak=False)
    def note(sender: Any = None, headers: Any = None, **_: Any) -> None:
        seen.append((headers["id"], headers["task"], headers["own"]))

    try:
        sent = app.send_task("shop.add", headers={"own": 1})
    finally:
        before_task_publish.disconnect(note)

    assert seen == [(sent.id, "shop.add", 1)]
    (message,) = app.transport.browse("default")
    assert set(message.message.headers) == {"own"}


def test_a_receiver_is_connected_once_under_one_uid() -> None:
    def one(**_: Any) -> None: ...
    def two(**_: Any) -> None: ...

    before = len(task_received.receivers)
    task_received.connect(one, dispatch_uid="mine")
    task_received.connect(two, dispatch_uid="mine")

    assert len(task_received.receivers) == before + 1
    task_received.disconnect(one)
    task_received.connect(two, dispatch_uid="mine")
    assert task_received.disconnect(two)


def test_a_worker_tells_of_its_process_and_of_what_it_receives(app: Celery) -> None:
    told: list[str] = []
    receivers = [
        (worker_process_init, lambda **_: told.append("init")),
        (task_received, lambda request, **_: told.append(request.task)),
        (worker_process_shutdown, lambda pid, exitcode, **_: told.append(f"exit {exitcode}")),
        (worker_shutdown, lambda **_: told.append("shutdown")),
    ]
    for signal, receiver in receivers:
        signal.connect(receiver)

    @app.task(name="one")
    def one() -> int:
        return 1

    try:
        with app.worker(threads=1):
            one.delay().get(timeout=10)
    finally:
        for signal, receiver in receivers:
            signal.disconnect(receiver)

    assert told == ["init", "one", "exit 0", "shutdown"]


def test_a_program_may_set_up_logging_itself() -> None:
    told: list[Any] = []
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []

    def mine(**fields: Any) -> None:
        told.append(fields["loglevel"])

    def after(logger: logging.Logger, **_: Any) -> None:
        told.append(logger)

    try:
        setup_logging.connect(mine)
        after_setup_logger.connect(after)
        configure_logging("info", "text")
        assert root.handlers == []
        setup_logging.disconnect(mine)
        configure_logging("warning", "text")
        assert len(root.handlers) == 1
    finally:
        setup_logging.disconnect(mine)
        after_setup_logger.disconnect(after)
        root.handlers = handlers

    assert told == [logging.INFO, root]
    assert get_task_logger("shop.tasks") is logging.getLogger("shop.tasks")


def test_options_of_celerys_decorators_are_taken(app: Celery) -> None:
    @app.task(
        name="taken",
        autoretry_for=(OSError,),
        retry_kwargs={"max_retries": 2, "countdown": 3},
        pydantic=True,
        serializer="json",
        reject_on_worker_lost=True,
        acks_late=True,
    )
    def taken() -> None: ...

    assert app.policy(taken).max_retries == 2
    assert app.policy(taken).default_retry_delay == 3
    with pytest.raises(ImproperlyConfigured, match="retry_kwargs takes max_retries and countdown"):
        app.task(name="wrong", retry_kwargs={"exc": 1})(lambda: None)


def test_results_and_revoking_take_celerys_arguments(app: Celery) -> None:
    @app.task(name="one")
    def one() -> int:
        return 1

    with app.worker(threads=1):
        sent = one.delay()
        assert sent.get(10, True, 0.1, disable_sync_subtasks=False) == 1
    app.control.revoke(new_id(), terminate=True, signal="SIGKILL")
    one.delay().revoke(signal="SIGTERM")


def test_a_dropped_copy_of_a_signature_is_warned_of(app: Celery) -> None:
    @app.task(name="one")
    def one() -> int:
        return 1

    signature = one.s()
    for drop in (lambda: _drop_set(signature), lambda: _drop_link(signature), lambda: _drop_link_error(signature)):
        with pytest.warns(UserWarning, match=r"signatures do not change: \w+\(\) returns a changed copy"):
            drop()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        changed = signature.set(queue="a").link(one.s()).link_error(one.s())
        [signature.set(queue="x") for _ in range(2)]
        assert changed.options == {"queue": "a"}


def _drop_set(signature: Any) -> None:
    signature.set(queue="x")


def _drop_link(signature: Any) -> None:
    signature.link(signature)


def _drop_link_error(signature: Any) -> None:
    signature.link_error(signature)


def test_shared_tasks_go_through_the_default_app() -> None:
    app = Celery("web", broker=f"memory://{new_id()}")
    app.set_default()

    assert shared_task in app._included


def test_reject_may_be_raised_as_a_class(app: Celery) -> None:
    @app.task(name="no")
    def no() -> None:
        raise Reject

    with pytest.raises(TaskRejected, match=r"^rejected$"):
        no.apply().get()


def test_discovery_takes_a_string_and_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "found_package").mkdir()
    (tmp_path / "found_package" / "__init__.py").write_text("")
    (tmp_path / "found_package" / "tasks.py").write_text(
        "from ekiden import shared_task\n\n\n@shared_task(name='found.package')\ndef one():\n    return 1\n"
    )
    (tmp_path / "found_module.py").write_text(
        "from ekiden import shared_task\n\n\n@shared_task(name='found.module')\ndef two():\n    return 2\n"
    )
    app = Celery("web", broker=f"memory://{new_id()}")
    app.autodiscover_tasks("found_package")
    app.autodiscover_tasks(["found_module"])
    app.autodiscover_tasks(["found_module"], related_name=None, force=True)

    app.load_tasks()

    assert {"found.package", "found.module"} <= set(app.tasks)


def test_no_tries_left_is_told(app: Celery) -> None:
    @app.task(bind=True, name="again", max_retries=0)
    def again(self: Task[..., Any]) -> None:
        self.retry(countdown=0)

    with pytest.raises(MaxRetriesExceededError):
        again.apply().get()


@pytest.mark.parametrize("name", ["chain", "group", "chord", "crontab", "current_app", "current_task", "uuid"])
def test_a_name_that_only_celery_has_says_what_to_use(name: str) -> None:
    import ekiden

    with pytest.raises(ImportError, match=f"ekiden has no '{name}': "):
        exec(f"from ekiden import {name}")
    with pytest.raises(ImportError, match=f"ekiden has no '{name}': "):
        getattr(ekiden, name)
    assert not hasattr(ekiden, "no_such_name_at_all")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("app.start()", ["worker", "--burst", "-c", "1"]),
        ("app.worker_main(['worker', '--burst', '-c', '1'])", []),
        ("app.worker_main()", ["--burst", "-c", "1"]),
    ],
)
def test_a_program_becomes_its_own_worker(tmp_path: Path, call: str, arguments: list[str]) -> None:
    (tmp_path / "tasks.py").write_text(
        "from ekiden import Ekiden as Celery\n\napp = Celery('tasks', broker='sqlite:///tasks.db')\n\n\n"
        f"@app.task\ndef add(x, y):\n    return x + y\n\n\nif __name__ == '__main__':\n    {call}\n"
    )

    ended = subprocess.run(
        [sys.executable, "tasks.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        stdin=subprocess.DEVNULL,
    )

    assert "tasks tasks.add" in ended.stderr


def test_an_app_that_is_in_no_module_cannot_start(app: Celery) -> None:
    with pytest.raises(MisuseError, match="is in no module"):
        app.start([])


def test_a_program_without_django_discovers_nothing_and_is_told(
    app: Celery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE", raising=False)
    monkeypatch.delitem(sys.modules, "django.conf", raising=False)

    app.autodiscover_tasks()
    app.load_tasks()

    assert "autodiscover_tasks() names no packages" in caplog.text


@pytest.mark.parametrize("line", ["from celery.schedules import crontab", "import kombu", "import ekiden.canvas"])
def test_an_import_that_was_left_says_who_knows_more(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "celery", None)  # type: ignore[arg-type]  # as where it is not installed
    monkeypatch.setitem(sys.modules, "kombu", None)  # type: ignore[arg-type]
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"left_{new_id()}"
    (tmp_path / f"{name}.py").write_text(f"{line}\n")

    with pytest.raises(ImproperlyConfigured, match="`ekiden port` says what to write instead"):
        import_module(name, "-A")


@pytest.mark.parametrize(
    "option",
    [{"store_errors_even_if_ignored": False}, {"compression": None}, {"send_events": False}, {"routing_key": None}],
)
def test_a_task_option_that_asks_for_nothing_is_accepted(option: dict[str, Any], app: Celery) -> None:
    assert app.task(name="plain", **option)(lambda: 1).apply().get() == 1


def test_an_error_of_the_command_names_the_app_that_was_typed() -> None:
    result = CliRunner().invoke(ekiden, ["-A", "no_such_shop:celery_app", "queues"])

    assert "no_such_shop:celery_app: there is no module" in result.output


def test_the_whole_configuration_of_a_flask_program_is_taken(app: Celery) -> None:
    config = {"CELERY_TASK_TIME_LIMIT": 30, "DEBUG": True, "SECRET_KEY": "x", "SQLALCHEMY_DATABASE_URI": "sqlite://"}

    app.conf.update(config)
    app.config_from_object(config)

    assert app.conf.task_time_limit == 30
    with pytest.raises(ImproperlyConfigured, match="did you mean 'task_time_limit'"):
        app.conf.update({"CELERY_TASK_TIME_LIMT": 30})
    with pytest.raises(ImproperlyConfigured, match="no setting 'debug'"):
        app.conf.update(debug=True)
