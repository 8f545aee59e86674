"""A message as one value in Redis, and back: [priority, due, headers, body] in MessagePack.

A later format adds elements at the end. Headers are None where there are none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec
from ekiden.errors import BrokerRefused
from ekiden.message import HIGHEST_PRIORITY, HeaderValue, Message, unsendable

from ekiden_redis.scripts import LATEST_MS

_encode = msgspec.msgpack.Encoder().encode


class _Stored(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What is stored of a message."""

    priority: Annotated[int, msgspec.Meta(ge=0, le=HIGHEST_PRIORITY)]
    due: float | None
    headers: dict[str, HeaderValue] | None
    body: bytes


_decode = msgspec.msgpack.Decoder(_Stored).decode
_RANKS = [str(rank) for rank in range(HIGHEST_PRIORITY + 1)]


class Packed(msgspec.Struct, frozen=True, gc=False):
    """A message as a script takes it: ``rank`` is "0" for the most urgent, ``due`` milliseconds, or empty for now."""

    id: str
    rank: str
    due: str
    value: bytes


class Unreadable(Exception):
    """What is stored is no message; the text says why not."""


def packed(message: Message, *, max_message_bytes: int) -> Packed | BrokerRefused:
    """What is stored of ``message``, or why it cannot be."""
    reason = unsendable(message)
    if reason is None and len(message.body) > max_message_bytes:
        reason = f"its body has {len(message.body)} bytes and max_message_bytes is {max_message_bytes}"
    if reason is None:
        due = message.due
        try:
            message.id.encode()
            return Packed(
                message.id,
                _RANKS[HIGHEST_PRIORITY - message.priority],
                "" if due is None else str(milliseconds(due)),
                value_of(message.priority, due, message.headers, message.body),
            )
        except (msgspec.MsgspecError, OverflowError, UnicodeEncodeError, TypeError, ValueError) as error:
            # A header of more than 64 bits, half a character, a due time that is infinite.
            reason = f"its id, its due time or a header cannot be written: {error}"
    return BrokerRefused(f"message {message.id!r} for queue {message.queue!r}: {reason}.")


def value_of(priority: int, due: float | None, headers: Mapping[str, HeaderValue], body: bytes) -> bytes:
    """What is stored of a message under its id."""
    return _encode((priority, due, headers or None, body))


def milliseconds(seconds: float) -> int:
    """Whole milliseconds, 0 to ``LATEST_MS``. Raises ValueError or OverflowError for what is no time at all."""
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} is no time")
    return max(0, min(LATEST_MS, math.floor(min(seconds, LATEST_MS) * 1000)))


def unpacked(id: bytes, queue: str, value: bytes) -> Message:  # noqa: A002
    """The message that ``value`` was made of. Raises Unreadable."""
    try:
        stored = _decode(value)
        message_id = id.decode()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unreadable(f"what is stored for it is no message: {error}") from error
    due = stored.due
    if due is not None and not math.isfinite(due):
        due = None
    return Message(message_id, queue, stored.body, stored.headers or {}, stored.priority, due)
