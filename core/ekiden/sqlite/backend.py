"""The result store: results, the fence, joins and records, in the tables of ``statements``.

Who waits for results does so in ``Waits``. The rules of what may follow what are ``states.may_follow`` and
``decide``; they are asked inside the transaction that stores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from ekiden.errors import BackendError, BackendRefused
from ekiden.results import Backend, BeginOutcome, Begun, Joined, Record, Start, StoredResult, refuse_unstorable
from ekiden.sqlite import statements
from ekiden.sqlite.bell import RESULTS, Bells
from ekiden.sqlite.database import Database, fetch
from ekiden.sqlite.location import name_in, options_in, path_in
from ekiden.sqlite.reading import Reading
from ekiden.sqlite.waits import Waits
from ekiden.states import RETRY, STARTED, is_final, may_follow
from ekiden.urls import BrokerURL

if TYPE_CHECKING:
    import sqlite3

Found = TypeVar("Found")

TIDY_SECONDS = 5.0
DELETED_AT_ONCE = 1000
LAST_CHARACTER, SURROGATES = 0x10FFFF, range(0xD800, 0xE000)


class SQLiteBackend(Backend):
    """Results in a file, for the processes of one machine; the same file as the broker's, or another."""

    def __init__(self, url: BrokerURL) -> None:
        options = options_in(url)
        self._url = str(url)
        self._database = Database(
            path_in(url),
            name=name_in(url),
            synchronous=options.synchronous,
            busy_timeout=options.busy_timeout,
            unavailable=BackendError,
            refused=BackendError,
            too_large=BackendRefused,
        )
        self._bells = Bells(self._database.path, sockets=options.wake == "socket", changes=self._database.data_version)
        self._reading = Reading(self._database)
        self._waits = Waits(self._database, self._bells, self._reading)
        self._tidy_at = 0.0
        self._closed = False

    def put(self, results: Sequence[StoredResult]) -> list[bool]:
        if not results:
            return []
        ids = [result.task_id for result in results]

        def store(connection: sqlite3.Connection) -> tuple[list[bool], bool]:
            now = time.time()
            rows = fetch(connection, statements.STORED_STATES, (_as_json(ids), now))
            stored = {row[0]: (row[1], row[2]) for row in rows if row[3] and self._reading.is_state(row)}
            new: dict[str, StoredResult] = {}
            answers = []
            for result in results:
                old = stored.get(result.task_id)
                allowed = old is None or may_follow(*old, result.state, result.step)
                answers.append(allowed)
                if allowed:
                    stored[result.task_id] = (result.state, result.step)
                    new[result.task_id] = result
            replaced = [row[0] for row in rows if row[0] in new]
            if replaced:
                connection.execute(statements.DELETE_RESULTS, (_as_json(replaced),))
            _insert(connection, statements.INSERT_RESULTS, [_result_row(result, now) for result in new.values()])
            return answers, any(is_final(result.state) for result in new.values())

        answers, has_final = self._write(ids, store)
        if has_final:
            self._bells.ring((RESULTS,))
        return answers

    def get(self, ids: Sequence[str]) -> list[StoredResult | None]:
        self._check_open(ids)
        asked = (_as_json(ids), time.time())
        found = self._reading.results(self._database.read(statements.STORED_RESULTS, asked))
        if len(found) < len(ids):
            for start in self._reading.starts(self._database.read(statements.STARTS, asked)).values():
                begun = StoredResult(start.task_id, STARTED, start.step, b"", start.expires)
                found.setdefault(start.task_id, begun)
        return [found.get(task_id) for task_id in ids]

    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        self._check_open(ids)
        return self._waits.wait(ids, timeout)

    def wake(self) -> None:
        self._waits.wake()

    def forget(self, ids: Sequence[str], *, deadline: float | None = None) -> None:
        def delete(connection: sqlite3.Connection) -> None:
            connection.execute(statements.DELETE_RESULTS, (_as_json(ids),))
            connection.execute(statements.DELETE_STARTS, (_as_json(ids),))

        self._write(ids, delete, deadline)

    def begin(self, starts: Sequence[Start]) -> list[Begun]:
        if not starts:
            return []
        ids = [start.task_id for start in starts]

        def note(connection: sqlite3.Connection) -> list[Begun]:
            now = time.time()
            asked = (_as_json(ids), now)
            stored = self._reading.results(fetch(connection, statements.STORED_RESULTS, asked))
            noted = self._reading.starts(fetch(connection, statements.STARTS, asked))
            answers = []
            new: dict[str, Start] = {}
            for start in starts:
                answer = decide(start, stored.get(start.task_id), noted.get(start.task_id))
                answers.append(answer)
                if answer.outcome is BeginOutcome.GO:
                    noted[start.task_id] = new[start.task_id] = start
            _insert(connection, statements.INSERT_STARTS, [_start_row(start, now) for start in new.values()])
            return answers

        return self._write(ids, note)

    def join(self, join_id: str, member: str, outcome: bytes, *, size: int, expires: float | None) -> Joined:
        def arrive(connection: sqlite3.Connection) -> Joined:
            now = time.time()
            if connection.execute(statements.ENDED_JOIN, (join_id, now)).fetchall():
                _delete_join(connection, join_id)
            new = connection.execute(statements.ARRIVE, (join_id, member, outcome)).rowcount
            ((arrived,),) = connection.execute(statements.COUNT_ARRIVAL, (join_id, new, _end(expires, now))).fetchall()
            complete = arrived >= size
            rows = fetch(connection, statements.ARRIVED, (join_id,)) if complete else []
            return Joined(int(arrived), complete, self._reading.outcomes(rows))

        return self._write((join_id, member), arrive)

    def read(self, keys: Sequence[str]) -> list[Record | None]:
        self._check_open(keys)
        rows = self._database.read(statements.READ_RECORDS, (_as_json(keys), time.time()))
        found = {record.key: record for record in self._reading.records(rows)}
        return [found.get(key) for key in keys]

    def write(
        self, key: str, value: bytes | None, *, expected_version: int | None = None, expires: float | None = None
    ) -> int | None:
        def change(connection: sqlite3.Connection) -> int | None:
            now = time.time()
            rows = fetch(connection, statements.READ_RECORDS, (_as_json([key]), now))
            version = next((record.version for record in self._reading.records(rows)), 0)
            if expected_version is not None and expected_version != version:
                return None
            if value is None:
                connection.execute(statements.DELETE_RECORD, (key,))
                return 0
            connection.execute(statements.WRITE_RECORD, (key, version + 1, _end(expires, now), value))
            return version + 1

        return self._write((key,), change)

    def scan(self, prefix: str) -> list[Record]:
        self._check_open((prefix,))
        rows = self._database.read(statements.SCAN_RECORDS, (prefix, _first_behind(prefix), time.time()))
        return self._reading.records(rows)

    def close(self) -> None:
        self._closed = True
        self._waits.close()
        self._bells.close()
        self._database.close()

    def forget_connections(self) -> None:
        self._waits.abandon()
        self._waits = Waits(self._database, self._bells, self._reading)
        self._bells.forget()
        self._database.forget()

    def _write(
        self, texts: Iterable[str], act: Callable[[sqlite3.Connection], Found], deadline: float | None = None
    ) -> Found:
        """A transaction on ``texts``, ids or keys, after which some of what has ended is deleted now and then."""
        self._check_open(texts)
        try:
            found = self._database.write(act, deadline)
        except (OverflowError, UnicodeEncodeError) as error:
            # A number, text or length that sqlite3 cannot hand to SQLite.
            raise BackendRefused(f"{self._url} cannot store this: {error}.") from error
        if time.monotonic() >= self._tidy_at:
            self._tidy_at = time.monotonic() + TIDY_SECONDS
            if self._database.write(_delete_some_that_ended):
                self._tidy_at = 0.0
        return found

    def _check_open(self, texts: Iterable[str]) -> None:
        if self._closed:
            raise BackendError(f"The result backend {self._url} was closed here; open it again.")
        refuse_unstorable(texts)


