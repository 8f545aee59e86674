"""What each command prints, for programs and for people, and what it says when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from textwrap import dedent
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from ekiden import Ekiden
from ekiden.app import load_app
from ekiden.cli import ekiden
from ekiden.message import HeaderValue, Message

SHOP = """
    from ekiden import Ekiden

    app = Ekiden("shop", broker="sqlite:///shop.db", task_routes={"*.mail": {"queue": "mail", "priority": 7}})
    inside = Ekiden("inside", broker="memory://inside")


    @app.task
    def add(x: int, y: int) -> int:
        return x + y


    @app.task(max_retries=0)
    def boom(text: str) -> None:
        raise ValueError(text)


    @app.task(autoretry_for=(OSError,), max_retries=1, default_retry_delay=0)
    def fetch() -> None:
        raise OSError("no route")


    @app.task(ignore_result=True)
    def mail(to: str) -> None:
        pass


    @inside.task
    def here() -> None:
        pass
"""

numbers = count(1)


class Shop:
    """An app in a module of its own, and the command, run beside it."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.target = f"{module}:app"

    @property
    def app(self) -> Ekiden:
        return load_app(self.target)

    def run(self, *arguments: object, code: int = 0, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(ekiden, [str(each) for each in arguments], input=stdin)
        assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == code, result.output
        return result

    @contextmanager
    def working(self) -> Iterator[None]:
        """A worker in a process of its own: the command closes its app, which is the same object in this process."""
        command = [sys.executable, "-m", "ekiden", "worker", self.target, "--processes", "1"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
            try:
                yield
            finally:
                worker.terminate()

    def json(self, *arguments: object) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    def refusal(self, *arguments: object, code: int = 1) -> str:
        """The one line that a mistake is answered with."""
        result = self.run(*arguments, code=code)
        assert result.stdout == ""
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        return line.removeprefix("Error: ")

    def work(self) -> None:
        """Work off what is there."""
        from ekiden.plan import WorkerOptions
        from ekiden.worker import Worker

        with self.app as app:
            Worker(app, WorkerOptions(burst=True, threads=2)).run()

    def dies(self, text: str = "broken") -> str:
        """Have a call fail for good; its id."""
        task_id = self.run("call", self.target, "boom", "--args", json.dumps([text])).stdout.strip()
        self.work()
        return task_id


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    module = f"shop_{next(numbers)}"
    (tmp_path / f"{module}.py").write_text(dedent(SHOP))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shop = Shop(module)
    yield shop
    shop.app.close()
    del sys.modules[module]


# Calls and results.


def test_call_prints_the_id_and_sends_what_it_is_told(shop: Shop) -> None:
    task_id = shop.run("call", shop.target, "mail", "--kwargs", '{"to": "ann"}', "--countdown", "60").stdout.strip()

    (seen,) = shop.app.transport.browse("mail")
    assert (seen.message.id, seen.message.priority, seen.condition.value) == (task_id, 7, "delayed")
    assert json.loads(seen.message.body)["kwargs"] == {"to": "ann"}


def test_a_call_can_go_elsewhere(shop: Shop) -> None:
    full_name = f"{shop.module}.add"

    shop.run(
        "call", shop.target, full_name, "--args", "[1, 2]", "--queue", "other", "--priority", 9, "--task-id", "mine"
    )

    (seen,) = shop.app.transport.browse("other")
    assert (seen.message.id, seen.message.priority) == ("mine", 9)


@pytest.mark.slow
def test_call_waits_for_the_result_and_prints_it_as_json(shop: Shop) -> None:
    with shop.working():
        waited = shop.run("call", shop.target, "add", "--args", "[1, 2]", "--wait", "30")

    assert waited.stdout == "3\n"


@pytest.mark.slow
def test_a_task_that_fails_is_told_on_standard_error(shop: Shop) -> None:
    with shop.working():
        failed = shop.run("call", shop.target, "boom", "--args", '["broken"]', "--wait", "30", code=1)

    assert failed.stdout == ""
    assert "ended as FAILURE: ValueError: broken" in failed.stderr
    assert "raise ValueError(text)" in failed.stderr


def test_a_task_that_takes_too_long_goes_on(shop: Shop) -> None:
    refusal = shop.refusal("call", shop.target, "add", "--args", "[1, 2]", "--wait", "0.01")

    assert "had not ended after 0.01 s; it is PENDING" in refusal


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("ad",), 1, "has no task 'ad'; did you mean"),
        (("add", "--args", "1"), 2, "is not a JSON array, such as"),
        (("add", "--args", "[1"), 2, "is not a JSON array, such as"),
        (("add", "--kwargs", "[]"), 2, "is not a JSON object, such as"),
        (("add",), 1, "add() missing a required argument: 'x'. shop_"),
        (("add", "--args", '["one", 2]'), 1, "add() cannot take 'one' for 'x'"),
        (("add", "--args", "[1, 2]", "--priority", "10"), 1, "10 is not a priority"),
        (("add", "--args", "[1, 2]", "--queue", "a b"), 1, "'a b' is not a queue name"),
    ],
)
def test_a_call_that_cannot_be_made_is_refused_in_one_sentence(
    shop: Shop, arguments: tuple[str, ...], code: int, said: str
) -> None:
    assert said in shop.refusal("call", shop.target, *arguments, code=code)


