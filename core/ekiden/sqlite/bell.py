"""Doorbells: how a process that waits learns that another one has committed something for it.

    <file>-bells/<subject>.<token>    a UNIX datagram socket; its owner waits for what concerns the subject

Who waits binds a socket per subject (a queue, a topic, the results) and keeps it as long as it may wait. Who has
committed lists the directory, which it remembers until the directory changes, and sends one byte to each socket of
its subject; where nobody waits for a subject, nobody is rung. A socket that refuses is left over from a dead process
and is removed. Bells are hints: each wait is bounded, and who waits looks at the file again at its end.

Where there are no such sockets (Windows, ``wake=poll``) a waiter looks many times a second whether anything in the
file has changed.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Protocol

from ekiden.digests import blake2b
from ekiden.locks import Flag
from ekiden.private_files import make_private_directory

LONGEST_ADDRESS = 100
"""Bytes; Linux takes 107, macOS 103."""

POLL_SECONDS = 0.02
_TAKEN_OVER_AFTER_SECONDS = 0.2
_NAME_LENGTH = 8 + 1 + 8
_DIRECTORY_SETTLES_NS = 100_000_000
"""A directory that changed less than this before it was listed may have changed since without a new time stamp."""

RESULTS = "results"


def of_queue(queue: str) -> str:
    """The subject of those who wait for messages in ``queue``."""
    return f"queue {queue}"


def of_topic(topic: str) -> str:
    """The subject of those who listen to ``topic``."""
    return f"topic {topic}"


class Bell(Protocol):
    """What somebody waits at; owned by the one thread that waits, save ``ring``."""

    def wait(self, timeout: float) -> None:
        """Return when rung since the last wait, or after ``timeout`` seconds, or for no reason."""

    def ring(self) -> None:
        """End the wait in progress, or the next one; any thread."""

    def close(self) -> None:
        """Nobody waits here any more."""

    def abandon(self) -> None:
        """In a forked child: it is the parent's bell."""


class Bells:
    """Makes bells for this process and rings those of all processes that use the same file.

    ``changes`` returns a number that is another one when the file has changed: what pollers look at. ``path`` is where
    the file is; it may be moved. Any thread may call any method.
    """

    def __init__(self, path: str, *, sockets: bool, changes: Callable[[], int]) -> None:
        self.path = path
        self._changes = changes
        self._sockets = sockets and hasattr(socket, "AF_UNIX")
        self._looking: Looking | None = None
        self._sender: socket.socket | None = None
        self._listed: dict[str, list[str]] = {}
        self._listed_for: tuple[int, int] | None = None

    def bell(self, subjects: Iterable[str]) -> Bell:
        """A bell that rings for any of ``subjects``, from now until it is closed."""
        if self._sockets:
            with contextlib.suppress(OSError):  # a directory that cannot be made or used: then by looking
                return SocketBell(_directory_for(self.path), subjects)
        if self._looking is None:
            self._looking = Looking(self._changes)
        return PollingBell(self._looking)

    def ring(self, subjects: Iterable[str]) -> None:
        """Wake everybody, in any process, who waits for one of ``subjects``. Never blocks, never raises."""
        waiting = self._waiting()
        if waiting:
            for subject in subjects:
                for address in waiting.get(_short(subject), ()):
                    self._send(address)

    def forget(self) -> None:
        """In a forked child: use no socket or lock of the parent's."""
        self._sender = None
        self._looking = None

    def close(self) -> None:
        """Free what ringing needed."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()

    def _waiting(self) -> dict[str, list[str]]:
        if not self._sockets:
            return {}
        directory = _directory_for(self.path)
        try:
            found = os.stat(directory)
            changed = found.st_mtime_ns
            if (found.st_ino, changed) == self._listed_for:
                return self._listed
            waiting: dict[str, list[str]] = {}
            for name in os.listdir(directory):
                waiting.setdefault(name.partition(".")[0], []).append(f"{directory}/{name}")
        except OSError:
            return {}  # nobody has waited yet
        self._listed = waiting
        settled = time.time_ns() - changed > _DIRECTORY_SETTLES_NS
        self._listed_for = (found.st_ino, changed) if settled else None
        return waiting

    def _send(self, address: str) -> None:
        sender = self._sender
        if sender is None:
            sender = self._sender = _new_socket()
        try:
            sender.sendto(b"!", address)
        except BlockingIOError:
            pass  # its owner has hundreds of unheard rings already
        except ConnectionRefusedError:
            with contextlib.suppress(OSError):
                os.unlink(address)
        except OSError:
            pass  # gone since it was listed


class SocketBell:
    """Sockets in the bells' directory, one for each subject."""

    def __init__(self, directory: str, subjects: Iterable[str]) -> None:
        self._directory = directory
        self._sockets: dict[int, socket.socket] = {}
        self._addresses: list[str] = []
        self._poll = select.poll()
        token = os.urandom(4).hex()
        try:
            for subject in subjects:
                self._add(f"{directory}/{_short(subject)}.{token}")
        except OSError:
            self.close()
            raise

    def _add(self, address: str) -> None:
        bound = _bound_socket(self._directory, address)
        self._sockets[bound.fileno()] = bound
        self._addresses.append(address)
        self._poll.register(bound, select.POLLIN)

    def wait(self, timeout: float) -> None:
        rung = self._poll.poll(max(timeout, 0.0) * 1000)
        for descriptor, _ in rung:
            with contextlib.suppress(BlockingIOError):
                while True:
                    self._sockets[descriptor].recv(1)
        if not rung and not os.path.lexists(self._addresses[0]):
            self._bind_again()

    def _bind_again(self) -> None:
        """Somebody has removed the directory, or what was in it."""
        addresses, self._addresses = self._addresses, []
        self.abandon()
        self._poll = select.poll()
        for address in addresses:
            self._add(address)

    def ring(self) -> None:
        with contextlib.suppress(OSError, IndexError), _new_socket() as sender:
            sender.sendto(b"!", self._addresses[0])

    def close(self) -> None:
        for address in self._addresses:
            with contextlib.suppress(OSError):
                os.unlink(address)
        self.abandon()
        with contextlib.suppress(OSError):  # not empty: others wait
            os.rmdir(self._directory)

    def abandon(self) -> None:
        for bound in self._sockets.values():
            bound.close()
        self._sockets = {}


