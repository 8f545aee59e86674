"""What `ekiden doctor` finds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ekiden import Ekiden
from ekiden.doctor import Finding, examine
from ekiden.message import Message

Examine = Callable[..., list[Finding]]


@pytest.fixture
def app(tmp_path: Path) -> Ekiden:
    app = Ekiden("shop", broker=f"sqlite:///{tmp_path}/shop.db")

    @app.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    return app


def findings(app: Ekiden) -> list[Finding]:
    with app:
        return list(examine(app))


def troubles(app: Ekiden) -> list[str]:
    return [f"{each.level} {each.check}: {each.text}" for each in findings(app) if each.level != "ok"]


def test_an_app_that_can_work_is_told_so(app: Ekiden) -> None:
    found = findings(app)

    assert {each.level for each in found} == {"ok"}
    assert {"tasks", "broker", "durability", "results"} == {each.check for each in found}


def test_it_leaves_nothing_behind_and_changes_nothing(app: Ekiden) -> None:
    app.tasks["add"].delay(1, 2)

    findings(app)

    with app:
        (seen,) = app.transport.browse("default")
        assert seen.attempt == 0
        assert app.backend.scan("doctor/") == []


def test_a_broker_that_cannot_be_opened_is_wrong_and_nothing_more_is_asked_of_it(app: Ekiden) -> None:
    app.conf.broker_url = "sqlite:////proc/shop.db"

    found = findings(app)

    assert [each.check for each in found if each.level == "wrong"] == ["broker", "results"]
    assert all("sqlite:////proc/shop.db" in each.text for each in found if each.level == "wrong")


def test_a_file_that_everybody_can_read_is_a_warning(app: Ekiden, tmp_path: Path) -> None:
    findings(app)
    os.chmod(tmp_path / "shop.db", 0o644)

    assert troubles(app) == [
        f"warning file: every user of this machine can read {tmp_path}/shop.db, and the messages in it"
    ]


def test_a_broker_of_one_process_is_a_warning() -> None:
    app = Ekiden("shop", broker="memory://doctor")
    app.task(name="nothing")(lambda: None)

    assert any("memory://doctor lives inside one process" in each for each in troubles(app))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lease": 0.01}, "wrong lease: the lease is 0.01 s, and sqlite:// keeps none below 0.1 s"),
        ({"lease": 3600}, "warning lease: the lease is 3600 s"),
        ({"result_expires": None}, "warning results: results are kept for ever"),
        (
            {"worker_queues": ("other",)},
            "warning queues: add goes to default, which the setting worker_queues leaves out",
        ),
    ],
)
@pytest.mark.slow
def test_settings_that_do_not_go_together_are_named(app: Ekiden, settings: dict[str, object], said: str) -> None:
    app.conf.update(settings)

    (trouble,) = troubles(app)
    assert trouble.startswith(said)


class Opaque:
    """Nothing can read it."""


def test_an_annotation_that_cannot_be_read_is_named(app: Ekiden) -> None:
    @app.task(name="take")
    def take(it: Opaque, hidden: NoSuchType) -> NoSuchType: ...  # type: ignore[name-defined]  # noqa: F821

    found = troubles(app)

    assert {each.partition(":")[0] for each in found} == {"warning annotations"}
    assert "take: the parameter 'it': values of" in found[0]
    hidden, result = found[1:]
    assert "take: the parameter 'hidden': the annotation 'NoSuchType' names what cannot be looked up at run" in hidden
    assert "take: the result: the annotation 'NoSuchType' names what cannot be looked up at run time" in result


def test_limits_that_a_stop_or_each_other_defeat_are_named(app: Ekiden) -> None:
    @app.task(name="long", time_limit=600, soft_time_limit=600)
    async def long() -> None: ...

    @app.task(name="stubborn", max_retries=None, autoretry_for=(OSError,))
    def stubborn() -> None: ...

    assert [each.partition(":")[0] for each in troubles(app)] == ["warning limits", "warning limits", "warning retries"]


def test_a_task_that_no_worker_could_run_is_wrong(app: Ekiden) -> None:
    @app.task(name="slow", time_limit=5)
    def slow() -> None: ...

    (trouble,) = troubles(app)
    assert trouble.startswith("wrong worker: task slow needs a process of its own")


def test_what_lies_in_the_queues_is_told(app: Ekiden) -> None:
    with app:
        app.send_task("gone")
        app.transport.publish([Message("1", "default", b"garbage"), Message("2", "default.dead", b"{}")])

    found = troubles(app)

    assert found[0] == "warning queue: default: 2 ready to run, and no worker has any in hand"
    assert found[1] == "warning dead letters: default: 1 dead letters"
    assert found[2].startswith("warning queue: default: message 1: its body is not a call")
    assert found[3] == "warning queue: default: calls wait of tasks that this app does not have: gone"


def test_an_app_without_tasks_is_a_warning(tmp_path: Path) -> None:
    assert troubles(Ekiden("empty", broker=f"sqlite:///{tmp_path}/empty.db")) == ["warning tasks: the app has no tasks"]


def test_what_broker_and_results_warn_of_alike_is_told_once(couchdb_place: str) -> None:
    app = Ekiden("shop", broker=couchdb_place)
    alike = set(app.transport.warnings(["default"])) & set(app.backend.warnings())

    warned = [each.text for each in findings(app) if each.level == "warning"]

    assert set(warned) >= alike
    assert len(warned) == len(set(warned))
