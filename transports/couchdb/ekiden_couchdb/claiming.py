"""Claiming: the documents at the head of a queue are read, and written back with a fresh token.

Of several who write the same revision one wins; for the others it is a conflict, and the message somebody else's. In a
cluster a document that too few nodes have ``accepted`` is nobody's until its lease ends; and before an expired lease is
claimed there, it is looked whether some node knows that the message was settled: then what is left of it is deleted.

What is held stays at the head of its range, so more is read than wanted. Where that is much, a stretch that is all held
is left out for some time.

A claim that too few nodes have taken leaves a branch, which may show when the winner's is gone: a settled message would
look leased until that claim ends. So the loser looks now and then whether the message was settled, and ends the branch.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterable, Sequence
from http import HTTPStatus

import msgspec
from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportError
from ekiden.loggers import safe_logger

from ekiden_couchdb.client import BulkAnswer, BulkOutcome, Client
from ekiden_couchdb.documents import (
    SLOTS,
    Document,
    Rows,
    after,
    attempts_of,
    delayed_rows,
    is_ready_at,
    message_in,
    order_of,
    owner_in,
    queue_in,
    ready_rows,
    size_of,
    slot_id,
    token_of,
    until,
    until_of,
    why_foreign,
)
from ekiden_couchdb.errors import status_of
from ekiden_couchdb.generations import Generations
from ekiden_couchdb.holding import Held, Holdings
from ekiden_couchdb.reading import Row, read_documents, read_leaves, read_rows, visible
from ekiden_couchdb.set_aside import SetAside

logger = safe_logger(__name__)

AT_ONCE = 500
LOOK_AGAIN_SECONDS = 5.0
NODES_DIFFER_SECONDS = 1.0
"""By so much the clocks of a cluster's nodes may differ, as they tell them; a lease is given it in addition."""

_NEVER = 2**62  # milliseconds
_PAGE_BYTES = 8 * 1024 * 1024
_FIRST_GUESS_BYTES = 64 * 1024
_LONGEST_PAGE = 1000
_READ_BEYOND = 10
_STRETCH = 100
"""So many in a row that are held are left out for ``_LEFT_OUT_SECONDS``."""
_LEFT_OUT_SECONDS = 2.0
_TRIES_AGAINST_OTHERS = 4
_LOST_CLAIMS_AT_ONCE = 20
_SLOT_UNUSED_SECONDS = 300.0
"""A slot that was not written for so long, and of which nothing is held, is a dead consumer's."""
_SLOTS_AT_ONCE = 100


class _Stretch(msgspec.Struct, frozen=True):
    """Everything from document ``first`` to ``last`` is held, at least until the moment ``until`` (monotonic)."""

    first: str
    last: str
    until: float


class _Unanswered(msgspec.Struct, frozen=True):
    """A claim that may have been carried out."""

    database: str
    queue: str
    token: str
    ids: list[str]
    ends: float


class _LostClaim(msgspec.Struct, frozen=True):
    """A claim that too few nodes have taken: of which database, and until when (the server's milliseconds)."""

    database: str
    until: int


