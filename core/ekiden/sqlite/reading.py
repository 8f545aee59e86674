"""Rows of the result store as what they say, where they say something.

Somebody may have written into the file: another program, a script, a person with ``sqlite3``. SQLite takes a text or a
number in any column. A row that says nothing counts as absent: the next one that is stored takes its place, and
nobody else is held up by it. It is named in the log, once in each process.

A stored outcome whose body is no bytes is read as bytes nevertheless: who waits for it is then told that the result
cannot be read, instead of waiting for one that never comes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ekiden.loggers import safe_logger
from ekiden.results import Record, Start, StoredResult

if TYPE_CHECKING:
    from ekiden.sqlite.database import Database

logger = safe_logger("ekiden.sqlite")

NAMED_AT_MOST = 1000


class Reading:
    """Reads rows, in any thread, and remembers which ones it has named in the log."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._named: set[tuple[str, str]] = set()

    def is_state(self, row: tuple[Any, ...]) -> bool:
        """Whether (task_id, state, step, ...) can be compared with another state."""
        if type(row[1]) is str and type(row[2]) is int:
            return True
        self._name("result", row[0])
        return False

    def results(self, rows: Iterable[tuple[Any, ...]]) -> dict[str, StoredResult]:
        """By task id, of rows (task_id, state, step, body, expires)."""
        found: dict[str, StoredResult] = {}
        for row in rows:
            task_id, state, step, body, expires = row
            if type(body) is bytes and type(state) is str and type(step) is int and _is_time(expires):
                found[task_id] = StoredResult(task_id, state, step, body, expires)
            elif self.is_state(row):
                self._name("result", task_id)
                found[task_id] = StoredResult(task_id, state, step, _as_bytes(body), None)
        return found

    def starts(self, rows: Iterable[tuple[Any, ...]]) -> dict[str, Start]:
        """By task id, of rows (task_id, step, message_id, expires)."""
        found: dict[str, Start] = {}
        for task_id, step, message_id, expires in rows:
            if type(step) is int and type(message_id) is str and _is_time(expires):
                found[task_id] = Start(task_id, step, message_id, expires)
            else:
                self._name("start", task_id)
        return found

    def records(self, rows: Iterable[tuple[Any, ...]]) -> list[Record]:
        """Of rows (key, value, version)."""
        found: list[Record] = []
        for key, value, version in rows:
            if type(key) is str and type(value) is bytes and type(version) is int and version > 0:
                found.append(Record(key, value, version))
            else:
                self._name("record", key)
        return found

    def outcomes(self, rows: Iterable[tuple[Any, ...]]) -> dict[str, bytes]:
        """By member, of rows (member, outcome)."""
        return {str(member): _as_bytes(outcome) for member, outcome in rows}

    def _name(self, table: str, key: object) -> None:
        what = (table, repr(key))
        if what not in self._named:
            if len(self._named) >= NAMED_AT_MOST:
                self._named.clear()
            self._named.add(what)
            logger.error(
                "sqlite:///%s: the %s stored under %s cannot be read, and counts as none: somebody else has written it",
                self._database.path,
                *what,
            )


def _is_time(value: object) -> bool:
    return value is None or type(value) is float


def _as_bytes(value: object) -> bytes:
    if type(value) is bytes:
        return value
    return value.encode(errors="surrogateescape") if isinstance(value, str) else b""
