"""One SQLite file, opened by one process: two connections, their locks, and what goes wrong with files.

    writer    every transaction that changes something, one at a time; guarded by ``_writing``
    reader    single statements that change nothing, beside a transaction of the writer; guarded by ``_reading``

What always holds:

- A write begins with BEGIN IMMEDIATE: a transaction that began by reading and then wants to write is refused at once
  in WAL mode, however long it is ready to wait. Who finds the file locked by another process tries again after a
  fraction of a millisecond (SQLite's own ladder sleeps up to 100).
- Every result is fetched to its end before the lock is released: an unfinished cursor would keep the WAL from being
  emptied.
- **Nobody opens or closes the file beside SQLite.** Closing any descriptor of it drops every lock this process has on
  it. Looking at it (``os.stat``) is safe.
- **One process checkpoints at a time**, holding ``<file>-checkpoint.lock``, not soon after another one did, and in
  RESTART or TRUNCATE mode, which keep writers out meanwhile: SQLite before 3.51.3 can lose pages when a checkpoint
  begins shortly after another one while somebody commits. Each process does so when it has itself written about
  ``WAL_PAGES``; the idle ones also shorten the WAL file, which costs those who write next a fifth of their speed.
- **No connection crosses a fork.** SQLite keeps one list of open files per process; a child inherits it and believes
  to hold locks that it does not: rows committed through a *new* connection in the child are lost when the parent
  closes its own. So both connections are closed before a fork and opened again, by parent and child, when needed.
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
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn

from ekiden.errors import EkidenError
from ekiden.sqlite import statements

try:
    import fcntl
except ImportError:  # Windows: each connection checkpoints by itself, as SQLite does by default
    _HAS_FLOCK = False
else:
    _HAS_FLOCK = True

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
    """

    def __init__(
        self,
        path: str,
        *,
        synchronous: Literal["normal", "full"],
        busy_timeout: float,
        unavailable: type[EkidenError],
        refused: type[EkidenError],
        too_large: type[EkidenError],
    ) -> None:
        self.path = path
        self._synchronous = synchronous
        self._busy_timeout = busy_timeout
        self._unavailable = unavailable
        self._refused = refused
        self._too_large = too_large
        self._transaction = _Transaction(self)
        self._look_at_wal = 0.0
        self._pages = self._changes = 0
        self._backoff = 1
        self._inherited = False
        self._start()
        self._close_before_forks()

    def _start(self) -> None:
        self._writing = threading.Lock()
        self._reading = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None

    def write(self, deadline: float | None = None) -> _Transaction:
        """A transaction: ``with database.write() as connection``. Committed at the end, rolled back when left early.

        ``deadline`` (monotonic seconds): it has begun by then; without one, within ``busy_timeout``.
        """
        return self._transaction if deadline is None else _Transaction(self, deadline)

    def read(self, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Every row of one statement that changes nothing."""
        with self._reading:
            if self._reader is not None:
                return self._fetch(self._reader, statement, parameters)
        with self._writing, self._reading:
            return self._fetch(self._opened_reader(), statement, parameters)

    def data_version(self) -> int:
        """A number that differs from the last one when any connection but the reader has committed since."""
        version: int = self.read("PRAGMA data_version")[0][0]
        return version

    def tidy(self) -> None:
        """When nobody writes: empty the WAL, and give free pages back to the file system."""
        size, changed = self._wal()
        if size == 0 or time.time() - changed < WAL_IDLE_SECONDS:
            return
        with self._writing:
            writer = self._writer
            if writer is None:
                return
            with contextlib.suppress(sqlite3.Error):  # whoever writes next meets the same trouble, and can be told
                if writer.execute("PRAGMA freelist_count").fetchone()[0] > VACUUM_PAGES:
                    # One step gives back one page, and only executescript() goes on stepping.
                    writer.executescript(f"PRAGMA incremental_vacuum({VACUUM_PAGES})")
            self._checkpoint(writer, "TRUNCATE")

    def close(self) -> None:
        """Close both connections; the next call opens them again."""
        with self._writing, self._reading:
            self._close_connections()

    def forget(self) -> None:
        """In a forked child: begin anew. Connections that could not be closed before the fork are kept, unused."""
        for connection in (self._writer, self._reader):
            if connection is not None:
                _keep_for_ever(connection)
                self._inherited = True
        self._start()

    # Transactions.

    def begin(self, deadline: float | None = None) -> sqlite3.Connection:
        """Take the lock and begin; only ``_Transaction`` calls this."""
        patience = self._busy_timeout + 1
        if deadline is not None:
            patience = min(patience, max(0.0, deadline - time.monotonic()))
        if not self._writing.acquire(timeout=patience):
            raise self._unavailable(f"sqlite:///{self.path}: this process was busy writing for {patience:.3g} s.")
        try:
            writer = self._writer = self._writer or self._open_writer(deadline)
            self._patiently(writer, "BEGIN IMMEDIATE", deadline)
        except BaseException as error:
            self._writing.release()
            if isinstance(error, sqlite3.Error):
                self._raise(error)
            raise
        return writer

    def end(self, connection: sqlite3.Connection, error: BaseException | None) -> None:
        """Commit, or roll back after ``error``, and release the lock; only ``_Transaction`` calls this."""
        try:
            if error is None:
                connection.execute("COMMIT")
                self._note_commit(connection)
        except sqlite3.Error as failed:
            error = failed
        finally:
            if connection.in_transaction:
                with contextlib.suppress(sqlite3.Error):  # a disk that fails has rolled it back already
                    connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error) and _code_of(error) == sqlite3.SQLITE_FULL:
                self._checkpoint(connection, "RESTART")  # so that deleting finds room in the WAL
            self._writing.release()
        if isinstance(error, sqlite3.Error):
            self._raise(error)

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
            self._checkpoint(writer, "RESTART")
        elif time.monotonic() >= self._look_at_wal:
            self._look_at_wal = time.monotonic() + WAL_LOOK_SECONDS
            if self._wal()[0] >= WAL_LIMIT_BYTES * self._backoff:
                self._checkpoint(writer, "TRUNCATE")

    def _checkpoint(self, writer: sqlite3.Connection, mode: Literal["RESTART", "TRUNCATE"]) -> None:
        if not _HAS_FLOCK:
            return
        with _sole_checkpointer(f"{self.path}-checkpoint.lock") as sole:
            if sole:
                self._pages = 0
                with contextlib.suppress(sqlite3.Error):  # what was committed is safe in the WAL
                    # With no time to wait it would go on without keeping the writers out.
                    writer.execute(f"PRAGMA busy_timeout={CHECKPOINT_WAITS_MS}")
                    (stopped, _, _) = writer.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
                    self._backoff = min(self._backoff * 2, LONGEST_BACKOFF) if stopped else 1
                writer.execute("PRAGMA busy_timeout=0")

    # Opening and closing.

    def _open_writer(self, deadline: float | None = None) -> sqlite3.Connection:
        if self._inherited:
            raise self._refused(
                f"sqlite:///{self.path}: this process was forked while its parent was writing to the file, and cannot "
                "use it safely; start it with the spawn method."
            )
        _make_private(self.path)
        writer = self._connect(deadline)
        try:
            if self._check_ours(writer) == 0:
                # Decided when the file is made, or it can never shrink again. Later it would only wait for a lock.
                writer.execute("PRAGMA auto_vacuum=INCREMENTAL")
            self._patiently(writer, "PRAGMA journal_mode=WAL", deadline)
            writer.execute(f"PRAGMA synchronous={self._synchronous}")
            writer.execute("PRAGMA secure_delete=OFF")
            writer.execute("PRAGMA temp_store=MEMORY")
            if _HAS_FLOCK:
                writer.execute("PRAGMA wal_autocheckpoint=0")
            self._make_tables(writer, deadline)
            writer.execute("PRAGMA busy_timeout=0")
        except BaseException:
            writer.close()
            raise
        return writer

    def _opened_reader(self) -> sqlite3.Connection:
        """The caller holds both locks."""
        if self._reader is None:
            try:
                if self._writer is None:
                    self._writer = self._open_writer()  # makes the file and its tables
                self._reader = self._connect()
                self._reader.execute("PRAGMA query_only=ON")
            except sqlite3.Error as error:
                self._raise(error)
        return self._reader

    def _fetch(self, reader: sqlite3.Connection, statement: str, parameters: Sequence[Any]) -> list[Any]:
        try:
            return reader.execute(statement, parameters).fetchall()
        except sqlite3.Error as error:
            self._raise(error)

    def _connect(self, deadline: float | None = None) -> sqlite3.Connection:
        timeout = self._busy_timeout
        if deadline is not None:
            timeout = min(timeout, max(0.0, deadline - time.monotonic()))
        # Every connection is used under a lock of ours, by any thread.
        return sqlite3.connect(
            self.path, timeout=timeout, isolation_level=None, check_same_thread=False, cached_statements=256
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
        self._patiently(writer, "BEGIN IMMEDIATE", deadline)
        try:
            if self._check_ours(writer) == 0:
                for statement in statements.TABLES:
                    writer.execute(statement)
                writer.execute(f"PRAGMA application_id={statements.APPLICATION_ID}")
                writer.execute(f"PRAGMA user_version={statements.FORMAT_VERSION}")
            writer.execute("COMMIT")
        except BaseException:
            if writer.in_transaction:
                writer.execute("ROLLBACK")
            raise

    def _close_connections(self) -> None:
        for connection in (self._reader, self._writer):
            if connection is not None:
                # What the close could not do (a full disk), the next one to open the file does.
                with contextlib.suppress(sqlite3.Error):
                    connection.close()
        self._reader = self._writer = None

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
        patience = self._busy_timeout + 1
        self._held_for_fork = [lock for lock in (self._writing, self._reading) if lock.acquire(timeout=patience)]
        if self._writing in self._held_for_fork and self._reading in self._held_for_fork:
            self._close_connections()

    def _after_fork(self) -> None:
        for lock in self._held_for_fork:
            lock.release()

    def _raise(self, error: sqlite3.Error) -> NoReturn:
        code = _code_of(error)
        again, meaning = _MEANING.get(code, (False, ""))
        kind = self._unavailable if again else self._refused
        if code == sqlite3.SQLITE_TOOBIG:
            kind = self._too_large
        raise kind(f"sqlite:///{self.path}: {meaning or 'SQLite refused'} ({error}).") from error


class _Transaction:
    """``with`` this: see ``Database.write``."""

    __slots__ = ("_connection", "_database", "_deadline")

    def __init__(self, database: Database, deadline: float | None = None) -> None:
        self._database = database
        self._deadline = deadline

    def __enter__(self) -> sqlite3.Connection:
        self._connection = self._database.begin(self._deadline)
        return self._connection

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._database.end(self._connection, error)


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
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            os.link(new, path)
        finally:
            os.unlink(new)


@contextlib.contextmanager
def _sole_checkpointer(path: str) -> Iterator[bool]:
    """Whether nobody on this host is at it or was just now; until the end of the ``with``, nobody else will be."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        last = os.fstat(descriptor)
        # A new file was never written to: nobody has checkpointed yet.
        sole = last.st_size == 0 or not 0 <= time.time() - last.st_mtime < CHECKPOINT_EVERY_SECONDS
        yield sole
        if sole:
            os.pwrite(descriptor, b"!", 0)  # its time is that of the last checkpoint
        fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _keep_for_ever(connection: sqlite3.Connection) -> None:
    """Never close it, not even when the interpreter ends: closing drops the locks of every connection to the file."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
