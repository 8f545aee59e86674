"""Records: small values under keys, compared and set by their version.

    <prefix>.records    {_id: key, v: version, b: value, u: until when it counts in milliseconds, x: the same as a date}

One that counts no more is as good as none, and the next write begins with version 1 again. So does one that somebody
else has written in another form.
"""

from __future__ import annotations

from collections.abc import Sequence

from bson import Binary
from ekiden.loggers import safe_logger
from ekiden.results import Record
from pymongo import ReturnDocument
from pymongo.errors import DuplicateKeyError

from ekiden_mongodb.client import Client
from ekiden_mongodb.expiring import AT_ONCE, WHOLE, Document, ExpiringCollection, is_whole, slices, until

logger = safe_logger("ekiden_mongodb")

_LAST_CHARACTER = "\U0010ffff"
_BEFORE_SURROGATES, _BEHIND_SURROGATES = 0xD7FF, 0xE000


class Records:
    """The records of one backend. Every method raises what the client raises."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._collection = ExpiringCollection(client, "records")
        self._are_mostly_new = False  # what was written last was

    def read(self, keys: Sequence[str]) -> list[Record | None]:
        """The record under each key, in their order."""
        found: dict[str, Record | None] = {}
        with self._client.asking():
            now = self._now()
            for some in slices(keys, AT_ONCE):
                for document in self._collection().find({"_id": {"$in": list(some)}}):
                    found[document["_id"]] = _record(document, now)
        return [found.get(key) for key in keys]

    def write(self, key: str, value: bytes, *, expected_version: int | None, expires: float | None) -> int | None:
        """Write one, and return its new version; None when its version is another than the expected one."""
        ends = until(expires)
        fields = {"b": Binary(value), "u": ends, "x": {"$toDate": ends}}
        with self._client.asking():
            if expected_version == 0:
                return self._create(key, fields)
            if expected_version is not None:
                return self._replace(key, fields, expected_version)
            version = None
            while version is None:  # it may come to be, or end, between the two
                write = self._create if self._are_mostly_new else self._replace_any
                version = write(key, fields)
                if version is None:
                    self._are_mostly_new = not self._are_mostly_new
            return version

    def _create(self, key: str, fields: Document) -> int | None:
        """Write one that is not there, or counts no more."""
        try:
            self._collection().update_one(
                {"_id": key, "$nor": [self._counting()]}, [{"$set": {**fields, "v": 1}}], upsert=True
            )
        except DuplicateKeyError:
            return None
        return 1

    def _replace(self, key: str, fields: Document, version: int) -> int | None:
        done = self._collection().update_one(
            {"_id": key, **self._counting(), "v": version}, [{"$set": {**fields, "v": version + 1}}]
        )
        return version + 1 if done.matched_count else None

    def _replace_any(self, key: str, fields: Document) -> int | None:
        written = self._collection().find_one_and_update(
            {"_id": key, **self._counting()},
            [{"$set": {**fields, "v": {"$add": ["$v", 1]}}}],
            projection={"v": 1},
            return_document=ReturnDocument.AFTER,
        )
        return None if written is None else int(written["v"])

    def delete(self, key: str, *, expected_version: int | None) -> int | None:
        """Delete one, and return 0; None when its version is another than the expected one."""
        with self._client.asking():
            collection = self._collection()
            if expected_version is None:
                collection.delete_one({"_id": key})
                return 0
            counting = {"_id": key, **self._counting()}
            if expected_version == 0:
                return 0 if collection.find_one(counting, {"_id": 1}) is None else None
            return 0 if collection.delete_one({**counting, "v": expected_version}).deleted_count else None

    def scan(self, prefix: str) -> list[Record]:
        """Every record whose key begins with ``prefix``, sorted by key."""
        with self._client.asking():
            keys: Document = {"$gte": prefix}
            behind = _behind(prefix)
            if behind is not None:
                keys["$lt"] = behind
            now = self._now()
            found = [_record(document, now) for document in self._collection().find({"_id": keys})]
        return sorted((record for record in found if record is not None), key=lambda record: record.key)

    def forget(self) -> None:
        """In a forked child: drop what is the parent's."""
        self._collection.forget()

    def _counting(self) -> Document:
        """The condition for a record that counts."""
        return {
            "u": {"$gt": self._now(), "$type": WHOLE},
            "b": {"$type": "binData"},
            "v": {"$type": WHOLE},
        }

    def _now(self) -> int:
        return int(self._client.server_time() * 1000)


def _record(document: Document, now: int) -> Record | None:
    """A record that counts, as ``Records._counting`` has it."""
    ends, value, version = document.get("u"), document.get("b"), document.get("v")
    if not is_whole(ends) or not is_whole(version) or not isinstance(value, bytes):
        logger.error("the record %s cannot be read and counts as none", document["_id"])
        return None
    return Record(document["_id"], bytes(value), int(version)) if ends > now else None


def _behind(prefix: str) -> str | None:
    """The first text behind all that begin with ``prefix``, as a server sorts them; None where there is none."""
    kept = prefix.rstrip(_LAST_CHARACTER)
    if not kept:
        return None
    last = ord(kept[-1])
    return kept[:-1] + chr(_BEHIND_SURROGATES if last == _BEFORE_SURROGATES else last + 1)
