"""What a task can be told when it is declared, and do while it runs."""

import re

import pytest
from ekiden import Ekiden, Task
from ekiden.exceptions import ConfigurationError, MaxRetriesExceededError, MisuseError, TaskRejected
from ekiden.testing.conformance.fixtures import eventually

from tests.porting.conftest import Start
from tests.porting.programs import tasks
from tests.porting.programs.tasks import Unreachable, app


@pytest.fixture(autouse=True)
def fresh() -> None:
    tasks.handled.clear()
    tasks.may_go_on.clear()
    for each in (tasks.line, tasks.count_lines):
        each._lines = None


def test_a_name_can_be_chosen(work: Start) -> None:
    work(app)

    assert tasks.add.name == "sum-of-two-numbers"
    assert app.send_task("sum-of-two-numbers", (1, 2)).get(timeout=10) == 3


def test_a_bound_task_knows_its_request(work: Start) -> None:
    work(app)

    result = tasks.describe.apply_async((1,), {"y": 3}, expires=60)

    found = result.get(timeout=10)
    assert found.pop("hostname")
    assert found == {
        "name": tasks.describe.name,
        "id": result.id,
        "task": tasks.describe.name,
        "args": [1],
        "kwargs": {"y": 3},
        "retries": 0,
        "called_directly": False,
        "queue": "default",
        "root_id": result.id,
        "parent_id": None,
        "eta": None,
        "expires": True,
        "is_eager": False,
        "correlation_id": result.id,
    }
    assert tasks.describe.apply((1,)).get()["is_eager"]


def test_a_task_knows_which_task_sent_it(work: Start) -> None:
    work(app)

    parent = tasks.call_describe.delay()

    child = app.AsyncResult(parent.get(timeout=10))
    assert child.get(timeout=10)["parent_id"] == parent.id
    assert child.get()["root_id"] == parent.id


# Retries.


@pytest.mark.parametrize("succeed_at", [0, 2])
def test_a_task_retries_itself(work: Start, succeed_at: int) -> None:
    work(app)

    assert tasks.retry_by_hand.delay(succeed_at).get(timeout=10) == succeed_at


def test_when_no_tries_are_left_its_exception_is_raised(work: Start) -> None:
    work(app)

    result = tasks.retry_by_hand.delay(5)

    with pytest.raises(Unreachable, match="try 2"):
        result.get(timeout=10)
    assert result.retries == 2


def test_a_retry_may_change_the_arguments(work: Start) -> None:
    work(app)

    assert tasks.retry_with_other_arguments.delay(0).get(timeout=10) == 3


def test_a_retry_without_a_reason_ends_with_a_reason(work: Start) -> None:
    work(app)

    with pytest.raises(MaxRetriesExceededError, match="tried 2 times"):
        tasks.retry_without_a_reason.delay().get(timeout=10)


def test_known_exceptions_are_retried_with_growing_pauses(work: Start) -> None:
    work(app)

    assert tasks.retry_by_itself.delay().get(timeout=10) == 3


def test_some_exceptions_are_not_retried(work: Start) -> None:
    work(app)

    with pytest.raises(KeyError):
        tasks.retry_most.delay().get(timeout=10)
    assert tasks.handled == ["tried"]


def test_the_attributes_of_a_base_class_are_options(work: Start) -> None:
    work(app)

    result = tasks.retry_as_its_base_says.delay()

    with pytest.raises(Unreachable, match="after 2 retries"):
        result.get(timeout=10)
    assert tasks.handled == ["tried"] * 3


def test_what_the_decorator_says_goes_over_the_base_class() -> None:
    elsewhere = Ekiden("elsewhere", broker="memory://elsewhere")

    @elsewhere.task(base=tasks.RetryingTask, max_retries=7, bind=True)
    def task(self: Task) -> None: ...

    assert task.options.max_retries == 7
    assert task.max_retries == 7
    assert task.options.autoretry_for == (Unreachable,)


def test_a_wrong_attribute_of_a_base_class_is_refused() -> None:
    class Wrong(Task):
        max_retries = "many"

    elsewhere = Ekiden("elsewhere", broker="memory://elsewhere")

    with pytest.raises(ConfigurationError, match=r"max_retries"):
        elsewhere.task(base=Wrong)(lambda: None)


# Endings by exception.


def test_ignore_leaves_the_state_to_the_task(work: Start) -> None:
    work(app)

    result = tasks.ignore.delay()

    eventually(result.failed, what="the state that it stored itself")
    assert result.result == "not wanted"


def test_reject_sends_the_message_to_the_dead_letters(work: Start) -> None:
    work(app)

    with pytest.raises(TaskRejected, match="out of paper"):
        tasks.reject.delay().get(timeout=10)
    eventually(lambda: app.transport.depth("default.dead").ready == 1, what="a dead letter")