def test_result_tells_everything_that_is_stored(shop: Shop) -> None:
    done = shop.run("call", shop.target, "add", "--args", "[1, 2]").stdout.strip()
    failed = shop.dies()

    value, failure = shop.json("result", shop.target, done), shop.json("result", shop.target, failed, "--wait", "5")

    assert (value["state"], value["value"], value["task"], value["queue"]) == (
        "SUCCESS",
        3,
        f"{shop.module}.add",
        "default",
    )
    assert (failure["state"], failure["value"], failure["error"]) == ("FAILURE", None, "ValueError: broken")
    assert "Traceback" in shop.run("result", shop.target, failed).stdout
    assert shop.json("result", shop.target, "nobody")["state"] == "PENDING"


def test_a_revoked_task_does_not_run(shop: Shop) -> None:
    task_id = shop.run("call", shop.target, "add", "--args", "[1, 2]").stdout.strip()

    shop.run("revoke", shop.target, task_id)
    shop.work()

    assert shop.json("result", shop.target, task_id)["state"] == "REVOKED"


# Queues.


def test_queues_are_listed_with_their_dead_letters(shop: Shop) -> None:
    shop.run("call", shop.target, "add", "--args", "[1, 2]")
    shop.run("call", shop.target, "mail", "--args", '["ann"]', "--countdown", "60")

    assert shop.json("queues", shop.target) == [
        {"queue": "default", "ready": 1, "delayed": 0, "leased": 0},
        {"queue": "default.dead", "ready": 0, "delayed": 0, "leased": 0},
        {"queue": "mail", "ready": 0, "delayed": 1, "leased": 0},
        {"queue": "mail.dead", "ready": 0, "delayed": 0, "leased": 0},
    ]
    assert "default.dead      0        0       0" in shop.run("queues", shop.target).stdout


def test_purge_needs_a_yes_where_nobody_can_be_asked(shop: Shop) -> None:
    shop.run("call", shop.target, "add", "--args", "[1, 2]")

    assert "say --yes" in shop.refusal("purge", shop.target, "default", code=2)
    assert shop.run("purge", shop.target, "default", "--yes").stdout == "1 message of default deleted.\n"
    assert shop.app.transport.depth("default").ready == 0


# Dead letters.


def test_dead_letters_are_listed_with_their_reason(shop: Shop) -> None:
    task_id = shop.dies("first line\nsecond line")

    (row,) = shop.json("dead", "list", shop.target, "default")

    at = row.pop("at")
    assert at.endswith("+00:00")
    assert row == {
        "id": task_id,
        "task": f"{shop.module}.boom",
        "reason": "ValueError",
        "error": "first line\nsecond line",
        "attempts": 1,
    }
    (_, line) = shop.run("dead", "list", shop.target, "default").stdout.splitlines()
    assert line.split() == [task_id, f"{shop.module}.boom", "ValueError", "first", "line", "1", at]
    assert shop.run("dead", "list", shop.target, "mail").stdout == "mail has no dead letters.\n"
    assert shop.json("dead", "list", shop.target, "mail") == []


def test_more_dead_letters_than_a_page_are_listed_up_to_a_limit(shop: Shop) -> None:
    shop.app.transport.publish([Message(f"{number:032}", "mail.dead", b"garbage") for number in range(250)])

    assert len(shop.json("dead", "list", shop.target, "mail")) == 250
    assert len(shop.json("dead", "list", shop.target, "mail", "--limit", "101")) == 101


