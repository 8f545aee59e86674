"""Processes of our own and signals: what a process starts with before it can obey, and how it ends with its parent.

A signal to a whole group of processes (Ctrl-C, systemd) also reaches those that are just starting, where it would be
an exception in the middle of an import, or an end that looks like a crash. So a parent starts them deaf to it, and
they listen again once they have said what it means to them. Where a system has none of this, nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_PR_SET_PDEATHSIG = 1


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
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
