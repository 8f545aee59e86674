"""Publishing: each message first gets a note, by which its id is known, and then its document.

The note of an id is written once: who finds it there looks whether the message that it points to is still alive. Only
then is it a duplicate. Else the message goes where the note says, so that two who do this at the same time meet in one
document; and where there was one before, to a place that the note is changed to first, so that nobody takes the new
message for the settled one. A publisher that dies in between leaves a note without a message, which is in nobody's way.

In a cluster a note that too few copies have taken is no note yet: whoever wrote it reads the notes of a quorum and goes
where the visible one says. A message is stored, or a duplicate of one that is, when a quorum has its document.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus

import msgspec
from ekiden.errors import BrokerRefused, BrokerUnavailable, EkidenError
from ekiden.message import DUPLICATE, REPLY_PREFIX, STORED, Message, Published, PublishOutcome

from ekiden_couchdb.client import BulkAnswer, BulkOutcome, Client
from ekiden_couchdb.coordinators import Coordinators
from ekiden_couchdb.documents import (
    Document,
    Packed,
    age_of,
    delayed_id,
    generation,
    new_document,
    note_id,
    packed,
    place_in,
    ready_id,
)
from ekiden_couchdb.errors import status_of
from ekiden_couchdb.generations import Generations
from ekiden_couchdb.quorum import make_sure, take_back
from ekiden_couchdb.reading import Found, read_branches, read_documents, read_leaves, read_surely
from ekiden_couchdb.replies import ReplyQueues
from ekiden_couchdb.signals import Signals

AT_ONCE = 500
SLICE_BYTES = 4 * 1024 * 1024
"""About how much one request carries at most, if it is more than one message."""

_TRIES = 4
_MOST_REMEMBERED = 10_000
_PAUSE_SECONDS = 0.01


Read = Callable[[Client, str, Sequence[str]], dict[str, Found]]


class _Item(msgspec.Struct):
    """One message on its way. ``number`` is its position in the batch, ``note_rev`` the revision of its note."""

    number: int
    message: Packed
    document_id: str = ""
    note_rev: str = ""


class Publisher:
    """Publishes for one transport. ``_lock`` guards the last age that was given, and ``_failed_places``.

    ``_failed_places``: where messages were to go, by queue and id, that were told as not stored.
    """

    def __init__(
        self,
        client: Client,
        generations: Generations,
        signals: Signals,
        replies: ReplyQueues,
        coordinators: Coordinators,
    ) -> None:
        self._client = client
        self._coordinators = coordinators
        self._generations = generations
        self._signals = signals
        self._replies = replies
        self.forget()

    def forget(self) -> None:
        """In a forked child: make a new lock."""
        self._lock = threading.Lock()
        self._last_age = 0
        self._failed_places: OrderedDict[tuple[str, str], str] = OrderedDict()

    def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
        """As ``Transport.publish``."""
        answers: list[Published] = [STORED] * len(messages)
        items: list[_Item] = []
        for number, message in enumerate(messages):
            value = packed(message, max_message_bytes=self._client.options.max_message_bytes)
            if isinstance(value, BrokerRefused):
                answers[number] = Published(PublishOutcome.FAILED, value)
            else:
                items.append(_Item(number, value))
        with self._client.one_deadline(by=deadline):
            self._coordinators.look()
            self._store_all(items, answers, nothing_else=len(items) == len(messages))
        return answers

    def _store_all(self, items: list[_Item], answers: list[Published], *, nothing_else: bool) -> None:
        """Store ``items`` and note each one's answer. Raises where nothing could be asked, and ``nothing_else`` was."""
        items = self._without_closed_reply_queues(items)
        items = _without_repeated(items, answers)
        failures: list[EkidenError] = []
        slices = list(_cut(items))
        try:
            for some in slices:
                try:
                    self._store_with_patience(some, answers)
                except (BrokerUnavailable, BrokerRefused) as error:
                    failures.append(error)
                    for item in some:
                        answers[item.number] = Published(PublishOutcome.FAILED, error)
            if failures and len(failures) == len(slices) and nothing_else:
                raise failures[0]
        finally:
            self._remember_places(items, answers)
            queues = {item.message.queue for item in items if answers[item.number] is STORED}
            if queues:
                self._signals.ring(queues)

    def _without_closed_reply_queues(self, items: list[_Item]) -> list[_Item]:
        asked = {item.message.queue for item in items if item.message.queue.startswith(REPLY_PREFIX)}
        if not asked:
            return items
        closed = asked - self._replies.open_ones(asked)
        return [item for item in items if item.message.queue not in closed]

    def _store_with_patience(self, items: list[_Item], answers: list[Published]) -> None:
        """Store ``items``; where the database has been sealed or dropped meanwhile, in the one that came after it."""
        for tries_left in reversed(range(_TRIES)):
            try:
                items = self._store(items, answers)
            except BrokerRefused as error:
                if status_of(error) == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                    self._store_one_by_one(items, answers, error)
                    return
                if not self._client.is_missing(error) or not tries_left:
                    raise
                if tries_left == 1:
                    self._generations.replace_missing()
            if not items:
                return
            self._generations.refresh()
        trouble = BrokerUnavailable(f"{self._client.place}: its databases of messages take no new ones now.")
        for item in items:
            answers[item.number] = Published(PublishOutcome.FAILED, trouble)

    def _store_one_by_one(self, items: Sequence[_Item], answers: list[Published], error: EkidenError) -> None:
        """One of ``items`` is too large for this server: which one shows when each goes by itself."""
        if len(items) == 1:
            answers[items[0].number] = Published(PublishOutcome.FAILED, error)
            return
        for item in items:
            try:
                self._store_with_patience([item], answers)
            except (BrokerUnavailable, BrokerRefused) as trouble:
                answers[item.number] = Published(PublishOutcome.FAILED, trouble)

    def _store(self, items: list[_Item], answers: list[Published]) -> list[_Item]:
        """Store ``items`` and note each one's answer. Returns those that this database does not take any more."""
        database = self._generations.current()
        items = self._without_older(database, items, answers)
        self._choose_documents(items)
        notes = [{"_id": note_id(item.message), "at": item.document_id} for item in items]
        sealed: list[_Item] = []
        noted: list[_Item] = []
        known: list[_Item] = []
        accepted: list[_Item] = []
        for item, answer in zip(items, self._client.bulk(database, notes), strict=True):
            match answer.outcome:
                case BulkOutcome.OK:
                    item.note_rev = answer.rev
                    noted.append(item)
                case BulkOutcome.ACCEPTED:
                    item.note_rev = answer.rev
                    accepted.append(item)
                case BulkOutcome.CONFLICT:
                    known.append(item)
                case BulkOutcome.FORBIDDEN:
                    sealed.append(item)
                case BulkOutcome.ERROR:
                    answers[item.number] = self._failed(answer)
        ours, others = self._made_sure(database, accepted, answers)
        noted += ours
        noted += self._placed(database, known + others, answers)
        documents = [new_document(item.document_id, item.message, item.note_rev) for item in noted]
        unsure: list[_Item] = []
        for item, answer in zip(noted, self._client.bulk(database, documents), strict=True):
            match answer.outcome:
                case BulkOutcome.OK:
                    answers[item.number] = STORED
                case BulkOutcome.CONFLICT:
                    answers[item.number] = DUPLICATE
                    unsure.append(item)
                case BulkOutcome.ACCEPTED:
                    answers[item.number] = STORED
                    unsure.append(item)
                case BulkOutcome.FORBIDDEN:
                    sealed.append(item)
                case BulkOutcome.ERROR:
                    answers[item.number] = self._failed(answer)
        self._make_sure(database, unsure, answers)
        return sealed

    def _choose_documents(self, items: Sequence[_Item]) -> None:
        """Where each goes. What was told as not stored goes where it was to go then: it may be there."""
        now = self._client.server_time()
        with self._lock:
            age = self._last_age = max(self._last_age, int(now * 1e6)) + len(items)
            places = [self._failed_places.pop((item.message.queue, item.message.id), "") for item in items]
        for number, (item, place) in enumerate(zip(items, places, strict=True), start=1 - len(items)):
            due = item.message.due
            if place and place in {delayed_id(item.message, due or 0), ready_id(item.message, age_of(place))}:
                item.document_id = place
            elif due is None or due <= now * 1000:
                item.document_id = ready_id(item.message, age + number)
            else:
                item.document_id = delayed_id(item.message, due)

    def _remember_places(self, items: Sequence[_Item], answers: Sequence[Published]) -> None:
        with self._lock:
            for item in items:
                if answers[item.number].outcome is PublishOutcome.FAILED and item.document_id:
                    self._failed_places[item.message.queue, item.message.id] = item.document_id
            while len(self._failed_places) > _MOST_REMEMBERED:
                self._failed_places.popitem(last=False)

    def _without_older(self, current: str, items: list[_Item], answers: list[Published]) -> list[_Item]:
        """Those of which no older database holds a message."""
        for database in self._generations.readable():
            if database == current or not items:
                continue
            try:
                notes = read_documents(self._client, database, [note_id(item.message) for item in items])
                places = {id_: place_in(note.document) for id_, note in notes.items() if note.document is not None}
                alive = self._alive(database, [place for place in places.values() if place])
            except BrokerRefused as error:
                if not self._client.is_missing(error):
                    raise
                continue  # it has been dropped, so it was empty
            fresh: list[_Item] = []
            held: list[_Item] = []
            for item in items:
                if (place := places.get(note_id(item.message), "")) in alive:
                    item.document_id = place
                    answers[item.number] = DUPLICATE
                    held.append(item)
                else:
                    fresh.append(item)
            self._make_sure(database, held, answers)
            items = fresh
        return items

    def _made_sure(
        self, database: str, items: list[_Item], answers: list[Published]
    ) -> tuple[list[_Item], list[_Item]]:
        """Of notes that too few copies took, those that a quorum has now, and those where another's is instead.

        The others have FAILED: so many nodes are away that nothing can be stored.
        """
        ours: list[_Item] = []
        others: list[_Item] = []
        for number, item in enumerate(items):
            note = {"_id": note_id(item.message), "at": item.document_id}
            deadline = self._client.deadline()
            try:
                rev = make_sure(self._client, database, note, item.note_rev, None, deadline=deadline, patient=False)
            except BrokerUnavailable as error:
                for each in items[number:]:
                    answers[each.number] = Published(PublishOutcome.FAILED, error)
                break
            item.note_rev = rev or ""
            (others if rev is None else ours).append(item)
        return ours, others

    def _placed(self, database: str, items: list[_Item], answers: list[Published]) -> list[_Item]:
        """Those whose notes were there already, and point to no living message. They have their places then."""
        placed: list[_Item] = []
        duplicates: list[_Item] = []
        is_cluster = self._client.is_cluster()
        for tries in range(_TRIES):
            if not items:
                break
            if tries:
                time.sleep(random.uniform(0, _PAUSE_SECONDS * tries))  # somebody else publishes them just now
            surely = is_cluster and tries > 0
            read: Read = read_surely if surely else read_documents
            notes = read(self._client, database, [note_id(item.message) for item in items])
            if surely:
                notes = {id_: self._without_conflict(database, note) for id_, note in notes.items()}
            places = {id_: place_in(note.document) for id_, note in notes.items() if note.document is not None}
            found = read(self._client, database, [place for place in places.values() if place])
            moving: list[_Item] = []
            doubtful: list[_Item] = []
            for item in items:
                note = notes[note_id(item.message)]
                item.note_rev = note.rev if note.document is not None else ""
                there = found.get(places.get(note.id, ""))
                if there is not None and there.document is not None:
                    item.document_id = there.id
                    answers[item.number] = DUPLICATE
                    duplicates.append(item)
                elif is_cluster and not surely:
                    doubtful.append(item)  # that is what one copy says
                elif there is None or there.rev:
                    moving.append(item)
                else:
                    item.document_id = there.id
                    placed.append(item)
            items = doubtful + self._note_new_places(database, moving, placed, answers)
        self._make_sure(database, duplicates, answers)
        again = BrokerUnavailable(f"{self._client.place}: others publish the same id at this moment; publish it again.")
        for item in items:
            answers[item.number] = Published(PublishOutcome.FAILED, again)
        return placed

    def _without_conflict(self, database: str, note: Found) -> Found:
        """``note`` as one: where two nodes have each taken one, that one stays whose message is there."""
        if not note.others:
            return note
        branches = [leaf for leaf in read_leaves(self._client, database, note.id) if not leaf.get("_deleted")]
        places = read_surely(self._client, database, [place for leaf in branches if (place := place_in(leaf))])

        def rank(leaf: Document) -> tuple[bool, bool, bool]:
            there = places.get(place_in(leaf), Found(""))
            return there.document is not None, bool(there.rev), leaf["_rev"] == note.rev

        winner, *others = sorted(branches, key=rank, reverse=True) or [note.document or {}]
        for leaf in others:
            take_back(self._client, database, note.id, leaf["_rev"], self._client.deadline())
        return Found(note.id, winner.get("_rev", note.rev), winner)

    def _note_new_places(
        self, database: str, moving: list[_Item], placed: list[_Item], answers: list[Published]
    ) -> list[_Item]:
        """Have the notes of ``moving`` point to where their messages will be: these are ``placed``.

        Returns those for which somebody else may have been quicker.
        """
        changed = [
            {"_id": note_id(item.message), "at": item.document_id} | ({"_rev": item.note_rev} if item.note_rev else {})
            for item in moving
        ]
        again: list[_Item] = []
        for item, answer in zip(moving, self._client.bulk(database, changed), strict=True):
            match answer.outcome:
                case BulkOutcome.OK:
                    item.note_rev = answer.rev
                    placed.append(item)
                case BulkOutcome.ACCEPTED | BulkOutcome.CONFLICT:
                    again.append(item)
                case BulkOutcome.FORBIDDEN | BulkOutcome.ERROR:
                    answers[item.number] = self._failed(answer)
        return again

    def _make_sure(self, database: str, items: list[_Item], answers: list[Published]) -> None:
        """Have the answers of ``items``, whose documents are there, be true of a quorum; what is not has FAILED.

        A document that is there may be so on too few copies, by a publisher that was told that it had failed. It is
        handed to all copies, which tells nothing of how many took it. That a quorum of them could do so shows when its
        note is written once more. The document itself is not: that would race with those who claim it.
        """
        if not items or not self._client.is_cluster():
            return
        found = read_documents(self._client, database, [item.document_id for item in items])
        handed: list[Document] = []
        waiting: list[_Item] = []
        for item in items:
            each = found[item.document_id]
            if each.document is None or generation(each.rev) > 1:
                branches = read_branches(self._client, database, item.document_id)
            else:
                branches = [{**each.document, "_revisions": {"start": 1, "ids": [each.rev.partition("-")[2]]}}]
            living = [branch for branch in branches if not branch.get("_deleted")]
            if living or not branches:
                waiting.append(item)
            # else it has been received and settled meanwhile
            handed += living
        self._client.hand_over(database, handed)
        self._touch_notes(database, waiting, answers)

    def _touch_notes(self, database: str, items: list[_Item], answers: list[Published]) -> None:
        for tries in range(_TRIES):
            if not items:
                return
            read: Read = read_surely if tries else read_documents
            notes = read(self._client, database, [note_id(item.message) for item in items])
            going = [item for item in items if (note := notes[note_id(item.message)]).document or not note.rev]
            touched = [_touched(notes[note_id(item.message)], item) for item in going]
            items = []
            accepted: list[_Item] = []
            for item, answer in zip(going, self._client.bulk(database, touched), strict=True):
                match answer.outcome:
                    case BulkOutcome.OK:
                        item.note_rev = answer.rev
                    case BulkOutcome.ACCEPTED:
                        item.note_rev = answer.rev
                        accepted.append(item)
                    case BulkOutcome.CONFLICT:
                        items.append(item)
                    case BulkOutcome.FORBIDDEN | BulkOutcome.ERROR:
                        answers[item.number] = self._failed(answer)
            items += self._made_sure(database, accepted, answers)[1]
        failed = self._failed(BulkAnswer("", BulkOutcome.ACCEPTED))
        for item in items:
            answers[item.number] = failed

    def _alive(self, database: str, ids: list[str]) -> set[str]:
        if not ids:
            return set()
        found = read_documents(self._client, database, ids)
        return {id_ for id_, each in found.items() if each.document is not None}

    def _failed(self, answer: BulkAnswer) -> Published:
        if answer.outcome is BulkOutcome.ACCEPTED:
            why = "too few nodes of the cluster have stored it; publish it again"
        else:
            why = answer.reason
        return Published(PublishOutcome.FAILED, BrokerUnavailable(f"{self._client.place}: {why}."))


def _touched(note: Found, item: _Item) -> Document:
    """The same note in a revision of its own; where it is missing, a new one."""
    document = note.document or {"_id": note.id, "at": item.document_id}
    revision = {"_rev": note.rev} if note.document is not None else {}
    return {**document, **revision, "published_again": os.urandom(8).hex()}


def _without_repeated(items: list[_Item], answers: list[Published]) -> list[_Item]:
    """Each message once; one that comes again in the same batch is a duplicate of the first."""
    first: dict[tuple[str, str], _Item] = {}
    for item in items:
        if first.setdefault((item.message.queue, item.message.id), item) is not item:
            answers[item.number] = DUPLICATE
    return list(first.values())


def _cut(items: list[_Item]) -> Iterator[list[_Item]]:
    """``items`` in parts that one request takes."""
    start = size = 0
    for end, item in enumerate(items):
        if end > start and (end - start == AT_ONCE or size + len(item.message.content) > SLICE_BYTES):
            yield items[start:end]
            start, size = end, 0
        size += len(item.message.content)
    if items:
        yield items[start:]
