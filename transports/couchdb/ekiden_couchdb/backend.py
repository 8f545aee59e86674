"""The result store in CouchDB: results, the fence, joins and records.

``store_documents`` says what is kept, ``store`` how it changes; who waits for results does so in ``waits``, and what
has expired is deleted by ``tidying``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from ekiden.errors import BackendError, BackendRefused
from ekiden.results import (
    Backend,
    BeginOutcome,
    Begun,
    Joined,
    Record,
    Start,
    StoredResult,
    refuse_unstorable,
)
from ekiden.states import may_follow
from ekiden.urls import BrokerURL

from ekiden_couchdb import records
from ekiden_couchdb.client import Client
from ekiden_couchdb.coordinators import Coordinators
from ekiden_couchdb.joins import Joins
from ekiden_couchdb.store import DELETION, Store
from ekiden_couchdb.store_documents import Document, task_document
from ekiden_couchdb.stored_results import known_task
from ekiden_couchdb.tidying import Tidying
from ekiden_couchdb.waits import Waits
from ekiden_couchdb.warnings import warnings_about


class CouchDBRefused(BackendError):
    """The server will not do it as it is set up now: a password, a right, a missing database."""


class CouchDBTooLarge(CouchDBRefused, BackendRefused):
    """The server does not take a value of this size."""


class CouchDBBackend(Backend):
    """Results in two databases of one CouchDB, a single node or a cluster."""

    def __init__(self, url: BrokerURL) -> None:
        self._url = str(url)
        self._client = Client(url, unavailable=BackendError, refused=CouchDBRefused, too_large=CouchDBTooLarge)
        self._results = Store(self._client, self._client.database("results"))
        self._records = Store(self._client, self._client.database("records"))
        self._coordinators = Coordinators(self._client, "results")
        self._begin_anew()
        self._closed = False

    def put(self, results: Sequence[StoredResult]) -> list[bool]:
        self._check(result.task_id for result in results)
        self._coordinators.look()
        answers = [False] * len(results)
        numbers: defaultdict[str, list[int]] = defaultdict(list)
        for number, result in enumerate(results):
            numbers[task_document(result.task_id)].append(number)

        def decide(id_: str, document: Document | None) -> Document | None:
            now = self._results.now()
            task = old = known_task(self._results, document, results[numbers[id_][0]].task_id, now)
            for number in numbers[id_]:
                new, stored = results[number], task.result
                answers[number] = stored is None or may_follow(stored.state, stored.step, new.state, new.step)
                if answers[number]:
                    task = task.with_result(new, now)
            return None if task is old else task.document()

        self._results.change(numbers, decide, are_new=True)
        self._tidying.ask()
        return answers

    def get(self, ids: Sequence[str]) -> list[StoredResult | None]:
        self._check(ids)
        if not ids:
            return []
        found = self._results.read({task_document(task_id) for task_id in ids})
        now = self._results.now()
        return [known_task(self._results, found.get(task_document(each)), each, now).told() for each in ids]

    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        self._check(ids)
        return self._waits.wait(ids, timeout)

    def wake(self) -> None:
        self._waits.wake()

    def forget(self, ids: Sequence[str], *, deadline: float | None = None) -> None:
        self._check(ids)
        with self._client.one_deadline(by=deadline):
            self._results.change({task_document(task_id) for task_id in ids}, _deleted)

    def begin(self, starts: Sequence[Start]) -> list[Begun]:
        self._check(text for start in starts for text in (start.task_id, start.message_id))
        self._coordinators.look()
        answers: dict[int, Begun] = {}
        numbers: defaultdict[str, list[int]] = defaultdict(list)
        for number, start in enumerate(starts):
            numbers[task_document(start.task_id)].append(number)

        def decide(id_: str, document: Document | None) -> Document | None:
            now = self._results.now()
            task = old = known_task(self._results, document, starts[numbers[id_][0]].task_id, now)
            for number in numbers[id_]:
                answers[number] = task.answer(starts[number])
                if answers[number].outcome is BeginOutcome.GO:
                    task = task.with_note(starts[number], now)
            # Also a note that was there is written again: it was read somewhere, and may be old news.
            return None if task is old else task.document()

        self._results.change(numbers, decide)
        self._tidying.ask()
        return [answers[number] for number in range(len(starts))]

    def join(self, join_id: str, member: str, outcome: bytes, *, size: int, expires: float | None) -> Joined:
        self._check((join_id, member))
        self._coordinators.look()
        joined = self._joins.join(join_id, member, outcome, size=size, expires=expires)
        self._tidying.ask()
        return joined

    def read(self, keys: Sequence[str]) -> list[Record | None]:
        self._check(keys)
        return records.read(self._records, keys)

    def write(
        self, key: str, value: bytes | None, *, expected_version: int | None = None, expires: float | None = None
    ) -> int | None:
        self._check((key,))
        self._coordinators.look()
        version = records.write(self._records, key, value, expected_version=expected_version, expires=expires)
        self._tidying.ask()
        return version

    def scan(self, prefix: str) -> list[Record]:
        self._check((prefix,))
        return records.scan(self._records, prefix)

    def warnings(self) -> list[str]:
        self._check_open()
        return warnings_about(self._client, "results", self._coordinators)

    def close(self) -> None:
        self._closed = True
        self._waits.close()
        self._tidying.close()
        self._client.close()

    def forget_connections(self) -> None:
        self._client.forget()
        self._coordinators.forget()
        self._begin_anew()

    def _begin_anew(self) -> None:
        """All that has threads or locks; in a forked child those are the parent's."""
        self._waits = Waits(self._client, self._results)
        self._joins = Joins(self._records)
        self._tidying = Tidying(self._client, (self._results, self._records))

    def _check(self, texts: Iterable[str]) -> None:
        """Refuse what can be no id or key, and every call after ``close``."""
        self._check_open()
        refuse_unstorable(texts)

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError(f"The result backend {self._url} was closed here; open it again.")


def _deleted(_id: str, document: Document | None) -> Document | None:
    return None if document is None else DELETION