def test_a_dead_letter_is_shown_whole(shop: Shop) -> None:
    task_id = shop.dies()
    shop.app.transport.publish([Message("garbage", "default.dead", b"\xff{", {"color": "red"})])

    call, garbage = (shop.json("dead", "show", shop.target, "default.dead", each) for each in (task_id, "garbage"))

    assert (call["args"], call["queue"], call["tries"], call["body"]) == (["broken"], "default", 1, None)
    assert (garbage["task"], garbage["headers"], garbage["body"]) == (None, {"color": "red"}, "\\xff{")
    assert shop.refusal("dead", "show", shop.target, "default", "nobody").startswith(
        "default has no dead letter nobody"
    )


@pytest.mark.slow
def test_a_dead_letter_is_sent_back_by_its_id_and_the_others_stay_untouched(shop: Shop) -> None:
    dead = [shop.dies(text) for text in "abc"]

    shop.run("dead", "retry", shop.target, "default", dead[1])

    assert [row["id"] for row in shop.json("dead", "list", shop.target, "default")] == [dead[0], dead[2]]
    (back,) = shop.app.transport.browse("default")
    assert json.loads(back.message.body)["id"] == dead[1]
    assert {seen.attempt for seen in shop.app.transport.browse("default.dead")} == {0}
    assert shop.json("result", shop.target, dead[1])["state"] == "PENDING"


@pytest.mark.slow
def test_all_dead_letters_are_sent_back_once_and_may_die_again(shop: Shop) -> None:
    dead = {shop.dies(text) for text in "abc"}

    assert "3 dead letters of default sent back." in shop.run("dead", "retry", shop.target, "default", "--all").stdout
    shop.work()

    assert {row["id"] for row in shop.json("dead", "list", shop.target, "default")} == dead


def test_a_call_that_died_after_its_last_try_is_really_tried_again(shop: Shop) -> None:
    shop.run("call", shop.target, "fetch")
    shop.work()
    (before,) = shop.json("dead", "list", shop.target, "default")

    shop.run("dead", "retry", shop.target, "default", "--all")
    runs: list[str] = []
    shop.app.tasks[f"{shop.module}.fetch"].function = lambda: runs.append("again")
    shop.work()

    assert runs == ["again"]
    assert shop.json("result", shop.target, before["id"])["state"] == "SUCCESS"


@pytest.mark.parametrize("expires", [60, -3600], ids=["not yet", "long ago"])
def test_what_is_sent_back_has_its_whole_lifetime_again(shop: Shop, expires: int) -> None:
    sent = time.time() - 7200
    for retries in (0, 4):
        call = {"v": 1, "task": f"{shop.module}.add", "id": f"call-{retries}", "sent": sent, "args": [1, retries]}
        lifetime = {"expires": time.time() + expires, "retries": retries, "eta": sent + 60, "last_error": "OSError"}
        body = json.dumps(call | lifetime).encode()
        shop.app.transport.publish(
            [Message(f"letter-{retries}", "default.dead", body, {"ekiden-dead-queue": "default"})]
        )

    began = time.time()
    shop.run("dead", "retry", shop.target, "default", "--all")

    for seen in shop.app.transport.browse("default"):
        again = json.loads(seen.message.body)
        assert again["sent"] >= began
        assert again["expires"] - again["sent"] == pytest.approx(7200 + expires, abs=1)
        assert not {"retries", "eta", "last_error"} & set(again)
    shop.work()
    assert [shop.app.AsyncResult(f"call-{retries}").get(1) for retries in (0, 4)] == [1, 5]
    assert shop.json("dead", "list", shop.target, "default") == []


def test_what_died_after_its_tries_is_sent_back_with_the_lifetime_that_its_first_try_had(shop: Shop) -> None:
    shop.run("call", shop.target, "fetch", "--expires", "100")
    shop.work()

    shop.run("dead", "retry", shop.target, "default", "--all")

    (seen,) = shop.app.transport.browse("default")
    again = json.loads(seen.message.body)
    assert again["expires"] - again["sent"] == pytest.approx(100, abs=0.01)


def test_what_no_worker_could_read_waits_for_a_newer_one_when_it_is_sent_back(shop: Shop) -> None:
    shop.app.transport.publish([Message("0" * 32, "default.dead", b'{"v":2}', {"ekiden-dead-queue": "default"})])

    shop.run("dead", "retry", shop.target, "default", "--all")
    shop.work()

    assert [seen.message.body for seen in shop.app.transport.browse("default")] == [b'{"v":2}']
    assert shop.json("dead", "list", shop.target, "default") == []


