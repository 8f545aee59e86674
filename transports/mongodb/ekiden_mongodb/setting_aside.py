"""Setting aside what is no message: what somebody else wrote into the collection goes to the dead letters.

Each document by itself: its dead letter is stored, then it is deleted. Whoever dies in between leaves both, and the
next one finds the dead letter's id taken.
"""

from __future__ import annotations

from collections.abc import Sequence

import bson
from bson.errors import BSONError
from ekiden.errors import BrokerRefused
from ekiden.loggers import safe_logger
from ekiden.message import Published, PublishOutcome, unreadable

from ekiden_mongodb.documents import Document, Messages, Unreadable, attempts_of, message_of
from ekiden_mongodb.publishing import Prepared, Publisher

logger = safe_logger("ekiden_mongodb")


class SettingAside:
    """Sets aside for one consumer, in the thread that receives."""

    def __init__(self, messages: Messages, publisher: Publisher) -> None:
        self._messages = messages
        self._publisher = publisher

    def set_aside(self, queue: str, documents: Sequence[Document]) -> None:
        """Send these documents of ``queue`` to its dead letters. Belongs inside ``client.asking()``.

        One that cannot be sent there now stays, and comes again.
        """
        for document in documents:
            reason = _reason(document)
            logger.error("%s: the document %r goes to the dead letters: %s", queue, document["_id"], reason)
            refused = self._bury(queue, document, reason)
            if refused is not None:
                logger.error("%s: the document %r cannot be set aside now: %s", queue, document["_id"], refused)
            else:
                self._messages.collection().delete_one({"_id": document["_id"]})

    def _bury(self, queue: str, document: Document, reason: str) -> Exception | None:
        """Store the dead letter; returns why it cannot be."""
        body = document.get("b")
        dead = unreadable(
            queue,
            _name(document),
            bytes(body) if isinstance(body, bytes) else _encoded(document),
            reason,
            attempt=attempts_of(document),
        )
        if dead is None:
            return None
        stored = self._publisher.document_of(dead)
        if isinstance(stored, BrokerRefused):
            return stored
        answers = self._publisher.insert(self._publisher.dated([Prepared(0, dead, stored)]))
        answer = answers.get(0, Published(PublishOutcome.STORED))
        return answer.error if answer.outcome is PublishOutcome.FAILED else None


def _reason(document: Document) -> str:
    try:
        message_of(document)
    except Unreadable as error:
        return str(error)
    return "it is not where its _id says"


def _name(document: Document) -> str:
    document_id = document["_id"]
    return document_id.rpartition("\0")[2] if isinstance(document_id, str) else repr(document_id)


def _encoded(document: Document) -> bytes:
    try:
        return bson.encode(document)
    except (BSONError, OverflowError):
        return repr(document).encode("utf-8", "backslashreplace")
