"""Moving: what stays long in a sealed database (not due yet, dead letters) goes to the current one.

    1  the document is marked with where it goes; from then on nobody claims it
    2  a copy is stored there
    3  the marked document is deleted

Each step may be repeated by whoever finds it half done. The copy has a revision that follows from the document's, and
is stored as replication stores: where that revision has been before, nothing changes, even if the copy has been settled
and deleted since. So no message is twice where it went, however long one who moves is stopped between two steps.

What is stored so is answered alike however few copies of a cluster take it. So the original goes only when a quorum has
taken a further revision of the copy.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from hashlib import blake2b
from typing import Any

import msgspec

from ekiden_couchdb.catalogue import is_generation
from ekiden_couchdb.client import BulkOutcome, Client
from ekiden_couchdb.documents import Document, Rows, after, note_of, place_in, until_of, why_foreign
from ekiden_couchdb.reading import Row, read_documents, read_leaves, read_rows, read_surely, visible
from ekiden_couchdb.set_aside import SetAside

AT_ONCE = 100
MESSAGES = Rows("", "~")
"""All messages of a database, whatever their queues; notes and slots come behind them."""

_NEVER = 253_402_300_799_000  # the last millisecond of the year 9999


class _Mark(msgspec.Struct, frozen=True):
    """Where a document goes, with which revision, and what its ``until`` was."""

    to: str
    until: int
    rev: str


class Mover:
    """Moves what nobody holds out of one database. Used by one thread at a time. Raises what the client raises."""

    def __init__(self, client: Client, database: str) -> None:
        self._client = client
        self._database = database
        self._set_aside = SetAside()
        self._start = MESSAGES.start

    def step(self, target: str) -> bool:
        """Move some of it to ``target``. Whether any was moved."""
        rows = read_rows(self._client, self._database, Rows(self._start, MESSAGES.end), limit=AT_ONCE)
        self._start = after(rows[-1].id) if len(rows) == AT_ONCE else MESSAGES.start
        marked = self._marked([row for row in rows if self._may_go(row)], target)
        if self._client.is_cluster():
            marked = [each for each in marked if not self._is_settled(each)]
        moved = False
        for place in sorted({str(each["moving"]["to"]) for each in marked}):
            moved |= self._move([each for each in marked if each["moving"]["to"] == place], place, target)
        return moved

    def _may_go(self, row: Row) -> bool:
        document = row.document
        if document is None:
            return False
        why = why_foreign(document) or (self._why_unmovable(document) if "moving" in document else None)
        if why is not None:
            self._set_aside.add(self._database, row.id, row.rev, why)
            return False
        return "moving" in document or until_of(document) <= self._client.server_time() * 1000

    def _why_unmovable(self, document: Document) -> str | None:
        """Why its mark is none of ours; None where it is. Nothing is written to a database of another kind."""
        try:
            mark = msgspec.convert(document["moving"], _Mark)
        except msgspec.ValidationError as error:
            return f"its mark cannot be read: {error}"
        return None if is_generation(self._client, mark.to) else f"it is to go to {mark.to!r}, which holds no messages"

    def _marked(self, rows: list[Row], target: str) -> list[Document]:
        """The documents of ``rows`` with a mark; those that somebody else has changed meanwhile are left out."""
        marked: list[Document] = []
        fresh: list[Document] = []
        for row in rows:
            assert row.document is not None
            (marked if "moving" in row.document else fresh).append(row.document)
        documents = [_with_mark(document, target) for document in fresh]
        for document, answer in zip(documents, self._client.bulk(self._database, documents), strict=True):
            if answer.outcome is BulkOutcome.OK:
                marked.append({**document, "_rev": answer.rev})
        return marked

    def _is_settled(self, document: Document) -> bool:
        """Whether a node of the cluster knows that it was settled; then what is left of it is deleted."""
        leaves = read_leaves(self._client, self._database, document["_id"])
        living = [str(leaf["_rev"]) for leaf in leaves if not leaf.get("_deleted")]
        if len(living) == len(leaves) and visible(document["_id"], leaves).rev != document["_rev"]:
            return True  # it is not as we have read it; the next look tells
        if len(living) == len(leaves):
            return False
        for rev in living:
            self._client.bulk(self._database, [_deletion(document["_id"], rev)])
        return True

    def _move(self, documents: list[Document], place: str, target: str) -> bool:
        """Store copies at ``place`` and delete the documents; those that it does not take are marked for ``target``."""
        stored = self._stored(documents, place)
        gone = [_deletion(each["_id"], each["_rev"]) for each in documents if each["_id"] in stored]
        self._client.bulk(self._database, gone)
        notes = [_deletion(note_of(each["_id"]), each["note"]) for each in documents if each["_id"] in stored]
        self._client.bulk(self._database, [note for note in notes if note["_rev"]])
        if place != target:
            others = [_with_mark(each, target) for each in documents if each["_id"] not in stored]
            self._client.bulk(self._database, others)
        return bool(gone)

    def _stored(self, documents: list[Document], place: str) -> set[str]:
        """Store copies there. The ids of those that are there now, or have been."""
        notes = self._notes(documents, place)
        if notes is None:
            return set()
        copies = [_copy(each, notes.get(each["_id"], "")) for each in documents]
        self._client.hand_over(place, copies)
        wanted = {str(each["_id"]): [each["_rev"]] for each in copies}
        missing: dict[str, Any] = self._client.ask("POST", f"/{place}/_revs_diff", wanted, harmless=True).body
        there = wanted.keys() - missing.keys()
        return self._surely_stored(there, place) if self._client.is_cluster() else there

    def _surely_stored(self, ids: Collection[str], place: str) -> set[str]:
        """Those copies that a quorum has, or that were received and settled there; the others are looked at again."""
        found = read_surely(self._client, place, list(ids))
        living = [each for each in found.values() if each.document is not None]
        settled = {each.id for each in found.values() if each.document is None and each.rev}
        touched = [{**(each.document or {}), "_rev": each.rev, "moved": os.urandom(8).hex()} for each in living]
        answers = self._client.bulk(place, touched)
        return settled | {answer.id for answer in answers if answer.outcome is BulkOutcome.OK}

    def _notes(self, documents: list[Document], place: str) -> dict[str, str] | None:
        """The revisions of the notes there, by which the messages' ids are known; None where no such database is."""
        wanted = {note_of(each["_id"]): str(each["_id"]) for each in documents}
        try:
            self._client.bulk(place, [{"_id": note, "at": at} for note, at in wanted.items()])
            found = read_documents(self._client, place, list(wanted))
        except self._client.errors.refused as error:
            if not self._client.is_missing(error):
                raise
            return None
        alive = [each for each in found.values() if each.document is not None]
        return {wanted[each.id]: each.rev for each in alive if place_in(each.document or {}) == wanted[each.id]}


def _with_mark(document: Document, target: str) -> Document:
    """``document`` on its way to ``target``: claimed by nobody, for ever."""
    moving = document.get("moving") or {
        "until": until_of(document),
        "rev": "1-" + blake2b(f"{document['_id']} {document['_rev']}".encode(), digest_size=16).hexdigest(),
    }
    return {**document, "until": _NEVER, "token": "", "owner": "", "moving": {**moving, "to": target}}


def _copy(document: Document, note_rev: str) -> Document:
    """What is stored at the target: the message as it was before the mark."""
    moving = document["moving"]
    changes = {"_rev": moving["rev"], "until": moving["until"], "note": note_rev}
    return {name: value for name, value in document.items() if name != "moving"} | changes


def _deletion(document_id: str, rev: str) -> Document:
    return {"_id": document_id, "_rev": rev, "_deleted": True}