class PollingBell:
    """Waits until the file has changed. Of all who wait in one process, one looks at it for everybody."""

    def __init__(self, looking: Looking) -> None:
        self.called = Flag()
        self._looking = looking
        self._seen = looking.look()
        self._rung = False

    def wait(self, timeout: float) -> None:
        looking, end = self._looking, time.monotonic() + timeout
        looking.waiting[self] = None
        try:
            while True:
                self.called.clear()
                left = end - time.monotonic()
                if self._rung or self._seen != looking.version or left <= 0:
                    break
                looking.wait(self, left)
        finally:
            looking.waiting.pop(self, None)
            looking.hand_over(self)
        self._rung = False
        self._seen = looking.version

    def ring(self) -> None:
        self._rung = True
        self.called.set()

    def close(self) -> None:
        self.ring()

    def abandon(self) -> None:
        """It has nothing of the parent's."""


class Looking:
    """How the pollers of one process look at the file: ``version`` is what was last seen.

    No lock is held while they wait, so that an exception out of a signal handler leaves none taken. Who looks says so
    by an assignment, and whoever finds that it has not looked for a while takes over; that two look harms nothing.
    """

    def __init__(self, changes: Callable[[], int]) -> None:
        self.waiting: dict[PollingBell, None] = {}
        self.version = -1
        self._changes = changes
        self._looker: PollingBell | None = None
        self._looked_at = 0.0

    def look(self) -> int:
        """The version of the file now; who waits for another one is called."""
        self._looked_at = time.monotonic()
        version = self._changes()
        if version != self.version:
            self.version = version
            for bell in list(self.waiting):
                bell.called.set()
        return version

    def wait(self, bell: PollingBell, timeout: float) -> None:
        """Wait for ``bell`` to be called, and look for news unless another waiter does."""
        if self._looker is None or time.monotonic() - self._looked_at > _TAKEN_OVER_AFTER_SECONDS:
            self._looker = bell
        if self._looker is bell:
            bell.called.wait(min(timeout, POLL_SECONDS))
            self.look()
        else:
            bell.called.wait(min(timeout, _TAKEN_OVER_AFTER_SECONDS))

    def hand_over(self, bell: PollingBell) -> None:
        """``bell`` waits no more: if it was the one that looked, another one does."""
        if self._looker is bell:
            self._looker = None
            for another in list(self.waiting)[:1]:
                another.called.set()


@lru_cache(maxsize=4096)
def _short(subject: str) -> str:
    return blake2b(subject.encode(errors="surrogatepass"), digest_size=4).hexdigest()


def _new_socket() -> socket.socket:
    new = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    new.setblocking(False)
    return new


def _bound_socket(directory: str, address: str) -> socket.socket:
    bound = _new_socket()
    try:
        for _ in range(3):  # whoever closes the last bell removes the directory
            make_private_directory(directory)
            with contextlib.suppress(FileNotFoundError):
                bound.bind(address)
                return bound
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound


@lru_cache(maxsize=64)
def _directory_for(path: str) -> str:
    beside = f"{path}-bells"
    if len(os.fsencode(beside)) + 1 + _NAME_LENGTH <= LONGEST_ADDRESS:
        return beside
    # Too long for the address of a socket: every process of this user finds the same short one.
    import tempfile  # 8 ms, and only where a path is too long for a socket

    return f"{tempfile.gettempdir()}/ekiden-{os.getuid()}-{blake2b(os.fsencode(path), digest_size=8).hexdigest()}"
