"""Processes of our own and signals: what a process starts with before it can obey, and how it ends.

A signal to a whole group of processes (Ctrl-C, systemd) also reaches those that are just starting, where it would be
an exception in the middle of an import, or an end that looks like a crash. So a parent starts them deaf to it, and
they listen again once they have said what it means to them. Where a system has none of this, nothing is done.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

TYPE_CHECKING = False  # the supervisor starts its first process before it imports ``typing``
if TYPE_CHECKING:
    from typing import NoReturn

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What tells a process to stop in order; Ctrl-C tells the supervisor alone."""

WORKER_MARK, BODY_MARK = "_EKIDEN_WORKER", "_EKIDEN_BODY"
"""Variables in the environment by which ``descendants`` finds what was started in a process of ours."""

_PR_SET_PDEATHSIG = 1
_EXIT_SECONDS = 3.0
_FINALIZING_SECONDS = 2.0


def marked(environment: Mapping[str, str], name: str, mark: str) -> dict[str, str]:
    """An environment for a process of ours, by which what is started in it is found again."""
    return {**environment, name: mark}


@contextlib.contextmanager
def deaf_to(*signals: signal.Signals) -> Iterator[None]:
    """Processes started inside do not hear ``signals`` until they call ``obey``."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hold_back(*signals: signal.Signals) -> None:
    """``signals`` wait until ``hear`` is called, and reach no process that is started meanwhile before it does so."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)


def hear(*signals: signal.Signals) -> None:
    """From now on ``signals`` do what they mean to this process, also those that were held back."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def is_ignored(number: signal.Signals) -> bool:
    """Whether this process was started to ignore a signal, as ``nohup`` has it with SIGHUP."""
    return signal.getsignal(number) is signal.SIG_IGN


def obey(number: signal.Signals, action: Callable[[], object] | None) -> None:
    """From now on a signal calls ``action`` (None: does nothing), also if it was sent since this process was started.

    ``action`` interrupts the main thread anywhere, even while that holds a lock: it may put something into a
    SimpleQueue, and not much more. Processes that user code forks do not inherit it.
    """

    def act(_number: int, _frame: FrameType | None) -> None:
        if action is not None:
            action()

    signal.signal(number, act)
    if hasattr(signal, "pthread_sigmask"):
        _forks_do_not_inherit(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


def _forks_do_not_inherit(number: signal.Signals) -> None:
    """A forked process has the signal's default action, and hears it from then on.

    Python forgets a signal that comes between the fork and that: whoever sent it would wait for the process's end for
    ever, as a multiprocessing.Pool does that is left at once.
    """
    heard = threading.local()

    def before() -> None:
        heard.mask = signal.pthread_sigmask(signal.SIG_BLOCK, [number])

    def after() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard.mask)

    def in_child() -> None:
        signal.signal(number, signal.SIG_DFL)
        after()

    os.register_at_fork(before=before, after_in_parent=after, after_in_child=in_child)


def ignore_interrupts() -> None:
    """A Ctrl-C reaches the whole group of processes, and only the supervisor decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends, however busy it is then (Linux)."""
    if sys.platform == "linux":
        import ctypes  # only in body processes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def take_standard_input() -> io.BufferedReader:
    """The pipe that is this process's standard input, for us alone.

    A program that code of the user's starts, and ``input()``, find the end of the file instead.
    """
    taken = os.fdopen(os.dup(0), "rb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return taken


def end_process(code: int, last: Callable[[], object] | None = None) -> NoReturn:
    """End this process within some seconds, whatever it still has. Call it from the main thread.

    Threads that never end, exit handlers that hang and processes that nobody stops keep an interpreter from ending.
    ``last`` is called before it is ended by force.
    """

    def end() -> None:
        try:
            if last is not None:
                last()
        finally:
            os._exit(code)

    timer = threading.Timer(_EXIT_SECONDS, end)
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # no more threads can be started: then by the alarm
        timer.start()
    if hasattr(signal, "setitimer"):  # for what hangs when no thread runs any more
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, _EXIT_SECONDS + _FINALIZING_SECONDS)
    with contextlib.suppress(Exception):  # whoever has read it may be gone
        sys.stdout.flush()
    sys.exit(code)


def resident_bytes(pid: int) -> int:
    """How much memory a process has resident; 0 where the system does not tell."""
    return _memory_pages(pid)[0] * _page_bytes()


def private_bytes(pid: int) -> int:
    """How much of that is not shared with others, such as the libraries' code."""
    resident, shared = _memory_pages(pid)
    return (resident - shared) * _page_bytes()


def _memory_pages(pid: int) -> tuple[int, int]:
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            _, resident, shared, *_ = file.read().split()
        return int(resident), int(shared)
    except (OSError, ValueError):
        return 0, 0


def _page_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
