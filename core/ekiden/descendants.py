"""What tasks have started: processes that end with the process they were started in, a body process or a worker.

They are found in /proc (Linux), in two ways: by whose child they are, and by a mark in the environment that a process
of ours was started with, which is inherited. The first finds what was started without that environment, the second
what has lost its parent. A process group would be left by a shell with job control, and could not be both a worker's
and a body's. What has made a session of its own (a daemon, ``start_new_session=True``) is let go.

Where there is no /proc, a body process leads a process group instead, and that is killed.
"""

from __future__ import annotations

import contextlib
import os
import signal

import msgspec

HAVE_GROUPS_INSTEAD = not os.path.exists("/proc/self/stat") and hasattr(os, "killpg")

_MOST_ROUNDS = 10
_ENDED = {b"Z", b"X"}


class _Process(msgspec.Struct, frozen=True):
    """A process that has not ended, as /proc shows it."""

    pid: int
    parent: int
    session: int


def end_descendants(leader: int, name: str, mark: str) -> list[int]:
    """Kill what was started in the process ``leader``, which may have ended; the numbers of what was found.

    The process itself is left alone. Raises OSError when /proc cannot be read.
    """
    found: set[int] = set()
    for _ in range(_MOST_ROUNDS):  # what is killed may just have started another one
        members = _descendants(leader, found, f"{name}={mark}".encode()) - found
        if not members:
            break
        for pid in members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        found |= members
    return sorted(found)


def _descendants(leader: int, also_of: set[int], variable: bytes) -> set[int]:
    session = os.getsid(0)
    processes = [each for each in _processes() if each.session == session and each.pid not in {leader, os.getpid()}]
    children: dict[int, list[int]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process.pid)
    found = {process.pid for process in processes if _has(process.pid, variable)}
    waiting = [leader, *also_of, *found]
    while waiting:
        more = [pid for pid in children.get(waiting.pop(), ()) if pid not in found]
        found.update(more)
        waiting += more
    return found


def _processes() -> list[_Process]:
    if not os.path.exists("/proc/self/stat"):
        return []
    return [found for name in os.listdir("/proc") if name.isdigit() and (found := _process(int(name))) is not None]


def _process(pid: int) -> _Process | None:
    try:
        stat = _content(f"/proc/{pid}/stat")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # The name, in parentheses, may hold anything: state, parent, group and session are behind the last one.
    state, parent, _group, session = stat.rpartition(b")")[2].split()[:4]
    return None if state in _ENDED else _Process(pid, int(parent), int(session))


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _has(pid: int, variable: bytes) -> bool:
    try:
        return variable in _content(f"/proc/{pid}/environ").split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
