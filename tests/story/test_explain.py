"""`ekiden explain` tells the truth: its steps are functions that really run; and it runs nothing of the user's."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from ekiden import Ekiden, Task, hooks, probe
from ekiden.explain import BROKER, HERE, HOME, WORKER, Explanation, Fact, Step, explain

called: list[str] = []


class Watched(Task[..., Any]):
    def before_start(self, *_: Any) -> None:
        called.append("before_start")


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Ekiden]:
    """An app whose every part would tell that it was called."""
    called.clear()
    app = Ekiden(
        "shop", broker=f"sqlite:///{tmp_path}/shop.db", task_routes={"add": {"queue": "sums", "priority": 7}}, lease=33
    )

    @app.task(name="add")
    def add(x: int, y: int = 1) -> int:
        """Add two numbers. Never in vain."""
        called.append("add")
        return x + y

    @app.task(name="wait")
    async def wait() -> None:
        called.append("wait")

    @app.task(name="limited", time_limit=5, rate_limit="5/s")
    def limited() -> None:
        called.append("limited")

    @app.task(name="silent", ignore_result=True, acks="early", queue="quiet")
    def silent() -> None:
        called.append("silent")

    @app.task(name="watched", base=Watched)
    def watched() -> None:
        called.append("watched")

    return app


def explained(app: Ekiden, name: str) -> Explanation:
    with app:
        return explain(app, app.tasks[name])


def names(explanation: Explanation, where: str) -> list[str]:
    return [step.name for step in explanation.steps if step.where == where]


def fact(explanation: Explanation, name: str) -> Fact:
    (found,) = [each for each in explanation.facts if each.name == name]
    return found


def function_at(step: Step) -> str:
    """The first line of the function that is written where the step says."""
    lines = Path(step.file).read_text().splitlines()[step.line - 1 :]
    return next(line for line in lines if line.lstrip().startswith(("def ", "async def ")))


@pytest.mark.parametrize("name", ["add", "wait", "limited", "silent", "watched"])
@pytest.mark.slow
def test_every_step_is_written_where_it_says(app: Ekiden, name: str) -> None:
    for step in explained(app, name).steps:
        assert f"def {step.name.rpartition('.')[2]}(" in function_at(step), step
        assert step.does


@pytest.mark.parametrize("name", ["add", "wait", "limited", "silent", "watched"])
@pytest.mark.slow
def test_nothing_of_the_users_is_called_and_the_apps_broker_is_not_asked(
    app: Ekiden, name: str, tmp_path: Path
) -> None:
    def hear(sender: Any, **_: Any) -> None:
        called.append("receiver")

    for signal in hooks.ALL:
        signal.connect(hear)
    try:
        explained(app, name)
    finally:
        for signal in hooks.ALL:
            signal.disconnect(hear)

    assert called == []
    assert list(tmp_path.iterdir()) == []


def test_a_call_goes_from_delay_through_the_apps_own_broker_to_the_body_and_back(app: Ekiden) -> None:
    found = explained(app, "add")

    assert names(found, HERE)[:2] == ["Task.delay", "Task.apply_async"]
    assert "encode_call" in names(found, HERE)
    assert names(found, BROKER) == ["SQLiteTransport.publish"]
    worker = names(found, WORKER)
    landmarks = [
        "SQLiteConsumer.receive",
        "decode_call",
        "Runner.submit",
        "run",
        "add",
        "verdict",
        "SQLiteBackend.put",
        "SQLiteConsumer.settle",
    ]
    assert [name for name in worker if name in landmarks] == landmarks
    home = names(found, HOME)
    assert home[0] == "AsyncResult.get"
    assert "SQLiteBackend.wait" in home
    assert not any("Memory" in step.name for step in found.steps)


def test_the_steps_are_the_functions_that_a_real_call_passes_through(app: Ekiden) -> None:
    """The publishing half is checked without the probe: with the app's own task and its own broker."""
    passed: list[str] = []

    def note(frame: Any, event: str, _argument: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith("ekiden."):
            passed.append(f"{frame.f_code.co_filename}:{frame.f_code.co_firstlineno}")

    told = [f"{step.file}:{step.line}" for step in explained(app, "add").steps if step.where in {HERE, BROKER}]
    with app:
        sys.setprofile(note)
        app.tasks["add"].delay(1, 2)
        sys.setprofile(None)

    assert set(told) <= set(passed)


def test_steps_are_numbered_and_nested_as_they_call_each_other(app: Ekiden) -> None:
    steps = explained(app, "add").steps

    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    depths = {step.name: step.depth for step in steps}
    assert depths["Task.delay"] == 0
    assert depths["Task.apply_async"] == 1
    assert depths["run"] + 1 == depths["add"]
    assert depths["Ekiden.check_may_wait"] == depths["SQLiteBackend.wait"] == 1


@pytest.mark.slow
def test_the_body_is_told_of_in_its_own_words(app: Ekiden) -> None:
    (body,) = [step for step in explained(app, "add").steps if step.name == "add"]
    (wordless,) = [step for step in explained(app, "limited").steps if step.name == "limited"]

    assert body.does == "Add two numbers."
    assert Path(body.file).samefile(__file__)
    assert wordless.does.startswith("limited() -> ")


@pytest.mark.parametrize(
    ("name", "has", "has_not"),
    [
        ("wait", ["EventLoop.submit", "run_async"], ["run", "BodyProcess.run"]),
        ("limited", ["RateLimiter.take", "BodyProcesses.take", "BodyProcess.run", "execute", "run"], ["run_async"]),
        ("silent", ["Runner.submit", "Settler.settle_first"], ["SQLiteBackend.put", "AsyncResult.get"]),
    ],
)
@pytest.mark.slow
def test_other_options_lead_through_other_functions(app: Ekiden, name: str, has: list[str], has_not: list[str]) -> None:
    steps = [step.name for step in explained(app, name).steps]

    assert set(has) <= set(steps)
    assert not set(has_not) & set(steps)
    assert steps.count(name) == 1


def test_an_at_most_once_call_is_settled_before_its_body(app: Ekiden) -> None:
    worker = names(explained(app, "silent"), WORKER)

    assert worker.index("SQLiteConsumer.settle") < worker.index("silent")


def test_the_facts_say_what_holds_and_who_said_so(app: Ekiden) -> None:
    add, limited, silent = (explained(app, name) for name in ("add", "limited", "silent"))

    assert (fact(add, "queue").value, fact(add, "queue").said_by) == ("sums", "the route 'add'")
    assert (fact(silent, "queue").value, fact(silent, "queue").said_by) == ("quiet", "the task's declaration")
    assert fact(limited, "queue").said_by == "the setting task_default_queue"
    assert (fact(limited, "time_limit").value, fact(limited, "time_limit").said_by) == ("5.0", "the task's declaration")
    assert fact(add, "time_limit").said_by == "the settings"
    assert fact(add, "transport").value == "ekiden.sqlite.transport.SQLiteTransport"
    assert fact(add, "function").value.startswith("add(x: ")


def test_handlers_and_receivers_are_named(app: Ekiden) -> None:
    def hear(sender: Any, **_: Any) -> None: ...

    hooks.task_success.connect(hear, app.tasks["watched"])
    try:
        found = explained(app, "watched")
    finally:
        hooks.task_success.disconnect(hear, app.tasks["watched"])

    assert fact(found, "handler").value == "before_start"
    assert fact(found, "receiver").said_by == "the signal task_success"


def test_passwords_are_not_told(app: Ekiden) -> None:
    app.conf.broker_url = f"memory://{uuid4().hex}"
    app.conf.result_backend = f"memory://ann:secret@{uuid4().hex}"

    assert "secret" not in repr(explained(app, "add"))


def test_the_probe_is_left_as_it_was(app: Ekiden) -> None:
    before = probe.nothing.options

    explained(app, "limited")

    assert probe.nothing.options == before
    with probe.app:
        assert probe.app.transport.depth("default").ready == 0


def test_nothing_is_typed_in_by_hand() -> None:
    """The sentences come from docstrings: none of them stands in the module that tells them."""
    import ekiden.explain

    source = inspect.getsource(ekiden.explain)
    app = Ekiden("shop", broker=f"memory://{uuid4().hex}")
    app.task(name="nothing")(lambda: None)

    assert not [step.does for step in explained(app, "nothing").steps if step.does in source]
