"""The command as Celery's users type it: what is understood, and what each refusal says."""

from __future__ import annotations

import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from ekiden import Ekiden
from ekiden.app import load_app
from ekiden.cli import celery_words, ekiden
from ekiden.cli.target import apps_below
from ekiden.errors import ConfigurationError

SHOP = """
from ekiden import Ekiden

app = Ekiden("shop", broker="sqlite:///shop.db", task_routes={"*.mail": "mail"})


@app.task
def add(x, y):
    return x + y


@app.task
def mail(to):
    return to
"""

numbers = count(1)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with an app, in the current directory. No two tests import the same one."""
    name = f"celery_shop_{next(numbers)}"
    (tmp_path / f"{name}.py").write_text(SHOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(ekiden, arguments)
    assert result.exit_code == code, result.output
    return result


def refusal(*arguments: str) -> str:
    (line,) = [line for line in run(*arguments, code=2).stderr.splitlines() if line.startswith("Error: ")]
    return line.removeprefix("Error: ")


def completed(*words: str) -> list[str]:
    """What a shell offers for the last of the words, after ``ekiden``."""
    environment = {"COMP_WORDS": " ".join(["ekiden", *words]), "COMP_CWORD": str(len(words))}
    result = CliRunner().invoke(ekiden, [], prog_name="ekiden", env=environment | {"_EKIDEN_COMPLETE": "bash_complete"})
    return [line.removeprefix("plain,") for line in result.stdout.splitlines() if line]


@pytest.mark.parametrize(
    "words",
    ["-A {} call add", "--app={} call add", "call -A {} add", "call add -A {}", "call {}:app add", "call {} add"],
)
def test_the_app_may_be_named_before_or_behind_the_command(shop: str, words: str) -> None:
    run(*words.format(shop).split(), "-a", "[1, 2]")

    assert load_app(shop).transport.depth("default").ready == 1


def test_a_call_takes_the_short_options(shop: str) -> None:
    sent = run("-A", shop, "call", f"{shop}.add", "-a", "[1]", "-k", '{"y": 2}')

    (seen,) = load_app(shop).transport.browse("default")
    assert sent.stdout.strip() in str(seen.message.headers) + seen.message.body.decode() + seen.message.id


@pytest.mark.parametrize(
    ("words", "left"), [("purge -f", 0), ("purge -Q mail --force", 1), ("purge mail default --yes", 0)]
)
@pytest.mark.slow
def test_purge_empties_the_queues_that_are_named_or_all(shop: str, words: str, left: int) -> None:
    run("-A", shop, "call", "add", "-a", "[1, 2]")
    run("-A", shop, "call", "mail", "-a", '["ann"]')

    run("-A", shop, *words.split())

    transport = load_app(shop).transport
    assert (transport.depth("default").ready, transport.depth("mail").ready) == (left, 0)


@pytest.mark.parametrize("command", celery_words.COMMANDS)
def test_a_command_that_only_celery_has_says_what_to_use(shop: str, command: str) -> None:
    said = refusal("-A", shop, command, "anything")

    assert said == f"{command}: {celery_words.COMMANDS[command]}"


@pytest.mark.parametrize("names", [*celery_words.REFUSED_BY_WORKER, *celery_words.REFUSED_FLAGS_OF_WORKER], ids=str)
def test_an_option_that_only_celery_has_says_what_to_use(shop: str, names: tuple[str, ...]) -> None:
    value = ["1"] if names in celery_words.REFUSED_BY_WORKER else []
    sentence = {**celery_words.REFUSED_BY_WORKER, **celery_words.REFUSED_FLAGS_OF_WORKER}[names]

    for name in names:
        assert refusal("worker", shop, name, *value) == f"{names[-1]}: {sentence}"


@pytest.mark.parametrize("pool", ["gevent", "eventlet"])
def test_a_pool_of_green_threads_is_refused_with_what_does_its_work(shop: str, pool: str) -> None:
    assert "`async def` tasks run on an event loop" in refusal("worker", shop, "-P", pool)


def test_a_pool_that_nobody_knows_is_refused_by_name(shop: str) -> None:
    assert "'fork' is none of thread, process, threads, prefork, solo." in refusal("worker", shop, "-P", "fork")


@pytest.mark.parametrize(
    ("words", "processes", "threads"),
    [
        ("-P solo -c 3", 1, 1),
        ("-P threads -c 3", 1, 3),
        ("-P prefork --concurrency 2", 2, 1),
        ("-c 1 --threads 5 -l WARN -l INFO -O fair --without-gossip --without-mingle -S state", 1, 5),
    ],
)
@pytest.mark.slow
def test_a_worker_is_started_as_celerys_options_say(shop: str, words: str, processes: int, threads: int) -> None:
    command = [sys.executable, "-m", "ekiden", "-A", shop, "worker", "--burst", "-n", "one@%h", *words.split()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)

    assert ended.stderr.count(f", {threads} threads") == ended.stderr.count("is ready") == processes
    assert "one@" in ended.stderr
    assert "%h" not in ended.stderr


@pytest.mark.slow
def test_a_worker_warns_of_a_queue_that_nothing_sends_to(shop: str) -> None:
    command = [sys.executable, "-m", "ekiden", "-A", shop, "worker", "--burst", "-c", "1", "-Q", "celery,mail"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, stdin=subprocess.DEVNULL)

    assert "no task and no route of the app sends to celery; its calls go to default, mail" in ended.stderr


def test_a_module_alone_names_the_app_that_celery_projects_keep_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    number = next(numbers)
    for kind, files in {
        "several": {"__init__.py": "from ekiden import Ekiden\nother = Ekiden('other')\napp = Ekiden('app')\n"},
        "celery": {"__init__.py": "from ekiden import Ekiden\nother = Ekiden('other')\ncelery = Ekiden('app')\n"},
        "module": {"__init__.py": "", "celery.py": "from ekiden import Ekiden\nproj = Ekiden('app')\n"},
        "dotted": {"__init__.py": "", "tasks.py": "from ekiden import Ekiden\nproj = Ekiden('app')\n"},
    }.items():
        package = tmp_path / f"{kind}_{number}"
        package.mkdir()
        for name, text in files.items():
            (package / name).write_text(text)

    for target in (
        "several_{}",
        "celery_{}",
        "module_{}",
        "module_{}.celery",
        "dotted_{}.tasks",
        "dotted_{}.tasks.proj",
    ):
        assert isinstance(load_app(target.format(number)), Ekiden)
        assert load_app(target.format(number)).name == "app"
    with pytest.raises(ConfigurationError, match=r"it has no Ekiden app"):
        load_app(f"dotted_{number}")
    (tmp_path / f"two_{number}.py").write_text("from ekiden import Ekiden\nx = Ekiden('x')\ny = Ekiden('y')\n")
    with pytest.raises(ConfigurationError, match=rf"say which app, as two_{number}:NAME; its apps: x, y"):
        load_app(f"two_{number}")


def test_a_shell_completes_commands_apps_tasks_and_queues(shop: str) -> None:
    assert "worker" in completed("wor")
    assert completed("worker", "celery_") == [f"{shop}:app"]
    assert completed("-A", shop, "call", "a") == ["add"]
    assert completed("call", shop, f"{shop}.") == [f"{shop}.add", f"{shop}.mail"]
    assert completed("worker", shop, "-Q", "mail,de") == ["mail,default"]
    assert completed("purge", shop, "m") == ["mail"]
    assert completed("purge", "no_such_module", "m") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(shell: str) -> None:
    assert "_EKIDEN_COMPLETE" in run("completion", shell).stdout


def test_apps_are_found_without_importing_anything(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("from ekiden import Ekiden\napp = Ekiden(\n")
    (tmp_path / "exits.py").write_text("from ekiden import Ekiden as Celery\nraise SystemExit\ncelery = Celery('x')\n")
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("import ekiden\n\nshop = ekiden.Ekiden('shop')\n")

    assert sorted(apps_below(tmp_path)) == ["exits:celery", "pkg:shop"]
