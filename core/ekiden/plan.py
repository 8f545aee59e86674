"""What a supervisor and its worker processes tell each other: the plan, the app's settings, how a process ended.

Down a process's standard input: the plan, a line of JSON, and later perhaps to end at once. Up a pipe that the plan
names: a line of JSON with the settings that the supervisor obeys, and from then on a byte a second while all is well.
"""

from __future__ import annotations

import os
import signal

import msgspec

from ekiden.bounds import Count, InHand, Threads
from ekiden.safe_text import printable
from ekiden.times import PositiveSeconds, Seconds

EXIT_DONE = 0
EXIT_FAILED = 1
"""The process met what it could not handle, and says what."""
EXIT_REPLACE = 75
"""The process ends because it is to be replaced: it has done enough tasks, or grown too large."""
EXIT_UNUSABLE = 78
"""The app or its settings cannot work; starting again would not help. (``EX_CONFIG`` of sysexits.h.)"""
EXIT_UNCLEAN = 70
"""A task was still running when the grace was over."""


END_AT_ONCE = b"end at once\n"
"""What the supervisor writes after the plan when a stop is not to wait for running tasks."""


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How one worker process works; what is None comes from the app's settings. Times are in seconds.

    ``name`` is its slot: a worker opened under the name of a dead one takes over its deliveries at once, and one under
    the name of a living one is refused; without one it gets a unique one. ``burst``: end when nothing is ready or in
    hand. ``max_tasks``, ``max_memory_mb``: end after so many tasks, or so much memory.
    """

    queues: tuple[str, ...] = ()
    strict: bool = False
    threads: Threads | None = None
    async_concurrency: InHand | None = None
    prefetch: InHand | None = None
    pool: str | None = None
    lease: PositiveSeconds | None = None
    grace: Seconds | None = None
    name: str | None = None
    burst: bool = False
    max_tasks: Count | None = None
    max_memory_mb: PositiveSeconds | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor tells a worker process to do.

    ``introduces``: say what is worked for. ``speaks``: say why that is impossible; of processes that start together
    only one does. ``instance`` tells this supervisor from every other. ``claims_name``: the name was chosen by
    somebody, so that another worker may have it. ``up_descriptor`` is the end of the pipe to the supervisor, where the
    system has such ones. ``beats``: say there that all is well even if the app's settings name no liveness file.
    """

    target: str
    introduces: bool
    speaks: bool
    options: WorkerOptions
    log_level: str
    log_format: str
    instance: str
    claims_name: bool
    up_descriptor: int | None = None
    beats: bool = False


class SupervisorSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of the app that its supervisor obeys, where the command line says nothing else. Times in seconds."""

    processes: Threads | None
    grace: Seconds
    liveness_file: str | None


BEAT = b"."
"""What a process writes every second while it is well."""


def unique_name() -> str:
    """A name that no other worker has, or ever had: in containers, host and process id are often the same."""
    return f"{printable(_host())}:{os.getpid()}:{os.urandom(4).hex()}"


def _host() -> str:
    if hasattr(os, "uname"):
        return os.uname().nodename  # what socket.gethostname() tells, without the 4 ms of that import
    import socket

    return socket.gethostname()


def exit_text(code: int) -> str:
    """How a process ended, in words, from its return code as ``subprocess`` tells it."""
    if code >= 0:
        return f"it exited with {code}"
    try:
        return f"it was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"it was ended by signal {-code}"
