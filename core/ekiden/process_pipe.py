"""The two pipes to a process, for as long as that process lives.

A pipe says that its other end is gone only when nobody has that end any more. Processes that a body has forked have it,
too, and may live on: so whoever reads or writes here is told when the process itself has ended.
"""

from __future__ import annotations

import contextlib
import os
import select
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import subprocess

_PIECE_BYTES = 256 * 1024
_LOOK_MILLISECONDS = 200


class ProcessPipe:
    """Reads what a process writes to its standard output, and writes to its standard input (POSIX).

    Used by one thread at a time. Somebody else waits for the process; until then it can be asked whether it has ended.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._files = (process.stdin, process.stdout)
        self._input, self._output = process.stdin.fileno(), process.stdout.fileno()
        self._end = _opened(process.pid)
        self._read_ahead = bytearray()
        self._readable, self._writable, self._ended = select.poll(), select.poll(), select.poll()
        self._readable.register(self._output, select.POLLIN)
        self._writable.register(self._input, select.POLLOUT)
        for descriptor in (self._input, self._output):
            os.set_blocking(descriptor, False)
        if self._end is not None:
            self._ended.register(self._end, select.POLLIN)
            self._readable.register(self._end, select.POLLIN)
            self._writable.register(self._end, select.POLLIN)

    def read(self, size: int) -> bytes:
        """So many bytes; fewer when the process has ended or closed its end."""
        while len(self._read_ahead) < size and (piece := self._next_piece()):
            self._read_ahead += piece
        taken = bytes(self._read_ahead[:size])
        del self._read_ahead[:size]
        return taken

    def write(self, data: bytes) -> None:
        """Write all of it. Raises BrokenPipeError when the process has ended or closed its end."""
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._input, left) :]
            except BlockingIOError:
                if not self._wait(self._writable, self._input):
                    raise BrokenPipeError("the process has ended") from None

    def flush(self) -> None:
        """Nothing is held back."""

    def is_quiet(self) -> bool:
        """Whether the process lives, and nothing came from it that was not read."""
        return not self._read_ahead and not self._readable.poll(0) and not self._has_ended()

    def close(self) -> None:
        """Close this end of both. May be called again."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        end, self._end = self._end, None
        if end is not None:
            os.close(end)

    def _next_piece(self) -> bytes:
        while True:
            try:
                return os.read(self._output, _PIECE_BYTES)
            except BlockingIOError:
                if not self._wait(self._readable, self._output):
                    return self._last_piece()

    def _last_piece(self) -> bytes:
        """What it wrote just before it ended."""
        try:
            return os.read(self._output, _PIECE_BYTES)
        except BlockingIOError:
            return b""

    def _wait(self, poll: select.poll, descriptor: int) -> bool:
        """Wait until something can be done with ``descriptor``; False when the process has ended before."""
        while True:
            ready = [found for found, _ in poll.poll(None if self._end is not None else _LOOK_MILLISECONDS)]
            if descriptor in ready:
                return True
            if ready or self._has_ended():
                return False

    def _has_ended(self) -> bool:
        if self._end is not None:
            return bool(self._ended.poll(0))
        if not hasattr(os, "waitid"):
            return self._process.poll() is not None
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True


def wait_without_reaping(pid: int) -> None:
    """Wait until a child has ended; its number stays its own. Returns at once where the system has no such thing."""
    if hasattr(os, "waitid"):
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def _opened(pid: int) -> int | None:
    """A descriptor that is readable when the process has ended, where the system has such ones and gives us one."""
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        return os.pidfd_open(pid)
    except OSError:
        return None
