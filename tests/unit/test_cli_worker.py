"""`ekiden worker` as it is run: real processes, told by signals."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import psutil
import pytest
from ekiden.cli.worker import queue_names
from ekiden.cpus import available_cpus
from ekiden.errors import ConfigurationError

from tests.working import eventually

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

    def says_something_within(self, seconds: float) -> bool:
        """Whether there is something to read for ``line``."""
        assert self.process.stderr is not None
        return bool(select.select([self.process.stderr], [], [], seconds)[0])

    def processes(self) -> list[int]:
        """The worker processes that are alive."""
        children = psutil.Process(self.process.pid).children()
        return [each.pid for each in children if each.status() != psutil.STATUS_ZOMBIE]

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
@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_does(start: Start, signals: tuple[signal.Signals, ...]) -> None:
    worker = start("worker", "shop:app", "--processes", "1")
    worker.line("is ready")

    assert worker.end(*signals) == 0
    assert "has stopped" in worker.told
    assert "killed" not in worker.told


def test_a_worker_process_told_twice_from_outside_stops_too(start: Start) -> None:
    worker = start("worker", "shop:app", "--processes", "1", "--log-format", "json")
    child = int(worker.line(r'is ready.*"process":(\d+)')[1])

    for _ in range(2):
        os.kill(child, signal.SIGTERM)

    worker.line("ended by itself .* it is replaced")
    worker.line("is ready")
    assert worker.end(signal.SIGTERM) == 0


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


def has_settings(directory: Path, **settings: object) -> None:
    """Have the app set them in its module."""
    written = directory / "shop.py.new"  # a worker that reloads must not find half of it
    written.write_text(f"{dedent(SHOP)}\napp.conf.update({settings!r})\n")
    written.replace(directory / "shop.py")


@pytest.mark.slow
def test_the_number_of_processes_that_the_app_sets_is_obeyed(start: Start, tmp_path: Path) -> None:
    has_settings(tmp_path, worker_concurrency=3)
    found = {options: start("worker", "shop:app", "--burst", *options) for options in [(), ("--processes", "2")]}

    assert [worker.end() for worker in found.values()] == [0, 0]
    assert [worker.told.count("is ready") for worker in found.values()] == [3, 2]


@pytest.mark.slow
def test_settings_for_the_supervisor_can_come_from_the_environment(start: Start) -> None:
    workers = start("worker", "shop:app", "--burst", EKIDEN_WORKER_PROCESSES="3")
    mistaken = start("worker", "shop:app", EKIDEN_WORKER_PROCESSES="none")

    assert workers.end() == 0
    assert workers.told.count("is ready") == 3
    assert mistaken.end() == 78
    assert "environment variable EKIDEN_WORKER_PROCESSES: " in mistaken.told
    assert mistaken.told.count("\n") == 1


@pytest.mark.parametrize(("options", "seconds"), [((), "3.5"), (("--grace", "4.5"), "4.5")])
def test_the_grace_that_the_app_sets_is_obeyed(
    start: Start, tmp_path: Path, options: tuple[str, ...], seconds: str
) -> None:
    has_settings(tmp_path, worker_grace=3.5, worker_processes=1)
    worker = start("worker", "shop:app", *options)
    worker.line("is ready")

    assert worker.end(signal.SIGTERM) == 0
    assert f"running tasks get {seconds} s" in worker.told


def test_the_liveness_file_that_the_app_sets_is_touched(start: Start, tmp_path: Path) -> None:
    has_settings(tmp_path, worker_liveness_file=str(tmp_path / "alive"), worker_processes=1)
    worker = start("worker", "shop:app")
    worker.line("is ready")

    eventually((tmp_path / "alive").exists, what="the file is touched")

    assert worker.end(signal.SIGTERM) == 0


def test_settings_for_the_supervisor_that_cannot_be_read_stop_nobody(start: Start, tmp_path: Path) -> None:
    into_each_pipe = """
        import contextlib, os
        for number in range(3, 30):
            with contextlib.suppress(OSError):
                os.write(number, b"not meant for you\\n")
    """
    (tmp_path / "shop.py").write_text(dedent(into_each_pipe) + dedent(SHOP))
    worker = start("worker", "shop:app", "--burst")

    assert worker.end() == 0
    assert "cannot be read, and its defaults hold" in worker.told
    assert worker.told.count("is ready") == available_cpus()


@pytest.mark.slow
def test_settings_that_change_are_obeyed_after_a_reload(start: Start, tmp_path: Path) -> None:
    has_settings(tmp_path, worker_processes=1)
    worker = start("worker", "shop:app", "--reload", str(tmp_path))
    worker.line("is ready")

    for count in (3, 2):
        begun = time.monotonic()
        while time.monotonic() < begun + 20:  # the watch may begin a moment after the start
            has_settings(tmp_path, worker_processes=count, result_expires=time.monotonic())
            if worker.says_something_within(1.0):
                break
        worker.line("processes are replaced")
        eventually(lambda count=count: len(worker.processes()) == count, what=f"{count} processes")

    assert worker.end(signal.SIGTERM) == 0


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
