"""One SQLite file, opened by one process: two connections, their locks, and what goes wrong with files.

    writer    every transaction that changes something, one at a time; guarded by ``_writing``
    reader    single statements that change nothing, beside a transaction of the writer; guarded by ``_reading``

What always holds:

- A write begins with BEGIN IMMEDIATE: a transaction that began by reading and then wants to write is refused at once
  in WAL mode, however long it is ready to wait. Who finds the file locked by another process tries again after a
  fraction of a millisecond (SQLite's own ladder sleeps up to 100).
- Every result is fetched to its end before the lock is released: an unfinished cursor would keep the WAL from being
  emptied.
- **An exception may come out of a signal handler at any moment**, also while something is cleaned up. Python calls
  handlers between its own instructions, and never inside of SQLite: so a transaction is ended by the connection's own
  ``__exit__``, and a lock released by the first call of a ``finally``, which nothing can divide. ``_mend`` then does
  what is left, whatever was interrupted. So transactions are functions that are passed in, and not ``with`` blocks of
  our own, whose end could be interrupted before its first line.
- **Nobody opens or closes the file beside SQLite.** Closing any descriptor of it drops every lock this process has on
  it. Looking at it (``os.stat``) is safe.
- **One process checkpoints at a time**, holding ``<file>-checkpoint.lock``, not soon after another one did, and in
  RESTART or TRUNCATE mode, which keep writers out meanwhile: SQLite before 3.51.3 can lose pages when a checkpoint
  begins shortly after another one while somebody commits. Each process does so when it has itself written about
  ``WAL_PAGES``; the idle ones also shorten the WAL file, which costs those who write next a fifth of their speed.
- **No connection crosses a fork.** SQLite keeps one list of open files per process; a child inherits it and believes
  to hold locks that it does not: rows committed through a *new* connection in the child are lost when the parent
  closes its own. So both connections are closed before a fork and opened again, by parent and child, when needed.
- **The name is looked at** every ``LOOK_SECONDS`` while the file is used. When it means another file, or none, all is
  closed and opened anew by that name (``ekiden.sqlite.opened``).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, TypeVar

from ekiden.errors import EkidenError
from ekiden.locks import release_if_held
from ekiden.loggers import safe_logger
from ekiden.sqlite import statements
from ekiden.sqlite.host_lock import HAS_FLOCK, HostLock
from ekiden.sqlite.opened import (
    Opened,
    behind,
    can_have_no_other_wal,
    change,
    has_wal,
    in_this_process,
    is_same_file,
    remove_wal,
)

Found = TypeVar("Found")

logger = safe_logger("ekiden.sqlite")

WAL_PAGES = 1000
PAGES_OF_A_COMMIT, ROWS_OF_A_PAGE = 4, 2
"""A commit of one row writes some four pages; a batch about one more for every two rows."""

WAL_LIMIT_BYTES = 64 * 1024 * 1024
"""The WAL of large messages is shortened before it exceeds this by much."""

WAL_LOOK_SECONDS = 0.1
CHECKPOINT_WAITS_MS = 250
LONGEST_BACKOFF = 64
"""Somebody who reads for long stops every checkpoint; trying each time would stop all writers each time."""

CHECKPOINT_EVERY_SECONDS = 0.05
WAL_IDLE_SECONDS = 3.0
VACUUM_PAGES = 1000
"""Pages given back to the file system at a time, and how many must be free before any are."""

SHORTEST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.0002, 0.002

LOOK_SECONDS = 0.5
"""How long it may go unnoticed, by a process that uses the file, that it was deleted or replaced."""

_MEANING = {
    sqlite3.SQLITE_BUSY: (True, "it was locked by another process for longer than busy_timeout; try again"),
    sqlite3.SQLITE_LOCKED: (True, "it was locked by another connection; try again"),
    sqlite3.SQLITE_FULL: (True, "the disk is full, or the file has reached its size limit; make room"),
    sqlite3.SQLITE_IOERR: (True, "the disk reports an error"),
    sqlite3.SQLITE_CANTOPEN: (False, "the file cannot be opened or made; check its directory and the rights on both"),
    sqlite3.SQLITE_READONLY: (False, "the file or its directory is read-only for this user"),
    sqlite3.SQLITE_PERM: (False, "this user may not open the file"),
    sqlite3.SQLITE_AUTH: (False, "this user may not open the file"),
    sqlite3.SQLITE_NOTADB: (False, "the file is not an SQLite database"),
    sqlite3.SQLITE_CORRUPT: (False, "the file is damaged; PRAGMA integrity_check says where"),
    sqlite3.SQLITE_TOOBIG: (False, "a value is larger than SQLite takes"),
}


class Database:
    """An SQLite file as this process uses it; any thread may call any method.

    Raises ``unavailable`` for what may work when tried again (locked, full), ``refused`` for what will not
    (read-only, damaged, not ours), and ``too_large`` for a value that no SQLite file takes. ``busy_timeout`` is in
    seconds.

    ``reopened`` counts how often the file was deleted or replaced while it was open: what a caller remembers of an
    earlier one, such as the number of the last row it saw, does not hold for the next. ``name`` is what the user calls
    the file, where that is a link to ``path``.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        synchronous: Literal["normal", "full"],
        busy_timeout: float,
        unavailable: type[EkidenError],
        refused: type[EkidenError],
        too_large: type[EkidenError],
    ) -> None:
        self.path = path
        self._name = name or path
        self._synchronous = synchronous
        self._busy_timeout = busy_timeout
        self._unavailable = unavailable
        self._refused = refused
        self._too_large = too_large
        self.reopened = 0
        self._look_at_wal = self._checkpoint_at = 0.0
        self._pages = self._changes = 0
        self._backoff = 1
        self._inherited = False
        self._start()
        self._close_before_forks()

    def _start(self) -> None:
        # Reentrant ones can be released only by the thread that holds them: whoever was interrupted can always try.
        self._writing = threading.RLock()
        self._reading = threading.RLock()
        self._writing_thread = 0
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self.opened: Opened | None = None
        self._look_at = 0.0
        self._host_lock = HostLock(f"{self.path}-checkpoint.lock")
        in_this_process.add(self)

    def write(self, act: Callable[[sqlite3.Connection], Found], deadline: float | None = None) -> Found:
        """What ``act`` returns, which changes the file through the connection that it is given: all of it or nothing.

        It is committed when ``act`` returns, and rolled back when it raises. ``deadline`` (monotonic seconds): it has
        begun by then; without one, within ``busy_timeout``.
        """
        return self._alone(lambda writer: self._transact(writer, act, deadline), deadline)

    def read(self, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Every row of one statement that changes nothing."""
        while True:
            if time.monotonic() >= self._look_at:
                self._look()
            try:
                rows = self._read(statement, parameters)
            except BaseException as error:
                release_if_held(self._reading)
                if isinstance(error, sqlite3.Error):
                    self._raise(error)
                raise
            if rows is not None:
                return rows
            self._look_around()
            self._alone(self._open_reader)

    def data_version(self) -> int:
        """A number that differs from the last one when any connection but the reader has committed since."""
        version: int = self.read("PRAGMA data_version")[0][0]
        return version

    def tidy(self) -> None:
        """When nobody writes: empty the WAL, and give free pages back to the file system."""
        size, changed = self._wal()
        if size > 0 and time.time() - changed >= WAL_IDLE_SECONDS and self._writer is not None:
            self._alone(self._tidy)

    def close(self) -> None:
        """Close both connections; the next call opens them again."""
        try:
            with self._writing, self._reading:
                self._close_connections()
        except BaseException:
            self._mend()
            raise

    def forget(self) -> None:
        """In a forked child: begin anew. Connections that could not be closed before the fork are kept, unused."""
        for connection in (self._writer, self._reader):
            if connection is not None:
                _keep_for_ever(connection)
                self._inherited = True
        self._start()

    def _read(self, statement: str, parameters: Sequence[Any]) -> list[Any] | None:
        with self._reading:
            return None if self._reader is None else fetch(self._reader, statement, parameters)

    # Transactions.

    def _alone(self, act: Callable[[sqlite3.Connection], Found], deadline: float | None = None) -> Found:
        """What ``act(writer)`` returns, while no other thread of this process uses the writer."""
        if self._writing_thread == threading.get_ident():
            # A signal handler that calls delay(), while the main thread is in the middle of another one.
            raise self._unavailable(f"sqlite:///{self.path}: this thread is in the middle of writing to it already.")
        if self._writer is None:
            self._look_around()
        elif time.monotonic() >= self._look_at:
            self._look()
        try:
            return self._locked(act, deadline)
        except BaseException as error:
            self._mend()
            if isinstance(error, sqlite3.Error):
                self._raise(error)
            raise

    def _locked(self, act: Callable[[sqlite3.Connection], Found], deadline: float | None) -> Found:
        patience = self._busy_timeout + 1
        if deadline is not None:
            patience = min(patience, max(0.0, deadline - time.monotonic()))
        if not self._writing.acquire(timeout=patience):
            raise self._unavailable(f"sqlite:///{self.path}: this process was busy writing for {patience:.3g} s.")
        try:
            self._writing_thread = threading.get_ident()
            return act(self._writer or self._open_writer(deadline))
        finally:
            self._writing_thread = 0
            self._writing.release()

    def _transact(
        self, writer: sqlite3.Connection, act: Callable[[sqlite3.Connection], Found], deadline: float | None
    ) -> Found:
        try:
            with writer:  # it commits or rolls back by itself, whatever interrupts these lines
                self._patiently(writer, "BEGIN IMMEDIATE", deadline)
                found = act(writer)
                writer.execute("COMMIT")  # the connection's own would be compiled anew each time
        except sqlite3.Error as error:
            if _code_of(error) == sqlite3.SQLITE_FULL:
                self._checkpoint(writer, "RESTART")  # so that deleting finds room in the WAL
            raise
        self._note_commit(writer)
        return found

    def _patiently(self, connection: sqlite3.Connection, statement: str, deadline: float | None = None) -> None:
        give_up = None
        while True:
            try:
                connection.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if _code_of(error) != sqlite3.SQLITE_BUSY:
                    raise
                now = time.monotonic()
                if give_up is None:
                    give_up = now + self._busy_timeout if deadline is None else min(deadline, now + self._busy_timeout)
                if now >= give_up:
                    raise
            time.sleep(random.uniform(SHORTEST_RETRY_SECONDS, LONGEST_RETRY_SECONDS))

    def _mend(self) -> None:
        """Undo what is left of a transaction that was interrupted in the very lines that end it."""
        if self._writing.acquire(blocking=False):  # free, or still this thread's
            try:
                if self._writer is not None and self._writer.in_transaction:
                    self._writer.rollback()
                self._host_lock.release()
                self._writing_thread = 0
            finally:
                self._writing.release()
        release_if_held(self._reading)
        release_if_held(self._writing)

    # Checkpoints.

    def _wal(self) -> tuple[int, float]:
        """The size of the WAL file, and when it was last written."""
        try:
            found = os.stat(f"{self.path}-wal")
        except OSError:
            return 0, 0.0
        return found.st_size, found.st_mtime

    def _note_commit(self, writer: sqlite3.Connection) -> None:
        """Checkpoint when this process has written enough since it last did."""
        changes = writer.total_changes
        self._pages += PAGES_OF_A_COMMIT + (changes - self._changes) // ROWS_OF_A_PAGE
        self._changes = changes
        if self._pages >= WAL_PAGES * self._backoff:
            if time.monotonic() >= self._checkpoint_at:
                self._checkpoint(writer, "RESTART")
        elif time.monotonic() >= self._look_at_wal:
            self._look_at_wal = time.monotonic() + WAL_LOOK_SECONDS
            if self._wal()[0] >= WAL_LIMIT_BYTES * self._backoff:
                self._checkpoint(writer, "TRUNCATE")

    def _tidy(self, writer: sqlite3.Connection) -> None:
        with contextlib.suppress(sqlite3.Error):  # whoever writes next meets the same trouble, and can be told
            if writer.execute("PRAGMA freelist_count").fetchone()[0] > VACUUM_PAGES:
                # One step gives back one page, and only executescript() goes on stepping.
                writer.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
        self._checkpoint(writer, "TRUNCATE")

    def _checkpoint(self, writer: sqlite3.Connection, mode: Literal["RESTART", "TRUNCATE"]) -> None:
        # A WAL that belongs to an earlier file, or that others have exchanged, must not be written into this one.
        if self._changed() is None and self._host_lock.acquire():
            try:
                last = self._host_lock.seconds_since_use()
                if last is None or not 0 <= last < CHECKPOINT_EVERY_SECONDS:
                    self._pages = 0
                    self._empty_wal(writer, mode)
                    self._host_lock.note_use()
                else:  # not at every commit: to ask takes some ten system calls
                    self._checkpoint_at = time.monotonic() + CHECKPOINT_EVERY_SECONDS - last
            finally:
                self._host_lock.release()

    def _empty_wal(self, writer: sqlite3.Connection, mode: Literal["RESTART", "TRUNCATE"]) -> bool:
        """Whether everything in the WAL is in the file now, and the next transaction begins the WAL anew."""
        stopped = 1
        try:
            # With no time to wait it would go on without keeping the writers out.
            writer.execute(f"PRAGMA busy_timeout={CHECKPOINT_WAITS_MS}")
            with contextlib.suppress(sqlite3.Error):  # what was committed is safe in the WAL
                (stopped, _, _) = writer.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
                self._backoff = min(self._backoff * 2, LONGEST_BACKOFF) if stopped else 1
        finally:
            writer.execute("PRAGMA busy_timeout=0")
        return not stopped

    # Opening and closing.

    def _open_writer(self, deadline: float | None) -> sqlite3.Connection:
        if self._inherited:
            raise self._refused(
                f"sqlite:///{self.path}: this process was forked while its parent was writing to the file, and cannot "
                "use it safely; start it with the spawn method."
            )
        self._clear_the_way(deadline)
        before = behind(self._name, self.path)
        writer = self._connect(deadline)
        try:
            if self._check_ours(writer) == 0:
                # Decided when the file is made, or it can never shrink again. Later it would only wait for a lock.
                writer.execute("PRAGMA auto_vacuum=INCREMENTAL")
            self._patiently(writer, "PRAGMA journal_mode=WAL", deadline)
            writer.execute(f"PRAGMA synchronous={self._synchronous}")
            writer.execute("PRAGMA secure_delete=OFF")
            writer.execute("PRAGMA temp_store=MEMORY")
            if HAS_FLOCK:
                writer.execute("PRAGMA wal_autocheckpoint=0")
            self._make_tables(writer, deadline)
            writer.execute("PRAGMA busy_timeout=0")
            opened = behind(self._name, self.path)
            if opened is None or (before is not None and before.file != opened.file):
                raise self._unavailable(f"sqlite:///{self.path}: somebody replaced the file while it was opened.")
            self._changes = writer.total_changes
            self.opened = opened
            self._writer = writer
        except BaseException:
            writer.close()
            raise
        return writer

    def _open_reader(self, _writer: sqlite3.Connection) -> None:
        """The writer has made the file and its tables."""
        if self._reader is None:
            reader = self._connect()
            reader.execute("PRAGMA query_only=ON")
            reader.execute(statements.WHOSE).fetchall()
            if self._changed() is None:
                self._reader = reader
            else:  # it may have opened another file than the writer
                reader.close()
                self._look_at = 0.0

    def _connect(self, deadline: float | None = None) -> sqlite3.Connection:
        # Every connection is used under a lock of ours, by any thread.
        return sqlite3.connect(
            self.path,
            timeout=self._patience(deadline),
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )

    def _check_ours(self, connection: sqlite3.Connection) -> int:
        """The version of the format in the file, 0 for an empty one. Refuses files of others and newer formats."""
        # As one statement, or another process could make the tables between two of them.
        application, version, tables = connection.execute(statements.WHOSE).fetchone()
        if not tables:
            return 0
        if application != statements.APPLICATION_ID:
            raise self._refused(
                f"sqlite:///{self.path}: the file belongs to another program; give ekiden one of its own."
            )
        if version > statements.FORMAT_VERSION:
            raise self._refused(
                f"sqlite:///{self.path}: the file has format {version} and this ekiden knows formats up to "
                f"{statements.FORMAT_VERSION}; install a newer ekiden."
            )
        return int(version)

    def _make_tables(self, writer: sqlite3.Connection, deadline: float | None) -> None:
        if self._check_ours(writer) == statements.FORMAT_VERSION:
            return
        with writer:
            self._patiently(writer, "BEGIN IMMEDIATE", deadline)
            if self._check_ours(writer) == 0:
                for statement in statements.TABLES:
                    writer.execute(statement)
                writer.execute(f"PRAGMA application_id={statements.APPLICATION_ID}")
                writer.execute(f"PRAGMA user_version={statements.FORMAT_VERSION}")

    def _clear_the_way(self, deadline: float | None) -> None:
        """Make the file if there is none, and remove the WAL of an earlier one: SQLite would read it with the new one.

        One process at a time does so, or it would remove what another one has just made.
        """
        if os.path.exists(self.path):
            return
        try:
            if has_wal(self.path) and self._host_lock.acquire(self._patience(deadline)):
                if not os.path.exists(self.path):
                    remove_wal(self.path)
                _make_private(self.path)
        finally:
            self._host_lock.release()
        _make_private(self.path)

    def _patience(self, deadline: float | None) -> float:
        """For how many seconds to wait for others: ``busy_timeout``, or less where the deadline comes first."""
        if deadline is None:
            return self._busy_timeout
        return min(self._busy_timeout, max(0.0, deadline - time.monotonic()))

    def _close_connections(self) -> None:
        connections = self._reader, self._writer
        self._reader = self._writer = self.opened = None
        for connection in connections:
            if connection is not None:
                # What the close could not do (a full disk), the next one to open the file does.
                with contextlib.suppress(sqlite3.Error):
                    connection.close()

    # A file that is not the same any more.

    def _changed(self) -> str | None:
        """What has happened to the file since it was opened; None when nothing has, or when that cannot be told."""
        opened = self.opened
        if opened is None:
            return None
        try:
            return change(opened, behind(self._name, self.path))
        except OSError:
            return None

    def _look(self) -> None:
        """See whether the file is still the one that its name means; close it, all over this process, if not."""
        self._look_at = time.monotonic() + LOOK_SECONDS
        opened = self.opened
        if opened is None or self._changed() is None:
            return
        taken: list[threading.RLock] = []
        try:
            self._take(in_this_process.lock, taken)
            databases = in_this_process.all_of(opened.file)
            if any(each._writing_thread == threading.get_ident() for each in databases):
                return  # a signal handler, in the middle of a write of this thread
            for each in databases:
                self._take(each._writing, taken)
                self._take(each._reading, taken)
            what = self._changed()
            if what is not None:  # and no other thread was here first
                self._leave(databases, opened, what)
        finally:
            for lock in reversed(taken):
                release_if_held(lock)

    def _look_around(self) -> None:
        """Before something is opened: what this process has open of the same file must be as it was."""
        with contextlib.suppress(OSError):
            found = behind(self._name, self.path)
            if found is not None:
                for each in in_this_process.all_of(found.file):
                    each._look()

    def _take(self, lock: threading.RLock, taken: list[threading.RLock]) -> None:
        taken.append(lock)
        patience = self._busy_timeout + 1
        if not lock.acquire(timeout=patience):
            raise self._unavailable(f"sqlite:///{self.path}: this process was busy with it for {patience:g} s.")

    def _leave(self, databases: Sequence[Database], opened: Opened, what: str) -> None:
        """Close ``databases``, all that this process has opened of one file. The caller holds all their locks."""
        outcome = "What only the earlier one held is lost."
        locked = self._host_lock.acquire(self._busy_timeout)
        try:
            if not is_same_file(opened, self._name):
                saved = True
            elif saved := locked and self._save_wal(opened):
                outcome = "Nothing is lost."
            else:
                outcome = "What was stored last may be lost."
            if locked:
                # While they are open here: once they are closed, new files may have their numbers. A WAL that is not
                # saved stays: where it is whole, whoever opens the file next makes a new index of it.
                remove_wal(self.path, opened, only_index=not saved)
        finally:
            self._host_lock.release()
        logger.error(
            "sqlite:///%s: the file %s. It is opened again by its name, and made where there is none. %s",
            self.path,
            what,
            outcome,
        )
        for each in databases:
            each._close_connections()
            each.path = os.path.realpath(each._name)
            each._host_lock = HostLock(f"{each.path}-checkpoint.lock")
            each.reopened += 1

    def _save_wal(self, opened: Opened) -> bool:
        """Bring home what is in the WAL, some of whose names were removed; False where that cannot be done.

        Only while nobody can have begun another WAL, whose pages would be overwritten.
        """
        return (
            self._writer is not None
            and can_have_no_other_wal(opened, self.path)
            and self._empty_wal(self._writer, "TRUNCATE")
        )

    # Forks.

    def _close_before_forks(self) -> None:
        """Such hooks cannot be taken back, so they must not keep this object alive."""
        if not hasattr(os, "register_at_fork"):  # pragma: no cover
            return
        myself = weakref.ref(self)

        def before() -> None:
            if (database := myself()) is not None:
                database._before_fork()

        def in_parent() -> None:
            if (database := myself()) is not None:
                database._after_fork()

        def in_child() -> None:
            if (database := myself()) is not None:
                database.forget()

        os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)

    def _before_fork(self) -> None:
        if self._writing_thread == threading.get_ident():
            return  # a signal handler forks in the middle of a write; the child will refuse to use the file
        patience = max(self._busy_timeout + 1, 0.0)
        if self._writing.acquire(timeout=patience) and self._reading.acquire(timeout=patience):
            self._close_connections()

    def _after_fork(self) -> None:
        if self._writing_thread != threading.get_ident():
            release_if_held(self._reading)
            release_if_held(self._writing)

    def _raise(self, error: sqlite3.Error) -> NoReturn:
        code = _code_of(error)
        again, meaning = _MEANING.get(code, (False, ""))
        if code == sqlite3.SQLITE_CANTOPEN and self.reopened:
            again = True  # its directory was moved while it was in use, and may come back
        self._look_at = 0.0
        kind = self._unavailable if again else self._refused
        if code == sqlite3.SQLITE_TOOBIG:
            kind = self._too_large
        raise kind(f"sqlite:///{self.path}: {meaning or 'SQLite refused'} ({error}).") from error


def fetch(connection: sqlite3.Connection, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
    """Every row. A text that is not UTF-8, which another program has written, is told as its bytes."""
    try:
        return connection.execute(statement, parameters).fetchall()
    except sqlite3.OperationalError as error:
        if _code_of(error):
            raise  # SQLite's own, and not the module's that cannot decode a text
    connection.text_factory = _text_or_bytes
    try:
        return connection.execute(statement, parameters).fetchall()
    finally:
        connection.text_factory = str


def _text_or_bytes(text: bytes) -> str | bytes:
    try:
        return text.decode()
    except UnicodeDecodeError:
        return text


def _code_of(error: sqlite3.Error) -> int:
    """SQLite's primary code; 0 for the module's own errors (a value that cannot be bound)."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def _make_private(path: str) -> None:
    """Make an empty file that only its owner may read, if there is none yet.

    It gets its name only when it is closed: closing it later could drop locks that another thread has on it by then.
    """
    if os.path.exists(path):
        return
    with contextlib.suppress(OSError):  # SQLite makes the file, or says better why it cannot be made
        new = f"{path}-new-{os.urandom(8).hex()}"
        try:
            os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            os.link(new, path)
        finally:
            os.unlink(new)


def _keep_for_ever(connection: sqlite3.Connection) -> None:
    """Never close it, not even when the interpreter ends: closing drops the locks of every connection to the file."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
