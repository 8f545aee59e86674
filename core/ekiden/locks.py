"""Locks, waits and threads that an exception out of a signal handler must not leave in disorder.

Such an exception may come at any moment. Python calls handlers between its own instructions, so ``with lock:`` is safe
as CPython is built: nothing can come between the lock's own ``__enter__`` and the block, nor between the block's last
call and ``__exit__``. That is not promised anywhere, and a debugger or a tracer does come in between. So a method that
may be interrupted holds a reentrant lock, which only the thread that holds it can release, and does this around it:

    try:
        return self._act()      # in which is ``with self._lock:``
    except BaseException:
        release_if_held(self._lock)
        raise

The call between the two is needed: no handler covers the line of a ``try`` or ``with`` that stands in another ``try``.
Where a lock is not waited for, or not for ever, ``with`` is of no use, and ``call_holding`` does all of this:
between ``if lock.acquire(...):`` and the ``try`` behind it an exception may come, and the lock stays taken for ever.

``threading.Condition`` and ``threading.Event`` are not safe: they are Python themselves. Interrupted where it gives its
lock back or takes it again, a condition leaves it taken for ever, or releases one that another thread holds, and a
RuntimeError comes out in place of the exception. So a user's thread waits by a ``Flag``, and ``start_thread`` starts
what it needs, for ``Thread.start`` waits by an Event.
"""

from __future__ import annotations

import _thread
import contextlib
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

_LOOK_AGAIN_SECONDS = 0.5
_STARTED_WITHIN_SECONDS = 0.1


def release_if_held(lock: threading.RLock) -> None:
    """Release ``lock`` if this thread holds it, as nearly never."""
    with contextlib.suppress(RuntimeError):  # it does not
        lock.release()


def call_holding(lock: threading.RLock, act: Callable[[], object], *, timeout: float = 0.0) -> bool:
    """Call ``act`` while holding ``lock``; not, and False, while another thread has it for ``timeout`` seconds.

    Call it with a lock that this thread does not hold yet.
    """
    try:
        return _call_holding(lock, act, timeout)
    except BaseException:
        release_if_held(lock)
        raise


def _call_holding(lock: threading.RLock, act: Callable[[], object], timeout: float) -> bool:
    if not lock.acquire(timeout=min(max(0.0, timeout), threading.TIMEOUT_MAX)):
        return False
    try:
        act()
    finally:
        lock.release()
    return True


class Flag:
    """What threads wait for until another sets it: as ``threading.Event``, with nothing to be left locked.

    Any thread may call any method. Waiting and setting are one call of C each; a wake-up that is lost with a waiter
    that was interrupted costs the other waiters half a second.
    """

    __slots__ = ("_called", "_is_set")

    def __init__(self) -> None:
        self._called: SimpleQueue[None] = SimpleQueue()
        self._is_set = False

    def is_set(self) -> bool:
        """Whether it was set since it was last cleared."""
        return self._is_set

    def set(self) -> None:
        """End all waits in progress, and those that begin before it is cleared."""
        self._is_set = True
        if self._called.empty():
            self._called.put(None)

    def clear(self) -> None:
        """Let who waits from now on wait."""
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until it is set, for ``timeout`` seconds at most; whether it is."""
        give_up = None if timeout is None else time.monotonic() + timeout
        while not self._is_set:
            left = _LOOK_AGAIN_SECONDS if give_up is None else give_up - time.monotonic()
            if left <= 0:
                break
            with contextlib.suppress(Empty):
                self._called.get(timeout=min(left, _LOOK_AGAIN_SECONDS))
                if self.is_set():
                    self._called.put(None)  # for whoever else waits; what is left over ends no wait by itself
        return self._is_set


def start_thread(thread: threading.Thread) -> None:
    """Start ``thread``, from any thread. Interrupted, it has begun, or does so within a moment.

    Raises RuntimeError where no more threads can be started, as ``Thread.start`` does, and for no other reason.
    """
    if threading.current_thread() is not threading.main_thread():
        thread.start()  # only the main thread runs signal handlers
        return
    started: SimpleQueue[BaseException | None] = SimpleQueue()

    def start() -> None:
        try:
            thread.start()
        except BaseException as error:  # noqa: BLE001 - it is raised where it was asked for
            started.put(error)
        else:
            started.put(None)

    try:
        _thread.start_new_thread(start, ())
        error = started.get()
    except BaseException:
        with contextlib.suppress(Empty):  # who comes next finds it started, and not by half
            started.get(timeout=_STARTED_WITHIN_SECONDS)
        raise
    if error is not None:
        raise error
