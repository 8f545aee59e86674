"""Settling: what follows is published first, then the delivery's document is deleted, if it is still ours.

It is ours as long as its revision is the one that we wrote. Where it is not, or an answer was lost, the document is
read: our token in it means that it is still held, whatever its revision. One that is deleted was deleted by us if we
have tried to, and either nobody else could have meanwhile or its revision is the very next one.

In a cluster, what others have written in vain may become visible when our revision is deleted: that is deleted, too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum

from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportError
from ekiden.message import LOST, SETTLED, Delivery, Ending, PublishOutcome, Settled, SettleOutcome

from ekiden_couchdb.claiming import NODES_DIFFER_SECONDS
from ekiden_couchdb.client import BulkAnswer, BulkOutcome, Client
from ekiden_couchdb.documents import Document, attempts_of, generation, note_of, note_revision, place_in, size_of, until
from ekiden_couchdb.generations import Generations
from ekiden_couchdb.holding import Held, Holdings, Tag
from ekiden_couchdb.publishing import Publisher
from ekiden_couchdb.reading import Found, read_documents

AT_ONCE = 500
SLICE_BYTES = 8 * 1024 * 1024
_TRIES = 3
_WRITTEN = {BulkOutcome.OK, BulkOutcome.ACCEPTED}
_NOT_WRITTEN = {BulkOutcome.FORBIDDEN, BulkOutcome.ERROR}


class _State(Enum):
    """What has become of one that was ours."""

    HELD = "held"
    DELETED = "deleted"
    LOST = "lost"


Attempt = Callable[[str, list[Held]], list[BulkAnswer]]


class Settler:
    """Ends what one consumer holds, whose lease is ``lease`` seconds."""

    def __init__(
        self, client: Client, generations: Generations, publisher: Publisher, holdings: Holdings, *, lease: float
    ) -> None:
        self._client = client
        self._generations = generations
        self._publisher = publisher
        self._holdings = holdings
        self._lease = lease

    def settle(self, endings: Sequence[Ending]) -> list[Settled]:
        """As ``Consumer.settle``. What is SETTLED or LOST is held no more."""
        answers = [LOST] * len(endings)
        items = self._find([ending.delivery for ending in endings])
        with self._client.one_deadline():
            following = {number: held for number, held in items.items() if endings[number].publish}
            if following:
                for number, answer in self._publish(endings, following).items():
                    answers[number] = answer
                    del items[number]
            for number, answer in self._end(items, self._delete, deleting=True).items():
                answers[number] = answer
                if answer.outcome is not SettleOutcome.FAILED:
                    self._holdings.drop(items[number])
        return answers

    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        """As ``Consumer.extend``. What is LOST is held no more."""
        answers = [LOST] * len(deliveries)
        with self._client.one_deadline():
            for number, answer in self._extend(self._find(deliveries)).items():
                answers[number] = answer
        return answers

    def give_back(self, held: Iterable[Held], *, attempts_less: int, delay: float = 0.0) -> None:
        """Let others have it, after ``delay`` seconds. What is not ours any more is passed over.

        Raises what the client raises; then some may have been given back.
        """
        with self._client.one_deadline():
            again = until(self._client.latest_server_time(), delay) if delay > 0 else 0
            for database, some in _by_database(held):
                # A revision is a hash of what is written: without something fresh it may have been there before.
                changes = {"until": again, "token": "", "owner": "", "given_back": os.urandom(8).hex()}
                documents = {
                    each.id: {
                        **each.document,
                        **changes,
                        "attempts": max(0, attempts_of(each.document) - attempts_less),
                        "_rev": each.rev,
                    }
                    for each in some
                }
                answers = dict(zip(documents, self._client.bulk(database, list(documents.values())), strict=True))
                moved = [each for each in some if answers[each.id].outcome is BulkOutcome.CONFLICT]
                if moved:
                    # An extension whose answer was lost has changed the revision; or it is somebody else's.
                    states = self._states(database, moved)
                    ours = {
                        each.id: {**documents[each.id], "_rev": each.rev}
                        for each in moved
                        if states[each.id] is _State.HELD
                    }
                    answers |= zip(ours, self._client.bulk(database, list(ours.values())), strict=True)
                not_written = [each for each in some if answers[each.id].outcome in _NOT_WRITTEN]
                for each in some:
                    if answers[each.id].outcome not in _NOT_WRITTEN:
                        self._holdings.drop(each)
                if not_written:
                    reason = answers[not_written[0].id].reason
                    raise self._client.errors.unavailable(
                        f"{self._client.place} did not take back a message: {reason}."
                    )

    # What both have in common.

    def _find(self, deliveries: Sequence[Delivery]) -> dict[int, Held]:
        """Those that are held, each once, by their positions."""
        held: dict[int, Held] = {}
        seen: set[int] = set()
        for number, delivery in enumerate(deliveries):
            found = self._holdings.find(delivery)
            if found is not None and id(found) not in seen:
                seen.add(id(found))
                held[number] = found
        return held

    def _end(self, items: Mapping[int, Held], attempt: Attempt, *, deleting: bool) -> dict[int, Settled]:
        """Make an ``attempt`` at each, again where its revision was another; returns how it ended."""
        ended: dict[Tag, Settled] = {}
        left: Sequence[Held] = list(items.values())
        for _ in range(_TRIES):
            again: list[Held] = []
            for database, some in _by_database(left):
                answers, trouble = self._attempt(database, some, attempt, deleting=deleting)
                doubtful = [held for held in some if held.tag not in answers]
                if doubtful:
                    answers |= self._after_doubt(database, doubtful, trouble, deleting=deleting)
                again += [held for held in doubtful if held.tag not in answers]
                ended |= answers
            left = again
            if not left:
                break
        changes = _failed(f"{self._client.place}: its revision changes again and again.")
        return {number: ended.get(held.tag, changes) for number, held in items.items()}

    def _attempt(
        self, database: str, some: list[Held], attempt: Attempt, *, deleting: bool
    ) -> tuple[dict[Tag, Settled], TransportError | None]:
        """One request: how it ended, for all of which that is certain; and what went wrong with it."""
        try:
            written = attempt(database, some)
        except (BrokerUnavailable, BrokerRefused) as error:
            for held in some:
                held.may_be_deleted |= deleting
            return {}, error
        ended: dict[Tag, Settled] = {}
        for held, answer in zip(some, written, strict=True):
            match answer.outcome:
                case BulkOutcome.OK:
                    ended[held.tag] = SETTLED
                case BulkOutcome.ACCEPTED if deleting:
                    ended[held.tag] = SETTLED  # the others learn it from those that have accepted it
                case BulkOutcome.ACCEPTED:
                    ended[held.tag] = _failed(f"{self._client.place}: too few nodes of the cluster have stored it.")
                case BulkOutcome.FORBIDDEN | BulkOutcome.ERROR:
                    ended[held.tag] = _failed(f"{self._client.place}: {answer.reason}.")
                case BulkOutcome.CONFLICT:
                    pass
        return ended, None

    def _after_doubt(
        self, database: str, doubtful: Sequence[Held], trouble: TransportError | None, *, deleting: bool
    ) -> dict[Tag, Settled]:
        """How it ended for those that were not written, or may have been. Those that are missing are still ours."""
        try:
            states = self._states(database, doubtful)
        except (BrokerUnavailable, BrokerRefused) as error:
            failed = _failed(str(trouble or error))
            return {held.tag: failed for held in doubtful}
        ended: dict[Tag, Settled] = {}
        for held in doubtful:
            state = states[held.id]
            if state is not _State.HELD:
                ended[held.tag] = SETTLED if deleting and state is _State.DELETED else LOST
        return ended

    def _states(self, database: str, some: Sequence[Held]) -> dict[str, _State]:
        """What has become of each, by its document's id. The revisions of those that are ours are up to date then."""
        found = read_documents(self._client, database, [held.id for held in some])
        return {held.id: self._state(held, found[held.id]) for held in some}

    def _state(self, held: Held, found: Found) -> _State:
        if found.document is not None:
            if found.document.get("token") != held.document["token"]:
                return _State.LOST
            held.rev = found.rev
            return _State.HELD
        was_it_us = generation(found.rev) == generation(held.rev) + 1 or held.ends > time.monotonic()
        return _State.DELETED if held.may_be_deleted and was_it_us else _State.LOST

    # Settling.

    def _publish(self, endings: Sequence[Ending], items: Mapping[int, Held]) -> dict[int, Settled]:
        """Publish what follows. Returns the answers for those whose deliveries are not to be forgotten now."""
        now = time.monotonic()
        answers = self._extend({number: held for number, held in items.items() if held.ends <= now})
        answers = {number: answer for number, answer in answers.items() if answer is not SETTLED}
        going = [number for number in items if number not in answers]
        messages = [message for number in going for message in endings[number].publish]
        try:
            published = iter(self._publisher.publish(messages))
        except TransportError as error:
            failed = _failed(str(error))
            return answers | dict.fromkeys(going, failed)
        for number in going:
            results = [next(published) for _ in endings[number].publish]
            failures = [result.error for result in results if result.outcome is PublishOutcome.FAILED]
            if failures:
                answers[number] = Settled(SettleOutcome.FAILED, failures[0])
        return answers

    def _delete(self, database: str, some: list[Held]) -> list[BulkAnswer]:
        deletions: list[Document] = [_deleted(held.id, held.rev) for held in some]
        notes = [_deleted(note_of(held.id), note) for held in some if (note := note_revision(held.document))]
        everything = self._client.bulk(database, deletions + notes)
        answers = everything[: len(some)]
        rewritten = [answer.id for answer in everything[len(some) :] if answer.outcome is BulkOutcome.CONFLICT]
        if rewritten:
            self._delete_notes(database, rewritten, {held.id for held in some})
        gone = [held.id for held, answer in zip(some, answers, strict=True) if answer.outcome in _WRITTEN]
        if self._client.is_cluster():
            self._delete_what_showed(database, gone)
        self._generations.deleted(database, {answer.id: (answer.rev,) for answer in answers if answer.rev})
        return answers

    def _delete_notes(self, database: str, ids: Sequence[str], places: Collection[str]) -> None:
        """Delete notes that were written once more since their messages were, because these were published again."""
        try:
            found = read_documents(self._client, database, ids)
            notes = [each for each in found.values() if each.document and place_in(each.document) in places]
            self._client.bulk(database, [_deleted(each.id, each.rev) for each in notes])
        except (BrokerUnavailable, BrokerRefused):
            return  # a note without a message is in nobody's way

    def _delete_what_showed(self, database: str, ids: Sequence[str]) -> None:
        """Delete what became visible when our revision of these documents was deleted: others' claims, made in vain."""
        try:
            found = read_documents(self._client, database, ids, with_conflicts=True)
            for each in found.values():
                if each.document is not None:
                    for rev in (each.rev, *each.others):
                        self._client.bulk(database, [_deleted(each.id, rev)])
        except (BrokerUnavailable, BrokerRefused):
            return  # whoever finds it sees that it was settled

    # Extending.

    def _extend(self, items: Mapping[int, Held]) -> dict[int, Settled]:
        """Extend each; returns how it ended. What is LOST is held no more."""
        ends = time.monotonic() + self._lease
        answers = self._end(items, self._write_longer, deleting=False)
        for number, answer in answers.items():
            match answer.outcome:
                case SettleOutcome.SETTLED:
                    items[number].ends = ends
                case SettleOutcome.LOST:
                    self._holdings.drop(items[number])
                case SettleOutcome.FAILED:
                    pass
        return answers

    def _write_longer(self, database: str, some: list[Held]) -> list[BulkAnswer]:
        lease = self._lease + (NODES_DIFFER_SECONDS if self._client.is_cluster() else 0.0)
        end = until(self._client.latest_server_time(), lease)
        documents = [{**held.document, "until": end, "_rev": held.rev} for held in some]
        answers = self._client.bulk(database, documents)
        for held, answer in zip(some, answers, strict=True):
            if answer.outcome in _WRITTEN:
                held.rev = answer.rev
        return answers


def _by_database(held: Iterable[Held]) -> Iterator[tuple[str, list[Held]]]:
    """What is held in each database, in parts that one request takes."""
    databases: dict[str, list[Held]] = {}
    for each in held:
        databases.setdefault(each.database, []).append(each)
    for database, some in databases.items():
        start = size = 0
        for end, each in enumerate(some):
            length = size_of(each.document)
            if end > start and (end - start == AT_ONCE or size + length > SLICE_BYTES):
                yield database, some[start:end]
                start, size = end, 0
            size += length
        yield database, some[start:]


def _deleted(document_id: str, rev: str) -> Document:
    return {"_id": document_id, "_rev": rev, "_deleted": True}


def _failed(why: str) -> Settled:
    """It is the server that is in trouble, not an ending: when it is put right, all of them are good."""
    return Settled(SettleOutcome.FAILED, BrokerUnavailable(why))
