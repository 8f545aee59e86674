"""Starts worker processes: the first one ahead, while the command still reads its arguments.

A worker process needs a fifth of a second before it can be told anything, and so does the command. This module, and
what it imports, is therefore kept small: neither ``typing`` nor anything of ekiden that needs it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from ekiden.spawning import STOP_SIGNALS, WORKER_MARK, deaf_to, hold_back, marked


class WorkerProcess:
    """A worker process that waits for its plan. Whoever has it waits for its end.

    ``up``: what it writes for its supervisor, None where a system has no such pipes; ``up_descriptor``: the number of
    the other end, in the process. ``mark``: by which what it has started is found; see ``descendants``.
    """

    __slots__ = ("mark", "process", "up", "up_descriptor")

    def __init__(self, shown: Sequence[str]) -> None:
        """Start it; ``shown`` stands in its command line, and means nothing. Raises OSError."""
        command = [sys.executable, "-m", "ekiden.worker_process", *shown]
        self.mark = os.urandom(8).hex()
        self.up: int | None = None
        self.up_descriptor: int | None = None
        environment = marked(os.environ, WORKER_MARK, self.mark)
        if os.name == "posix":
            self.up, self.up_descriptor = os.pipe()
            os.set_blocking(self.up, False)
        passed = () if self.up_descriptor is None else (self.up_descriptor,)
        try:
            with deaf_to(signal.SIGINT):
                self.process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=passed, env=environment)
        except BaseException:
            self.close_up()
            raise
        finally:
            for descriptor in passed:
                os.close(descriptor)

    def close_up(self) -> None:
        """Read no more of what it writes. May be called again."""
        up, self.up = self.up, None
        if up is not None:
            os.close(up)


class Spare:
    """A worker process that was started before anybody knew what it is to do: somebody takes it, or it is ended."""

    def __init__(self, process: WorkerProcess) -> None:
        self._process: WorkerProcess | None = process

    def take(self) -> WorkerProcess | None:
        """The process, for whoever asks first."""
        process, self._process = self._process, None
        return process

    def end(self) -> None:
        """End the process unless it was taken."""
        left = self.take()
        if left is not None:
            left.close_up()
            left.process.kill()
            left.process.communicate()


def started_ahead(arguments: Sequence[str]) -> Spare | None:
    """The first worker process of a command with these arguments, if it seems to be ``ekiden worker``.

    Then signals are held back until the supervisor runs, or the command ends: what is to stop the worker may come now.
    """
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        rest = rest[2:] if rest[0] in {"-A", "--app"} else rest[1:]
    if rest[:1] != ["worker"] or not {"-h", "--help"}.isdisjoint(rest):
        return None
    hold_back(signal.SIGINT, *STOP_SIGNALS)
    with contextlib.suppress(OSError, MemoryError):  # the supervisor tries again, and says what is wrong
        return Spare(WorkerProcess(rest[1:]))
    return None
