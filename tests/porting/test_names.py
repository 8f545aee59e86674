"""Every public name of Celery 5.7's: it is here, or a sentence says what to do instead.

``celery_names.json`` holds the names: settings, those of before Celery 4, modules with theirs, attributes of objects.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner
from ekiden import Ekiden as Celery
from ekiden.celery_names import ARGUMENTS_OF_AN_APP, ATTRIBUTES, instead_of
from ekiden.cli import ekiden
from ekiden.errors import ConfigurationError, MaxRetriesExceededError, TaskExpired
from ekiden.exceptions import TaskRevokedError
from ekiden.message import new_id
from ekiden.porting.names import MODULES, moved
from ekiden.result import AsyncResult
from ekiden.signals import task_success

NAMES = json.loads((Path(__file__).parent / "celery_names.json").read_text())
VALUES = [None, True, False, 1, -1, 1.5, "x", "", "json", [], ["a"], (), {}, {"a": 1}, {1}, b"x", object()]
IMPORTS = [(module, name) for module, names in NAMES["modules"].items() for name in names]


@pytest.fixture
def app() -> Iterator[Celery]:
    with Celery("shop", broker=f"memory://{new_id()}") as found:
        yield found


def object_of(kind: str, app: Celery) -> Any:
    @app.task(name="add")
    def add(x: int) -> int:
        return x

    return {
        "app": app,
        "backend": app.backend,
        "control": app.control,
        "request": add.request,
        "result": AsyncResult("1", app),
        "settings": app.conf,
        "signal": task_success,
        "signature": add.s(1),
        "task": add,
    }[kind]


@pytest.mark.parametrize("which", ["settings", "settings_before_4"])
def test_every_setting_is_taken_or_answered_in_a_sentence(which: str, app: Celery) -> None:
    for name in NAMES[which]:
        for value in VALUES:
            try:
                app.conf[name] = value
            except ConfigurationError as error:
                text = str(error)
                assert text.startswith(f"ekiden has no setting {name!r}.") is False
                assert ("did you mean" in text or "\n" in text) is False, text


@pytest.mark.parametrize("name", ["broker_host", "security_key", "CELERYD_MAX_MEMORY_PER_CHILD"])
def test_a_setting_in_a_module_is_not_taken_for_the_programs_own(name: str, app: Celery) -> None:
    settings = type("settings", (), {name: "10", "page_size": 3, "CELERY_PAGE_SIZE": 3})

    with pytest.raises(ConfigurationError):
        app.config_from_object(settings)


def test_every_name_to_import_is_here_or_has_a_sentence() -> None:
    bare = [each for each in IMPORTS if moved(*each) is None and instead_of(*each) is None]

    assert bare == []


@pytest.mark.parametrize("module", [module for module in NAMES["modules"] if module in MODULES])
def test_an_import_from_ekiden_is_answered_in_a_sentence(module: str) -> None:
    ours = importlib.import_module(MODULES[module])
    missing = [name for name in NAMES["modules"][module] if moved(module, name) is None]

    for name in missing:
        if type(vars(ours).get(name)) is not ModuleType:  # messaging is a module in Celery, too
            with pytest.raises(ImportError, match=rf"has no '{name}': \w+"):
                getattr(ours, name)()  # ekiden.task is the module of tasks: who calls it is told


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("from ekiden import task\n@task\ndef add(): ...", "ekiden has no 'task': use @app.task, or @shared_task."),
        ("import ekiden\n@ekiden.task(name='x')\ndef add(): ...", "ekiden has no 'task': use @app.task, or @shared_"),
        ("from ekiden import signature\nsignature('add', (1,))", "ekiden has no 'signature': a task makes its own: "),
    ],
)
def test_a_function_of_celerys_that_is_a_module_here_is_answered(code: str, said: str) -> None:
    with pytest.raises(ImportError, match=said):
        exec(code, {})


@pytest.mark.parametrize("kind", NAMES["attributes"])
def test_every_attribute_is_here_or_has_a_sentence(kind: str, app: Celery) -> None:
    asked = object_of(kind, app)

    for name in NAMES["attributes"][kind]:
        try:
            getattr(asked, name)
        except AttributeError as error:
            assert f"has no {name!r}: " in str(error)  # noqa: PT017


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_no_sentence_is_about_an_attribute_that_is_there(kind: str, app: Celery) -> None:
    asked = object_of(kind, app)

    assert [name for name in ATTRIBUTES[kind] if hasattr(asked, name)] == []


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_a_misspelt_attribute_is_an_attribute_error(kind: str, app: Celery) -> None:
    with pytest.raises(AttributeError, match="aplly"):
        _ = object_of(kind, app).aplly


def test_the_modules_are_attributes_as_celerys_are() -> None:
    program = "import ekiden as celery; celery.exceptions.Ignore; celery.states.PENDING; celery.result.AsyncResult"

    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_app_under_celerys_name_is_told_in_a_sentence() -> None:
    with pytest.raises(ImportError, match="from ekiden import Ekiden as Celery"):
        _ = importlib.import_module("ekiden").Celery


def test_a_misspelt_name_to_import_is_no_name() -> None:
    for module in sorted({*MODULES.values(), "ekiden.schedules"}):
        assert not hasattr(importlib.import_module(module), "__no_such__")
    assert not hasattr(importlib.import_module("ekiden.signals"), "task_sucess")


@pytest.mark.parametrize("argument", ARGUMENTS_OF_AN_APP)
def test_an_argument_of_celerys_app_is_answered_in_a_sentence(argument: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"an app takes no {argument}=: \w+"):
        Celery("shop", **{argument: "shop.parts:Part"})


def test_celerys_other_arguments_of_an_app_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"SHOP_TASK_TIME_LIMIT": 30}

    app = Celery(
        main="shop",
        set_as_current=False,
        autofinalize=True,
        strict_typing=False,
        changes={"result_expires": 60},
        config_source=settings,
        namespace="SHOP",
        loader=None,
    )

    assert (app.name, app.main, app.conf.task_typing) == ("shop", "shop", False)
    assert (app.conf.result_expires, app.conf.task_time_limit) == (60, 30)


def test_settings_come_from_a_module_that_the_environment_names(monkeypatch: pytest.MonkeyPatch, app: Celery) -> None:
    monkeypatch.setenv("SHOP_SETTINGS", f"{__name__}:SETTINGS")
    app.config_from_envvar("SHOP_SETTINGS")
    assert app.conf.task_time_limit == 7

    with pytest.raises(ConfigurationError, match="OTHER_SETTINGS is not set"):
        app.config_from_envvar("OTHER_SETTINGS")


SETTINGS = {"task_time_limit": 7}

OPTIONS: list[tuple[str, Any, Any]] = [
    ("max_retries", 10, 3),
    ("default_retry_delay", 180.0, 5.0),
    ("rate_limit", None, "10/m"),
    ("time_limit", None, 30.0),
    ("soft_time_limit", None, 20.0),
    ("ignore_result", False, True),
    ("acks_late", True, False),
    ("track_started", False, True),
    ("throws", (), (KeyError,)),
    ("typing", True, False),
    ("priority", None, 3),
    ("expires", None, 60.0),
]


@pytest.mark.parametrize(("option", "unsaid", "said"), OPTIONS)
def test_a_task_knows_its_options_under_celerys_names(option: str, unsaid: Any, said: Any, app: Celery) -> None:
    plain = app.task(name="plain")(lambda: None)
    declared = app.task(name="declared", **{option: said})(lambda: None)

    assert (getattr(plain, option), getattr(declared, option)) == (unsaid, said)


def test_an_option_that_is_assigned_afterwards_is_refused(app: Celery) -> None:
    task = app.task(name="plain")(lambda: None)

    with pytest.raises(AttributeError, match=r"rate_limit of a task is declared, not assigned: write @app\.task"):
        task.rate_limit = "1/s"


def test_errors_are_at_hand_where_celery_has_them(app: Celery) -> None:
    task = app.task(name="plain")(lambda: None)
    result = AsyncResult[Any]("1", app)

    assert task.MaxRetriesExceededError is MaxRetriesExceededError
    with pytest.raises(result.TimeoutError):
        result.get(timeout=0)
    assert (task.backend, result.backend, result.app) == (app.backend, app.backend, app)


def test_a_request_is_asked_like_a_mapping(app: Celery) -> None:
    seen: dict[str, object] = {}

    @app.task(bind=True, name="ask")
    def ask(self: Any) -> None:
        seen.update(id=self.request.get("id"), chord=self.request.get("chord"), other=self.request.get("x", 1))

    result = ask.apply()

    assert seen == {"id": result.id, "chord": None, "other": 1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_always_eager", False),
        ("enable_utc", True),
        ("task_serializer", "json"),
        ("accept_content", ["json"]),
        ("timezone", "UTC"),
        ("CELERY_TASK_ALWAYS_EAGER", False),
        ("task_default_exchange_type", "direct"),
    ],
)
def test_a_setting_that_nobody_assigned_tells_what_holds(name: str, value: object, app: Celery) -> None:
    assert (app.conf[name], name in app.conf, app.conf.get(name)) == (value, True, value)


@pytest.mark.parametrize("command", ["", "worker", "call", "purge", "result"])
def test_every_option_of_the_command_is_here_or_answered_in_a_sentence(command: str) -> None:
    for option in NAMES["options"][command]:
        for name in option["names"]:
            words = [name] if option["is_flag"] else [name, "1"]
            behind = [command, *words, "--help"] if command else [*words, "--help"]
            result = CliRunner().invoke(ekiden, behind)
            assert "No such option" not in result.output, (command, name)
            assert result.exit_code == 0 or f"{name}: " in result.output or "Invalid value" in result.output, (
                result.output
            )


@pytest.mark.parametrize("command", NAMES["commands"])
def test_every_command_is_here_or_answered_in_a_sentence(command: str) -> None:
    result = CliRunner().invoke(ekiden, [command, "--help"])

    assert result.exit_code == 0 or f"Error: {command}: " in result.output


@pytest.mark.parametrize(
    ("sent", "again", "arrived"),
    [
        (((), {"x": 1, "y": 2, "z": 3}), ((2, 3), None), (2, 3, 3)),
        (((1, 2, 3), {}), (None, {"x": 9}), (9, 2, 3)),
        (((1,), {"y": 2, "z": 3}), ((5,), None), (5, 2, 3)),
        (((1, 2), {"z": 3}), (None, {"z": 4}), (1, 2, 4)),
        (((1, 2, 3), {}), ((4, 5, 6), {}), (4, 5, 6)),
        (((1, 2, 3), {}), (None, None), (1, 2, 3)),
    ],
)
def test_the_arguments_of_a_retry_go_over_those_of_before(sent: Any, again: Any, arrived: Any, app: Celery) -> None:
    @app.task(bind=True, name="again", max_retries=1)
    def once_more(self: Any, x: int, y: int, z: int = 0) -> list[int]:
        if not self.request.retries:
            raise self.retry(args=again[0], kwargs=again[1], countdown=0)
        return [x, y, z]

    assert once_more.apply(*sent).get() == list(arrived)


@pytest.mark.parametrize(
    "option",
    [
        {"argsrepr": "(***)"},
        {"kwargsrepr": "{***}"},
        {"serializer": "json"},
        {"add_to_parent": True},
        {"producer": None},
        {"compression": None},
    ],
)
def test_an_option_that_asks_for_what_is_done_anyway_is_accepted(option: dict[str, Any], app: Celery) -> None:
    add = app.task(name="add")(lambda x: x)

    assert add.apply((1,), **option).get() == 1
    add.apply_async((1,), **option)
    app.send_task("add", (1,), **option)
    assert add.s(1).set(**option).apply_async().id


@pytest.mark.parametrize("option", [{"serializer": "pickle"}, {"producer": object()}, {"compression": "gzip"}])
def test_an_option_that_asks_for_something_else_is_refused(option: dict[str, Any], app: Celery) -> None:
    add = app.task(name="add")(lambda x: x)

    with pytest.raises(ConfigurationError, match="there is no call option"):
        add.apply_async((1,), **option)


def test_a_call_that_expired_is_caught_where_revoked_ones_are() -> None:
    assert issubclass(TaskExpired, TaskRevokedError)
