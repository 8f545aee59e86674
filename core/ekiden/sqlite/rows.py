"""Messages as rows of the file, and back."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from itertools import chain
from typing import Any

import msgspec

from ekiden.errors import BrokerRefused
from ekiden.message import (
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    REPLY_PREFIX,
    HeaderValue,
    Message,
    unsendable,
    wrong_header,
)
from ekiden.sqlite import statements
from ekiden.times import LATEST_TIME

Row = tuple[Any, ...]
"""(queue, id, priority, state, until, due, headers, body)"""

MESSAGE_COLUMNS = 5

_NO_HEADERS: dict[str, HeaderValue] = {}


class Unreadable(Exception):
    """A row of the file is no message; the text says why, in words that follow "message ...: "."""


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
    """The message in (id, body, headers, priority, due, ...). Raises Unreadable for what no transport has written."""
    message_id, body, headers, priority, due = columns[:MESSAGE_COLUMNS]
    if type(body) is not bytes:
        raise Unreadable(f"its body is {type(body).__name__}, not bytes")
    if type(message_id) is not str or not message_id:
        raise Unreadable(f"its id is {message_id!r}")
    if type(priority) is not int or not LOWEST_PRIORITY <= priority <= HIGHEST_PRIORITY:
        raise Unreadable(f"its priority is {priority!r}")
    if due is not None and (type(due) is not float or not 0 <= due <= LATEST_TIME):
        raise Unreadable(f"the time at which it is due is {due!r}")
    return Message(message_id, queue, body, _NO_HEADERS if headers is None else _decoded(headers), priority, due)


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


def _decoded(headers: Any) -> dict[str, HeaderValue]:
    if type(headers) is not str:
        raise Unreadable(f"its headers are {type(headers).__name__}, not a text")
    try:
        decoded = msgspec.json.decode(headers)
    except msgspec.DecodeError:
        try:
            decoded = json.loads(headers)
        except ValueError as error:
            raise Unreadable(f"its headers are no JSON: {error}") from error
    if type(decoded) is not dict:
        raise Unreadable("its headers are no JSON object")
    wrong = wrong_header(decoded)
    if wrong is not None:
        raise Unreadable(wrong)
    return decoded