@pytest.mark.slow
def test_a_rejected_message_can_come_back(work: Start) -> None:
    work(app)

    assert tasks.requeue_once.delay().get(timeout=10) == "done"


def test_an_expected_exception_is_not_logged_as_an_error(work: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    work(app)

    tasks.fail_as_declared.delay().get(timeout=10, propagate=False)

    record = next(each for each in caplog.records if "unknown customer" in each.getMessage())
    assert record.levelname == "INFO"


# States.


def test_a_task_tells_how_far_it_is(work: Start) -> None:
    work(app)
    result = tasks.import_files.delay(["a", "b", "c"])

    eventually(lambda: "told" in tasks.handled, what="progress")
    told = (result.state, result.info)
    tasks.may_go_on.set()

    assert told == ("IMPORTING", {"current": 3, "total": 3})
    assert result.get(timeout=10) == 3


def test_that_a_task_has_started_is_told_on_request(work: Start) -> None:
    work(app)
    result = tasks.patient.delay()

    eventually(lambda: result.state == "STARTED", what="STARTED")
    tasks.may_go_on.set()

    assert result.get(timeout=10) is None


def test_a_result_that_is_ignored_is_not_stored(work: Start) -> None:
    work(app)

    result = tasks.forgetful.delay()

    eventually(lambda: tasks.handled == ["ran"], what="the body ran")
    assert tasks.add.delay(1, 1).get(timeout=10) == 2
    assert result.state == "PENDING"


# Base classes.


def test_a_base_class_keeps_what_it_opened(work: Start) -> None:
    work(app, threads=1)

    lines = [tasks.line.delay(number).get(timeout=10) for number in range(3)]

    assert lines == ["first", "second", "third"]
    assert tasks.handled == ["read"]


def test_each_task_has_its_own_attributes(work: Start) -> None:
    work(app, threads=1)

    assert tasks.line.delay(0).get(timeout=10) == "first"
    assert tasks.count_lines.delay().get(timeout=10) == 3
    assert tasks.handled == ["read", "read"]


def test_handlers_are_told_how_calls_went(work: Start) -> None:
    work(app)

    success, failure = tasks.half.delay(4), tasks.half.delay(5)
    retried = tasks.half_at_second_try.delay(8)
    assert success.get(timeout=10) == 2
    failure.get(timeout=10, propagate=False)
    assert retried.get(timeout=10) == 4

    def told_of(task_id: str) -> list[tuple[object, ...]]:
        return [each for each in tasks.handled if task_id in each]

    assert told_of(success.id) == [
        ("before_start", success.id, [4], {}),
        ("on_success", 2, success.id),
        ("after_return", "SUCCESS", success.id),
    ]
    assert told_of(failure.id) == [
        ("before_start", failure.id, [5], {}),
        ("on_failure", "ValueError(5)", failure.id, True),
        ("after_return", "FAILURE", failure.id),
    ]
    assert [each[0] for each in told_of(retried.id)] == [
        "before_start",
        "on_retry",
        "after_return",
        "before_start",
        "on_success",
        "after_return",
    ]


def test_a_base_class_may_wrap_the_call(work: Start) -> None:
    work(app)

    result = tasks.whisper.delay("HUSH")

    assert result.get(timeout=10) == "hush"
    assert tasks.handled == [f"starting {tasks.whisper.name}[{result.id}]"]
    assert tasks.whisper.run("HUSH") == "hush"


# What is refused.


@pytest.mark.parametrize(
    ("option", "value", "advice"),
    [
        ("serializer", "pickle", "messages are JSON"),
        ("reject_on_worker_lost", False, "always comes back"),
        ("max_retry", 3, "did you mean 'max_retries'?"),
    ],
)
def test_an_option_that_is_not_here_says_what_to_write_instead(option: str, value: object, advice: str) -> None:
    elsewhere = Ekiden("elsewhere", broker="memory://elsewhere")

    with pytest.raises(ConfigurationError, match=re.escape(repr(option))) as refused:
        elsewhere.task(**{option: value})(lambda: None)

    assert advice in str(refused.value)


def test_waiting_for_a_task_inside_a_task_is_refused(work: Start) -> None:
    work(app)
    elsewhere_result = tasks.add.delay(1, 1)
    elsewhere_result.get(timeout=10)

    @app.task(name="waits-inside")
    def waits_inside() -> None:
        tasks.add.delay(1, 1).get()

    try:
        with pytest.raises(MisuseError, match="allow_join"):
            waits_inside.delay().get(timeout=10)
    finally:
        del app._tasks["waits-inside"]
