"""Where broadcasts are kept: a database for each day, which is dropped as a whole some days later.

    {prefix}-events-YYYYMMDD / MILLISECONDS-RANDOM    {"topic": TOPIC, "payloads": [BASE64, ...]}

The day is the server's, in UTC. One document holds what is broadcast in one call, in its order: a server may carry out
what one request holds in any order. Single events are never deleted, because that would leave a tombstone of each.

Where an administrator has made ``{prefix}-events``, it is used instead, for ever: for users who may not make databases.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from uuid import uuid4

import msgspec

from ekiden_couchdb.client import BulkOutcome, Client

DAYS_KEPT = 2
"""Yesterday's database is kept, too: listeners may still read it."""

BYTES_TOGETHER = 3 * 1024 * 1024
"""Payloads that are larger together are several documents."""

_DAY_FORMAT = "%Y%m%d"


class Event(msgspec.Struct, frozen=True):
    """A document of a broadcast."""

    topic: str
    payloads: list[bytes]  # msgspec reads base64


def broadcast(client: Client, topic: str, payloads: Sequence[bytes]) -> None:
    """Send ``payloads`` to everyone who listens to ``topic`` now. Raises what the client raises."""
    for some in _parts(payloads):
        milliseconds = int(client.server_time() * 1000)
        _store(
            client,
            {
                "_id": f"{milliseconds:013}-{uuid4().hex}",
                "topic": topic,
                "payloads": [base64.b64encode(payload).decode() for payload in some],
            },
        )


def lasting_database(client: Client) -> str:
    """The one for all days, where an administrator has made it."""
    return client.database("events")


def database_of(client: Client, seconds: float) -> str:
    """The database of a day, told by a moment of it (seconds since the epoch, by the server's clock)."""
    return client.database(f"events-{datetime.fromtimestamp(seconds, UTC).strftime(_DAY_FORMAT)}")


def ensure_database(client: Client, database: str) -> None:
    """Make the database of a day where it is missing. Raises what the client raises."""
    try:
        client.ensure_database(database)
    except client.errors.refused as error:
        raise client.errors.refused(
            f"{error} For broadcasts, one that is called {lasting_database(client)!r} will do, for all days."
        ) from error


def drop_old_databases(client: Client) -> None:
    """Delete the databases of days that have gone by; who may not do that leaves it to others.

    Raises what the client raises when the server cannot be reached.
    """
    oldest = datetime.fromtimestamp(client.server_time(), UTC) - timedelta(days=DAYS_KEPT - 1)
    with suppress(client.errors.refused):
        for database in day_databases(client):
            if database < database_of(client, oldest.timestamp()):
                client.ask("DELETE", f"/{database}", accept={HTTPStatus.NOT_FOUND}, harmless=True)
                client.lost(database)


def day_databases(client: Client) -> list[str]:
    """The databases of all days that there are. Raises what the client raises; only administrators may ask."""
    first = client.database("events-")
    query = {"startkey": f'"{first}"', "endkey": f'"{first}~"'}
    found = client.ask("GET", "/_all_dbs", query=query).body
    return [name for name in found if name.startswith(first) and name.removeprefix(first).isdigit()]


def _parts(payloads: Sequence[bytes]) -> Iterator[list[bytes]]:
    part: list[bytes] = []
    size = 0
    for payload in payloads:
        if part and size + len(payload) > BYTES_TOGETHER:
            yield part
            part, size = [], 0
        part.append(payload)
        size += len(payload)
    if part:
        yield part


def is_lasting(client: Client) -> bool:
    """Whether an administrator has made a database for all days."""
    answer = client.ask("GET", f"/{lasting_database(client)}", accept={HTTPStatus.NOT_FOUND})
    return answer.status == HTTPStatus.OK


def _store(client: Client, document: dict[str, object]) -> None:
    """Store a document of a broadcast, wherever it belongs now.

    It is asked which database is there before anything is sent: to a missing one a server would not read it.
    """
    deadline = client.deadline()
    if is_lasting(client):
        _store_in(client, lasting_database(client), document, deadline)
        return
    database = database_of(client, client.server_time())
    is_new = not client.has_ensured(database)
    ensure_database(client, database)
    try:
        _store_in(client, database, document, deadline)
    except client.errors.refused as error:
        if not client.is_missing(error):
            raise
        client.lost(database)
        ensure_database(client, database)
        _store_in(client, database, document, deadline)
    if is_new:
        drop_old_databases(client)


def _store_in(client: Client, database: str, document: dict[str, object], deadline: float) -> None:
    (answer,) = client.bulk(database, [document], deadline=deadline)
    if answer.outcome in {BulkOutcome.FORBIDDEN, BulkOutcome.ERROR}:
        raise client.errors.refused(f"{client.place}: {database} did not take a broadcast ({answer.reason}).")
