"""Looking at a queue and emptying it: browse, depth, purge."""

from __future__ import annotations

import math

import msgspec
from bson.datetime_ms import DatetimeMS
from ekiden.message import Condition, Depth, Message, Seen

from ekiden_mongodb.claiming import AT_ONCE
from ekiden_mongodb.client import Client
from ekiden_mongodb.documents import (
    ALL_PRIORITIES,
    CLAIM_INDEX,
    LEASED,
    WAITING,
    Document,
    Messages,
    Unreadable,
    attempts_of,
    date,
    message_of,
    seconds,
)
from ekiden_mongodb.replies import is_reply_queue, not_vanished

_INDEX = dict(CLAIM_INDEX)
_ORDER = [("p", 1), ("v", 1), ("o", 1), ("_id", 1)]
_CONDITIONS = (Condition.READY, Condition.DELAYED, Condition.LEASED)
_LEASED_PART = 2
_SHOWN = {"p": 1, "v": 1, "o": 1, "n": 1, "b": 1, "h": 1, "d": 1}


class _Cursor(msgspec.Struct, frozen=True, array_like=True):
    """Behind which message to go on. ``began`` (ms) is when the browsing began: it parts what is ready and delayed.

    ``part`` is a position in _CONDITIONS; ``p`` is None at the beginning of the part.
    """

    began: int
    part: int = 0
    p: float | None = None
    v: int = 0
    o: int = 0
    id: str = ""


def depth(client: Client, messages: Messages, queue: str) -> Depth:
    """As ``Transport.depth``: counts the entries of the index."""
    with client.asking():
        now = client.server_time()
        counted: Document = {"q": queue, "s": {"$in": [WAITING, LEASED]}, "p": ALL_PRIORITIES}
        if is_reply_queue(queue):
            counted |= not_vanished(now)
        is_over = {"$lte": ["$v", date(now)]}
        groups = messages.by_index(
            lambda: (
                messages.collection()
                .aggregate(
                    [{"$match": counted}, {"$group": {"_id": {"s": "$s", "over": is_over}, "count": {"$sum": 1}}}],
                    hint=_INDEX,
                )
                .to_list()
            )
        )
    counts = {(group["_id"]["s"], group["_id"]["over"]): int(group["count"]) for group in groups}
    return Depth(
        # A lease that is over makes it ready, whether somebody has noticed it or not.
        ready=counts.get((WAITING, True), 0) + counts.get((LEASED, True), 0),
        delayed=counts.get((WAITING, False), 0),
        leased=counts.get((LEASED, False), 0),
    )


def purge(client: Client, messages: Messages, queue: str) -> int:
    """As ``Transport.purge``: in slices, between which others get their turn."""
    purged = 0
    while True:
        with client.asking():
            ended = {"$lte": date(client.server_time())}
            waiting: Document = {"q": queue, "s": WAITING, "p": ALL_PRIORITIES}
            over: Document = {"q": queue, "s": LEASED, "p": ALL_PRIORITIES, "v": ended}
            found: list[str] = []
            for condition, still in ((waiting, {"s": WAITING}), (over, {"s": LEASED, "v": ended})):
                ids = [document["_id"] for document in _found(messages, condition, {"_id": 1}, AT_ONCE)]
                found += ids
                if ids:
                    purged += messages.collection().delete_many({"_id": {"$in": ids}, **still}).deleted_count
        if not found:
            return purged


def browse(client: Client, messages: Messages, queue: str, *, after: str | None, limit: int) -> list[Seen]:
    """As ``Transport.browse``: what is ready, then what is delayed, then what is leased; each by the index."""
    seen: list[Seen] = []
    with client.asking():
        now = client.server_time()
        cursor = _Cursor(math.floor(now * 1000)) if after is None else msgspec.json.decode(after, type=_Cursor)
        while len(seen) < limit and cursor.part < len(_CONDITIONS):
            wanted = min(limit - len(seen), AT_ONCE)
            page = _page(messages, queue, cursor, now, wanted)
            for document in page:
                v = seconds(document["v"])
                cursor = _Cursor(
                    cursor.began, cursor.part, document["p"], round(v * 1000), int(document["o"]), document["_id"]
                )
                condition = Condition.READY if v <= now else _CONDITIONS[cursor.part]
                text = msgspec.json.encode(cursor).decode()
                seen.append(Seen(_shown(queue, document), condition, attempts_of(document), text))
            if len(page) < wanted:
                cursor = _Cursor(cursor.began, cursor.part + 1)
    return seen


def _page(messages: Messages, queue: str, cursor: _Cursor, now: float, limit: int) -> list[Document]:
    """What is behind ``cursor`` in its part: the rest of its priority, then the less urgent ones."""
    began = DatetimeMS(cursor.began)
    # What becomes due meanwhile stays in the part in which it was at the beginning.
    bounds: Document = [{"$lte": began}, {"$gt": began}, {"$gte": DatetimeMS(0)}][cursor.part]
    # With an order and an id of another type, it is none of ours, and there would be no going on behind it.
    ours: Document = {"o": {"$gte": 0, "$lte": 2**63 - 1}, "_id": {"$gte": ""}}
    part: Document = {"q": queue, "s": LEASED if cursor.part == _LEASED_PART else WAITING, **ours}
    if is_reply_queue(queue):
        part |= not_vanished(now)
    if cursor.p is None:
        conditions = [{**part, "p": ALL_PRIORITIES, "v": bounds}]
    else:
        v = DatetimeMS(cursor.v)
        behind = [
            {"v": {"$gt": v}},
            {"v": v, "o": {"$gt": cursor.o}},
            {"v": v, "o": cursor.o, "_id": {"$gt": cursor.id}},
        ]
        conditions = [
            {**part, "p": cursor.p, "v": {**bounds, "$gte": v}, "$or": behind},
            {**part, "p": {**ALL_PRIORITIES, "$gt": cursor.p}, "v": bounds},
        ]
    page: list[Document] = []
    for condition in conditions:
        left = limit - len(page)
        if left:
            page += _found(messages, condition, _SHOWN, left)
    return page


def _shown(queue: str, document: Document) -> Message:
    """The message that a document is; what cannot be read is shown with what there is for a body."""
    try:
        return message_of(document)
    except Unreadable:
        body = document.get("b")
        return Message(document["_id"], queue, bytes(body) if isinstance(body, bytes) else b"")


def _found(messages: Messages, condition: Document, fields: Document, limit: int) -> list[Document]:
    return messages.by_index(
        lambda: messages.collection().find(condition, fields, sort=_ORDER, limit=limit, hint=CLAIM_INDEX).to_list()
    )
