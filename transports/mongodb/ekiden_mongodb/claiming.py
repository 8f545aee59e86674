"""Claiming: find what is ready, take it under a fresh token, read what was won. Three round trips for a batch.

Two that want the same documents part them: each document is matched and taken in one step, and who comes second finds
it taken. Who loses many looks at more documents the next time, and picks among them by chance.

A claim that was not answered may have been carried out: what it took is read before the next one. What is found, or
won, and is no message is set aside; it holds nobody up.
"""

from __future__ import annotations

import os
import random
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
from ekiden.message import HIGHEST_PRIORITY, Delivery

from ekiden_mongodb.client import Client
from ekiden_mongodb.documents import (
    ALL_PRIORITIES,
    ATTEMPTS,
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
from ekiden_mongodb.giving_back import GivingBack
from ekiden_mongodb.holding import Holdings
from ekiden_mongodb.publishing import Publisher
from ekiden_mongodb.replies import REPLY_QUEUE_KEPT_SECONDS, is_reply_queue, keep, not_vanished
from ekiden_mongodb.setting_aside import SettingAside

AT_ONCE = 250
"""The most documents that one command names."""

REAP_SECONDS = 3.0
"""How often a busy consumer looks for leases that have ended; an idle one knows when the next one ends."""

_TRIES = 5
"""How often a claim begins anew because others were quicker, before its caller is told that there was nothing."""

_WIDEST = 8
"""At most so many times as many documents are looked at as are wanted."""

_QUEUES_AT_ONCE = 10
"""Of so many queues the server merges the heads of all priorities, waiting and leased (it merges 200 ranges)."""

_FIELDS = {"p": 1, "n": 1, "b": 1, "h": 1, "d": 1}
_ORDER = [("p", 1), ("v", 1), ("o", 1)]


class Change(msgspec.Struct, frozen=True):
    """What comes first in some queues: ``seconds`` from now it is due, or (``leased``) its lease ends."""

    seconds: float
    leased: bool


class Claimer:
    """Claims for one consumer, in the thread that receives; what it claims it enters into ``holdings``."""

    def __init__(
        self,
        client: Client,
        messages: Messages,
        publisher: Publisher,
        holdings: Holdings,
        queues: Sequence[str],
        *,
        lease: float,
        name: str,
        strict: bool,
    ) -> None:
        self._client = client
        self._messages = messages
        self._holdings = holdings
        self._turns = deque(dict.fromkeys(queues))
        self._reply_queues = [queue for queue in self._turns if is_reply_queue(queue)]
        self._lease = lease
        self._owner = name.encode("utf-8", "backslashreplace").decode().replace("\0", "") + "\0"
        self._strict = strict
        self._unanswered: tuple[list[str], str, float] | None = None
        self._width = 1
        self._keep_at = 0.0
        self._reap_at = _soon()
        self._giving_back = GivingBack(client, messages)
        self._setting_aside = SettingAside(messages, publisher)

    def open(self) -> int:
        """Give back what an earlier consumer of this name holds, and return how many that were."""
        owned = {"$gte": self._owner, "$lt": self._owner[:-1] + "\1"}
        held = {"q": {"$in": list(self._turns)}, "s": LEASED, "p": ALL_PRIORITIES, "t": owned}
        given = 0
        with self._client.asking():
            self._keep_reply_queues()
            while ids := self._ids({**held, **self._giving_back.possible()}, AT_ONCE):
                given += self._giving_back.give_back(ids, {"s": LEASED, "t": owned})
        return given

    def claim(self, room: int) -> tuple[list[Delivery], bool]:
        """Up to ``room`` deliveries, of the queues in their turn, and whether there may be more."""
        room = min(room, AT_ONCE)
        with self._client.asking():
            if self._unanswered is not None and (found := self._read(*self._unanswered)):
                return found, True
            if time.monotonic() >= self._keep_at:
                self._keep_reply_queues()
            if time.monotonic() >= self._reap_at:
                self.reap()
            for _ in range(_TRIES):
                now = self._client.server_time()
                ids, more = self._find(room, now)
                if not ids:
                    return [], False
                if found := self._take(ids, now):
                    self._serve(found)
                    return found, more or len(found) < len(ids)
        return [], True

    def unanswered(self) -> dict[str, list[str]]:
        """What may have been taken by a claim that was not answered: the ids by its token."""
        return {} if self._unanswered is None else {self._unanswered[1]: self._unanswered[0]}

    def reap(self) -> int:
        """Make ready again what is leased for longer than its lease; returns how much. Inside ``client.asking()``."""
        self._reap_at = _soon()
        ended = {"$lte": date(self._client.server_time())}
        leased = {"q": {"$in": list(self._turns)}, "s": LEASED, "p": ALL_PRIORITIES, "v": ended}
        ids = self._ids({**leased, **self._giving_back.possible()}, AT_ONCE)
        if not ids:
            return 0
        if len(ids) == AT_ONCE:
            self._reap_at = 0.0  # there may be more
        return self._giving_back.give_back(ids, {"s": LEASED, "v": ended})

    def next_change(self) -> Change | None:
        """What comes first in all of the queues; None where they are empty. Belongs inside ``client.asking()``."""
        now = self._client.server_time()
        plain = [queue for queue in self._turns if queue not in self._reply_queues]
        asked: list[Document] = [
            {"q": {"$in": plain[start : start + _QUEUES_AT_ONCE]}} for start in range(0, len(plain), _QUEUES_AT_ONCE)
        ]
        asked += [{"q": queue, **not_vanished(now)} for queue in self._reply_queues]
        firsts = [first for condition in asked for first in self._first(condition)]
        if not firsts:
            return None
        first = min(firsts, key=lambda document: seconds(document["v"]))
        return Change(seconds(first["v"]) - now, first["s"] == LEASED)

    def _first(self, condition: Document) -> list[Document]:
        ranges: Document = {"s": {"$in": [WAITING, LEASED]}, "p": {"$in": list(range(HIGHEST_PRIORITY + 1))}}
        wanted = {**condition, **ranges, "v": {"$gte": date(0)}, **self._giving_back.possible()}
        return self._messages.by_index(
            lambda: (
                self._messages.collection()
                .find(wanted, {"_id": 0, "s": 1, "v": 1}, sort=[("v", 1)], limit=1, hint=CLAIM_INDEX)
                .to_list()
            )
        )

    def _find(self, room: int, now: float) -> tuple[list[str], bool]:
        """The ids of what is ready, and whether there may be more."""
        ids: list[str] = []
        for queue in self._turns:
            wanted = room - len(ids)
            if not wanted:
                return ids, True
            ready: Document = {"q": queue, "s": WAITING, "p": ALL_PRIORITIES, "v": {"$lte": date(now)}}
            if queue in self._reply_queues:
                ready |= not_vanished(now)
            found = self._messages_among(queue, self._ids(ready, wanted * self._width))
            if len(found) > wanted:
                found = [found[place] for place in sorted(random.sample(range(len(found)), wanted))]
            ids += found
        return ids, len(ids) == room

    def _ids(self, condition: Document, limit: int) -> list[str]:
        found = self._messages.by_index(
            lambda: (
                self._messages.collection()
                .find(condition, {"_id": 1}, sort=_ORDER, limit=limit, batch_size=limit + 1, hint=CLAIM_INDEX)
                .to_list()
            )
        )
        return [document["_id"] for document in found]

    def _messages_among(self, queue: str, ids: list[Any]) -> list[str]:
        """Those of ``ids`` that may be messages' of ``queue``; the other documents are set aside."""
        beginning = f"{queue}\0"
        good = [each for each in ids if isinstance(each, str) and each.startswith(beginning)]
        if len(good) < len(ids):
            odd = [each for each in ids if not (isinstance(each, str) and each.startswith(beginning))]
            self._setting_aside.set_aside(queue, self._messages.collection().find({"_id": {"$in": odd}}).to_list())
        return good

    def _take(self, ids: list[str], now: float) -> list[Delivery]:
        token = self._owner + os.urandom(8).hex()
        self._unanswered = ids, token, time.monotonic() + self._lease
        lease_end = {"$add": ["$$NOW", round(self._lease * 1000)]}
        taking: Document = {"s": LEASED, "v": lease_end, "n": {"$add": [ATTEMPTS, 1]}, "t": {"$literal": token}}
        taken = self._messages.collection().update_many(
            {"_id": {"$in": ids}, "s": WAITING, "v": {"$lte": date(now)}}, [{"$set": taking}]
        )
        won = taken.modified_count
        if won < len(ids) // 2 or not won:
            self._width = min(2 * self._width, _WIDEST)
        elif won == len(ids):
            self._width = max(self._width // 2, 1)
        if not won:
            self._unanswered = None
            return []
        return self._read(*self._unanswered)

    def _read(self, ids: list[str], token: str, until: float) -> list[Delivery]:
        """What was won, in its order."""
        if time.monotonic() >= until:
            self._unanswered = None  # its leases have ended
            return []
        won = {"_id": {"$in": ids}, "t": token}
        found = self._messages.collection().find(won, _FIELDS, batch_size=len(ids) + 1).to_list()
        documents = {document["_id"]: document for document in found}
        deliveries: list[Delivery] = []
        for document_id in ids:
            document = documents.get(document_id)
            if document is not None:
                try:
                    deliveries.append(Delivery(message_of(document), token, attempts_of(document)))
                except Unreadable:
                    del documents[document_id]
                    self._setting_aside.set_aside(document_id.partition("\0")[0], [document])
        self._holdings.add(documents, token, until)
        self._unanswered = None
        return deliveries

    def _serve(self, deliveries: Sequence[Delivery]) -> None:
        """Who was served stands at the back."""
        if self._strict or len(self._turns) == 1:
            return
        for queue in dict.fromkeys(delivery.message.queue for delivery in deliveries):
            self._turns.remove(queue)
            self._turns.append(queue)

    def _keep_reply_queues(self) -> None:
        self._keep_at = time.monotonic() + REPLY_QUEUE_KEPT_SECONDS / 3
        if self._reply_queues:
            queues = self._reply_queues
            self._messages.by_index(lambda: keep(self._client, self._messages, queues))


def _soon() -> float:
    """When to look for ended leases again, on the monotonic clock: not all consumers at once."""
    return time.monotonic() + REAP_SECONDS * random.uniform(0.5, 1.0)