IMPOSSIBLE_QUEUES = ["a b", "a/b", "q" * 300, "other.dead", "reply.nobody", "a\nb", "a,b"]


@pytest.mark.parametrize("chosen", ["--all", "letter"])
@pytest.mark.parametrize("name", IMPOSSIBLE_QUEUES, ids=range(len(IMPOSSIBLE_QUEUES)))
@pytest.mark.slow
def test_a_letter_from_an_impossible_queue_stays_and_the_others_go(shop: Shop, name: str, chosen: str) -> None:
    dead = shop.dies()
    body = json.dumps({"v": 1, "task": f"{shop.module}.add", "id": "call", "sent": 0, "args": [1, 2]}).encode()
    letter = Message("letter", "default.dead", body, {"ekiden-dead-queue": name})
    with shop.app as app:
        app.transport.publish([letter])

    result = shop.run("dead", "retry", shop.target, "default", chosen, code=1)

    assert "1 dead letter cannot be sent back and stays in default.dead, such as call: nothing can be sent to" in (
        result.stderr
    )
    left = {seen.message.id: seen for seen in shop.app.transport.browse("default.dead")}
    assert left["letter"].message == letter
    assert left["letter"].attempt == 0
    assert len(left) == (1 if chosen == "--all" else 2)
    assert [json.loads(seen.message.body)["id"] for seen in shop.app.transport.browse("default")] == (
        [dead] if chosen == "--all" else []
    )


def test_retry_says_what_it_could_not_find(shop: Shop) -> None:
    assert "say which: the ids of some, or --all" in shop.refusal("dead", "retry", shop.target, "default", code=2)
    missing = shop.run("dead", "retry", shop.target, "default", "nobody", code=1)
    assert "1 dead letter could not be found in default.dead" in missing.stderr


ODD_VALUES: list[HeaderValue] = [
    None,
    True,
    -1,
    2**62,
    1e300,
    -1e300,
    "",
    "yesterday",
    "\x1b[2J\n2 messages",
    "x" * 500,
]


@pytest.mark.parametrize("value", ODD_VALUES, ids=range(len(ODD_VALUES)))
@pytest.mark.slow
def test_dead_letters_are_listed_shown_and_sent_back_whatever_their_headers_say(shop: Shop, value: HeaderValue) -> None:
    names = ["reason", "error", "attempts", "at", "queue"]
    headers: dict[str, HeaderValue] = {f"ekiden-dead-{name}": value for name in names} | {"own": value}
    body = json.dumps({"v": 1, "task": "\x1b]0;gone\x07", "id": "a\nb\x9b", "sent": 1.0}).encode()
    with shop.app as app:
        app.transport.publish([Message("odd", "default.dead", body, headers)])
        app.transport.publish([Message("odder", "default.dead", b"\x1b\xff\x9b", headers)])

    listed = shop.run("dead", "list", shop.target, "default").stdout
    shown = [shop.run("dead", "show", shop.target, "default", each).stdout for each in ("odd", "odder")]

    assert len(listed.splitlines()) == 3
    assert_moves_nothing(listed, *shown)
    assert [each["id"] for each in shop.json("dead", "list", shop.target, "default")] == ["a\nb\x9b", "odder"]
    assert [each["headers"] for each in (shop.json("dead", "show", shop.target, "default", "odd"),)] == [{"own": value}]
    if not isinstance(value, str):
        shop.run("dead", "retry", shop.target, "default", "--all")
        with shop.app as app:
            assert len(app.transport.browse("default")) == 2


HOSTILE = "gone\x1b[2J\x1b]0;title\x07\r\nForged: all is well\x9b\u202e"


def assert_moves_nothing(*printed: str) -> None:
    """Whatever was printed neither moves the cursor nor begins a line of its own."""
    for text in printed:
        assert not [character for character in text if character != "\n" and not character.isprintable()], text
        assert not [line for line in text.splitlines() if line.startswith("Forged")], text


