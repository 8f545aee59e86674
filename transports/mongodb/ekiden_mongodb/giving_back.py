"""Giving back what others hold: what is leased for too long, and what an earlier consumer of a name held.

A worker that is killed while it settles may leave a transaction open. The servers give it up after a minute, and until
then whoever writes to its documents waits, unless that is in a transaction too: then it is told of the conflict at
once. So messages are given back in transactions, and those that somebody's open transaction has are passed over for
some time; nobody else waits for them. Servers without transactions cannot have that trouble.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from pymongo.errors import OperationFailure

from ekiden_mongodb.client import Client
from ekiden_mongodb.documents import GIVEN_BACK, Document, Messages
from ekiden_mongodb.errors import NO_TRANSACTIONS

PASSED_OVER_SECONDS = 5.0


class GivingBack:
    """Gives back for one consumer, in the thread that receives."""

    def __init__(self, client: Client, messages: Messages) -> None:
        self._client = client
        self._messages = messages
        self._has_transactions = True
        self._passed_over: dict[str, float] = {}

    def possible(self) -> Document:
        """A condition: not those that are passed over now."""
        now = time.monotonic()
        self._passed_over = {found: until for found, until in self._passed_over.items() if now < until}
        return {"_id": {"$nin": list(self._passed_over)}} if self._passed_over else {}

    def give_back(self, ids: Sequence[str], condition: Document) -> int:
        """Give back those that still meet ``condition``; returns how many. Belongs inside ``client.asking()``."""
        if not (self._has_transactions and self._client.features().transactions):
            return self._update(ids, condition)
        given = 0
        pending = [ids]
        while pending:
            some = pending.pop()
            try:
                given += self._update_in_transaction(some, condition)
            except OperationFailure as error:
                if error.code in NO_TRANSACTIONS:
                    self._has_transactions = False
                    given += self._update(some, condition)
                elif not error.has_error_label("TransientTransactionError"):
                    raise
                elif len(some) > 1:
                    middle = len(some) // 2
                    pending += [some[middle:], some[:middle]]
                elif isinstance(some[0], str):  # else it is no message, and what becomes of it is not waited for
                    self._passed_over[some[0]] = time.monotonic() + PASSED_OVER_SECONDS
        return given

    def _update(self, ids: Sequence[str], condition: Document) -> int:
        return self._messages.collection().update_many({"_id": {"$in": ids}, **condition}, GIVEN_BACK).modified_count

    def _update_in_transaction(self, ids: Sequence[str], condition: Document) -> int:
        messages = self._messages.collection(durable=True)
        with self._client.transaction() as session:
            updated = messages.update_many({"_id": {"$in": ids}, **condition}, GIVEN_BACK, session=session)
        return updated.modified_count
