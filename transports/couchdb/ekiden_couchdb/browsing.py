"""Looking into queues, and emptying them.

The revision of a document that nobody has touched since it was published has the generation 1: of these, which are most
of a long queue, the id says all that is to be known, and their bodies are not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ekiden.errors import BrokerRefused
from ekiden.message import Condition, Depth, Seen

from ekiden_couchdb.client import BulkOutcome, Client
from ekiden_couchdb.documents import (
    MESSAGE_ID,
    Document,
    Rows,
    after,
    attempts_of,
    delayed_rows,
    due_of,
    generation,
    message_in,
    note_of,
    place_in,
    ready_rows,
    token_of,
    until_of,
    why_foreign,
)
from ekiden_couchdb.generations import Generations
from ekiden_couchdb.reading import Row, read_documents, read_rows
from ekiden_couchdb.set_aside import SetAside

_PAGE = 1000
_DOCUMENTS_PAGE = 100


class _Place(NamedTuple):
    """One range of one database."""

    database: str
    rows: Rows


def depth(client: Client, generations: Generations, set_aside: SetAside, queue: str) -> Depth:
    """As ``Transport.depth``: it costs a short answer for each message.

    What cannot be read does not count, once a consumer has found that out: nobody can wait for it.
    """
    counts = dict.fromkeys(Condition, 0)
    now = client.server_time() * 1000
    for place in _places(generations, queue):
        for page in _pages(client, place):
            rows = [row for row in page if not set_aside.has(place.database, row.id, row.rev)]
            for condition in _conditions(client, place.database, rows, now).values():
                counts[condition] += 1
    return Depth(counts[Condition.READY], counts[Condition.DELAYED], counts[Condition.LEASED])


def browse(client: Client, generations: Generations, queue: str, *, after_cursor: str | None, limit: int) -> list[Seen]:
    """As ``Transport.browse``. A cursor is a database and a document's id."""
    seen: list[Seen] = []
    now = client.server_time() * 1000
    database, _, document_id = (after_cursor or "").partition(" ")
    for place in _places(generations, queue):
        rows = place.rows
        if after_cursor:
            if place.database < database or (place.database == database and rows.end <= document_id):
                continue
            if place.database == database and document_id >= rows.start:
                rows = Rows(after(document_id), rows.end)
        while len(seen) < limit:
            page = _read(client, place.database, rows, limit=min(limit - len(seen), _DOCUMENTS_PAGE))
            for row in page:
                # What no version of ours has written, or a later one, is not shown.
                if row.document is not None and why_foreign(row.document) is None:
                    message, _ = message_in(row.document, queue)
                    attempts, condition = attempts_of(row.document), _condition(row.document, now)
                    seen.append(Seen(message, condition, attempts, f"{place.database} {row.id}"))
            if not page:
                break
            rows = Rows(after(page[-1].id), rows.end)
    return seen


def empty(client: Client, generations: Generations, queue: str, *, leased: bool = False) -> int:
    """Delete the ready and delayed messages of ``queue``, and ``leased`` ones if told; returns how many there were."""
    deleted = 0
    for place in _places(generations, queue):
        for page in _pages(client, place):
            now = client.server_time() * 1000
            conditions = _conditions(client, place.database, page, now)
            going = [
                row for row in page if row.id in conditions and (leased or conditions[row.id] is not Condition.LEASED)
            ]
            deleted += _delete(client, generations, place.database, going)
    return deleted


def _delete(client: Client, generations: Generations, database: str, rows: Sequence[Row]) -> int:
    """Delete those that nobody has changed meanwhile, and their notes; returns how many."""
    answers = client.bulk(database, [{"_id": row.id, "_rev": row.rev, "_deleted": True} for row in rows])
    # What too few nodes have deleted may be received all the same, so it does not count.
    gone = [answer for answer in answers if answer.outcome is BulkOutcome.OK]
    if gone:
        notes = read_documents(client, database, [note_of(answer.id) for answer in gone])
        places = {answer.id for answer in gone}
        stale = [note for note in notes.values() if note.document is not None and place_in(note.document) in places]
        client.bulk(database, [{"_id": note.id, "_rev": note.rev, "_deleted": True} for note in stale])
        generations.deleted(database, {answer.id: (answer.rev,) for answer in gone})
    return len(gone)


def _places(generations: Generations, queue: str) -> Iterator[_Place]:
    for database in generations.readable():
        yield _Place(database, delayed_rows(queue))
        yield _Place(database, ready_rows(queue))


def _pages(client: Client, place: _Place) -> Iterator[list[Row]]:
    """The ids of one range, page by page."""
    rows = place.rows
    while page := _read(client, place.database, rows, limit=_PAGE, with_documents=False):
        yield page
        if len(page) < _PAGE:
            return
        rows = Rows(after(page[-1].id), rows.end)


def _read(client: Client, database: str, rows: Rows, *, limit: int, with_documents: bool = True) -> list[Row]:
    try:
        return read_rows(client, database, rows, limit=limit, with_documents=with_documents)
    except BrokerRefused as error:
        if not client.is_missing(error):
            raise
        return []  # it was empty, and has been dropped


def _conditions(client: Client, database: str, rows: Sequence[Row], now: float) -> dict[str, Condition]:
    """How each of ``rows`` is; what is gone by now is left out."""
    conditions: dict[str, Condition] = {}
    touched: list[str] = []
    for row in rows:
        if not MESSAGE_ID.fullmatch(row.id):
            continue
        if generation(row.rev) > 1:
            touched.append(row.id)
        else:
            conditions[row.id] = Condition.READY if due_of(row.id) <= now else Condition.DELAYED
    for start in range(0, len(touched), _DOCUMENTS_PAGE):
        for found in read_documents(client, database, touched[start : start + _DOCUMENTS_PAGE]).values():
            if found.document is not None and why_foreign(found.document) is None:
                conditions[found.id] = _condition(found.document, now)
    return conditions


def _condition(document: Document, now: float) -> Condition:
    if until_of(document) > now:
        return Condition.LEASED if token_of(document) else Condition.DELAYED
    return Condition.READY if due_of(document["_id"]) <= now else Condition.DELAYED