def test_nothing_from_outside_moves_the_cursor(shop: Shop) -> None:
    task_id = shop.dies(HOSTILE)

    listed = shop.run("dead", "list", shop.target, "default")
    shown = shop.run("dead", "show", shop.target, "default", task_id)
    stored = shop.run("result", shop.target, task_id)
    as_json = [shop.run("result", shop.target, task_id, "--json"), shop.run("dead", "list", shop.target, "x", "--json")]
    refused = shop.run("call", shop.target, HOSTILE, code=1)
    missing = shop.run("dead", "show", shop.target, "default", HOSTILE, code=1)
    revoked = shop.run("revoke", shop.target, HOSTILE)

    for result in (listed, shown, stored, *as_json, refused, missing, revoked):
        assert_moves_nothing(result.stdout, result.stderr)
    assert "gone\\x1b[2J" in listed.stdout
    assert json.loads(as_json[0].stdout)["error"] == f"ValueError: {HOSTILE}"


def test_a_failure_that_is_waited_for_moves_no_cursor(shop: Shop) -> None:
    with shop.working():
        result = shop.run("call", shop.target, "boom", "--args", json.dumps([HOSTILE]), "--wait", "30", code=1)

    assert_moves_nothing(result.stdout, result.stderr)
    assert "ValueError: gone\\x1b[2J" in result.stderr


def test_dead_letters_can_be_purged(shop: Shop) -> None:
    shop.dies()

    shop.run("dead", "purge", shop.target, "default", "--yes")

    assert shop.json("dead", "list", shop.target, "default") == []


# Looking.


def test_transports_tells_what_every_installed_one_promises(shop: Shop) -> None:
    found = {row["scheme"]: row for row in shop.json("transports")}

    assert {"memory", "sqlite"} <= found.keys()
    assert found["sqlite"]["shared_between_processes"] is True
    assert found["sqlite"]["options"]["synchronous"] == "normal"
    assert "sqlite://" in shop.run("transports").stdout


def test_explain_is_told_to_people_and_to_programs(shop: Shop) -> None:
    text = shop.run("explain", shop.target, "mail").stdout
    told = shop.json("explain", shop.target, "mail")

    assert ["queue", "mail", "(the", "route", "'*.mail')"] in [line.split() for line in text.splitlines()]
    assert "IN YOUR PROCESS\n  1 Task.delay  " in text
    assert [step["number"] for step in told["steps"]] == list(range(1, len(told["steps"]) + 1))
    assert shop.app.transport.depth("mail").ready == 0


# Mistakes that any command may meet.


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("nowhere:app", "there is no module 'nowhere'"),
        ("{module}:ap", "has no 'ap'; its apps: app, inside"),
        ("{module}:add", "not an Ekiden app"),
        ("{module}:inside", "memory://inside lives inside one process"),
    ],
)
def test_an_app_that_cannot_be_used_is_refused_in_one_sentence(shop: Shop, target: str, said: str) -> None:
    assert said.format(module=shop.module) in shop.refusal("queues", target.format(module=shop.module))


def test_a_broker_that_cannot_be_opened_is_named(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    shop.app.conf.broker_url = "sqlite:////proc/nothing.db"

    assert "sqlite:////proc/nothing.db: the file cannot be opened" in shop.refusal("queues", shop.target)


def test_a_bug_keeps_its_traceback() -> None:
    from ekiden.cli import Commands

    @click.group(cls=Commands)
    def group() -> None: ...

    @group.command()
    def buggy() -> None:
        raise ZeroDivisionError

    assert isinstance(CliRunner().invoke(group, ["buggy"]).exception, ZeroDivisionError)


def paths(group: click.Group, path: str = "ekiden") -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield f"{path} {name}"
        if isinstance(command, click.Group):
            yield from paths(command, f"{path} {name}")


@pytest.mark.parametrize("path", [path for path in paths(ekiden) if path != "ekiden demo"])
def test_the_help_of_each_command_shows_it_at_work(path: str) -> None:
    shown = CliRunner().invoke(ekiden, [*path.split()[1:], "--help"])

    assert shown.exit_code == 0
    assert f"\n  {path}" in shown.output


def test_a_setting_that_does_not_exist_is_told_with_the_line_of_the_users_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mistaken.py").write_text('from ekiden import Ekiden\n\napp = Ekiden("x", task_serializer="pickle")\n')
    monkeypatch.chdir(tmp_path)

    result = CliRunner().invoke(ekiden, ["queues", "mistaken:app"])

    assert result.exit_code != 0
    assert f"({tmp_path / 'mistaken.py'}:3)" in result.stderr
