"""Bodies in threads, and how a running one is interrupted. (``event_loop`` and ``body_process`` are the other places.)

Watchdog      one thread that calls things back at their time: limits
ThreadBody    a body that is running in a thread, and can be interrupted while the user's code is on top
"""

from __future__ import annotations

import heapq
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

_OWN_DIRECTORY = f"{Path(__file__).parent}{os.sep}"
_CALLER_OF_BODIES = (f"{_OWN_DIRECTORY}execution.py", "run")
_INTERRUPT_AGAIN_SECONDS = 0.01
_FEW_CANCELLED = 100


class Alarm:
    """One call back at a time of the monotonic clock; ``cancel`` it when it is not needed any more."""

    __slots__ = ("_watchdog", "action", "at")

    def __init__(self, watchdog: Watchdog, at: float, action: Callable[[], None]) -> None:
        self._watchdog = watchdog
        self.at = at
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Do not call back. It may be being called just now."""
        self.action = None
        self._watchdog.note_cancelled()


class Watchdog:
    """Calls back at set times, from one thread that is started with the first alarm. The actions must be quick.

    ``_changed`` guards everything. Cancelled alarms stay in the heap until they are many: then all of them go at once.
    ``failed(error)`` is called when an action raises: some limit is not kept, which nobody else will notice.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._failed = failed
        self._changed = threading.Condition()
        self._alarms: list[tuple[float, int, Alarm]] = []
        self._cancelled = 0
        self._order = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def after(self, seconds: float, action: Callable[[], None]) -> Alarm:
        """Call ``action`` in ``seconds``."""
        alarm = Alarm(self, time.monotonic() + seconds, action)
        with self._changed:
            if self._thread is None and not self._closed:
                thread = threading.Thread(target=self._run, name="ekiden-watchdog", daemon=True)
                thread.start()
                self._thread = thread
            heapq.heappush(self._alarms, (alarm.at, next(self._order), alarm))
            self._changed.notify()
        return alarm

    def note_cancelled(self) -> None:
        """One of the alarms has been cancelled."""
        with self._changed:
            self._cancelled += 1
            if self._cancelled > _FEW_CANCELLED and self._cancelled > len(self._alarms) // 2:
                self._alarms = [each for each in self._alarms if each[2].action is not None]
                heapq.heapify(self._alarms)
                self._cancelled = 0

    def close(self) -> None:
        """Call nothing back any more, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._alarms or self._alarms[0][0] > time.monotonic()):
                    until = self._alarms[0][0] - time.monotonic() if self._alarms else threading.TIMEOUT_MAX
                    self._changed.wait(min(until, threading.TIMEOUT_MAX))
                if self._closed:
                    return
                _, _, alarm = heapq.heappop(self._alarms)
            action = alarm.action
            if action is not None:
                try:
                    action()
                except BaseException as error:  # noqa: BLE001 - the alarms behind it are to ring, too
                    self._failed(error)


class ThreadBody:
    """The bodies that run in one thread, one after the other, and how the running one is interrupted.

    An exception is raised in the thread only while the user's code is on top: never inside code of ekiden that it
    called, where a lock could be left locked, and never after the body has ended. What blocks in C (a long
    ``time.sleep``) is interrupted when it returns. ``turn`` numbers the bodies; ``_mutex`` guards it and the rest.
    """

    def __init__(self) -> None:
        self.turn = 0
        self._thread_id = threading.get_ident()
        self._mutex = threading.Lock()
        self._running = False

    def begin(self) -> None:
        """The next body begins."""
        with self._mutex:
            self.turn += 1
            self._running = True

    def end(self) -> None:
        """The body has ended: nothing is raised any more.

        What was raised before has arrived by now, with the call of this function at the latest. Nothing is withdrawn
        (``SetAsyncExc(None)``): that leaves Python 3.11 looking for it for ever, and hanging as soon as it traces.
        """
        with self._mutex:
            self._running = False

    def interrupt_until_done(self, watchdog: Watchdog, kind: type[BaseException], turn: int) -> None:
        """Raise ``kind`` in that body, trying again while code of ekiden is on top. Nothing if it has ended."""
        with self._mutex:
            if not self._running or self.turn != turn:
                return
            frame = sys._current_frames().get(self._thread_id)
            if frame is not None and is_users_code(frame):
                import ctypes  # only where soft limits end something

                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread_id), ctypes.py_object(kind))
                return
        watchdog.after(_INTERRUPT_AGAIN_SECONDS, lambda: self.interrupt_until_done(watchdog, kind, turn))


def is_users_code(top: FrameType) -> bool:
    """Whether, at the top of this stack, a body is running, and no code of ekiden that it called.

    The code of ekiden that is nearest to the top must be what calls bodies: then no lock of ekiden's or of a broker's
    client is held for it, and the task's handlers and the signals have not begun. The demo counts as user code.
    """
    frame: FrameType | None = top
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_OWN_DIRECTORY) and not frame.f_globals["__name__"].startswith("ekiden.demo"):
            return frame is not top and (code.co_filename, code.co_name) == _CALLER_OF_BODIES
        frame = frame.f_back
    return False
