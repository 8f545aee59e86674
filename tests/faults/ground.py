"""Where a fault happens: a broker, workers in real processes, and a ledger of what their tasks did.

Ground          one broker and queue, the app of the test's side, and all workers that the test started
RunningWorker   one supervisor with its worker and body processes: what it says, and signals to any of them
Ledger          what the tasks wrote down, by whichever process; see apps/ledger.py
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
from ekiden import Ekiden
from ekiden.message import DEAD_SUFFIX, Depth, Seen
from ekiden.transport import Transport
from ekiden.urls import parse_url

from tests import working

APPS = Path(__file__).parent / "apps"
PATIENCE = 20.0
"""Seconds that a test waits for what must happen, before it says that it did not."""

SETTLED_SECONDS = 0.5
"""How long a worker that was told to stop may take for a claim that it has begun."""

LONGEST_BACKLOGS = {"mongodb": 300, "couchdb": 500}
"""By the scheme of the broker, where it or what stands in for it becomes slow with a longer one."""

UNLUCKY = {"EKIDEN_TASK_MAX_DELIVERIES": "100"}
"""For workers that are killed so often that one message can be in many a dead one's hand without being the cause."""

on_one_broker = pytest.mark.parametrize("broker_url", ["sqlite"], indirect=True)
"""For a test in which the broker plays no part, and which takes its time."""

Found = TypeVar("Found")


def eventually(look: Callable[[], Found | None], *, what: str, within: float = PATIENCE) -> Found:
    """The same as for other tests, with the longer patience that real processes need."""
    return working.eventually(look, what=what, within=within)


def wait_a_while_for(look: Callable[[], object], *, seconds: float = 2.0) -> None:
    """Wait until ``look`` returns something true; for so long only, since it need not be so."""
    give_up = time.monotonic() + seconds
    while not look() and time.monotonic() < give_up:
        time.sleep(0.02)


