"""The app: where its settings come from, what it opens and closes, whose tasks it has, how it is found."""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ekiden import Ekiden, TaskSet
from ekiden.app import load_app
from ekiden.errors import BackendError, ConfigurationError, TransportClosed
from ekiden.message import new_id
from ekiden.settings import Settings, setting_docs


@pytest.fixture
def url() -> str:
    return f"memory://{new_id()}"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory that is the current one, and in which modules are found; they are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


# Settings.


def test_every_setting_has_a_default_that_fits_and_a_meaning() -> None:
    documented = list(setting_docs())

    assert len(documented) > 30
    for name, kind, default, meaning in documented:
        setattr(Settings(), name, default)
        assert kind, name
        assert meaning.endswith("."), name


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("task_max_retry", 3, "did you mean 'task_max_retries'"),
        ("nonsense", 1, "ekiden has no setting 'nonsense'"),
        ("task_max_retries", -1, "the setting task_max_retries cannot be -1"),
        ("task_max_retries", "3", "the setting task_max_retries cannot be '3'"),
        ("task_default_queue", "a b", "is not a queue name"),
        ("task_default_rate_limit", "fast", "is not a rate limit"),
        ("task_routes", {"a": {"que": "x"}}, "there is no 'que'"),
        ("worker_pool", "gevent", "worker_pool"),
        ("lease", 0, "lease"),
        ("task_always_eager", True, "task.apply()"),
        ("worker_concurrency", 0, "worker_processes"),
    ],
)
def test_a_wrong_setting_is_refused_wherever_it_is_said(name: str, value: Any, message: str, url: str) -> None:
    app = Ekiden(broker=url)

    for say in (
        lambda: Ekiden(broker=url, **{name: value}),
        lambda: setattr(app.conf, name, value),
        lambda: app.conf.update({name: value}),
        lambda: app.config_from_object({name: value}),
    ):
        with pytest.raises((ConfigurationError, AttributeError)) as caught:
            say()  # type: ignore[no-untyped-call]
        if not isinstance(caught.value, AttributeError):
            assert message in str(caught.value)


@pytest.mark.parametrize(
    ("celery", "value", "name", "here"),
    [
        ("CELERY_TASK_ACKS_LATE", False, "task_acks", "early"),
        ("CELERY_WORKER_MAX_TASKS_PER_CHILD", 7, "worker_max_tasks_per_process", 7),
        ("CELERY_IMPORTS", ("a", "b"), "include", ("a", "b")),
        ("CELERY_TASK_DEFAULT_QUEUE", "jobs", "task_default_queue", "jobs"),
    ],
)
def test_a_celery_setting_that_means_the_same_is_taken(celery: str, value: Any, name: str, here: Any, url: str) -> None:
    app = Ekiden(broker=url)

    app.config_from_object({celery: value, "OTHER": 1}, namespace="CELERY")

    assert getattr(app.conf, name) == here


def test_the_environment_goes_over_the_project_and_arguments_over_both(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "pyproject.toml").write_text(
        '[tool.ekiden]\nbroker_url = "memory://a"\nlease = 11\nworker_threads = 3\ntask_default_queue = "project"\n'
    )
    monkeypatch.setenv("EKIDEN_LEASE", "12")
    monkeypatch.setenv("EKIDEN_TASK_DEFAULT_QUEUE", "environment")
    monkeypatch.setenv("EKIDEN_INCLUDE", "one, two")
    monkeypatch.setenv("EKIDEN_TASK_IGNORE_RESULT", "true")
    monkeypatch.setenv("EKIDEN_TASK_ROUTES", '{"a.*": "b"}')
    (project / "shop.py").write_text('from ekiden import Ekiden\napp = Ekiden("shop", task_default_queue="argument")\n')

    conf = load_app_without_its_tasks("shop").conf

    assert (conf.broker_url, conf.worker_threads, conf.lease, conf.task_default_queue) == (
        "memory://a",
        3,
        12,
        "argument",
    )
    assert (conf.include, conf.task_ignore_result, conf.task_routes) == (("one", "two"), True, {"a.*": "b"})


def load_app_without_its_tasks(module: str) -> Ekiden:
    import importlib

    app: Ekiden = importlib.import_module(module).app
    return app


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("EKIDEN_LEASE", "long", "environment variable EKIDEN_LEASE: the setting lease cannot be 'long'"),
        ("EKIDEN_TASK_ROUTES", "{", "must be a JSON object"),
        ("EKIDEN_BROKER_URL", "redis", "is not a broker URL"),
        ("EKIDEN_BROKER_URL", "carrot://x", "no transport for carrot:// is installed"),
    ],
)
def test_a_wrong_environment_is_told_with_its_variable(
    variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)

    with pytest.raises(ConfigurationError, match=message.replace("(", r"\(")):
        Ekiden("shop")


