"""Has a signal arrive at any instruction of some code, so that its handler raises there.

The interpreter runs signal handlers in the main thread after calls, at the start of functions and at the end of loops:
an exception out of one (Ctrl-C, an alarm) may come at each of these places. ``Signals`` makes one come at a chosen
place, where a real signal could.
"""

from __future__ import annotations

import ctypes
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from types import FrameType
from typing import Any

SIGNAL = signal.SIGUSR1

COLLECTING = ("_pytest", "_weakrefset", "weakref", "hypothesis")
"""Modules with functions that run where Python collects garbage: an exception out of these goes nowhere."""


class Interrupted(BaseException):
    """What the handler raises."""


class Signals:
    """Interrupts calls in the main thread, which alone runs signal handlers. Owned by that thread."""

    def __init__(self) -> None:
        self._left = 0
        self._is_pending = False
        self._event = self._files = ""
        self._arrivals = map(ctypes.pythonapi.PyErr_SetInterruptEx, repeat(int(SIGNAL)))

    @contextmanager
    def handled(self) -> Iterator[None]:
        """The handler is there inside the ``with`` block."""
        before = signal.signal(SIGNAL, self._handle)
        try:
            yield
        finally:
            self._is_pending = False
            signal.signal(SIGNAL, before)

    def interrupt(self, call: Callable[[], object], number: int, *, within: str, lines: bool = False) -> bool | None:
        """Have the signal arrive at the ``number``-th instruction (or line) of ``call`` in files that begin so.

        Whether ``call`` was interrupted by it; None where it has fewer of them. ``within``: a path, or its beginning.
        """
        self._left, self._is_pending = number, False
        self._event, self._files = "line" if lines else "opcode", within
        before = sys.gettrace()
        sys.settrace(self._trace)
        try:
            call()
        except Interrupted:
            return True
        finally:
            sys.settrace(before)
            has_arrived = self._left == 0
            self._is_pending = False
        return False if has_arrived else None

    def places(self, call: Callable[[], object], *, within: str, lines: bool = False) -> int:
        """How many instructions (or lines) of ``call`` there are, as ``interrupt`` counts them."""
        self.interrupt(call, sys.maxsize, within=within, lines=lines)
        return sys.maxsize - self._left

    def _trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(self._files) or frame.f_code.co_filename == __file__:
            return None
        frame.f_trace_opcodes = self._event == "opcode"
        frame.f_trace_lines = self._event == "line"
        if event == self._event and self._left > 0:
            self._left -= 1
            self._is_pending = self._left == 0
        if self._is_pending:
            for _ in self._arrivals:  # a loop, because after a call the handler would run here
                return self._trace
        return self._trace

    def _handle(self, _number: int, frame: FrameType | None) -> None:
        if self._is_pending and frame is not None and not _is_a_tests(frame):
            self._is_pending = False
            raise Interrupted
        # In code of a test it is passed over: it arrives again at the next instruction of the code in question.


@contextmanager
def signals_every(seconds: float, *, within: tuple[str, ...]) -> Iterator[None]:
    """Inside the ``with`` block a signal interrupts the main thread about so often, wherever it is by then.

    But only while something is called there from a file whose path begins with one of ``within``, and not where Python
    collects what is of no use any more, or tells pytest of it: nobody could handle an exception out of that.
    """
    over, main = threading.Event(), threading.get_ident()
    assert main == threading.main_thread().ident, "only the main thread runs signal handlers"

    def interrupt(_number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_globals.get("__name__", "").startswith(COLLECTING):
                return
            if frame.f_code.co_filename.startswith(within):
                raise Interrupted
            frame = frame.f_back

    def send() -> None:
        while not over.wait(random.uniform(0.2, 1.8) * seconds):
            signal.pthread_kill(main, SIGNAL)

    before = signal.signal(SIGNAL, interrupt)
    sender = threading.Thread(target=send, name="sends signals", daemon=True)
    sender.start()
    try:
        yield
    finally:
        over.set()
        sender.join()
        signal.signal(SIGNAL, before)


def _is_a_tests(frame: FrameType) -> bool:
    return frame.f_code.co_filename == __file__ or frame.f_code.co_filename.rpartition("/")[2].startswith("test_")
