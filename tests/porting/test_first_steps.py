"""The first program: define, call, ask for the result, configure."""

import sys

import pytest
from ekiden import AsyncResult
from ekiden.exceptions import ConfigurationError
from ekiden.exceptions import TimeoutError as ResultTimeout
from ekiden.result import AsyncResult as ImportedAsyncResult

from tests.porting.conftest import Start
from tests.porting.programs import first_steps
from tests.porting.programs.first_steps import add, app, divide, multiply


def test_delay_returns_a_result_that_becomes_ready(work: Start) -> None:
    work(app)

    result = add.delay(4, 4)

    assert result.get(timeout=10) == 8
    assert result.ready()
    assert result.successful()
    assert not result.failed()
    assert result.state == result.status == "SUCCESS"
    assert result.result == 8


def test_a_task_that_is_called_is_the_function() -> None:
    assert add(4, 4) == 8
    assert add.name == "tests.porting.programs.first_steps.add"
    assert app.tasks[add.name] is add


def test_get_raises_what_the_task_raised_unless_told_otherwise(work: Start) -> None:
    work(app)

    result = divide.delay(1, 0)

    with pytest.raises(ZeroDivisionError, match="division by zero"):
        result.get(timeout=10)
    assert isinstance(result.get(propagate=False), ZeroDivisionError)
    assert result.failed()
    assert "divide" in result.traceback
    assert "ZeroDivisionError" in result.traceback


def test_get_gives_up_at_its_timeout(use: Start) -> None:
    use(app)

    with pytest.raises(ResultTimeout, match="PENDING"):
        add.delay(1, 1).get(timeout=0.01)


def test_a_result_is_found_again_by_its_id(work: Start) -> None:
    work(app)
    task_id = add.delay(2, 3).id

    found = [app.AsyncResult(task_id), add.AsyncResult(task_id), AsyncResult(task_id, app=app)]

    assert [result.get(timeout=10) for result in found] == [5, 5, 5]
    assert ImportedAsyncResult is AsyncResult


def test_a_result_can_be_forgotten(work: Start) -> None:
    work(app)
    result = add.delay(1, 1)
    result.get(timeout=10)

    result.forget()

    assert app.AsyncResult(result.id).state == "PENDING"


def test_settings_hold(work: Start) -> None:
    work(app)

    result = multiply.delay(6, 7)

    assert result.get(timeout=10) == 42
    assert result.queue == "slow"
    assert app.conf.result_expires == 3600
    assert app.conf.task_track_started


@pytest.mark.parametrize(
    ("setting", "value", "advice"),
    [
        ("task_serializer", "pickle", "delete the line"),
        ("accept_content", ["json", "pickle"], "delete the line"),
        ("timezone", "Europe/Atlantis", "IANA"),
        ("task_always_eager", True, "task.apply()"),
        ("redis_username", "ann", "in its URL"),
        ("beat_schedule", {"add": {"task": "tasks.add", "schedule": 30}}, "no schedules yet"),
    ],
)
def test_a_setting_that_is_not_here_says_what_to_write_instead(setting: str, value: object, advice: str) -> None:
    with pytest.raises(ConfigurationError, match=setting) as assigned:
        setattr(app.conf, setting, value)
    with pytest.raises(ConfigurationError, match=setting) as updated:
        app.conf.update({setting: value})

    assert advice in str(assigned.value)
    assert advice in str(updated.value)


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'result_expires'"):
        app.conf.update(result_expire=3600)


def test_the_module_is_imported_under_its_own_name() -> None:
    assert sys.modules[app.tasks[add.name].__module__] is first_steps