KUBERNETES = {
    "EKIDEN_PORT": "tcp://10.0.0.7:5432",
    "EKIDEN_SERVICE_HOST": "10.0.0.7",
    "EKIDEN_SERVICE_PORT": "5432",
    "EKIDEN_SERVICE_PORT_DB": "5432",
    "EKIDEN_PORT_5432_TCP": "tcp://10.0.0.7:5432",
    "EKIDEN_PORT_5432_TCP_ADDR": "10.0.0.7",
    "EKIDEN_BROKER_PORT": "tcp://10.0.0.8:5672",
    "EKIDEN_BROKER_SERVICE_HOST": "10.0.0.8",
    "EKIDEN_WORKER_PORT": "tcp://10.0.0.9:80",
    "EKIDEN_REDIS_HOST": "10.0.0.10",
}
"""What it puts into the environment for services named ekiden, ekiden-broker, ekiden-worker."""


@pytest.mark.parametrize(
    ("variable", "value", "advice"),
    [
        *((variable, value, "is no setting") for variable, value in KUBERNETES.items()),
        ("EKIDEN_LEES", "5", "did you mean 'lease'?"),
        ("EKIDEN_TASK_ALWAYS_EAGER", "1", "there is no eager mode"),
        ("EKIDEN_", "x", "is no setting"),
    ],
)
def test_a_variable_that_is_no_setting_is_a_warning(
    variable: str, value: str, advice: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(variable, value)

    app = Ekiden("shop", broker="memory://")

    assert app.conf == Ekiden("shop", broker="memory://").conf
    (warning, _) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"{variable} is no setting" in warning.getMessage()
    assert advice in warning.getMessage()


def test_a_wrong_project_file_is_told_with_its_path(project: Path) -> None:
    (project / "pyproject.toml").write_text("[tool.ekiden]\nlees = 5\n")
    (project / "shop.py").write_text('from ekiden import Ekiden\napp = Ekiden("shop")\n')

    with pytest.raises(ConfigurationError, match=r"pyproject\.toml: \[tool\.ekiden\]: ekiden has no setting 'lees'"):
        load_app("shop:app")


def test_an_unknown_scheme_is_refused_when_the_app_is_made() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean redis://"):
        Ekiden("shop", broker="reddis://localhost")


def test_a_password_in_a_broker_url_is_not_told() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Ekiden("shop", broker="carrot://user:secret@host")

    assert "secret" not in str(caught.value)


# Opening and closing.


def test_nothing_is_opened_before_it_is_needed(tmp_path: Path) -> None:
    app = Ekiden("shop", broker=f"sqlite:///{tmp_path}/broker.db")

    @app.task
    def add() -> None: ...

    add.s()
    assert list(tmp_path.iterdir()) == []


def test_with_closes_what_was_opened_and_the_app_can_be_used_again(url: str) -> None:
    with Ekiden("shop", broker=url) as app:
        transport, backend = app.transport, app.backend
        app.send_task("x")

    with pytest.raises(TransportClosed):
        transport.depth("default")
    with pytest.raises(BackendError):
        backend.get(["x"])
    assert app.transport.depth("default").ready == 1
    app.close()
    app.close()


def test_another_broker_takes_effect_after_closing(url: str) -> None:
    app = Ekiden("shop", broker=url)
    app.send_task("x")
    assert app.stores_results()

    app.conf.broker_url = f"{url}-other"
    app.close()

    assert app.transport.depth("default").ready == 0
    assert (str(app.broker_url()), str(app.backend_url())) == (f"{url}-other", f"{url}-other")
    app.close()


def test_without_a_broker_a_file_in_the_project_is_used(project: Path) -> None:
    (project / "pyproject.toml").write_text("")
    (project / "package").mkdir()
    (project / "package" / "__init__.py").write_text("")
    (project / "package" / "shop.py").write_text('from ekiden import Ekiden\napp = Ekiden("shop")\n')

    with load_app("package.shop:app") as app:
        app.send_task("x")

    assert (project / ".ekiden" / "ekiden.db").exists()
    assert (project / ".ekiden").stat().st_mode & 0o077 == 0


def test_many_threads_open_one_connection(url: str) -> None:
    app = Ekiden("shop", broker=url)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append((app.transport, app.backend))) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert len({id(transport) for transport, _ in found}) == len({id(backend) for _, backend in found}) == 1
    app.close()


def test_an_app_that_nobody_holds_goes_away(url: str) -> None:
    tasks = TaskSet("shop")
    app = Ekiden("shop", broker=url)
    app.include_tasks(tasks)
    reference = weakref.ref(app)

    app.close()
    del app
    gc.collect()

    assert reference() is None


# Finding tasks and apps.


