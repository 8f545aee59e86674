"""Messages as rows of the file, and back."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec

from ekiden.errors import BrokerRefused
from ekiden.loggers import safe_logger
from ekiden.message import REPLY_PREFIX, HeaderValue, Message, unsendable
from ekiden.safe_text import text_of
from ekiden.sqlite import statements

logger = safe_logger(__name__)

Row = tuple[Any, ...]
"""(queue, id, priority, state, until, due, headers, body)"""

MESSAGE_COLUMNS = 5

_NO_HEADERS: dict[str, HeaderValue] = {}


class NotAll(Exception):
    """A batch was not done as a whole and is rolled back; it is done again one by one."""


def row_of(message: Message, now: float, *, max_body_bytes: int) -> Row | BrokerRefused:
    """What is stored of ``message``, or why it cannot be."""
    reason = unsendable(message)
    if reason is None and len(message.body) > max_body_bytes:
        reason = f"its body has {len(message.body)} bytes and max_message_bytes is {max_body_bytes}"
    headers = None
    if reason is None:
        try:
            headers = _encoded(message.headers) if message.headers else None
            message.id.encode()
        except UnicodeEncodeError as error:
            reason = f"its id or a header cannot be written as UTF-8: {error}"
    if reason is not None:
        return BrokerRefused(f"message {message.id!r} for queue {message.queue!r}: {reason}.")
    due = message.due
    delayed = due is not None and due > now
    state, until = (statements.DELAYED, due) if delayed else (statements.READY, None)
    return (message.queue, message.id, message.priority, state, until, due, headers, message.body)


def message_in(queue: str, columns: Row) -> Message:
    """The message in (id, body, headers, priority, due, ...). What cannot be read as one is marked as being none."""
    message_id, body, headers, priority, due = columns[:MESSAGE_COLUMNS]
    if type(message_id) is str and type(body) is bytes and type(priority) is int and (not due or type(due) is float):
        try:
            return Message(message_id, queue, body, _decoded(headers) if headers else _NO_HEADERS, priority, due)
        except (ValueError, TypeError, RecursionError) as error:
            logger.warning("the headers of message %s cannot be read: %s", message_id, error)
    else:
        logger.warning("message %s cannot be read: the file holds something else than what was written", message_id)
    stored = body if isinstance(body, bytes) else text_of(body).encode()
    return Message(text_of(message_id), queue, stored, _UNREADABLE)


_UNREADABLE: dict[str, HeaderValue] = {"content-type": "application/x-ekiden-unreadable"}
"""No worker takes it for a call: it goes to the dead letters."""


def insert(connection: sqlite3.Connection, rows: Sequence[Row]) -> int:
    """Store messages in few statements; returns how many were not held already."""
    stored = start = 0
    for size, statement in statements.INSERT_MESSAGES.items():
        while len(rows) - start >= size:
            values = list(chain.from_iterable(rows[start : start + size]))
            stored += connection.execute(statement, values).rowcount
            start += size
    return stored


def existing_only(connection: sqlite3.Connection, rows: list[Row], now: float) -> list[Row]:
    """``rows`` without those for reply queues that do not exist (any more)."""
    replies = {row[0] for row in rows if row[0].startswith(REPLY_PREFIX)}
    if not replies:
        return rows
    found = connection.execute(statements.REPLY_QUEUES_THAT_EXIST, (json.dumps(list(replies)), now)).fetchall()
    missing = replies - {name for (name,) in found}
    return [row for row in rows if row[0] not in missing]


def _encoded(headers: Any) -> str:
    """As JSON. Infinities, NaN and integers beyond 64 bits come back from it as well, as Python writes them."""
    try:
        encoded = msgspec.json.encode(headers).decode()
    except (msgspec.MsgspecError, OverflowError):
        encoded = ""
    if not encoded or "null" in encoded:  # it writes those as null
        encoded = json.dumps(dict(headers), ensure_ascii=False)
        encoded.encode()
    return encoded


def _decoded(headers: str) -> dict[str, HeaderValue]:
    try:
        decoded: dict[str, HeaderValue] = msgspec.json.decode(headers)
    except msgspec.DecodeError:
        decoded = json.loads(headers)
    if not isinstance(decoded, dict):
        raise ValueError("they are no object")
    return decoded
