"""Records: small values, compared and set.

r:KEY    key, version, body, and when it ends
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from ekiden.errors import BackendError
from ekiden.results import Record

from ekiden_couchdb.store import DELETION, Store
from ekiden_couchdb.store_documents import (
    LAST,
    Document,
    end_of,
    has_ended,
    packed,
    record_document,
    unpacked,
)


def read(store: Store, keys: Sequence[str]) -> list[Record | None]:
    """The record under each key, in their order."""
    if not keys:
        return []
    found = store.read({record_document(key) for key in keys})
    now = store.now()
    return [_record(store, found.get(record_document(key)), now) for key in keys]


def scan(store: Store, prefix: str) -> list[Record]:
    """Every record whose key begins with ``prefix``, sorted by key."""
    first = record_document(prefix)
    now = store.now()
    records = (_record(store, document, now) for document in store.scan(first, first + LAST))
    return sorted((record for record in records if record is not None), key=lambda record: record.key)


def write(
    store: Store, key: str, value: bytes | None, *, expected_version: int | None, expires: float | None
) -> int | None:
    """Write or delete a record; its new version, or None where it has not the expected one."""
    version: int | None = None

    def decide(_id: str, document: Document | None) -> Document | None:
        nonlocal version
        now = store.now()
        record = _record(store, document, now)
        version = 0 if record is None else record.version
        if expected_version not in {None, version}:
            version = None
            return None
        if value is None:
            version = 0
            return None if document is None else DELETION
        version += 1
        return _document(key, value, version, end_of(expires, now))

    store.change([record_document(key)], decide, are_new=not expected_version and value is not None)
    return version


def _document(key: str, value: bytes, version: int, ends: int | None) -> Document:
    document: Document = {"key": key, "version": version, **packed(value)}
    return document if ends is None else {**document, "ends": ends}


def _record(store: Store, document: Document | None, now: float) -> Record | None:
    """What a document says; None where it has ended, or is none of ours: that one is set aside."""
    if document is None:
        return None
    try:
        stored = msgspec.convert(document, _Stored)
        if record_document(stored.key) != document.get("_id"):
            raise BackendError(f"The document {document.get('_id')!r} is not that of the key {stored.key!r}.")
        return None if has_ended(stored.ends, now) else Record(stored.key, unpacked(document), stored.version)
    except (msgspec.ValidationError, BackendError) as error:
        store.set_aside(document, error)
        return None


class _Stored(msgspec.Struct, frozen=True):
    """The fields of a record in its document, but for its body."""

    key: str
    version: int
    ends: int | None = None