def test_two_apps_never_meet(url: str) -> None:
    first, second = Ekiden("first", broker=url), Ekiden("second", broker=f"{url}-2")

    @first.task(name="only.in.first")
    def add() -> None: ...

    assert "only.in.first" in first.tasks
    assert second.find_task("only.in.first") is None
    second.send_task("only.in.first")
    assert first.transport.depth("default").ready == 0
    first.close()
    second.close()


def test_shared_tasks_of_discovered_packages_are_the_apps(project: Path) -> None:
    for package in ("orders", "mails", "without_tasks"):
        (project / package).mkdir()
        (project / package / "__init__.py").write_text("")
    for package in ("orders", "mails"):
        (project / package / "tasks.py").write_text(
            "from ekiden import shared_task\n\n@shared_task\ndef work():\n    return __name__\n"
        )
    (project / "shop.py").write_text(
        'from ekiden import Ekiden\napp = Ekiden("shop", broker="memory://discovery")\n'
        'app.autodiscover_tasks(["orders", "mails", "without_tasks"])\n'
    )

    app = load_app("shop:app")

    assert {"orders.tasks.work", "mails.tasks.work"} <= set(app.tasks)
    assert app.tasks["orders.tasks.work"].apply().get() == "orders.tasks"


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("", "shop:app", "has no 'app'; it has no Ekiden app"),
        ("app = 5", "shop:app", "is 5, not an Ekiden app"),
        ("1/0", "shop:app", "cannot be imported: ZeroDivisionError"),
        ("import no_such_module_here", "shop:app", "no_such_module_here"),
        ("def f(:", "shop:app", "SyntaxError"),
        (
            'from ekiden import Ekiden\na = Ekiden(broker="memory://")\nb = Ekiden(broker="memory://")',
            "shop",
            "say which app, as shop:NAME; its apps: a, b",
        ),
        (
            'from ekiden import Ekiden\na = Ekiden(broker="memory://", include=["missing_module"])',
            "shop:a",
            "the setting include: there is no module 'missing_module'",
        ),
    ],
)
def test_an_app_that_cannot_be_found_is_told_in_one_sentence(
    project: Path, source: str, target: str, message: str
) -> None:
    (project / "shop.py").write_text(source)

    with pytest.raises(ConfigurationError) as caught:
        load_app(target)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_does_not_exist_is_told(project: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere:app: there is no module 'nowhere'"):
        load_app("nowhere:app")


def test_the_only_app_of_a_module_need_not_be_named(project: Path) -> None:
    (project / "shop.py").write_text('from ekiden import Ekiden\napp = again = Ekiden("x", broker="memory://")')

    assert load_app("shop").name == "x"


@pytest.mark.slow
def test_a_task_of_a_program_has_the_name_that_a_worker_imports_it_by(project: Path) -> None:
    (project / "shop.py").write_text(
        'from ekiden import Ekiden\napp = Ekiden("x", broker="memory://")\n\n@app.task\ndef add(): ...\n\n'
        'if __name__ == "__main__":\n    print(add.name)\n'
    )

    told = [
        subprocess.run([sys.executable, *how], cwd=project, capture_output=True, text=True, check=True).stdout.strip()
        for how in (["shop.py"], ["-m", "shop"])
    ]

    assert told == ["shop.add", "shop.add"]


@pytest.mark.parametrize("setting", ["broker_url", "result_backend"])
def test_a_url_that_nobody_can_open_is_refused_when_it_is_assigned(setting: str) -> None:
    app = Ekiden("late", broker="memory://late")

    with pytest.raises(ConfigurationError, match=r"no (transport|result backend) for nosuch:// is installed"):
        setattr(app.conf, setting, "nosuch://host")
    with pytest.raises(ConfigurationError, match=r"no (transport|result backend) for nosuch:// is installed"):
        app.config_from_object({setting: "nosuch://host"})


@pytest.mark.parametrize("name", ["100%", "what?", "a#b", "two words", "caf\u00e9 %41", "at@host:1"])
def test_a_directory_of_any_name_holds_the_default_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    directory = tmp_path / name
    directory.mkdir()
    (directory / "pyproject.toml").write_text("")
    monkeypatch.delenv("EKIDEN_BROKER_URL", raising=False)
    app = Ekiden("anywhere")
    app.project_root = directory

    with app:
        app.send_task("shop.add", (1, 2))
        assert app.transport.depth("default").ready == 1

    assert (directory / ".ekiden" / "ekiden.db").is_file()
    assert (directory / ".ekiden").stat().st_mode & 0o077 == 0


def test_a_directory_that_the_default_broker_cannot_use_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / ".ekiden").mkdir()
    (tmp_path / "open" / ".ekiden").chmod(0o777)

    for root, said in ((tmp_path / "file", "Not a directory"), (tmp_path / "open", "other users may write in it")):
        app = Ekiden("nowhere")
        app.project_root = root
        with pytest.raises(ConfigurationError, match=f"which cannot be used: {said}; give the app broker="):
            app.broker_url()
