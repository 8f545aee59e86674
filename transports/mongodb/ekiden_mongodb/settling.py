"""Settling: what follows is stored and the delivery is forgotten, in one transaction where the servers have them.

Endings that nothing follows are one deletion. Where the servers have no transactions, what follows is stored first and
the delivery is deleted then: who dies in between leaves messages stored and a delivery that comes back, and storing
them once more finds their ids taken.

A delivery whose lease cannot have ended yet is ours without asking; of the others it is asked first, and those that
are ours are extended by it, so that nobody takes them meanwhile.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import msgspec
from ekiden.errors import BrokerRefused, BrokerUnavailable, TransportError
from ekiden.message import LOST, SETTLED, Delivery, Ending, Published, PublishOutcome, Settled, SettleOutcome
from pymongo.errors import BulkWriteError, OperationFailure, PyMongoError

from ekiden_mongodb.claiming import AT_ONCE
from ekiden_mongodb.client import Client
from ekiden_mongodb.documents import ATTEMPTS, GIVEN_BACK, LATEST_MS, Document, Messages, document_id
from ekiden_mongodb.errors import ABOUT_THE_VALUE, DUPLICATE_KEY, NO_TRANSACTIONS
from ekiden_mongodb.holding import Hold, Holdings
from ekiden_mongodb.publishing import Prepared, Publisher

TRANSACTION_BYTES = 4 * 1024 * 1024
"""About how much one transaction stores at most, if it is more than one ending's."""

_CLOCKS_DIFFER_SECONDS = 3600.0
"""Since 1970, so that what is released for longer is due at the end of time."""

_LONGEST_PAUSE_SECONDS = 0.05
"""Before a transaction that met another one is tried again."""

Item = TypeVar("Item")


class _Held(msgspec.Struct, frozen=True, gc=False):
    """A delivery by its document and claim, and its ending's position in the batch."""

    number: int
    document_id: str
    token: str


class _Followed(msgspec.Struct, frozen=True):
    """An ending with what follows; ``prepared`` has the ending's number."""

    held: _Held
    prepared: list[Prepared]

    def size(self) -> int:
        """Bytes that are stored for it, about."""
        return sum(len(each.message.body) + 500 for each in self.prepared)