def decide(start: Start, stored: StoredResult | None, noted: Start | None) -> Begun:
    """The fence's answer to ``start``, given what is stored of its task and which try was noted last."""
    if (stored is not None and stored.step > start.step) or (noted is not None and noted.step > start.step):
        return Begun(BeginOutcome.SECOND_COPY)
    if stored is not None and (is_final(stored.state) or (stored.state == RETRY and stored.step == start.step)):
        return Begun(BeginOutcome.ENDED, stored)
    if noted is not None and noted.step == start.step and noted.message_id != start.message_id:
        return Begun(BeginOutcome.SECOND_COPY)
    return Begun(BeginOutcome.GO)


def _delete_some_that_ended(connection: sqlite3.Connection) -> bool:
    """Whether there is more."""
    now = time.time()
    deleted = [connection.execute(statement, (now, DELETED_AT_ONCE)).rowcount for statement in statements.DELETE_ENDED]
    for (join_id,) in fetch(connection, statements.ENDED_JOINS, (now, DELETED_AT_ONCE)):
        _delete_join(connection, join_id)
    return DELETED_AT_ONCE in deleted


def _insert(connection: sqlite3.Connection, by_size: dict[int, str], rows: Sequence[tuple[Any, ...]]) -> None:
    """Store rows in few statements."""
    start = 0
    for size, statement in by_size.items():
        while len(rows) - start >= size:
            connection.execute(statement, list(chain.from_iterable(rows[start : start + size])))
            start += size


def _delete_join(connection: sqlite3.Connection, join_id: str | bytes) -> None:
    for statement in statements.DELETE_JOIN:
        connection.execute(statement, (join_id,))


def _result_row(result: StoredResult, now: float) -> tuple[Any, ...]:
    ends = _end(result.expires, now)
    return (result.task_id, result.state, result.step, ends, result.expires, result.body)


def _start_row(start: Start, now: float) -> tuple[Any, ...]:
    return (start.task_id, start.step, start.message_id, _end(start.expires, now), start.expires)


def _end(expires: float | None, now: float) -> float | None:
    return None if expires is None else now + expires


def _as_json(texts: Sequence[str]) -> str:
    return msgspec.json.encode(texts).decode()


def _first_behind(prefix: str) -> str | None:
    """The smallest text that is greater than all that begin with ``prefix``; None when there is none."""
    while prefix:
        following = ord(prefix[-1]) + 1
        prefix = prefix[:-1]
        if following <= LAST_CHARACTER:
            return prefix + chr(SURROGATES.stop if following in SURROGATES else following)
    return None
