"""Queues named reply.*: which there are, and how they vanish.

One document for each in ``<prefix>.replies``: its ``_id`` is the queue's name, ``x`` the date when it vanishes, which
its consumer moves on. Its messages carry the same date. The server deletes both some time after it (by a TTL index,
once a minute), so whoever asks passes over what is too old.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ekiden.message import REPLY_PREFIX

from ekiden_mongodb.client import Client
from ekiden_mongodb.documents import ALL_PRIORITIES, CLAIM_INDEX, LEASED, REPLIES, WAITING, Document, Messages, date

REPLY_QUEUE_KEPT_SECONDS = 60.0
"""How long a queue named reply.* outlives its consumer."""


def is_reply_queue(queue: str) -> bool:
    """Whether ``queue`` vanishes with its consumer."""
    return queue.startswith(REPLY_PREFIX)


def not_vanished(now: float) -> Document:
    """The condition for what is still there ``now`` (the server's time) among what vanishes."""
    return {"x": {"$gt": date(now)}}


def existing(client: Client, queues: Collection[str]) -> set[str]:
    """Which of the reply ``queues`` there are. Belongs inside ``client.asking()``."""
    if not queues:
        return set()
    found = client.collection(REPLIES).find({"_id": {"$in": list(queues)}, **not_vanished(client.server_time())})
    return {document["_id"] for document in found}


def keep(client: Client, messages: Messages, queues: Iterable[str]) -> None:
    """Make the reply ``queues``, or keep them and what is in them. Belongs inside ``client.asking()``."""
    later = [{"$set": {"x": {"$add": ["$$NOW", round(REPLY_QUEUE_KEPT_SECONDS * 1000)]}}}]
    for queue in queues:
        messages.collection().update_many(
            {"q": queue, "s": {"$in": [WAITING, LEASED]}, "p": ALL_PRIORITIES}, later, hint=CLAIM_INDEX
        )
        client.collection(REPLIES).update_one({"_id": queue}, later, upsert=True)
