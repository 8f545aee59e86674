"""What a real worker gives the bodies of its tasks: a context of their own, no standard input, and its log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from ekiden import Ekiden

pytestmark = pytest.mark.slow

PATIENCE = 30.0
PLACES = ("thread", "loop", "process")

APP = """
    import contextvars, decimal, logging, subprocess, sys
    from ekiden import Ekiden

    {configuration}

    app = Ekiden("surroundings")
    seen = contextvars.ContextVar("seen", default="nothing")
    logger = logging.getLogger("shop.orders")


    def read_and_set():
        found = [seen.get(), decimal.getcontext().prec]
        seen.set("something")
        decimal.getcontext().prec = 5
        return found


    def read_standard_input():
        script = "import sys; print(repr(sys.stdin.read()))"
        child = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=10)
        return [child.stdout.strip(), repr(sys.stdin.read())]


    def log(text):
        logger.info("order %s", text)
        logging.getLogger("ekiden.task").warning("a hint for %s", text)


    functions = {{"context": read_and_set, "input": read_standard_input, "log": log}}


    @app.task(name="thread")
    def in_thread(name, *args):
        return functions[name](*args)


    @app.task(name="loop")
    async def in_loop(name, *args):
        return functions[name](*args)


    @app.task(name="process", pool="process")
    def in_process(name, *args):
        return functions[name](*args)
"""


class Worker:
    """A real worker of one process and one thread, and the app that sends to it."""

    def __init__(self, directory: Path, configuration: str, *arguments: str) -> None:
        (directory / "shop.py").write_text(dedent(APP).format(configuration=configuration))
        broker = f"sqlite:///{directory}/shop.db"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("EKIDEN_")}
        command = [sys.executable, "-m", "ekiden", "worker", "shop:app", "--processes", "1", "--threads", "1"]
        self.log = directory / "log"
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, *arguments],
                cwd=directory,
                env={**kept, "EKIDEN_BROKER_URL": broker, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.PIPE,  # a terminal, say: nobody ever types anything
                stdout=log,
                stderr=log,
            )
        self._broker = broker

    def run(self, place: str, *args: object) -> tuple[str, Any]:
        """The id of the call, and what it returned."""
        with Ekiden("sender", broker=self._broker) as app:
            sent = app.send_task(place, args)
            return sent.id, sent.get(PATIENCE)

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()

    def end(self) -> list[str]:
        """Its whole log."""
        self._process.terminate()
        self._process.communicate(timeout=PATIENCE)
        return self.lines()


Start = Callable[..., Worker]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with started(tmp_path) as start:
        yield start


@contextmanager
def started(directory: Path) -> Iterator[Start]:
    """Starts workers, and leaves none behind."""
    workers: list[Worker] = []

    def start(configuration: str = "", *arguments: str) -> Worker:
        workers.append(Worker(directory, configuration, *arguments))
        return workers[-1]

    yield start
    for worker in workers:
        worker.end()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with started(tmp_path_factory.mktemp("surroundings")) as start:
        yield start()


@pytest.mark.parametrize("place", PLACES)
def test_a_tasks_context_variables_and_decimal_context_are_its_own(worker: Worker, place: str) -> None:
    assert [worker.run(place, "context")[1] for _ in range(3)] == [["nothing", 28]] * 3


@pytest.mark.parametrize("place", PLACES)
def test_a_task_that_reads_standard_input_finds_its_end(worker: Worker, place: str) -> None:
    assert worker.run(place, "input")[1] == ["''", "''"]


def test_a_programs_own_logging_holds_and_no_line_comes_twice(start: Start) -> None:
    worker = start('logging.basicConfig(level="INFO", format="MINE %(name)s %(message)s")')
    for place in PLACES:
        worker.run(place, "log", place)

    lines = worker.end()

    for place in PLACES:
        assert [line for line in lines if f"order {place}" in line] == [f"MINE shop.orders order {place}"]
        assert [line for line in lines if f"hint for {place}" in line] == [f"MINE ekiden.task a hint for {place}"]
    assert len([line for line in lines if "is ready" in line]) == 1


def test_a_handler_of_the_programs_on_one_logger_writes_its_lines_once(start: Start) -> None:
    worker = start(
        'logging.getLogger("shop").addHandler(logging.StreamHandler()); logging.getLogger("shop").setLevel("INFO")'
    )
    for place in PLACES:
        worker.run(place, "log", place)

    lines = worker.end()

    for place in PLACES:
        assert [line for line in lines if f"order {place}" in line] == [f"order {place}"]
        assert len([line for line in lines if f"hint for {place}" in line]) == 1


def test_a_log_of_json_is_json_everywhere_with_the_tasks_id(start: Start) -> None:
    worker = start("", "--log-format", "json")
    ids = {place: worker.run(place, "log", place)[0] for place in PLACES}

    lines = worker.end()

    records = [json.loads(line) for line in lines]
    for place in PLACES:
        written = [each for each in records if each["message"] in {f"order {place}", f"a hint for {place}"}]
        assert [each["logger"] for each in written] == ["shop.orders", "ekiden.task"]
        assert {each["task_id"] for each in written} == {ids[place]}
        assert {each["task_name"] for each in written} == {place}
    processes = {each["process"] for each in records if each["message"].startswith("order ")}
    assert len(processes) == 2, "the body process has written its own"