class Settler:
    """Settles, extends and releases for one consumer, in the thread that settles."""

    def __init__(
        self, client: Client, messages: Messages, publisher: Publisher, holdings: Holdings, *, lease: float
    ) -> None:
        self._client = client
        self._messages = messages
        self._publisher = publisher
        self._holdings = holdings
        self._lease = lease
        self._lease_end = {"$add": ["$$NOW", round(lease * 1000)]}
        self._has_transactions = True

    def settle(self, endings: Sequence[Ending]) -> list[Settled]:
        """As ``Consumer.settle``."""
        answers: list[Settled] = [SETTLED] * len(endings)
        plain: list[_Held] = []
        followed: list[_Followed] = []
        try:
            for held in self._still_held([ending.delivery for ending in endings], answers):
                ending = endings[held.number]
                if not ending.publish:
                    plain.append(held)
                elif isinstance(prepared := self._prepared(held.number, ending), BrokerRefused):
                    answers[held.number] = Settled(SettleOutcome.FAILED, prepared)
                else:
                    followed.append(_Followed(held, prepared))
        except TransportError as error:
            return [_failed(error)] * len(endings)
        for some in _sliced(plain):
            self._attempt(partial(self._delete, some, answers), some, answers)
        for batch in _batches(followed):
            self._hand_over_some(batch, answers)
        return answers

    def extend(self, deliveries: Sequence[Delivery]) -> list[Settled]:
        """As ``Consumer.extend``."""
        answers: list[Settled] = [SETTLED] * len(deliveries)
        for some in _sliced(self._by_document(deliveries)):
            try:
                with self._client.asking():
                    lost = self._extend(some)
            except TransportError as error:
                for held in some:
                    answers[held.number] = _failed(error)
            else:
                for held in lost:
                    answers[held.number] = LOST
        return answers

    def release(self, deliveries: Sequence[Delivery], *, delay: float, keep_attempt: bool) -> None:
        """As ``Consumer.release``."""
        fewer = {"$max": [0, {"$subtract": [ATTEMPTS, 1]}]}
        changes: list[Document] = [] if keep_attempt else [{"$set": {"n": fewer}}]
        if delay > 0:
            longest = LATEST_MS / 1000 - self._client.server_time()  # dates end with the year 9999
            later = {"$add": ["$$NOW", math.ceil(min(delay, longest - _CLOCKS_DIFFER_SECONDS) * 1000)]}
            changes.append({"$set": {"w": later}})
        self._give_back(self._by_document(deliveries), [*changes, *GIVEN_BACK])

    def give_back(self, ids_by_token: dict[str, list[str]]) -> None:
        """Give back what is held, and leave it its attempt. Raises TransportError."""
        held = [_Held(0, found, token) for token, ids in ids_by_token.items() for found in ids]
        self._give_back(held, GIVEN_BACK)

    # Holding.

    def _by_document(self, deliveries: Iterable[Delivery]) -> list[_Held]:
        return [
            _Held(number, document_id(delivery.message.queue, delivery.message.id), delivery.tag)
            for number, delivery in enumerate(deliveries)
        ]

    def _still_held(self, deliveries: Sequence[Delivery], answers: list[Settled]) -> Iterator[_Held]:
        """Those that are ours, and until their endings are carried out; the others are answered LOST."""
        unsure: list[_Held] = []
        at = time.monotonic()
        for held in self._by_document(deliveries):
            match self._holdings.of(held.document_id, held.token, at=at):
                case Hold.SURE:
                    yield held
                case Hold.UNSURE:
                    unsure.append(held)
                case Hold.LOST:
                    answers[held.number] = LOST
        for some in _sliced(unsure):
            with self._client.asking():
                lost = self._extend(some)
            for held in lost:
                answers[held.number] = LOST
            yield from (held for held in some if held not in lost)

    def _extend(self, held: Sequence[_Held]) -> list[_Held]:
        """Hold these for another lease; returns those that are lost."""
        messages, until = self._messages.collection(), time.monotonic() + self._lease
        ours = _condition(held)
        extended = messages.update_many(ours, [{"$set": {"v": self._lease_end}}]).matched_count
        sure = all(self._holdings.of(each.document_id, each.token) is Hold.SURE for each in held)
        lost: list[_Held] = []
        if extended < len(held) or not sure:
            found = {(document["_id"], document["t"]) for document in messages.find(ours, {"t": 1})}
            lost = [each for each in held if (each.document_id, each.token) not in found]
        for each in held:
            self._holdings.extend(each.document_id, each.token, until)
        return lost

    def _give_back(self, held: Sequence[_Held], update: Sequence[Document]) -> None:
        for some in _sliced(held):
            with self._client.asking():
                self._messages.collection().update_many(_condition(some), update)

    # Ending.

    def _attempt(self, act: Callable[[], None], held: Sequence[_Held], answers: list[Settled]) -> None:
        try:
            with self._client.asking():
                act()
        except TransportError as error:
            for each in held:
                answers[each.number] = _failed(error)

    def _hand_over_some(self, batch: list[_Followed], answers: list[Settled]) -> None:
        """Hand over a batch; one that pymongo cannot send is divided, until the culprit is alone and refused."""
        try:
            with self._client.asking():
                self._hand_over(batch, answers)
        except TransportError as error:
            if not isinstance(error.__cause__, ABOUT_THE_VALUE):
                for each in batch:
                    answers[each.held.number] = _failed(error)
            elif len(batch) == 1:
                answers[batch[0].held.number] = Settled(SettleOutcome.FAILED, error)
            else:
                self._hand_over_some(batch[: len(batch) // 2], answers)
                self._hand_over_some(batch[len(batch) // 2 :], answers)

    def _prepared(self, number: int, ending: Ending) -> list[Prepared] | BrokerRefused:
        prepared: list[Prepared] = []
        for message in ending.publish:
            document = self._publisher.document_of(message)
            if isinstance(document, BrokerRefused):
                return document
            prepared.append(Prepared(number, message, document))
        return prepared

    def _delete(self, held: Sequence[_Held], answers: list[Settled]) -> None:
        messages = self._messages.collection()
        deleted = messages.delete_many(_condition(held)).deleted_count
        if deleted == len(held):
            return
        # An earlier call deleted the others, and its answer was lost; unless they are there.
        there = {found["_id"] for found in messages.find({"_id": {"$in": [each.document_id for each in held]}}, {})}
        for each in held:
            if each.document_id in there:
                answers[each.number] = LOST

    def _hand_over(self, batch: list[_Followed], answers: list[Settled]) -> None:
        """Store what follows and delete the deliveries."""
        if self._has_transactions and self._client.features().transactions:
            self._hand_over_together(batch, answers)
        else:
            self._hand_over_in_steps(batch, answers)

    def _hand_over_together(self, batch: list[_Followed], answers: list[Settled]) -> None:
        following = self._publisher.dated([each for followed in batch for each in followed.prepared])
        give_up = time.monotonic() + self._client.options.timeout
        while batch:
            try:
                if self._in_transaction(batch, following):
                    self._publisher.ring(each.message for each in following)
                    return
                batch = self._without_lost(batch, answers)
            except PyMongoError as error:
                if error.has_error_label("TransientTransactionError") and time.monotonic() < give_up:
                    time.sleep(random.uniform(0, _LONGEST_PAUSE_SECONDS))
                elif isinstance(error, BulkWriteError) and error.details.get("writeErrors"):
                    batch, following = self._without_refused(batch, following, error, answers)
                elif isinstance(error, OperationFailure) and error.code in NO_TRANSACTIONS:
                    self._has_transactions = False
                    self._hand_over_in_steps(batch, answers)
                    return
                else:
                    raise
            numbers = {followed.held.number for followed in batch}
            following = [each for each in following if each.number in numbers]

    def _in_transaction(self, batch: Sequence[_Followed], following: Sequence[Prepared]) -> bool:
        """Returns False when some of the deliveries are not there; then nothing was done."""
        messages = self._messages.collection(durable=True)
        condition = _condition([followed.held for followed in batch])
        try:
            with self._client.transaction() as session:
                if messages.delete_many(condition, session=session).deleted_count < len(batch):
                    raise _NotAllHeld
                if following:
                    messages.insert_many([each.document for each in following], session=session)
        except _NotAllHeld:
            return False
        return True

    def _without_lost(self, batch: list[_Followed], answers: list[Settled]) -> list[_Followed]:
        """Those whose deliveries are ours. Of the others, those that are gone were settled: an answer was lost."""
        ids = [followed.held.document_id for followed in batch]
        there = self._messages.collection().find({"_id": {"$in": ids}}, {"t": 1})
        tokens = {found["_id"]: found.get("t") for found in there}
        kept: list[_Followed] = []
        for followed in batch:
            held = followed.held
            if tokens.get(held.document_id) == held.token:
                kept.append(followed)
            elif held.document_id in tokens:
                answers[held.number] = LOST
        return kept

    def _without_refused(
        self, batch: list[_Followed], following: list[Prepared], error: BulkWriteError, answers: list[Settled]
    ) -> tuple[list[_Followed], list[Prepared]]:
        """What is left without the documents that are stored already, and the endings whose documents are refused."""
        errors = self._client.errors
        refused: set[int] = set()
        for said in error.details.get("writeErrors", ()):
            each, code = following[said["index"]], said.get("code")
            if code != DUPLICATE_KEY:
                refused.add(each.number)
                answers[each.number] = Settled(SettleOutcome.FAILED, errors.of_code(code, str(said.get("errmsg", ""))))
        stored = self._stored([each.document["_id"] for each in following])
        batch = [followed for followed in batch if followed.held.number not in refused]
        left = {each.document["_id"]: each for each in reversed(following)}  # one may be there twice
        return batch, [
            each
            for each in following
            if left[each.document["_id"]] is each and each.document["_id"] not in stored and each.number not in refused
        ]

    def _stored(self, ids: list[str]) -> set[str]:
        return {found["_id"] for found in self._messages.collection().find({"_id": {"$in": ids}}, {"_id": 1})}

    def _hand_over_in_steps(self, batch: Sequence[_Followed], answers: list[Settled]) -> None:
        # When no answer comes, the next call asks first whether they are still ours, and stores nothing twice.
        for each in batch:
            self._holdings.doubt(each.held.document_id, each.held.token)
        following = self._publisher.dated([each for followed in batch for each in followed.prepared])
        # Several messages have their ending's number: one that failed is what counts.
        failures: dict[int, Published] = {}
        numbered = [msgspec.structs.replace(each, number=position) for position, each in enumerate(following)]
        for position, answer in self._publisher.insert(numbered).items():
            if answer.outcome is PublishOutcome.FAILED:
                failures[following[position].number] = answer
        for number, failure in failures.items():
            answers[number] = Settled(SettleOutcome.FAILED, failure.error)
        self._publisher.ring(each.message for each in following)
        self._delete([each.held for each in batch if each.held.number not in failures], answers)


class _NotAllHeld(Exception):
    """The transaction is given up: somebody else has some of the deliveries."""


def _condition(held: Sequence[_Held]) -> Document:
    """Those that the claims hold. A document has the token of one claim, and no two of these claims hold one twice."""
    tokens = list({each.token for each in held})
    return {
        "_id": {"$in": [each.document_id for each in held]},
        "t": tokens[0] if len(tokens) == 1 else {"$in": tokens},
    }


def _sliced(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), AT_ONCE):
        yield items[start : start + AT_ONCE]


def _batches(followed: Iterable[_Followed]) -> list[list[_Followed]]:
    """Those that go into one transaction each."""
    batches: list[list[_Followed]] = []
    count = size = 0
    for each in followed:
        count += 1 + len(each.prepared)
        size += each.size()
        if not batches or count > AT_ONCE or size > TRANSACTION_BYTES:
            batches.append([])
            count, size = 1 + len(each.prepared), each.size()
        batches[-1].append(each)
    return batches


def _failed(error: TransportError) -> Settled:
    """It is the servers that are in trouble, not an ending: when that is put right, all of them are good."""
    return Settled(SettleOutcome.FAILED, BrokerUnavailable(str(error)))
