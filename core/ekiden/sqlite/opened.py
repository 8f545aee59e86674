"""Whether the file that is open is still the one that its name means, and what has to be closed when it is not.

Somebody deletes the file, puts a copy in its place, moves its directory, or removes the WAL beside it, while processes
have it open. SQLite goes on with what it has open, so these processes would meet nobody any more. Each process looks
now and then (``changed``).

SQLite keeps one list of open files per process: a connection that is opened while another one of this process has the
same file open shares the old one's index of the WAL, and would read it beside a new WAL. So when something has
changed, every connection of this process to that file is closed before one is opened again: ``in_this_process``
knows all of them.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from ekiden.sqlite.database import Database

Inode = tuple[int, int]
"""Device and number."""


class Opened(msgspec.Struct, frozen=True):
    """What was behind the names when they were opened."""

    file: Inode
    wal: Inode | None
    index: Inode | None
    """Of the WAL: ``-shm``."""


def behind(name: str, path: str) -> Opened | None:
    """What is behind the names now; None when the file is not there.

    ``name`` is what the user calls the file, ``path`` what that meant when it was opened: another one behind a link.
    """
    file = _inode_of(name)
    return None if file is None else Opened(file, _inode_of(f"{path}-wal"), _inode_of(f"{path}-shm"))


def change(opened: Opened, now: Opened | None) -> str | None:
    """What has happened since, in words that follow "the file"; None when nothing has."""
    if now is None:
        return "is gone: it was deleted, or its directory was moved"
    if now.file != opened.file:
        return "was replaced by another one"
    for name, before, after in (("-wal", opened.wal, now.wal), ("-shm", opened.index, now.index)):
        if before != after:
            return f"lost its {name} file, which belongs to it while it is open"
    return None


def is_same_file(opened: Opened, name: str) -> bool:
    """Whether the name still means this file."""
    try:
        return _inode_of(name) == opened.file
    except OSError:
        return False


def can_have_no_other_wal(opened: Opened, path: str) -> bool:
    """Whether nobody can have opened the file with another WAL: ours has its name still, or none has it."""
    try:
        wal, index = _inode_of(f"{path}-wal"), _inode_of(f"{path}-shm")
    except OSError:
        return False
    return wal in {None, opened.wal} and index in {None, opened.index}


def has_wal(path: str) -> bool:
    """Whether there is a WAL beside ``path``, or its index."""
    return os.path.lexists(f"{path}-wal") or os.path.lexists(f"{path}-shm")


def remove_wal(path: str, opened: Opened | None = None, *, only_index: bool = False) -> None:
    """Remove the WAL beside ``path`` and its index, or only that; with ``opened``, only where they are these.

    Whoever calls this is the only one on this host to do so. What cannot be removed stays.
    """
    names = [(f"{path}-shm", opened and opened.index)]
    if not only_index:
        names.append((f"{path}-wal", opened and opened.wal))
    for name, wanted in names:
        with contextlib.suppress(OSError):  # SQLite says better what is wrong
            if opened is None or _inode_of(name) == wanted:
                os.unlink(name)


def _inode_of(path: str) -> Inode | None:
    """What is behind a name; None for nothing. Raises OSError where that cannot be told."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


class OpenDatabases:
    """Every Database of this process. Whoever closes those of one file holds ``lock``, and takes theirs after it."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._process_id = os.getpid()
        self.lock = threading.RLock()
        self._databases: dict[int, weakref.ref[Database]] = {}

    def add(self, database: Database) -> None:
        """Know one more."""
        if self._process_id != os.getpid():
            self._start()  # the lock may have been taken in the parent when this child was made
        number, databases = id(database), self._databases
        databases[number] = weakref.ref(database, lambda _: databases.pop(number, None))

    def all_of(self, file: Inode) -> list[Database]:
        """Those that have ``file`` open."""
        known = [reference() for reference in list(self._databases.values())]
        return [each for each in known if each is not None and each.opened is not None and each.opened.file == file]


# As module-level as what it describes: SQLite's list of open files is one per process, too.
in_this_process = OpenDatabases()