class Ledger:
    """What the tasks wrote down."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def entries(self, what: str | None = None) -> list[dict[str, Any]]:
        """Every event, or those of one kind, oldest first."""
        text = self.path.read_text() if self.path.exists() else ""
        found = [json.loads(line) for line in text.splitlines()]
        return [each for each in found if what is None or each["what"] == what]

    def length(self) -> int:
        """How many events there are; quicker than to read them, and no work for the broker."""
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def done(self) -> Counter[int]:
        """How often each number was done."""
        return Counter(each["number"] for each in self.entries("work"))

    def wait(self, what: str, count: int = 1, *, within: float = PATIENCE) -> list[dict[str, Any]]:
        """Wait until ``what`` was written down ``count`` times."""
        eventually(lambda: len(self.entries(what)) >= count, what=f"{count} times {what!r}", within=within)
        return self.entries(what)


class RunningWorker:
    """A worker as a user starts it, in a process group of its own."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command, cwd=APPS, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.pid = self._process.pid
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, name="reads a worker's log", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log.append(line)

    def said(self, pattern: str) -> list[str]:
        """The lines of its log that match."""
        return [line for line in self.log[:] if re.search(pattern, line)]

    def wait_until_it_says(self, pattern: str, count: int = 1, *, within: float = PATIENCE) -> list[str]:
        """Wait for so many lines that match."""
        try:
            eventually(lambda: len(self.said(pattern)) >= count, what=f"the worker says {pattern!r}", within=within)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{''.join(self.log)}") from None
        return self.said(pattern)

    def wait_until_ready(self, processes: int = 1) -> None:
        """Wait until so many of its processes receive."""
        self.wait_until_it_says(" is ready: ", processes)

    def worker_pids(self) -> list[int]:
        """The worker processes that are alive."""
        return self._children("ekiden.worker_process")

    def body_pids(self) -> list[int]:
        """The body processes that are alive."""
        return self._children("ekiden.body_process")

    def _children(self, program: str) -> list[int]:
        return [each.pid for each in processes_of_group(self.pid) if program in command_line(each)]

    def kill_one(self, chance: random.Random) -> None:
        """``kill -9`` for one of its worker processes."""
        os.kill(eventually(lambda: chance.choice(self.worker_pids() or [0]), what="a process"), signal.SIGKILL)

    def kill_any(self, chance: random.Random) -> None:
        """``kill -9`` for one of its worker or body processes."""
        pids = eventually(lambda: self.worker_pids() + self.body_pids(), what="a process")
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(chance.choice(pids), signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the supervisor alone."""
        self._process.send_signal(number)

    def signal_everyone(self, number: signal.Signals) -> None:  # type: ignore[name-defined]
        """Send a signal to the whole process group, as a terminal does."""
        os.killpg(self.pid, number)

    def wait(self, *, within: float = PATIENCE) -> int:
        """Its exit status, once it has ended."""
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the worker did not end within {within} s\n{''.join(self.log)}") from None

    def stop(self, *, within: float = PATIENCE) -> int:
        """Stop it as an operator does, and return its exit status."""
        self.signal(signal.SIGTERM)
        return self.wait(within=within)

    def kill(self) -> None:
        """End everything that is left of it."""
        for process in processes_of_group(self.pid):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.kill()
        self._process.wait()
        self._reader.join(PATIENCE)
        assert self._process.stderr is not None
        self._process.stderr.close()


class Ground:
    """A broker and a queue of the test's own, the app that sends, and the workers that the test starts.

    ``depth``: what tells exactly what the queue holds, where the transport cannot.
    """

    def __init__(
        self, broker_url: str, queue: str, directory: Path, *, depth: Callable[[], Depth] | None = None
    ) -> None:
        self.broker_url = broker_url
        self.queue = queue
        self.directory = directory
        self.ledger = Ledger(directory / "ledger")
        self.app = Ekiden("sender", broker=broker_url, task_default_queue=queue)
        self.workers: list[RunningWorker] = []
        self._depth = depth
        self._result_backend: str | None = None

    @property
    def transport(self) -> Transport:
        """The broker, as the test sees it."""
        return self.app.transport

    def start(
        self,
        target: str = "tasks:app",
        *,
        processes: int = 1,
        ready: bool = True,
        environment: dict[str, str] | None = None,
        under: tuple[str, ...] = (),
        **options: object,
    ) -> RunningWorker:
        """Start a worker and, unless told not to, wait until all its processes receive.

        ``under``: a command that starts it. ``options``: those of ``ekiden worker``; True is a flag.
        """
        flags = [f"--processes={processes}"]
        for name, value in options.items():
            flags.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}"))
        command = [*under, sys.executable, "-m", "ekiden", "worker", target, *flags]
        started = RunningWorker(command, {**self.environment(), **(environment or {})})
        self.workers.append(started)
        if ready:
            started.wait_until_ready(processes)
        return started

    def environment(self) -> dict[str, str]:
        """What a process needs to run an app of ``apps`` here."""
        return {
            **os.environ,
            "EKIDEN_BROKER_URL": self.broker_url,
            "EKIDEN_TASK_DEFAULT_QUEUE": self.queue,
            "FAULTS_LEDGER": str(self.ledger.path),
            "PYTHONUNBUFFERED": "1",
            **({"EKIDEN_RESULT_BACKEND": self._result_backend} if self._result_backend else {}),
        }

    def backlog(self, count: int) -> int:
        """``count`` messages, or as many as this broker copes with: see ``LONGEST_BACKLOGS``."""
        return min(count, LONGEST_BACKLOGS.get(parse_url(self.broker_url).scheme, count))

    def lease(self, seconds: float) -> float:
        """A lease of so many seconds, or the shortest that this broker has."""
        return max(seconds, self.transport.description.shortest_lease)

    def store_results_in(self, url: str) -> None:
        """Have the test's side and every worker that is started from now on keep results there."""
        self.app.conf.result_backend = self._result_backend = url

    def send_many(self, task: str, count: int) -> None:
        """Send ``count`` calls of a task that takes a number."""
        signatures = [self.app.signature(task, (number,)) for number in range(count)]
        # Any task of an app can send many signatures; the test's side needs to know the name only.
        self.app.task(name=task)(_unknown_here).enqueue_many(signatures)

    def open(self, gate: str = "gate") -> None:
        """Let the tasks that wait for a gate end."""
        (self.directory / gate).touch()

    def depth(self) -> Depth:
        """What the queue holds: how many are ready, delayed and in somebody's hand."""
        return self._depth() if self._depth is not None else self.transport.depth(self.queue)

    @property
    def looking_counts(self) -> bool:
        """Whether this broker counts it as an attempt when somebody looks at a message."""
        return self.transport.description.browsing_counts

    def wait_until_ready_again(self, count: int) -> None:
        """Wait until so many messages wait in the queue and have done so for a while: no claim is on its way."""
        since = math.inf

        def look() -> bool:
            nonlocal since
            now = time.monotonic()
            since = min(since, now) if self.depth().ready == count else math.inf
            return time.monotonic() - since >= SETTLED_SECONDS

        eventually(look, what=f"{count} messages are ready and stay so")

    def wait_until_empty(self, *, within: float = PATIENCE) -> None:
        """Wait until nothing is ready, delayed or held in the queue."""
        try:
            eventually(lambda: not any(_counts(self.depth())), what="the queue is empty", within=within)
        except AssertionError as error:
            logs = "".join(line for worker in self.workers for line in worker.log[-50:])
            raise AssertionError(f"{error}: {self.depth()}\n{logs}") from None

    def dead(self) -> list[Seen]:
        """The dead letters."""
        return self.transport.browse(self.queue + DEAD_SUFFIX, limit=10_000)

    def attempts(self) -> Counter[int]:
        """How many messages of the queue have been handed out how often.

        Where ``looking_counts``, looking hands them out as well.
        """
        found: Counter[int] = Counter()
        after: str | None = None
        while batch := self.transport.browse(self.queue, after=after, limit=1000):
            found.update(seen.attempt for seen in batch)
            after = batch[-1].cursor
        return found

    def close(self) -> None:
        """End every process that was started, and the app."""
        for worker in self.workers:
            worker.kill()
        self.app.close()


def _unknown_here(number: int) -> None:
    raise AssertionError("this is the sender's side")


def _counts(depth: Depth) -> tuple[int, int, int]:
    assert depth.ready is not None
    assert depth.delayed is not None
    assert depth.leased is not None
    return depth.ready, depth.delayed, depth.leased


def processes_of_group(group: int) -> list[psutil.Process]:
    """The processes of a process group that are alive."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def command_line(process: psutil.Process) -> list[str]:
    """What a process was started with; nothing for one that has ended."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def wait_until_gone(pid: int, *, within: float = PATIENCE) -> None:
    """Wait until a process has ended, whoever's child it is."""

    def gone() -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    eventually(gone, what=f"process {pid} ends", within=within)
