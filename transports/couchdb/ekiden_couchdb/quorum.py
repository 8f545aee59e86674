"""What a cluster accepted without a quorum: finds out whether it holds, and has it hold or takes it back.

A node answers ``accepted`` when fewer than a quorum of copies took a write: because the others are away, or because
they have taken another write of the same revision. In the first case the very same revision is handed to the others,
as replication does it. What the server answers to that says nothing: it is 201 however few took it. So the document is
written once more, over that revision; a copy takes that only if it has the revision, and the answer counts them. In the
second case both are in the database as two branches, and any of them may become the visible one. A client whose write
was only accepted has lost: it deletes its branch and decides anew. A quorum of copies is read for that, so one of them
knows of the winner. What was taken back says so, and nobody takes it for a deletion. Where nobody had won and all have
taken theirs back, what was there before is written again.
"""

from __future__ import annotations

import os
import time
from random import random
from typing import Any

import msgspec
from ekiden.errors import EkidenError

from ekiden_couchdb.client import BulkOutcome, Client
from ekiden_couchdb.store_documents import Document

_PAUSE_SECONDS = 0.1
_TAKEN_BACK = "taken_back"
_SURE = "sure"


class _Branch(msgspec.Struct, frozen=True):
    """One branch of a document: its revisions, the leaf first, and what the leaf is. ``path`` is what CouchDB says."""

    revisions: tuple[str, ...]
    path: Any
    is_deleted: bool
    is_taken_back: bool

    @property
    def leaf(self) -> str:
        """The revision that nobody has gone on from."""
        return self.revisions[0]


def make_sure(
    client: Client,
    database: str,
    document: Document,
    revision: str,
    previous: Document | None,
    *,
    deadline: float,
    patient: bool = True,
) -> str | None:
    """Have ``document``, of which ``revision`` was accepted, be kept by a quorum; the revision that it has then.

    ``previous``: what it was written over. None when somebody else has written over that, too: ours was taken back.
    Raises ``unavailable`` when neither could be done until ``deadline``, or, if not ``patient``, at once.
    """
    document_id = str(document["_id"])
    parent = None if previous is None else previous.get("_rev")
    first = revision
    is_kept = False
    while True:
        branches = _branches(client, database, document_id, deadline)
        ours = next((branch for branch in branches if branch.leaf == revision), None)
        if parent is None and ours is not None and revision == first and len(ours.revisions) > 1:
            parent = ours.revisions[1]  # a deletion, of which we did not know
        rivals = _rivals(branches, revision, parent)
        if rivals:
            take_back(client, database, document_id, revision, deadline)
            if previous is not None and not any(rival.is_deleted for rival in rivals):
                _restore(client, database, previous, deadline)
            return None
        if is_kept:
            return revision
        if time.monotonic() + _PAUSE_SECONDS >= deadline:
            raise _too_few(client, database)
        if ours is not None:
            handed = {**document, "_rev": revision, "_revisions": ours.path}
            client.hand_over(database, [handed], deadline=deadline)
            revision, is_kept = _written_over(client, database, document, revision, deadline)
            if not is_kept and not patient:
                raise _too_few(client, database)
        if not is_kept:
            time.sleep(_PAUSE_SECONDS * (0.5 + random() / 2))


def _too_few(client: Client, database: str) -> EkidenError:
    return client.errors.unavailable(
        f"{client.place}: too few nodes of the cluster, fewer than a quorum, have stored what was written to "
        f"{database}; are some away?"
    )


def _rivals(branches: list[_Branch], revision: str, parent: str | None) -> list[_Branch]:
    """What somebody else has written over ``parent``. Where there was nothing, a deletion is an older one."""
    return [
        branch
        for branch in branches
        if branch.leaf not in {revision, parent}
        and not branch.is_taken_back
        and (not branch.is_deleted if parent is None else parent in branch.revisions)
    ]


def _written_over(
    client: Client, database: str, document: Document, revision: str, deadline: float
) -> tuple[str, bool]:
    """Write the same over ``revision``: the revision that it has then, and whether a quorum has taken that."""
    again = {**document, "_rev": revision, _SURE: os.urandom(8).hex()}
    (answer,) = client.bulk(database, [again], deadline=deadline)
    if answer.outcome in {BulkOutcome.OK, BulkOutcome.ACCEPTED}:
        return answer.rev, answer.outcome is BulkOutcome.OK
    return revision, False


def take_back(client: Client, database: str, document_id: str, revision: str, deadline: float) -> None:
    """End a branch, so that nobody takes it for a deletion. Where a write went on from it, it is no branch any more."""
    tombstone = {"_id": document_id, "_rev": revision, "_deleted": True, _TAKEN_BACK: True}
    client.bulk(database, [tombstone], deadline=deadline)


def _restore(client: Client, database: str, previous: Document, deadline: float) -> None:
    """Write what was there, unless there is something."""
    document = {name: value for name, value in previous.items() if name != "_rev"}
    if all(branch.is_deleted for branch in _branches(client, database, str(previous["_id"]), deadline)):
        client.bulk(database, [document], deadline=deadline)


def _branches(client: Client, database: str, document_id: str, deadline: float) -> list[_Branch]:
    query = {"open_revs": "all", "revs": "true"}
    answer = client.ask("GET", f"/{database}/{document_id}", query=query, deadline=deadline)
    leaves: list[dict[str, Any]] = [each["ok"] for each in answer.body if "ok" in each]
    return [_branch(leaf) for leaf in leaves]


def _branch(leaf: dict[str, Any]) -> _Branch:
    path = leaf["_revisions"]
    revisions = tuple(f"{path['start'] - number}-{digest}" for number, digest in enumerate(path["ids"]))
    return _Branch(revisions, path, bool(leaf.get("_deleted")), bool(leaf.get(_TAKEN_BACK)))
