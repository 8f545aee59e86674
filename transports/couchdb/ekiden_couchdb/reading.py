"""Reading documents: ranges of ids, and documents by their ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ekiden_couchdb.client import Client
from ekiden_couchdb.documents import Document, Rows

KEYS_AT_ONCE = 500

_quoted = msgspec.json.Encoder().encode


class Row(msgspec.Struct, frozen=True, gc=False):
    """One document as a range shows it; ``document`` is None where it was not asked for."""

    id: str
    rev: str
    document: Document | None


class Found(msgspec.Struct, frozen=True, gc=False):
    """What there is under one id. ``rev`` is "" where there never was anything, or it was purged.

    ``document`` is None where it is deleted, or not there. ``others``: the living revisions that are not shown.
    """

    id: str
    rev: str = ""
    document: Document | None = None
    others: tuple[str, ...] = ()


def read_rows(client: Client, database: str, rows: Rows, *, limit: int, with_documents: bool = True) -> list[Row]:
    """The first ``limit`` documents of ``rows``."""
    query = {
        "startkey": _quoted(rows.start).decode(),
        "endkey": _quoted(rows.end).decode(),
        "limit": str(limit),
    }
    if with_documents:
        query["include_docs"] = "true"
    answer = client.ask("GET", f"/{database}/_all_docs", query=query)
    return [Row(row["id"], row["value"]["rev"], row.get("doc")) for row in answer.body["rows"] if "id" in row]


def read_documents(
    client: Client, database: str, ids: Sequence[str], *, with_conflicts: bool = False
) -> dict[str, Found]:
    """What there is under ``ids``."""
    query = {"include_docs": "true"} | ({"conflicts": "true"} if with_conflicts else {})
    found: dict[str, Found] = {}
    for start in range(0, len(ids), KEYS_AT_ONCE):
        some = list(ids[start : start + KEYS_AT_ONCE])
        answer = client.ask("POST", f"/{database}/_all_docs", {"keys": some}, query=query, harmless=True)
        for each in map(_found, answer.body["rows"]):
            found[each.id] = each
    return found


def _found(row: dict[str, Any]) -> Found:
    value = row.get("value")
    if not isinstance(value, dict):
        return Found(row["key"])
    document = None if value.get("deleted") else row.get("doc")
    others = () if document is None else tuple(document.pop("_conflicts", ()))
    return Found(row["key"], value["rev"], document, others)
