"""The first worker process is started ahead of the command's own imports: when, and what becomes of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from ekiden.starting import Spare, WorkerProcess, started_ahead

LATE = ("typing", "click", "msgspec", "logging", "asyncio")
"""What is imported after the first worker process was started."""

NEEDLESS_HERE = ("ssl", "hashlib", "asyncio", "stevedore", "importlib.metadata", "subprocess")
"""What a worker process does not need as long as nobody asks for it, and what takes long to import."""


@pytest.fixture(autouse=True)
def signals_are_heard_afterwards() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def loaded(program: str) -> set[str]:
    """The modules that are there after a program, in an interpreter of its own."""
    told = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    )
    return set(told.stdout.split())


@pytest.mark.parametrize(
    "line",
    ["worker shop:app", "worker", "-A shop worker -c 2", "--app shop worker", "--app=shop worker --reload"],
)
def test_the_process_of_a_worker_is_started_ahead(line: str) -> None:
    spare = started_ahead(line.split())

    assert spare is not None
    process = spare.take()
    assert process is not None
    assert spare.take() is None
    process.process.communicate(b"", timeout=20)  # without a plan it ends, and says nothing
    process.close_up()
    assert process.process.returncode == 0


@pytest.mark.parametrize("line", ["", "call shop:app worker", "-A worker queues", "worker --help", "--version", "-A"])
def test_no_process_is_started_for_other_commands(line: str) -> None:
    assert started_ahead(line.split()) is None


def test_a_process_that_nobody_takes_is_ended() -> None:
    process = WorkerProcess([])

    Spare(process).end()

    assert process.up is None
    assert not psutil.pid_exists(process.process.pid)


def test_a_mistake_on_the_command_line_leaves_no_process() -> None:
    command = [sys.executable, "-m", "ekiden", "worker", "--nonsense"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)

    assert ended.returncode == 2
    assert ended.stderr.count("Error: ") == 1
    assert not [each for each in psutil.Process().children(recursive=True) if "--nonsense" in each.cmdline()]


def test_what_starts_the_first_process_imports_little() -> None:
    assert not loaded("import ekiden.starting") & {*LATE, "ekiden.supervisor"}


def test_a_worker_process_imports_nothing_that_it_may_not_need(tmp_path) -> None:
    program = (
        "import ekiden.worker_process, ekiden\n"
        f"app = ekiden.Ekiden('shop', broker='sqlite:///{tmp_path}/x.db')\n"
        "app.opened_transport(), app.opened_backend()\n"
    )

    assert not loaded(program) & set(NEEDLESS_HERE)
