"""Tasks that start processes of their own, in every way there is, and leave them running."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time

from ekiden import Ekiden
from ledger import note, wait_for

app = Ekiden("children")

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]

ATTACHED = ("popen", "shell", "fork", "orphan", "multiprocessing", "own group", "no environment", "deaf")
DETACHED = ("session", "daemon")


@app.task(name="limited", time_limit=2)
def limited(how: str) -> None:
    """Start one, and wait for longer than the limit."""
    begin(how)
    wait_for("never")


@app.task(name="endless", pool="process")
def endless(how: str) -> None:
    """Start one, and wait."""
    begin(how)
    wait_for("never")


@app.task(name="leave")
def leave(how: str) -> None:
    """Start one in a thread of the worker, and leave it."""
    begin(how)


@app.task(name="leave_apart", pool="process")
def leave_apart(how: str) -> None:
    """The same in a body process, which goes on."""
    begin(how)


def begin(how: str) -> None:
    note("child", number=started(how), body=os.getpid())


def started(how: str) -> int:
    """Start a process that outlives the call, and return its number."""
    match how:
        case "popen":
            return subprocess.Popen(SLEEP).pid
        case "shell":
            # The shell's child, and the shell waits for it.
            program = f"{sys.executable} -c 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'; true"
            return first_line(subprocess.Popen(program, shell=True, stdout=subprocess.PIPE))
        case "fork":
            return forked(lambda: time.sleep(600))
        case "orphan":
            script = f"import subprocess; print(subprocess.Popen({SLEEP!r}).pid, flush=True)"
            return first_line(subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE))
        case "multiprocessing":
            process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
            process.start()
            assert process.pid is not None
            return process.pid
        case "own group":
            return subprocess.Popen(SLEEP, process_group=0).pid
        case "no environment":
            return subprocess.Popen(SLEEP, env={}).pid
        case "deaf":
            deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
            return subprocess.Popen([sys.executable, "-c", deaf]).pid
        case "session":
            return subprocess.Popen(SLEEP, start_new_session=True).pid
        case "daemon":
            # As daemons do it: it keeps whatever descriptors its body had.
            return forked(daemonize)
    raise AssertionError(how)


def daemonize() -> None:
    os.setsid()
    time.sleep(600)


def forked(do: object) -> int:
    child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        assert callable(do)
        do()
    finally:
        os._exit(0)


def first_line(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())
