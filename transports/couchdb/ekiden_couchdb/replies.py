"""Queues named ``reply.*``: there while their consumer is, and some time longer.

    {prefix}-records / reply:QUEUE    {"queue": its name, "until": milliseconds by the server's clock}

A consumer writes the document when it opens and keeps it fresh; who publishes to a reply queue looks whether it is
there. What was left in one that nobody keeps any more is deleted by whoever opens another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from ekiden.message import REPLY_PREFIX

from ekiden_couchdb.client import BulkOutcome, Client
from ekiden_couchdb.documents import Document, Rows, encoded_name
from ekiden_couchdb.reading import read_documents, read_rows

KEPT_SECONDS = 60.0
KEPT_FRESH_EVERY_SECONDS = 15.0
_BELIEVED_SECONDS = 5.0
_ALL = Rows("reply:", "reply;")
_MOST_FORGOTTEN_AT_ONCE = 20


class ReplyQueues:
    """Those of one transport. ``_lock`` guards what is remembered."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._database = client.database("records")
        self.forget()

    def forget(self) -> None:
        """In a forked child: make a new lock."""
        self._lock = threading.Lock()
        self._revisions: dict[str, str] = {}
        self._believed: dict[str, float] = {}

    def keep(self, queues: Iterable[str]) -> None:
        """Make them be, for some time from now."""
        until = int((self._client.latest_server_time() + KEPT_SECONDS) * 1000)
        documents: list[Document] = [
            {"_id": f"reply:{encoded_name(queue)}", "queue": queue, "until": until} for queue in queues
        ]
        self._client.ensure_database(self._database)
        while documents:
            with self._lock:
                for document in documents:
                    if revision := self._revisions.get(document["_id"]):
                        document["_rev"] = revision
            answers = self._client.bulk(self._database, documents)
            again: list[Document] = []
            with self._lock:
                for document, answer in zip(documents, answers, strict=True):
                    if answer.outcome in {BulkOutcome.OK, BulkOutcome.ACCEPTED}:
                        self._revisions[document["_id"]] = answer.rev
                    elif answer.outcome is BulkOutcome.CONFLICT:
                        again.append(document)
            if again:
                found = read_documents(self._client, self._database, [document["_id"] for document in again])
                with self._lock:
                    for document in again:
                        document.pop("_rev", None)
                        each = found[document["_id"]]
                        self._revisions[document["_id"]] = each.rev if each.document is not None else ""
            documents = again

    def open_ones(self, queues: Iterable[str]) -> set[str]:
        """Those of ``queues`` that are there."""
        now = time.monotonic()
        with self._lock:
            self._believed = {queue: until for queue, until in self._believed.items() if until > now}
            known = {queue for queue in queues if queue in self._believed}
        unknown = {f"reply:{encoded_name(queue)}": queue for queue in queues if queue not in known}
        if not unknown:
            return known
        try:
            found = read_documents(self._client, self._database, list(unknown))
        except self._client.errors.refused as error:
            if not self._client.is_missing(error):
                raise
            return known
        server_time = self._client.server_time() * 1000
        open_ones = {
            unknown[id_]
            for id_, each in found.items()
            if each.document is not None and _until(each.document) > server_time
        }
        with self._lock:
            self._believed.update(dict.fromkeys(open_ones, now + _BELIEVED_SECONDS))
        return known | open_ones

    def abandoned(self) -> list[Document]:
        """Some of those that nobody keeps any more; ``remove`` them once they are empty."""
        try:
            rows = read_rows(self._client, self._database, _ALL, limit=_MOST_FORGOTTEN_AT_ONCE * 10)
        except self._client.errors.refused as error:
            if not self._client.is_missing(error):
                raise
            return []
        long_ago = (self._client.server_time() - KEPT_SECONDS) * 1000
        documents = [row.document for row in rows if row.document is not None and _queue(row.document)]
        return [each for each in documents if _until(each) < long_ago][:_MOST_FORGOTTEN_AT_ONCE]

    def remove(self, document: Document) -> None:
        """One of ``abandoned`` is no more."""
        self._client.bulk(self._database, [{"_id": document["_id"], "_rev": document["_rev"], "_deleted": True}])


def _queue(document: Document) -> str:
    """The reply queue that a document is about; "" for what is none of ours: no other queue is emptied for it."""
    queue = document.get("queue")
    is_ours = (
        isinstance(queue, str)
        and queue.startswith(REPLY_PREFIX)
        and document.get("_id") == f"reply:{encoded_name(queue)}"
    )
    return str(queue) if is_ours else ""


def _until(document: Document) -> float:
    """When it ends, in milliseconds; a moment that cannot be read has gone by."""
    until = document.get("until")
    return until if isinstance(until, int | float) else 0
