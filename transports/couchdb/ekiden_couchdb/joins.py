"""Joins: who has arrived is in one document, what each brought in one of its own.

    j:JOIN           {"born": TOKEN, "also": [TOKEN, ...], "members": [MEMBER, ...], "ends"}
    m:JOIN:MEMBER    {"born": TOKEN, "member": MEMBER, body}

The first is compared and set, so arrivals have an order, and one of them is the last. A member's document counts while
its token is one of the join's: what is left of an earlier join of the same id, which has ended, is written over. They
have no end of their own, because each arrival puts off the end of all; what deletes a join deletes them first.

In a cluster two nodes may each take an arrival and neither hear of the other's; then there are two branches, and
whatever is written over one of them leaves the other as it is. So no arrival counts what it wrote alone: it reads what
a quorum has afterwards, and where that has another living branch, writes both over one of them and ends the other. Of
two arrivals the later one sees the other's branch, since their quorums meet; so one of them counts all.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from uuid import uuid4

import msgspec
from ekiden.errors import BackendError
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

PATIENCE_SECONDS = 2.0
"""So long the last member waits for what others have brought who were counted."""
MOST_LOOKED_FOR = 50


class _Head(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is known of a join: the token of its birth, ``also`` those of others that began it, and who has arrived."""

    born: str
    members: tuple[str, ...]
    ends: int | None = None
    also: tuple[str, ...] = ()

    def tokens(self) -> tuple[str, ...]:
        """Those of all who began it."""
        return (self.born, *self.also)

    def merged(self, other: _Head) -> _Head:
        """Both, where a conflict has made two of it."""
        born, *also = dict.fromkeys((*self.tokens(), *other.tokens()))
        members = tuple(dict.fromkeys((*self.members, *other.members)))
        ends = None if self.ends is None or other.ends is None else max(self.ends, other.ends)
        return _Head(born, members, ends, tuple(also))


class _Arrival(msgspec.Struct, frozen=True):
    """What has to be written for a member to have arrived; ``head`` is the join then."""

    head: _Head
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
        branches = self._remembered(join_at, member)
        brought: Document | None = None
        tries = 0
        while True:
            if not branches:
                branches = self._store.branches(join_at, deadline)
                brought = self._store.read([member_at]).get(member_at)
            arrival = self._arrival((join_at, branches), (member_at, brought), (member, outcome), expires)
            revisions = self._store.write(arrival.edits, deadline)
            if all(revisions):
                self._remember(arrival, join_at, revisions)
                self._store.end_branches(join_at, [str(branch["_rev"]) for branch in branches[1:]], deadline)
                if not self._store.is_cluster() or len(self._store.branches(join_at, deadline)) <= 1:
                    break
            self._store.pause(tries, deadline)
            tries += 1
            branches = []
        arrived = len(arrival.head.members)
        if arrived < size:
            return Joined(arrived, complete=False)
        outcomes = self._outcomes(join_id, arrival.head, deadline)
        if len(outcomes) < size:
            return Joined(len(outcomes), complete=False)
        return Joined(len(outcomes), complete=True, outcomes=outcomes)

    def _arrival(
        self,
        join: tuple[str, Sequence[Document]],
        brought: tuple[str, Document | None],
        member: tuple[str, bytes],
        expires: float | None,
    ) -> _Arrival:
        now = self._store.now()
        (join_at, branches), (member_at, before), (name, outcome) = join, brought, member
        head = _head_of(self._store, branches, now)
        changed = head or _Head(uuid4().hex, ())
        edits: list[Edit] = []
        if _outcome_in(self._store, before, changed) is None:
            edits.append(Edit.of(member_at, before, {"born": changed.born, "member": name, **packed(outcome)}))
        if name not in changed.members:
            members = (*changed.members, name)
            changed = msgspec.structs.replace(changed, members=members, ends=end_of(expires, now))
        if changed is not head or len(branches) > 1:
            visible = branches[0] if branches else None
            edits.append(Edit.of(join_at, visible, msgspec.to_builtins(changed)))
        return _Arrival(changed, edits)

    def _outcomes(self, join_id: str, head: _Head, deadline: float) -> dict[str, bytes]:
        """What the members brought; after some patience without those who died before they had brought anything.

        One that was counted a moment ago may be seen a moment later. A member that died arrives again with its message.
        """
        join_at = join_document(join_id)
        give_up = min(deadline, time.monotonic() + PATIENCE_SECONDS)
        tries = 0
        while True:
            outcomes: dict[str, bytes] = {}
            for document in self._store.scan(members_of(join_at), members_of(join_at) + LAST):
                outcome = _outcome_in(self._store, document, head)
                if outcome is not None and isinstance(document.get("member"), str):
                    outcomes[document["member"]] = outcome
            missing = [member for member in head.members if member not in outcomes][:MOST_LOOKED_FOR]
            places = {member_document(join_id, member): member for member in missing}
            for id_, document in self._store.read_surely(places, deadline).items():
                if (outcome := _outcome_in(self._store, document, head)) is not None:
                    outcomes[places[id_]] = outcome
            found = {member: outcomes[member] for member in head.members if member in outcomes}
            if len(found) == len(head.members) or time.monotonic() >= give_up:
                return found
            self._store.pause(tries, deadline)
            tries += 1

    # What is remembered.

    def _remembered(self, join_at: str, member: str) -> list[Document]:
        """The join as it was a moment ago. A member that asks whether it has arrived is told of now."""
        with self._lock:
            head = self._heads.get(join_at)
        return [] if head is None or member in head["members"] else [head]

    def _remember(self, arrival: _Arrival, join_at: str, revisions: list[str | None]) -> None:
        for edit, revision in zip(arrival.edits, revisions, strict=True):
            if edit.document["_id"] == join_at and len(arrival.head.members) <= LONGEST_REMEMBERED:
                with self._lock:
                    self._heads[join_at] = {**edit.document, "_rev": revision}
                    self._heads.move_to_end(join_at)
                    if len(self._heads) > REMEMBERED:
                        self._heads.popitem(last=False)


def _head_of(store: Store, branches: Sequence[Document], now: float) -> _Head | None:
    """What all ``branches`` say together, of those that have not ended and can be read; None where there are none."""
    found: _Head | None = None
    for document in branches:
        try:
            head = msgspec.convert(document, _Head)
        except msgspec.ValidationError as error:
            store.set_aside(document, error)
            continue
        if not has_ended(head.ends, now):
            found = head if found is None else found.merged(head)
    return found


def _outcome_in(store: Store, document: Document | None, head: _Head) -> bytes | None:
    """What a member of this join brought, by its document; None for what is none, or of an earlier join."""
    if document is None or document.get("born") not in head.tokens():
        return None
    try:
        return unpacked(document)
    except BackendError as error:
        store.set_aside(document, error)
        return None
