"""Joins: who has arrived is in one document, what each brought in one of its own.

    j:JOIN           {"born": TOKEN, "members": [MEMBER, ...], "ends"}
    m:JOIN:MEMBER    {"born": TOKEN, "member": MEMBER, body}

The first is compared and set, so arrivals have an order, and one of them is the last. A member's document counts while
its token is the join's: what is left of an earlier join of the same id, which has ended, is written over. They have no
end of their own, because each arrival puts off the end of all; who deletes a join deletes them first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from uuid import uuid4

import msgspec
from ekiden.results import Joined

from ekiden_couchdb.store import Edit, Store
from ekiden_couchdb.store_documents import (
    LAST,
    Document,
    end_of,
    has_ended,
    join_document,
    member_document,
    members_of,
    packed,
    unpacked,
)

REMEMBERED = 32
LONGEST_REMEMBERED = 10_000
"""So many joins, of so many members, are remembered."""


class _Arrival(msgspec.Struct, frozen=True):
    """What has to be written for a member to have arrived; ``members`` are all who have then."""

    born: str
    members: list[str]
    edits: list[Edit]


class Joins:
    """The joins of one store, for any number of threads.

    ``_heads`` are the joins that were written here last, guarded by ``_lock``: the next member can often go on from one
    of these without reading it. What it writes is compared with what is there, so they may be old.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._heads: OrderedDict[str, Document] = OrderedDict()

    def join(self, join_id: str, member: str, outcome: bytes, *, size: int, expires: float | None) -> Joined:
        """``member`` has arrived with ``outcome``, if it had not before. Raises what the client raises."""
        deadline = self._store.deadline()
        join_at, member_at = join_document(join_id), member_document(join_id, member)
        found: Mapping[str, Document] = self._remembered(join_at, member)
        tries = 0
        while True:
            found = found or self._store.read([join_at, member_at])
            old, brought = found.get(join_at), found.get(member_at)
            arrival = self._arrival((join_at, old), (member_at, brought), (member, outcome), expires)
            revisions = self._store.write(arrival.edits, deadline)
            if all(revisions):
                break
            self._store.pause(tries, deadline)
            tries += 1
            found = {}
        self._remember(arrival, join_at, revisions)
        if len(arrival.members) < size:
            return Joined(len(arrival.members), complete=False)
        return Joined(len(arrival.members), complete=True, outcomes=self._outcomes(join_at, arrival, deadline))

    def _arrival(
        self,
        join: tuple[str, Document | None],
        brought: tuple[str, Document | None],
        member: tuple[str, bytes],
        expires: float | None,
    ) -> _Arrival:
        now = self._store.now()
        (join_at, old), (member_at, before), (name, outcome) = join, brought, member
        head = None if old is None or has_ended(old.get("ends"), now) else old
        born = uuid4().hex if head is None else head["born"]
        members: list[str] = [] if head is None else list(head["members"])
        edits: list[Edit] = []
        if before is None or before.get("born") != born:
            edits.append(Edit.of(member_at, before, {"born": born, "member": name, **packed(outcome)}))
        if name not in members:
            members.append(name)
            ends = end_of(expires, now)
            edits.append(Edit.of(join_at, old, {"born": born, "members": members} | ({"ends": ends} if ends else {})))
        return _Arrival(born, members, edits)

    def _outcomes(self, join_at: str, arrival: _Arrival, deadline: float) -> dict[str, bytes]:
        """What all members brought. One that was counted a moment ago may be seen a moment later."""
        tries = 0
        while True:
            outcomes = {
                document["member"]: unpacked(document)
                for document in self._store.scan(members_of(join_at), members_of(join_at) + LAST)
                if document["born"] == arrival.born
            }
            if outcomes.keys() >= set(arrival.members):
                return {member: outcomes[member] for member in arrival.members}
            self._store.pause(tries, deadline)
            tries += 1

    # What is remembered.

    def _remembered(self, join_at: str, member: str) -> dict[str, Document]:
        """The join as it was a moment ago. Who asks whether he has arrived is told of now."""
        with self._lock:
            head = self._heads.get(join_at)
        return {} if head is None or member in head["members"] else {join_at: head}

    def _remember(self, arrival: _Arrival, join_at: str, revisions: list[str | None]) -> None:
        for edit, revision in zip(arrival.edits, revisions, strict=True):
            if edit.document["_id"] == join_at and len(arrival.members) <= LONGEST_REMEMBERED:
                with self._lock:
                    self._heads[join_at] = {**edit.document, "_rev": revision}
                    self._heads.move_to_end(join_at)
                    if len(self._heads) > REMEMBERED:
                        self._heads.popitem(last=False)
