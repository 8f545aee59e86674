"""One database of documents that are changed by compare-and-set.

A change is decided by what was read and written with the revision that was read; where somebody else was faster it is
read and decided anew, until the deadline. In a cluster a write counts when a quorum has it: see ``quorum``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from http import HTTPStatus
from random import random
from typing import Any, NamedTuple

from ekiden.errors import EkidenError

from ekiden_couchdb.client import BulkAnswer, BulkOutcome, Client
from ekiden_couchdb.quorum import make_sure, take_back
from ekiden_couchdb.reading import read_leaves, visible
from ekiden_couchdb.set_aside import SetAside
from ekiden_couchdb.store_documents import Document

AT_ONCE = 250
"""So many documents are the business of one request, fewer when they are large."""

BYTES_AT_ONCE = 4 * 1024 * 1024

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.002, 0.1
"""Between two tries where others write the same."""

FEW = 4
DELETION: Document = {"_deleted": True}

Decide = Callable[[str, Document | None], Document | None]
"""Is given a document's id and what it holds now (None:
there is none); returns what it is to hold, ``DELETION``, or None to leave it as it is. It is asked again when somebody
else was faster."""


class Edit(NamedTuple):
    """``document`` is to be written over ``previous``, or (None) where there is none."""

    document: Document
    previous: Document | None

    @classmethod
    def of(cls, id_: str, previous: Document | None, content: Document) -> Edit:
        """``content`` under ``id_``, with the revision of what was there."""
        revision = {} if previous is None else {"_rev": previous["_rev"]}
        return cls({"_id": id_, **revision, **content}, previous)


class Store:
    """The database ``name``, made when it is first written to. For any number of threads.

    Raises what the client raises. Each part of a large batch has a deadline of its own.
    """

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._set_aside = SetAside()
        self.name = name

    def set_aside(self, document: Document, why: object) -> None:
        """This document cannot be read: say so, once. What is written under its id goes over it."""
        self._set_aside.add(self.name, str(document.get("_id")), str(document.get("_rev")), why)

    def now(self) -> float:
        """The server's time, in seconds since the epoch: ours, unless the server's answers contradict it."""
        return self._client.nearest_server_time(time.time())

    def deadline(self) -> float:
        """When a call that begins now must have ended, on the monotonic clock."""
        return self._client.deadline()

    def read(self, ids: Collection[str]) -> dict[str, Document]:
        """What there is of these documents, by id."""
        found: dict[str, Document] = {}
        for some in _slices(list(ids)):
            found |= self._read_some(some, self._client.deadline())
        return found

    def scan(self, prefix: str, behind: str) -> Iterator[Document]:
        """Every document whose id begins with ``prefix`` and is less than ``behind``, by id."""
        first = prefix
        while True:
            query = {
                "startkey": f'"{first}"',
                "endkey": f'"{behind}"',
                "limit": str(AT_ONCE),
                "include_docs": "true",
                "attachments": "true",
            }
            answer = self._client.ask("GET", f"/{self.name}/_all_docs", query=query, accept={HTTPStatus.NOT_FOUND})
            rows = [] if answer.status == HTTPStatus.NOT_FOUND else self._client.rows(answer)
            yield from (row["doc"] for row in rows if row.get("doc"))
            if len(rows) < AT_ONCE:
                return
            first = f"{rows[-1]['id']} "  # less than every character in an id

    def change(self, ids: Collection[str], decide: Decide, *, are_new: bool = False) -> None:
        """Change documents as ``decide`` says. ``are_new``: probably there are none yet, so it is not looked first."""
        for some in _slices(list(ids)):
            self._change_some(some, decide, are_new=are_new)

    def write(self, edits: Sequence[Edit], deadline: float) -> list[str | None]:
        """Write documents, no two of one id, and return their revisions; None where somebody else was faster."""
        written: list[str | None] = []
        for some in _parts(edits):
            answers = self._bulk([edit.document for edit in some], deadline)
            written += [self._revision_of(edit, answer, deadline) for edit, answer in zip(some, answers, strict=True)]
        return written

    def is_cluster(self) -> bool:
        """Whether a document is kept by several nodes, which may disagree for a while."""
        return self._client.is_cluster()

    def branches(self, id_: str, deadline: float) -> list[Document]:
        """The living branches of a document, the visible one first; in a cluster, all that a quorum knows."""
        if not self._client.is_cluster():
            return list(self._read_some([id_], deadline).values())
        try:
            with self._client.one_deadline(by=deadline):
                leaves = read_leaves(self._client, self.name, id_)
        except EkidenError as error:
            if not self._client.is_missing(error):
                raise
            return []
        living = [leaf for leaf in leaves if not leaf.get("_deleted")]
        first = visible(id_, living).rev
        return sorted(living, key=lambda leaf: leaf["_rev"] != first)

    def read_surely(self, ids: Collection[str], deadline: float) -> dict[str, Document]:
        """What there is of these documents, by id; in a cluster as a quorum knows them, by a request for each."""
        if not self._client.is_cluster():
            return self._read_some(list(ids), deadline)
        return {id_: document for id_ in ids if (document := self._read_one(id_, deadline)) is not None}

    def end_branches(self, id_: str, revisions: Collection[str], deadline: float) -> None:
        """End branches of which all that they say was written over another one. Raises what the client raises."""
        for revision in revisions:
            take_back(self._client, self.name, id_, revision, deadline)

    def pause(self, tries: int, deadline: float) -> None:
        """Wait a moment, because others write the same. Raises ``unavailable`` when the deadline has passed."""
        if time.monotonic() >= deadline:
            raise self._client.errors.unavailable(
                f"{self._client.place}: others have written the same in {self.name} again and again."
            )
        time.sleep(min(FIRST_PAUSE_SECONDS * 2**tries, LONGEST_PAUSE_SECONDS) * random())

    def _change_some(self, ids: Sequence[str], decide: Decide, *, are_new: bool) -> None:
        deadline = self._client.deadline()
        found = {} if are_new else self._read_some(ids, deadline)
        waiting: Sequence[str] = ids
        tries = 0
        while True:
            edits = [
                Edit.of(id_, found.get(id_), content)
                for id_ in waiting
                if (content := decide(id_, found.get(id_))) is not None
            ]
            revisions = self.write(edits, deadline)
            waiting = [str(edit.document["_id"]) for edit, new in zip(edits, revisions, strict=True) if new is None]
            if not waiting:
                return
            if tries or not are_new:
                self.pause(tries, deadline)
            tries += 1
            found = self._read_some(waiting, deadline)

    def _read_some(self, ids: Sequence[str], deadline: float) -> dict[str, Document]:
        if not ids:
            return {}
        # In a cluster _all_docs reads one copy, which may be behind, and this a quorum.
        if len(ids) == 1 or (len(ids) <= FEW and self._client.is_cluster()):
            return {id_: document for id_ in ids if (document := self._read_one(id_, deadline))}
        answer = self._client.ask(
            "POST",
            f"/{self.name}/_all_docs",
            {"keys": ids},
            query={"include_docs": "true", "attachments": "true"},
            accept={HTTPStatus.NOT_FOUND},
            harmless=True,
            deadline=deadline,
        )
        rows = [] if answer.status == HTTPStatus.NOT_FOUND else self._client.rows(answer)
        return {row["id"]: row["doc"] for row in rows if row.get("doc")}

    def _read_one(self, id_: str, deadline: float) -> Document | None:
        answer = self._client.ask(
            "GET",
            f"/{self.name}/{id_}",
            query={"attachments": "true"},
            accept={HTTPStatus.NOT_FOUND},
            deadline=deadline,
        )
        document: Document | None = None if answer.status == HTTPStatus.NOT_FOUND else answer.body
        return document

    def _bulk(self, documents: Sequence[Document], deadline: float) -> list[BulkAnswer]:
        self._client.ensure_database(self.name)
        try:
            return self._client.bulk(self.name, documents, deadline=deadline)
        except EkidenError as error:
            if not self._client.is_missing(error):
                raise
        self._client.lost(self.name)
        self._client.ensure_database(self.name)
        return self._client.bulk(self.name, documents, deadline=deadline)

    def _revision_of(self, edit: Edit, answer: BulkAnswer, deadline: float) -> str | None:
        match answer.outcome:
            case BulkOutcome.OK:
                return answer.rev
            case BulkOutcome.CONFLICT:
                return None
            case BulkOutcome.ACCEPTED:
                return make_sure(self._client, self.name, edit.document, answer.rev, edit.previous, deadline=deadline)
            case BulkOutcome.FORBIDDEN:
                raise self._client.errors.refused(
                    f"{self._client.place}: {self.name} does not take a document ({answer.reason})."
                )
            case BulkOutcome.ERROR:
                raise self._client.errors.unavailable(
                    f"{self._client.place}: a document could not be stored in {self.name} ({answer.reason})."
                )


def _slices(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[start : start + AT_ONCE] for start in range(0, len(ids), AT_ONCE))


def _parts(edits: Sequence[Edit]) -> Iterator[list[Edit]]:
    """``edits`` in parts that one request may hold."""
    part: list[Edit] = []
    size = 0
    for edit in edits:
        length = _length(edit.document)
        if part and size + length > BYTES_AT_ONCE:
            yield part
            part, size = [], 0
        part.append(edit)
        size += length
    if part:
        yield part


def _length(document: Mapping[str, Any]) -> int:
    """About how long its body is."""
    if "_attachments" in document:
        return sum(len(each["data"]) for each in document["_attachments"].values())
    return len(document.get("body", ""))
