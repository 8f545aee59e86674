"""Rows of the file that are no messages: set aside and named in the log, so that nothing is held up by them.

Another program, a script, or a person with ``sqlite3`` may have written them. They stay in the file, with a negative
``seq``, until the queue is purged.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Any

import msgspec

from ekiden.loggers import safe_logger
from ekiden.sqlite import statements
from ekiden.sqlite.database import Database, fetch

logger = safe_logger("ekiden.sqlite")


class Garbage(msgspec.Struct, frozen=True):
    """A row that is no message; ``reason`` says why, in words that follow "message ...: "."""

    seq: int
    queue: str
    id: Any
    reason: str


def set_aside(connection: sqlite3.Connection, garbage: Sequence[Garbage]) -> None:
    """Put each where nobody looks for messages."""
    for each in garbage:
        connection.execute(statements.SET_ASIDE, (each.seq,))


def set_aside_what_has_no_time(queue: str, connection: sqlite3.Connection) -> list[Garbage]:
    """The same for what would never be due, or stay leased for ever, because no number says until when."""
    garbage = [
        Garbage(seq, queue, message_id, "the time until when it is delayed or leased is no number")
        for seq, message_id in fetch(connection, statements.WITHOUT_TIME, (queue,))
    ]
    set_aside(connection, garbage)
    return garbage


def name_in_log(database: Database, garbage: Sequence[Garbage]) -> None:
    """An error for each. Called after the transaction."""
    for each in garbage:
        logger.error(
            "sqlite:///%s: message %r in queue %r cannot be read and is set aside: %s. Somebody else has written it; "
            "purging the queue deletes it",
            database.path,
            each.id,
            each.queue,
            each.reason,
        )
