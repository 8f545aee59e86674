"""Publishing: one insertion for a batch, acknowledged when a majority of the members have it in their journals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from ekiden.errors import BrokerRefused
from ekiden.message import DUPLICATE, STORED, Message, Published, PublishOutcome
from pymongo.errors import BulkWriteError

from ekiden_mongodb.client import Client
from ekiden_mongodb.documents import Document, Messages, date, date_not_before, document_of
from ekiden_mongodb.errors import DUPLICATE_KEY
from ekiden_mongodb.replies import REPLY_QUEUE_KEPT_SECONDS, existing, is_reply_queue
from ekiden_mongodb.signals import Signals


class Prepared(msgspec.Struct, frozen=True, gc=False):
    """A message and the document that it is stored as. ``number`` is its position in the batch."""

    number: int
    message: Message
    document: Document


class Publisher:
    """Stores messages; for any number of threads."""

    def __init__(self, client: Client, messages: Messages, signals: Signals) -> None:
        self._client = client
        self._messages = messages
        self._signals = signals

    def publish(self, messages: Sequence[Message], *, deadline: float | None = None) -> list[Published]:
        """Store ``messages``; as ``Transport.publish``."""
        answers: list[Published] = [STORED] * len(messages)
        prepared: list[Prepared] = []
        for number, message in enumerate(messages):
            document = self.document_of(message)
            if isinstance(document, BrokerRefused):
                answers[number] = Published(PublishOutcome.FAILED, document)
            else:
                prepared.append(Prepared(number, message, document))
        if prepared:
            with self._client.asking(by=deadline):
                stored = self.dated(prepared)
                for number, answer in self.insert(stored).items():
                    answers[number] = answer
            with self._client.asking(by=deadline):
                self.ring(each.message for each in stored)
        return answers

    def document_of(self, message: Message) -> Document | BrokerRefused:
        """What is stored of ``message``, or why it is not."""
        return document_of(
            message,
            max_message_bytes=self._client.options.max_message_bytes,
            max_document_bytes=self._client.max_document_bytes,
        )

    def dated(self, prepared: Sequence[Prepared]) -> list[Prepared]:
        """Say in the documents when they may be handed out; those for reply queues that are not there are left out.

        Belongs inside ``client.asking()``.
        """
        replies = {each.message.queue for each in prepared if is_reply_queue(each.message.queue)}
        if replies:
            missing = replies - existing(self._client, replies)
            prepared = [each for each in prepared if each.message.queue not in missing]
        # Early by what the measurement may be wrong, so that no consumer waits for its clock to catch up with ours.
        reading = self._client.clock.reading()
        now = self._client.server_time() - reading.error
        order, at_once = round(now * 1e9), date(now)
        for position, each in enumerate(prepared):
            document, due = each.document, each.message.due
            document["v"] = document["w"] = at_once if due is None else date_not_before(due)
            document["o"] = order + position
            if each.message.queue in replies:
                document["x"] = date(now + REPLY_QUEUE_KEPT_SECONDS)
        return list(prepared)

    def insert(self, prepared: Sequence[Prepared]) -> dict[int, Published]:
        """Insert what is ``dated``; returns an answer for each that was not simply stored, by its number.

        Belongs inside ``client.asking()``; raises what pymongo raises when nothing could be asked.
        """
        if not prepared:
            return {}
        documents = [each.document for each in prepared]
        try:
            self._messages.collection(durable=True).insert_many(documents, ordered=False)
        except BulkWriteError as error:
            return self._answers(prepared, error)
        return {}

    def ring(self, messages: Iterable[Message]) -> None:
        """Wake who waits for ``messages``, also for those that are delayed: it is told when to look."""
        if queues := dict.fromkeys(message.queue for message in messages):
            self._signals.ring(queues)

    def _answers(self, prepared: Sequence[Prepared], error: BulkWriteError) -> dict[int, Published]:
        errors = self._client.errors
        answers: dict[int, Published] = {}
        for said in error.details.get("writeConcernErrors", ()):
            # They are stored, but it is not known whether they would survive the loss of a server.
            unsure = Published(PublishOutcome.FAILED, errors.of_code(said.get("code"), str(said.get("errmsg", ""))))
            answers.update((each.number, unsure) for each in prepared)
        for said in error.details.get("writeErrors", ()):
            number, code = prepared[said["index"]].number, said.get("code")
            if code == DUPLICATE_KEY:
                answers[number] = DUPLICATE
            else:
                answers[number] = Published(PublishOutcome.FAILED, errors.of_code(code, str(said.get("errmsg", ""))))
        return answers
