"""A feed: a small collection that is only ever inserted into, so that others may follow it as ``watching`` does.

    {_id: ObjectId, t: date, ...}

``t`` is the server's time at its lower bound when the document was made. A feed is a capped collection where the server
has such, so that its oldest documents make room, and otherwise an ordinary one where they expire.

What of a feed is new is told by ``Position``: it reads a little more than it must, by ``t``, and passes over what it
has seen. So nothing is missed and nothing told twice, however often the way of following changes meanwhile.

A feed that is made is never empty: its first document, which matches nobody's query, is the last step of making it. So
whoever finds a document need make nothing, and a tailable cursor, which would not live on an empty collection, does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from bson import ObjectId
from pymongo import WriteConcern
from pymongo.collection import Collection
from pymongo.errors import OperationFailure

from ekiden_mongodb.client import Client

Document = dict[str, Any]

KEPT_SECONDS = 600
"""So long documents live where there are no capped collections."""

OVERLAP = timedelta(seconds=5)
"""What was made so much earlier than the newest may still arrive after it: clocks are measured, not read."""

_UNACKNOWLEDGED = WriteConcern(w=0)


class Feed:
    """The feed ``<prefix>.<name>``; ``max_bytes`` is about how much of it is kept."""

    def __init__(self, client: Client, name: str, *, max_bytes: int) -> None:
        self.client = client
        self.name = name
        self._max_bytes = max_bytes
        self._making = threading.Lock()
        self._is_made = False

    @property
    def collection(self) -> Collection[Document]:
        """Where it is, for reading."""
        return self.client.collection(self.name)

    def append(self, contents: Sequence[Mapping[str, Any]], *, acknowledged: bool = True) -> list[ObjectId]:
        """Insert a document for each of ``contents``, in their order, and return their ids.

        Not ``acknowledged``: sent without waiting for an answer, so nobody learns if it fails. Raises what the client
        raises.
        """
        with self.client.asking():
            self.make()
            at = datetime.fromtimestamp(self.client.server_time(), UTC)
            documents: list[Document] = [{"_id": ObjectId(), "t": at, **content} for content in contents]
            collection = self.collection
            if not acknowledged:
                collection = collection.with_options(write_concern=_UNACKNOWLEDGED)
            if documents:
                collection.insert_many(documents)
        return [document["_id"] for document in documents]

    def make(self) -> None:
        """Have the collection made, once in this process. To be called inside ``asking``."""
        if self._is_made:
            return
        with self._making:
            if not self._is_made:
                self._make()
                self._is_made = True

    def make_again(self) -> None:
        """Have it looked whether the collection is there, at the next use: it may have been dropped."""
        self._is_made = False

    def abandon(self) -> None:
        """In a forked child: another thread of the parent's may have held the lock."""
        self._making = threading.Lock()

    def _make(self) -> None:
        database, collection = self.client.database, self.collection
        if collection.find_one({}, {"_id": 1}) is not None:
            return
        try:
            found = list(database.list_collections(filter={"name": collection.name}))
            if not found:
                found = [self._created(database, collection.name)]
            if found[0].get("options", {}).get("capped"):
                collection.create_index("t")
            else:
                collection.create_index("t", expireAfterSeconds=KEPT_SECONDS)
            collection.insert_one({"t": datetime.fromtimestamp(self.client.server_time(), UTC)})
        except OperationFailure as error:
            if error.code not in _NOT_FOR_US:
                raise

    def _created(self, database: Any, name: str) -> Document:
        try:
            database.command("create", name, capped=True, size=self._max_bytes)
        except OperationFailure as error:
            if error.code == _EXISTS:
                return next(iter(database.list_collections(filter={"name": name})), {})
            if error.code in _NOT_FOR_US or error.has_error_label("RetryableWriteError"):
                raise
            return {}  # it has no capped collections: the index makes an ordinary one
        return {"options": {"capped": True}}


_EXISTS = 48
_NOT_FOR_US = frozenset({13, 85, 86})
"""Somebody else has to make the collection, or has made the index in another way: it is used as it is."""


class Position:
    """How far one reader has come in a feed, of the documents that match ``matching`` (equality and operators)."""

    def __init__(self, feed: Feed, matching: Mapping[str, Any]) -> None:
        self.feed = feed
        self.matching = dict(matching)
        self._newest = datetime.fromtimestamp(feed.client.server_time(), UTC)
        self._seen: dict[ObjectId, datetime] = {}

    @property
    def query(self) -> Document:
        """What has to be looked at to miss nothing."""
        return {**self.matching, "t": {"$gte": self._newest - OVERLAP}}

    def unseen(self) -> list[Document]:
        """The documents that it has not come to, oldest first. To be called inside ``asking``."""
        found = [each for each in self.feed.collection.find(self.query) if isinstance(each["_id"], ObjectId)]
        return list(self.passed(sorted(found, key=lambda document: document["_id"])))

    def passed(self, documents: Iterable[Document]) -> list[Document]:
        """Come past these; returns those of them that it has not come past before."""
        new = []
        for document in documents:
            made_at = document.get("t")
            if not isinstance(document["_id"], ObjectId) or not isinstance(made_at, datetime):
                continue  # it is somebody else's
            if document["_id"] not in self._seen:
                self._seen[document["_id"]] = made_at
                self._newest = max(self._newest, made_at)
                new.append(document)
        if new and len(self._seen) > _FORGOTTEN_AT:
            oldest = self._newest - OVERLAP
            self._seen = {each: at for each, at in self._seen.items() if at >= oldest}
        return new


_FORGOTTEN_AT = 1000
