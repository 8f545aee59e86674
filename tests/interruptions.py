"""Exceptions that come out of signal handlers: one at every place of a piece of code, or as many as there can be."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ekiden.testing.interruptions import COLLECTING


class Interrupted(BaseException):
    """What the handler raises, as the one for Ctrl-C raises KeyboardInterrupt."""


def interrupted_everywhere(
    act: Callable[[], object], *, inside: str, lines_only: bool = False
) -> Iterator[Interrupted]:
    """Do ``act`` again and again, interrupted at its first place, its second, ... until it comes to its end.

    Places are the lines of modules whose name begins with ``inside``, and the instructions in each. Yields each
    exception while it is alive, with the frames that it came from.
    """
    place = 0
    while True:
        place += 1
        try:
            with _interrupted_at(place, inside=inside, lines_only=lines_only):
                act()
        except Interrupted as error:
            yield error
        else:
            return


@contextmanager
def _interrupted_at(place: int, *, inside: str, lines_only: bool) -> Iterator[None]:
    left = place

    def count(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal left
        if not frame.f_globals.get("__name__", "").startswith(inside):
            return None
        frame.f_trace_opcodes = not lines_only
        if event in {"line", "opcode"}:
            left -= 1
            if left == 0:
                raise Interrupted
        return count

    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(None)


@contextmanager
def signals_every(seconds: float, *, inside: str) -> Iterator[None]:
    """Interrupt the main thread about so often, wherever it is by then, but only while it is in such a module.

    Not where Python collects what is of no use any more, or tells pytest of it: nobody could handle an exception out of
    that.
    """

    def interrupt(_number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.2, 1.8) * seconds)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith(COLLECTING):
                return
            if module.startswith(inside):
                raise Interrupted
            frame = frame.f_back

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
