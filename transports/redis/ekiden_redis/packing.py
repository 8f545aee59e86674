"""A message as one value in Redis, and back: [priority, due, headers, body] in MessagePack.

A later format adds elements at the end. Headers are None where there are none.
"""

from __future__ import annotations

from typing import Any

import msgspec
from ekiden.errors import BrokerRefused
from ekiden.message import HIGHEST_PRIORITY, Message, unsendable

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[Any]).decode


class Packed(msgspec.Struct, frozen=True, gc=False):
    """A message as a script takes it: ``rank`` is 0 for the most urgent, ``due`` milliseconds or ``""`` for now."""

    id: str
    rank: int
    due: int | str
    value: bytes


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
                HIGHEST_PRIORITY - message.priority,
                "" if due is None else max(0, int(due * 1000)),
                _encode((message.priority, due, message.headers or None, message.body)),
            )
        except (msgspec.MsgspecError, OverflowError, UnicodeEncodeError, ValueError) as error:
            # A header of more than 64 bits, half a character, a due time that is infinite.
            reason = f"its id, its due time or a header cannot be written: {error}"
    return BrokerRefused(f"message {message.id!r} for queue {message.queue!r}: {reason}.")


def unpacked(id: bytes, queue: str, value: bytes) -> Message:  # noqa: A002
    """The message that ``value`` was made of."""
    priority, due, headers, body, *_ = _decode(value)
    return Message(id.decode(), queue, body, headers or {}, priority, due)
