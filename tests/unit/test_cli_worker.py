"""`ekiden worker` as it is run: real processes, told by signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from ekiden.cli.worker import queue_names
from ekiden.errors import ConfigurationError

SHOP = """
    from ekiden import Ekiden

    app = Ekiden("shop", broker="sqlite:///shop.db")
    inside = Ekiden("inside", broker="memory://")


    @app.task
    def add(x: int, y: int) -> int:
        return x + y


    @app.task(queue="urgent")
    def hurry() -> None:
        pass
"""

Start = Callable[..., "Command"]


class Command:
    """A running `ekiden`. ``line`` waits for a line on standard error that fits."""

    def __init__(self, directory: Path, *arguments: str, **environment: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("EKIDEN_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ekiden", *arguments],
            cwd=directory,
            env=kept | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.told = ""

    def line(self, pattern: str) -> re.Match[str]:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.told += line
            if found := re.search(pattern, line):
                return found
        pytest.fail(f"no line fits {pattern!r}:\n{self.told}")

    def end(self, *signals: signal.Signals) -> int:
        for each in signals:
            self.process.send_signal(each)
        out, rest = self.process.communicate(timeout=20)
        self.told += out + rest
        return self.process.returncode


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    (tmp_path / "shop.py").write_text(dedent(SHOP))
    commands: list[Command] = []

    def started(*arguments: str, **environment: str) -> Command:
        commands.append(Command(tmp_path, *arguments, **environment))
        return commands[-1]

    yield started
    for command in commands:
        if command.process.poll() is None:
            command.process.kill()
            command.process.communicate()


@pytest.mark.slow
def test_a_worker_says_what_it_works_for_once_and_works_off_what_is_there(start: Start, tmp_path: Path) -> None:
    task_id = start("call", "shop:app", "add", "--args", "[1, 2]").process.communicate(timeout=20)[0].strip()

    worker = start("worker", "shop:app", "--burst", "--processes", "2")

    assert worker.end() == 0
    assert worker.told.count("broker sqlite:///shop.db, results sqlite:///shop.db") == 1
    assert worker.told.count("queues default, urgent\n") == 1
    assert worker.told.count("tasks shop.add, shop.hurry\n") == 1
    found = start("result", "shop:app", task_id)
    assert found.end() == 0
    assert re.search(r"^value +3$", found.told, re.MULTILINE)


@pytest.mark.parametrize("signals", [(signal.SIGTERM,), (signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM)])
def test_a_worker_that_is_told_to_stop_does(start: Start, signals: tuple[signal.Signals, ...]) -> None:
    worker = start("worker", "shop:app", "--processes", "1")
    worker.line("is ready")

    assert worker.end(*signals) == 0
    assert "has stopped" in worker.told
    assert "killed" not in worker.told


def test_a_worker_process_that_is_told_twice_from_outside_stops_too(start: Start) -> None:
    worker = start("worker", "shop:app", "--processes", "1", "--log-format", "json")
    child = int(worker.line(r'is ready.*"process":(\d+)')[1])

    for _ in range(2):
        os.kill(child, signal.SIGTERM)

    assert worker.end() == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("shop:inside", "Error: memory:// lives inside one process"),
        ("nowhere:app", "Error: nowhere:app: there is no module 'nowhere'"),
        ("shop:add", "Error: shop:add is <Task shop.add>, not an Ekiden app"),
    ],
)
def test_an_app_that_no_worker_can_work_for_is_refused_once(start: Start, target: str, said: str) -> None:
    worker = start("worker", target, "--processes", "2")

    assert worker.end() == 78
    assert worker.told.startswith(said)
    assert worker.told.count("\n") == 1


@pytest.mark.slow
def test_what_the_supervisor_must_know_comes_from_the_environment(start: Start) -> None:
    workers = start("worker", "shop:app", "--burst", EKIDEN_WORKER_PROCESSES="3")
    mistaken = start("worker", "shop:app", EKIDEN_WORKER_PROCESSES="none")

    assert workers.end() == 0
    assert workers.told.count("is ready") == 3
    assert mistaken.end() == 1
    assert "Error: environment variable EKIDEN_WORKER_PROCESSES: " in mistaken.told


def test_the_supervisor_imports_no_app_and_opens_no_broker(start: Start, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text("import os, sys\nprint(os.getpid(), file=sys.stderr)\n" + dedent(SHOP))

    worker = start("worker", "shop:app", "--burst", "--processes", "1")
    supervisor = worker.process.pid

    assert worker.end() == 0
    assert supervisor not in map(int, re.findall(r"^\d+$", worker.told, re.MULTILINE))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, ((), False)),
        ("a", (("a",), False)),
        ("a, b", (("a", "b"), False)),
        ("a>b", (("a", "b"), True)),
    ],
)
def test_queues_are_read(text: str | None, names: tuple[tuple[str, ...], bool]) -> None:
    assert queue_names(text) == names


@pytest.mark.parametrize("text", ["a>b,c", "a,,b", "", "a.dead", "reply.a"])
def test_queues_that_cannot_be_served_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        queue_names(text)
