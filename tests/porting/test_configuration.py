"""Where settings come from, and where tasks are found."""

import sys
from collections.abc import Callable

import pytest
from ekiden import Ekiden as Celery
from ekiden import shared_task
from ekiden.exceptions import ImproperlyConfigured, MisuseError

from tests.porting.conftest import Start
from tests.porting.programs import celeryconfig, first_steps


class Config:
    """Settings in a class."""

    task_default_queue = "letters"
    task_time_limit = 30


@pytest.mark.parametrize(
    "source",
    [celeryconfig, "tests.porting.programs.celeryconfig", "tests.porting.test_configuration:Config", Config, Config()],
    ids=["module", "its name", "a name in a module", "class", "object"],
)
def test_settings_come_from_an_object(source: object) -> None:
    app = Celery("configured")

    app.config_from_object(source)

    assert app.conf.task_default_queue == "letters"


def test_a_celery_name_is_taken_where_it_means_the_same() -> None:
    app = Celery("configured")

    app.config_from_object(celeryconfig)

    assert app.conf.broker_url == "memory://configured"
    assert app.conf.task_acks == "late"
    assert app.conf.worker_max_tasks_per_process == 100
    assert app.conf.include == ("tests.porting.programs.shop.tasks",)


def test_a_namespace_picks_its_settings_out_of_others() -> None:
    app = Celery("web")

    app.config_from_object("tests.porting.programs.django_settings", namespace="CELERY")

    assert app.conf.broker_url == "memory://django"
    assert app.conf.task_default_queue == "web"
    assert app.conf.task_ignore_result


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(ImproperlyConfigured, match="no module 'celeryconfig'"):
        Celery("configured").config_from_object("celeryconfig")


def test_an_unknown_setting_of_a_module_is_refused() -> None:
    with pytest.raises(ImproperlyConfigured, match="did you mean 'task_routes'"):
        Celery("configured").config_from_object({"task_route": {}})


def test_included_modules_are_imported_by_the_worker(work: Start) -> None:
    app = Celery("shop", include=["tests.porting.programs.shop.tasks"])
    sys.modules.pop("tests.porting.programs.shop.tasks", None)
    shared_task._tasks.clear()

    work(app)

    assert app.send_task("tests.porting.programs.shop.tasks.price", (3,)).get(timeout=10) == 300


def test_tasks_are_discovered_in_packages(work: Start) -> None:
    app = Celery("shop")
    app.autodiscover_tasks(["tests.porting.programs.shop"])
    app.autodiscover_tasks(lambda: ["tests.porting.programs.reports", "tests.porting"], related_name="jobs")

    work(app)
    from tests.porting.programs.reports.jobs import report
    from tests.porting.programs.shop.tasks import price, who

    assert app.tasks["shop.me"].delay().get(timeout=10) == who.name
    assert app.tasks[price.name].delay(2).get(timeout=10) == 200
    assert app.tasks[report.name].delay().get(timeout=10) == "report"


def test_a_shared_task_of_no_app_says_what_to_do() -> None:
    from ekiden import TaskSet

    tasks = TaskSet("lonely")

    @tasks.task
    def alone() -> None: ...

    with pytest.raises(MisuseError, match="autodiscover_tasks"):
        alone.delay()


def test_an_unknown_option_of_the_app_is_refused() -> None:
    with pytest.raises(ImproperlyConfigured, match="task_cls="):
        Celery("custom").conf.task_cls = "shop.tasks:CustomTask"


def test_a_second_app_does_not_see_the_firsts_tasks(use: Callable[..., object]) -> None:
    other = Celery("other")

    assert set(other.tasks) == set()
    assert first_steps.add.name in first_steps.app.tasks