class Claimer:
    """Claims for one consumer. All of it belongs to the thread that receives."""

    def __init__(
        self,
        client: Client,
        generations: Generations,
        set_aside: SetAside,
        holdings: Holdings,
        *,
        owner: str,
        lease: float,
    ) -> None:
        self._client = client
        self._generations = generations
        self._set_aside = set_aside
        self._owner = owner
        self._lease = lease
        self._holdings = holdings
        self.next_change = math.inf
        """When something becomes ready by the clock, of what was seen: on the monotonic clock."""
        self._next_due: dict[tuple[str, str], float] = {}
        self._stretches: dict[str, _Stretch] = {}
        self._lost: dict[tuple[str, str], _LostClaim] = {}  # by the document and the revision that nobody may have won
        self._slots: dict[str, str] = {}
        self._takes_no_slot: set[str] = set()
        self._unanswered: _Unanswered | None = None
        self._due_at = math.inf
        self._blocked = 0
        self._crowd = 0.0  # how many of the last claims were lost to others, 0 to 1
        self._document_bytes = float(_FIRST_GUESS_BYTES)

    def look_for_delayed(self) -> None:
        """Something may have come that is due sooner than what is known."""
        self._next_due.clear()

    def look_everywhere(self) -> None:
        """Something may have come, or come back, anywhere."""
        self._next_due.clear()
        self._stretches.clear()

    def claim(self, queue: str, room: int) -> list[Held]:
        """Up to ``room`` messages of ``queue``, in their order; of the oldest database that has some first."""
        now = time.monotonic()
        won = [held for held in self.unanswered() if held.ends > now]
        for database in self._generations.readable():
            if len(won) >= room:
                break
            try:
                won += self._claim_from(database, queue, min(room - len(won), AT_ONCE))
            except BrokerRefused as error:
                if not self._client.is_missing(error):
                    raise
                self._generations.refresh()  # it was empty, and has been dropped
            except BrokerUnavailable:
                if not won:
                    raise
                break
        return won

    def recover(self) -> list[Held]:
        """What an earlier consumer of this name still holds, in whatever queue."""
        recovered: list[Held] = []
        for database in self._generations.readable():
            slot = read_documents(self._client, database, [slot_id(self._owner)])[slot_id(self._owner)]
            if slot.document is None:
                continue
            self._slots[database] = slot.rev
            for each in read_documents(self._client, database, _held_in(slot.document)).values():
                if each.document is not None and each.document.get("owner") == self._owner:
                    held = self._read(database, each.document, each.rev, queue_in(each.id))
                    recovered += [] if held is None else [held]
        return recovered

    def forget_old_slots(self) -> None:
        """Delete the slots of killed consumers, once what these held is others'. Raises what the client raises."""
        long_ago = (self._client.server_time() - _SLOT_UNUSED_SECONDS) * 1000
        for database in self._generations.readable():
            try:
                rows = read_rows(self._client, database, SLOTS, limit=_SLOTS_AT_ONCE)
                if unused := [row for row in rows if self._is_unused(database, row, long_ago)]:
                    self._client.bulk(database, [{"_id": row.id, "_rev": row.rev, "_deleted": True} for row in unused])
            except BrokerRefused as error:
                if not self._client.is_missing(error):
                    raise

    def _is_unused(self, database: str, row: Row, long_ago: float) -> bool:
        owner = owner_in(row.id)
        if row.document is None or owner == self._owner:
            return False
        written_at = row.document.get("at")
        if isinstance(written_at, int | float) and written_at > long_ago:
            return False
        held = read_documents(self._client, database, _held_in(row.document)).values()
        return not any(each.document is not None and each.document.get("owner") == owner for each in held)

    def leave(self) -> None:
        """This consumer holds nothing any more, and claims nothing."""
        for database, rev in self._slots.items():
            if rev:
                self._client.bulk(database, [{"_id": slot_id(self._owner), "_rev": rev, "_deleted": True}])
        self._slots.clear()

    # Claiming.

    def _claim_from(self, database: str, queue: str, room: int) -> list[Held]:
        for tries in range(1, _TRIES_AGAINST_OTHERS + 1):
            candidates = self._candidates(database, queue, room)
            won = self._write(database, queue, _bounded(candidates[:room])) if candidates else []
            if won or not candidates:
                return won
            time.sleep(random.uniform(0, 0.003 * tries))  # so many others are at it that they had better spread
        # They are others' now; when these do not get on, it will be seen with the next look.
        self.next_change = min(self.next_change, time.monotonic() + random.uniform(0.01, 0.05))
        return []

    def _candidates(self, database: str, queue: str, room: int) -> list[Row]:
        """What may be claimed now, in order; more than ``room`` where others want the same."""
        wanted = room + math.ceil(3 * room * self._crowd)
        found = self._free(database, ready_rows(queue), wanted)
        if self._next_due.get((database, queue), 0.0) <= time.monotonic():
            self._next_due[database, queue] = math.inf
            delayed = self._free(database, delayed_rows(queue), wanted)
            if delayed:
                self._next_due[database, queue] = 0.0
                found = sorted(found + delayed, key=lambda row: order_of(row.id))
            elif self._due_at < math.inf:
                self._next_due[database, queue] = self._due_at
        self.next_change = min(self.next_change, self._next_due.get((database, queue), math.inf))
        if self._crowd > 0.1:
            found = _shuffled(found)
        if self._client.is_cluster():
            found = self._without_settled(database, found[:wanted])
        return found

    def _free(self, database: str, rows: Rows, wanted: int) -> list[Row]:
        """The first ``wanted`` of ``rows`` that nobody holds and that are due. Notes what is seen of the others."""
        now = self._client.server_time() * 1000
        monotonic = time.monotonic()
        self._due_at = math.inf
        free: list[Row] = []
        held_in_a_row: list[tuple[Row, int]] = []
        longest: list[tuple[Row, int]] = []
        blocked = 0
        is_delayed = rows.start.endswith(":d:")
        for row in self._walk(database, rows, wanted):
            document = row.document
            if document is None:
                continue
            if (why := why_foreign(document)) is not None:
                self._set_aside.add(database, row.id, row.rev, why)
            if self._set_aside.has(database, row.id, row.rev):
                blocked += 1
                held_in_a_row.append((row, _NEVER))
                longest = max(longest, held_in_a_row, key=len)
                continue
            # A copy that has not heard of a claim of ours that too few have accepted shows the message as free.
            lost = self._lost.get((row.id, row.rev))
            ready_at = max(is_ready_at(document), 0 if lost is None else lost.until)
            if ready_at <= now:
                free.append(row)
                held_in_a_row = []
                if len(free) >= wanted:
                    break
                continue
            changes_at = monotonic + (ready_at - now) / 1000
            if is_delayed and not until_of(document):
                self._due_at = changes_at
                break  # all that follow are due later
            blocked += 1
            self.next_change = min(self.next_change, changes_at)
            held_in_a_row.append((row, ready_at))
            longest = max(longest, held_in_a_row, key=len)
        self._blocked = blocked
        if len(longest) >= _STRETCH:
            first_end = monotonic + (min(ready_at for _, ready_at in longest) - now) / 1000
            until = min(monotonic + _LEFT_OUT_SECONDS, first_end)
            self._stretches[f"{database}/{rows.start}"] = _Stretch(longest[0][0].id, longest[-1][0].id, until)
        return free

    def _walk(self, database: str, rows: Rows, wanted: int) -> Iterable[Row]:
        """The documents of ``rows``, page by page, without a stretch that is known to be held."""
        stretch = self._stretches.get(f"{database}/{rows.start}")
        parts = [rows]
        if stretch is not None:
            if stretch.until > time.monotonic():
                parts = [Rows(rows.start, stretch.first), Rows(after(stretch.last), rows.end)]
                self.next_change = min(self.next_change, stretch.until)
            else:
                del self._stretches[f"{database}/{rows.start}"]
        limit = wanted + (self._blocked + _READ_BEYOND if self._blocked else 0)
        for part in parts:
            start = part.start
            while True:
                limit = min(limit, _LONGEST_PAGE, max(1, int(_PAGE_BYTES / self._document_bytes)))
                page = self._page(database, Rows(start, part.end), limit)
                yield from page
                if len(page) < limit:
                    break
                start = after(page[-1].id)
                limit *= 2

    def _page(self, database: str, rows: Rows, limit: int) -> list[Row]:
        try:
            page = read_rows(self._client, database, rows, limit=limit)
        except BrokerUnavailable:
            self._document_bytes *= 4  # it may have been too much for the time that there is
            raise
        sizes = [size_of(row.document) for row in page]
        if sizes:
            self._document_bytes = max(1000.0, sum(sizes) / len(sizes), 0.7 * self._document_bytes)
        return page

    def _write(self, database: str, queue: str, rows: Sequence[Row]) -> list[Held]:
        """Claim ``rows`` with a fresh token. Returns those that are ours now."""
        try:
            return self._write_together(database, queue, rows)
        except BrokerRefused as error:
            if status_of(error) != HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                raise
            if len(rows) == 1:
                self._set_aside.add(database, rows[0].id, rows[0].rev, error)
                return []
        # A claim makes a document larger by a little, and one of these was as large as the server takes.
        return [held for row in rows for held in self._write(database, queue, [row])]

    def _write_together(self, database: str, queue: str, rows: Sequence[Row]) -> list[Held]:
        token = os.urandom(12).hex()
        lease = self._lease + (NODES_DIFFER_SECONDS if self._client.is_cluster() else 0.0)
        end = until(self._client.latest_server_time(), lease)
        ends = time.monotonic() + self._lease
        claims: list[Held] = []
        for row in rows:
            if (
                row.document is not None
                and (held := self._read(database, row.document, row.rev, queue, ends)) is not None
            ):
                attempts = attempts_of(held.document) + 1
                held.document |= {"attempts": attempts, "until": end, "token": token, "owner": self._owner}
                claims.append(held)
        if not claims:
            return []
        ids = [held.id for held in claims]
        self._unanswered = _Unanswered(database, queue, token, ids, ends)
        written = [{**held.document, "_rev": held.rev} for held in claims]
        slots = [] if database in self._takes_no_slot else [self._slot(database, ids)]
        try:
            answers = self._client.bulk(database, [*written, *slots])
        except BrokerRefused:
            self._unanswered = None
            raise
        self._unanswered = None
        if slots:
            self._note_slot(database, answers.pop(), ids)
        won: list[Held] = []
        for held, answer in zip(claims, answers, strict=True):
            if answer.outcome is BulkOutcome.OK:
                held.rev = answer.rev
                won.append(held)
            elif answer.outcome is BulkOutcome.ACCEPTED:
                self._lost[held.id, held.rev] = _LostClaim(database, end)
        self._crowd = 0.7 * self._crowd + 0.3 * (1 - len(won) / len(claims))
        return won

    def _read(self, database: str, document: Document, rev: str, queue: str, ends: float = 0.0) -> Held | None:
        """``document`` as something to hold; None where it is no message of ours: that one is set aside.

        One that is damaged is handed out as well, with what is left of it: its receiver buries it.
        """
        why = why_foreign(document)
        if why is not None:
            self._set_aside.add(database, document["_id"], rev, why)
            return None
        message, damage = message_in(document, queue)
        if damage is not None:
            logger.error("%s: the message in the document %s cannot be read: %s", database, document["_id"], damage)
        return Held(database, {name: value for name, value in document.items() if name != "_rev"}, rev, message, ends)

    def _slot(self, database: str, ids: list[str]) -> Document:
        held = [each.id for each in self._holdings.all() if each.database == database]
        now = math.ceil(self._client.server_time() * 1000)
        slot: Document = {"_id": slot_id(self._owner), "held": held + ids, "at": now}
        if rev := self._slots.get(database):
            slot["_rev"] = rev
        return slot

    def _note_slot(self, database: str, answer: BulkAnswer, ids: list[str]) -> None:
        """Remember the slot's revision. Where it was deleted or written since, it is written once more."""
        for _ in range(_TRIES_AGAINST_OTHERS):
            if answer.outcome is not BulkOutcome.CONFLICT:
                break
            found = read_documents(self._client, database, [slot_id(self._owner)])[slot_id(self._owner)]
            self._slots[database] = found.rev if found.document is not None else ""
            (answer,) = self._client.bulk(database, [self._slot(database, ids)])
        match answer.outcome:
            case BulkOutcome.OK | BulkOutcome.ACCEPTED:
                self._slots[database] = answer.rev
            case BulkOutcome.CONFLICT:
                pass
            case BulkOutcome.FORBIDDEN | BulkOutcome.ERROR:
                self._takes_no_slot.add(database)  # it is sealed: there the leases have to end

    def unanswered(self) -> list[Held]:
        """What the last claim won, if its answer was lost. Raises as long as that cannot be told."""
        if self._unanswered is None:
            return []
        unanswered = self._unanswered
        found = read_documents(self._client, unanswered.database, unanswered.ids)
        self._unanswered = None
        self._slots.pop(unanswered.database, None)
        won: list[Held] = []
        for each in found.values():
            if each.document is not None and each.document.get("token") == unanswered.token:
                held = self._read(unanswered.database, each.document, each.rev, unanswered.queue, unanswered.ends)
                won += [] if held is None else [held]
        return won

    # In a cluster.

    @property
    def has_lost_claims(self) -> bool:
        """Whether there are branches of ours that may show again."""
        return bool(self._lost)

    def end_lost_claims(self) -> None:
        """Delete what is left of claims of ours that were lost, of messages that were settled since.

        What cannot be asked now is looked at again.
        """
        now = self._client.server_time() * 1000
        self._lost = {revision: lost for revision, lost in self._lost.items() if lost.until > now}
        for revision, lost in list(self._lost.items())[:_LOST_CLAIMS_AT_ONCE]:
            document_id, _ = revision
            try:
                leaves = read_leaves(self._client, lost.database, document_id)
                living = [str(leaf["_rev"]) for leaf in leaves if not leaf.get("_deleted")]
                is_settled = len(living) < len(leaves)
                if is_settled:
                    self._delete(lost.database, document_id, living)
            except TransportError as error:
                if not self._client.is_missing(error):
                    return
                leaves = []  # they went with their database
                is_settled = True
            del self._lost[revision]
            if not is_settled and leaves:
                self._lost[revision] = lost  # behind the others, which have their turn first

    def _without_settled(self, database: str, rows: Sequence[Row]) -> list[Row]:
        """Those that no node knows to be settled; what is left of the others is deleted.

        Only one whose lease has ended can be: what its holder has deleted may show again as another's lost claim.
        """
        living: list[Row] = []
        for row in rows:
            if row.document is None or not token_of(row.document):
                living.append(row)
                continue
            leaves = read_leaves(self._client, database, row.id)
            revs = [str(leaf["_rev"]) for leaf in leaves if not leaf.get("_deleted")]
            if len(revs) < len(leaves):
                logger.info("%s: %s was settled; what another node still shows of it is deleted", database, row.id)
                self._delete(database, row.id, revs)
            elif visible(row.id, leaves).rev == row.rev:
                living.append(row)
            # else it is somebody else's by now
        return living

    def _delete(self, database: str, document_id: str, revs: Iterable[str]) -> None:
        for rev in revs:  # one request would take only one revision of a document
            self._client.bulk(database, [{"_id": document_id, "_rev": rev, "_deleted": True}])


def _bounded(rows: Sequence[Row]) -> Sequence[Row]:
    """As many of ``rows`` as one request carries."""
    size = 0
    for number, row in enumerate(rows):
        size += size_of(row.document)
        if number and size > _PAGE_BYTES:
            return rows[:number]
    return rows


def _held_in(slot: Document) -> list[str]:
    """The documents that a slot names."""
    held = slot.get("held")
    return [id_ for id_ in held if isinstance(id_, str)] if isinstance(held, list) else []


def _shuffled(rows: list[Row]) -> list[Row]:
    """Those of one rank in any order, so that not all claim the same ones."""
    random.shuffle(rows)
    return sorted(rows, key=lambda row: order_of(row.id)[0])
