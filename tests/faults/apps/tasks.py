"""An app whose tasks write down what they do; the broker, the queue and the lease come from the environment."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

from ekiden import Ekiden
from ekiden.errors import WorkerLostError
from ledger import is_open, note, wait_for

app = Ekiden("faults", task_max_retries=3)


@app.task(name="work", bind=True)
def work(self, number: int, seconds: float = 0.0) -> int:
    """Take some time, then write down that it is done."""
    if seconds:
        time.sleep(seconds)
    note("work", number=number, attempt=self.request.attempt)
    return number


@app.task(name="work_async", bind=True)
async def work_async(self, number: int, seconds: float = 0.0) -> int:
    """The same in the event loop."""
    await asyncio.sleep(seconds)
    note("work", number=number, attempt=self.request.attempt)
    return number


@app.task(name="quick", bind=True, ignore_result=True)
def quick(self, number: int) -> None:
    """Take a few milliseconds, and write down that it is done; its result is not wanted."""
    time.sleep(0.003)
    note("work", number=number, attempt=self.request.attempt)


@app.task(name="gated", bind=True)
def gated(self, number: int, gate: str = "gate") -> int:
    """Begin, and end when the test says so."""
    note("begun", number=number, attempt=self.request.attempt)
    wait_for(gate)
    note("work", number=number, attempt=self.request.attempt)
    return number


@app.task(name="silent", bind=True)
def silent(self, number: int) -> int:
    """Begin, and end when the test says so; writes nothing after that."""
    note("begun", number=number, attempt=self.request.attempt)
    wait_for("gate")
    return number


@app.task(name="gated_apart", pool="process")
def gated_apart(number: int, gate: str = "gate") -> int:
    """The same, in a body process."""
    note("begun", number=number)
    wait_for(gate)
    note("work", number=number)
    return number


@app.task(name="work_apart", bind=True, pool="process")
def work_apart(self, number: int, seconds: float = 0.0) -> int:
    """What ``work`` does, in a body process."""
    return work.run(number, seconds)


@app.task(name="follow", bind=True)
def follow(self, number: int, what: str) -> None:
    """What comes after a task."""
    note("follow", number=number, of=what)


@app.task(name="fails_first", bind=True)
def fails_first(self) -> int:
    """When the test says so, fail in the first hand-out, succeed in the second."""
    note("begun", attempt=self.request.attempt)
    wait_for({1: "first", 2: "second"}[self.request.attempt])
    if self.request.attempt == 1:
        raise ValueError("the first hand-out fails")
    return self.request.attempt


@app.task(name="fails_once", bind=True, autoretry_for=(ValueError,), retry_backoff=0, default_retry_delay=0.5)
def fails_once(self) -> str:
    """Fail in the first try."""
    note("fails", retries=self.request.retries)
    if self.request.retries == 0:
        raise ValueError("the first try fails")
    return f"tried {self.request.retries} times before"


@app.task(name="long")
def long(seconds: float) -> None:
    """Take long."""
    note("begun")
    time.sleep(seconds)
    note("work", number=0)


@app.task(name="long_apart", pool="process")
def long_apart(seconds: float) -> None:
    """Take long in a body process."""
    note("begun")
    time.sleep(seconds)
    note("work", number=0)


@app.task(name="long_async")
async def long_async(seconds: float) -> None:
    """Take long in the event loop."""
    note("begun")
    await asyncio.sleep(seconds)
    note("work", number=0)


@app.task(name="gated_async")
async def gated_async(number: int) -> int:
    """Begin, and end when the test says so, in the event loop."""
    note("begun", number=number)
    while not is_open("gate"):
        await asyncio.sleep(0.01)
    note("work", number=number)
    return number


@app.task(name="gated_early", acks="early")
def gated_early(number: int, gate: str = "gate") -> int:
    """At most once: begin, and end when the test says so."""
    note("begun", number=number)
    wait_for(gate)
    note("work", number=number)
    return number


@app.task(name="tracked", track_started=True)
def tracked(number: int, seconds: float) -> int:
    """Have it stored that it began, and take some time."""
    note("begun", number=number)
    time.sleep(seconds)
    note("work", number=number)
    return number


@app.task(name="poison", bind=True)
def poison(self, *, by_signal: bool = False) -> None:
    """Kill whatever process this runs in."""
    note("poison", attempt=self.request.attempt)
    if by_signal:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(9)


@app.task(name="kills_worker", bind=True)
def kills_worker(self) -> None:
    """Kill the worker process, from a process of its own as well."""
    note("poison", attempt=self.request.attempt)
    os.kill(os.getpid() if self.request.attempt == 1 else os.getppid(), signal.SIGKILL)
    time.sleep(60)


@app.task(name="poison_async", bind=True)
async def poison_async(self, *, by_signal: bool = False) -> None:
    """The same in the event loop."""
    note("poison", attempt=self.request.attempt)
    # To this very thread: sent to the process, SIGSEGV may reach another one while the body here goes on and returns.
    signal.raise_signal(signal.SIGKILL if by_signal else signal.SIGSEGV)


@app.task(name="dies_twice", bind=True, pool="process", autoretry_for=(WorkerLostError,), default_retry_delay=0.05)
def dies_twice(self) -> str:
    """Kill its body process in the first two tries."""
    note("dies", retries=self.request.retries)
    if self.request.retries < 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


@app.task(name="holds_interpreter")
def holds_interpreter(seconds: float) -> None:
    """Hold the interpreter's lock all the time, in a thread of the worker process."""
    note("begun")
    ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))
    note("work", number=0)


@app.task(name="holds_interpreter_apart", pool="process")
def holds_interpreter_apart(seconds: float) -> None:
    """The same in a process of its own."""
    note("begun")
    ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))
    note("work", number=0)


@app.task(name="endless", time_limit=0.5)
def endless() -> None:
    """Never end, deaf to everything: what a hard time limit is for."""
    note("begun")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        time.sleep(60)


@app.task(name="grow")
def grow(number: int, megabytes: int) -> None:
    """Take memory and keep it."""
    _kept.append(bytearray(megabytes * 1_000_000))
    note("work", number=number)


_kept: list[bytearray] = []


@app.task(name="grow_apart", pool="process")
def grow_apart(number: int, megabytes: int) -> None:
    """The same, in a body process."""
    grow.run(number, megabytes)


@app.task(name="pool_of_processes")
def pool_of_processes(count: int) -> list[int]:
    """Fork processes of its own, and end them as multiprocessing does, with SIGTERM."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(abs, range(count))


@app.task(name="pool_of_processes_apart", pool="process")
def pool_of_processes_apart(count: int) -> list[int]:
    """The same in a body process."""
    return pool_of_processes(count)


@app.task(name="large")
def large(size: int) -> str:
    """Return much."""
    return "x" * size


@app.task(name="leave_a_thread")
def leave_a_thread() -> None:
    """Start a thread that keeps the interpreter from ending."""
    threading.Thread(target=threading.Event().wait).start()


@app.task(name="leave_an_orphan")
def leave_an_orphan() -> int:
    """Start a process that starts another one and ends: the other one is nobody's child."""
    script = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'pass']).pid)"
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
