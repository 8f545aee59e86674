"""The result store in MongoDB: results and the fence in ``results``, ``joins``, ``records``; ``waits`` for who waits.

Results, notes, joins and records are written durably (a majority has them in its journals), and read from the primary.
A batch is one ``insert`` where most tasks are new, else one ``update``, and where the counts do not tell what became of
each, one look. A large batch is several of these.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

from bson import Binary
from ekiden.errors import BackendError, BackendRefused
from ekiden.results import Backend, Begun, Joined, Record, Start, StoredResult, refuse_unstorable
from ekiden.states import is_final
from ekiden.urls import BrokerURL
from pymongo import UpdateOne
from pymongo.errors import BulkWriteError
from pymongo.results import BulkWriteResult

from ekiden_mongodb import results as layout
from ekiden_mongodb.client import Client
from ekiden_mongodb.contexts import in_own_context
from ekiden_mongodb.errors import DUPLICATE_KEY
from ekiden_mongodb.expiring import AT_ONCE, Document, ExpiringCollection, slices
from ekiden_mongodb.joins import Joins
from ekiden_mongodb.records import Records
from ekiden_mongodb.waits import Waits
from ekiden_mongodb.warnings import warnings_about

WRITTEN_AT_ONCE = 500
"""So many results, or starts, are one command, with a deadline of its own."""

_MOST_COLLISIONS = 5
"""So often a batch is repeated whose documents others made at the same moment."""

_WRITER_BYTES = 9


class MongoDBRefused(BackendError):
    """The server will not do it before an operator has changed something: a password, a right, a version."""


class MongoDBBackend(Backend):
    """Results at one MongoDB server, a replica set, or a sharded cluster."""

    def __init__(self, url: BrokerURL) -> None:
        self._url = str(url)
        self._client = Client(url, unavailable=BackendError, refused=MongoDBRefused, unstorable=BackendRefused)
        self._results = ExpiringCollection(self._client, "results")
        self._joins = Joins(self._client)
        self._records = Records(self._client)
        self._waits = Waits(self._client, self._final)
        self._are_mostly_new = True  # the tasks whose results are stored: what their last ones were
        self._closed = False

    @in_own_context
    def put(self, results: Sequence[StoredResult]) -> list[bool]:
        self._check_open(text for result in results for text in (result.task_id, result.state))
        answers = [False] * len(results)
        for part in layout.parts(results, WRITTEN_AT_ONCE):
            stored = self._put([result for _, result in part])
            for place, result in part:
                answers[place] = result.task_id in stored
        # Also of those that were not stored now: they may have been by an earlier call whose answer was lost.
        ended = [result.task_id for result in results if is_final(result.state)]
        if ended:
            self._waits.tell(ended)
        return answers

    @in_own_context
    def get(self, ids: Sequence[str]) -> list[StoredResult | None]:
        self._check_open(ids)
        now = self._now()
        found = self._documents(ids)
        if len(ids) == 1 and found and not layout.is_readable(found[ids[0]], now):
            raise BackendError(f"What is stored for task {ids[0]} cannot be read: it was not stored by ekiden.")
        return [None if (document := found.get(i)) is None else layout.told(document, now) for i in ids]

    @in_own_context
    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        self._check_open(ids)
        return self._waits.wait(ids, timeout) if timeout > 0 and ids else self._final(ids)

    def wake(self) -> None:
        self._waits.wake()

    @in_own_context
    def forget(self, ids: Sequence[str], *, deadline: float | None = None) -> None:
        self._check_open(ids)
        for some in slices(ids, AT_ONCE):
            with self._client.asking(by=deadline):
                self._results().delete_many({"_id": {"$in": list(some)}})

    @in_own_context
    def begin(self, starts: Sequence[Start]) -> list[Begun]:
        self._check_open(text for start in starts for text in (start.task_id, start.message_id))
        answers: dict[int, Begun] = {}
        for part in layout.parts(starts, WRITTEN_AT_ONCE):
            with self._client.asking():
                self._update([layout.begin_update(start) for _, start in part])
            found = self._documents([start.task_id for _, start in part])
            now = self._now()
            answers |= {place: layout.begun(start, found.get(start.task_id), now) for place, start in part}
        return [answers[place] for place in range(len(starts))]

    @in_own_context
    def join(self, join_id: str, member: str, outcome: bytes, *, size: int, expires: float | None) -> Joined:
        self._check_open((join_id, member))
        return self._joins.join(join_id, member, outcome, size=size, expires=expires)

    @in_own_context
    def read(self, keys: Sequence[str]) -> list[Record | None]:
        self._check_open(keys)
        return self._records.read(keys)

    @in_own_context
    def write(
        self, key: str, value: bytes | None, *, expected_version: int | None = None, expires: float | None = None
    ) -> int | None:
        self._check_open((key,))
        if value is None:
            return self._records.delete(key, expected_version=expected_version)
        return self._records.write(key, value, expected_version=expected_version, expires=expires)

    @in_own_context
    def scan(self, prefix: str) -> list[Record]:
        self._check_open((prefix,))
        return self._records.scan(prefix)

    @in_own_context
    def warnings(self) -> list[str]:
        self._check_open(())
        return warnings_about(self._client, "results")

    @in_own_context
    def close(self) -> None:
        self._closed = True
        self._waits.close()
        self._client.close()

    def forget_connections(self) -> None:
        self._waits.abandon()
        self._client.forget()
        for each in (self._results, self._joins, self._records):
            each.forget()

    def _put(self, results: Sequence[StoredResult]) -> set[str]:
        """Store the results of different tasks; returns of which tasks it did."""
        writer = Binary(os.urandom(_WRITER_BYTES))
        stored: set[str] = set()
        with self._client.asking():
            left = list(results)
            if self._are_mostly_new:
                left = self._insert(results, writer)
                self._are_mostly_new = len(left) <= len(results) / 2
                stored = {result.task_id for result in results} - {result.task_id for result in left}
                if not left:
                    return stored
            ids = [result.task_id for result in left]
            done = self._update([layout.put_update(result, writer) for result in left])
            if done is None or done.modified_count + done.upserted_count < len(left):
                return stored | self._written_by(writer, ids)
            self._are_mostly_new = done.upserted_count > len(left) / 2
            return stored.union(ids)

    def _insert(self, results: Sequence[StoredResult], writer: Binary) -> list[StoredResult]:
        """Store those of whose tasks nothing is stored yet; returns the others."""
        now = self._now()
        try:
            self._results().insert_many([layout.new_document(each, writer, now) for each in results], ordered=False)
        except BulkWriteError as error:
            if not _are_collisions(error):
                raise
            return [results[each["index"]] for each in error.details["writeErrors"]]
        return []

    def _update(self, updates: Sequence[UpdateOne]) -> BulkWriteResult | None:
        """Carry out updates of different tasks; None when it took more than one try, so that nothing can be counted."""
        collisions = 0
        while True:
            try:
                done = self._results().bulk_write(updates, ordered=False)
            except BulkWriteError as error:
                collisions += 1
                if not _are_collisions(error) or collisions > _MOST_COLLISIONS:
                    raise
            else:
                return None if collisions else done

    def _documents(self, ids: Sequence[str]) -> dict[str, Document]:
        """What is stored of each task, as far as anything is."""
        return {each["_id"]: each for each in self._found(ids, {}, layout.READ)}

    def _written_by(self, writer: Binary, ids: Sequence[str]) -> set[str]:
        """Of which tasks the stored result was stored by the call ``writer``."""
        return {each["_id"] for each in self._found(ids, {"w": writer}, {"_id": 1})}

    def _final(self, ids: Sequence[str]) -> list[StoredResult]:
        """The final results among those of ``ids``."""
        now = self._now()
        found = self._found(ids, {"o": {"$gte": layout.FINAL}, "u": {"$gt": now}}, layout.READ)
        return [result for result in (layout.told(each, now) for each in found) if result is not None]

    def _found(self, ids: Sequence[str], matching: Document, projection: Document) -> Iterator[Document]:
        """The documents of tasks. Each hundred is one request, with a deadline of its own."""
        for some in slices(ids, AT_ONCE):
            with self._client.asking():
                found = list(self._results().find({"_id": {"$in": list(some)}, **matching}, projection))
            yield from found

    def _now(self) -> int:
        """The server's time in milliseconds."""
        return int(self._client.server_time() * 1000)

    def _check_open(self, texts: Iterable[str]) -> None:
        """Raise what is to be raised for a closed backend, and for ``texts`` (ids, keys) that cannot be stored."""
        if self._closed:
            raise BackendError(f"The result backend {self._url} was closed here; open it again.")
        refuse_unstorable(texts)


def _are_collisions(error: BulkWriteError) -> bool:
    """Whether all that went wrong is that some documents are there already."""
    said = error.details
    return not said.get("writeConcernErrors") and all(
        each.get("code") == DUPLICATE_KEY for each in said.get("writeErrors", ())
    )
