"""Reading documents: ranges of ids, documents by their ids, and all that a cluster knows of one.

In a cluster ``_all_docs`` shows what one copy holds, which may be behind. What must be known is asked of a quorum, with
all branches: where two copies differ the third is asked as well. A plain GET would not do: of two copies that agree on
what is visible it tells what the first one knows beside that.
"""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
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
    found = client.rows(client.ask("GET", f"/{database}/_all_docs", query=query))
    return [Row(row["id"], row["value"]["rev"], row.get("doc")) for row in found if "id" in row]


def read_documents(
    client: Client, database: str, ids: Sequence[str], *, with_conflicts: bool = False
) -> dict[str, Found]:
    """What there is under ``ids``."""
    query = {"include_docs": "true"} | ({"conflicts": "true"} if with_conflicts else {})
    found: dict[str, Found] = {}
    for start in range(0, len(ids), KEYS_AT_ONCE):
        some = list(ids[start : start + KEYS_AT_ONCE])
        answer = client.ask("POST", f"/{database}/_all_docs", {"keys": some}, query=query, harmless=True)
        for each in map(_found, client.rows(answer)):
            found[each.id] = each
    return found


def read_leaves(client: Client, database: str, document_id: str) -> list[Document]:
    """The ends of all branches of a document, deleted ones as well, that a quorum of its copies knows."""
    return _read_leaves(client, database, document_id, {"open_revs": "all"})


def read_branches(client: Client, database: str, document_id: str) -> list[Document]:
    """The same, each with its ``_revisions``."""
    return _read_leaves(client, database, document_id, {"open_revs": "all", "revs": "true"})


def _read_leaves(client: Client, database: str, document_id: str, query: dict[str, str]) -> list[Document]:
    answer = client.ask("GET", f"/{database}/{document_id}", query=query, accept={HTTPStatus.NOT_FOUND})
    if answer.status == HTTPStatus.NOT_FOUND:
        return []
    return [each["ok"] for each in answer.body if "ok" in each]


def read_surely(client: Client, database: str, ids: Sequence[str]) -> dict[str, Found]:
    """What there is under ``ids``, by a quorum; a request for each of them."""
    return {id_: visible(id_, read_leaves(client, database, id_)) for id_ in ids}


def visible(document_id: str, leaves: Sequence[Document]) -> Found:
    """The one of ``leaves`` that readers see: living before deleted, then the longest branch, then the digest."""
    if not leaves:
        return Found(document_id)
    ordered = sorted(leaves, key=lambda leaf: (not leaf.get("_deleted"), *_rank(leaf["_rev"])), reverse=True)
    winner, *others = ordered
    living = tuple(str(leaf["_rev"]) for leaf in others if not leaf.get("_deleted"))
    return Found(document_id, winner["_rev"], None if winner.get("_deleted") else winner, living)


def _rank(rev: str) -> tuple[int, str]:
    number, _, digest = rev.partition("-")
    return int(number), digest


def _found(row: dict[str, Any]) -> Found:
    value = row.get("value")
    if not isinstance(value, dict):
        return Found(row["key"])
    document = None if value.get("deleted") else row.get("doc")
    others = () if document is None else tuple(document.pop("_conflicts", ()))
    return Found(row["key"], value["rev"], document, others)
