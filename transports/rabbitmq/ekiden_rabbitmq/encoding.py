"""Messages as AMQP carries them: the properties of a content, and back.

    message_id        the message's id, where it fits (255 bytes)
    priority          the message's priority; a band holds one only, an adopted queue may sort by it
    delivery_mode     2: written to disk
    headers
      ekiden          JSON: {"headers": what the message carries, "due": ..., "id": the id that did not fit}; only what
                      there is of it. One header, because JSON carries every value exactly and costs less than a table
      ekiden-handouts how often it had been handed out when it was published: copies of a message count on
      ekiden-lap      present: it has to be delayed for the rest of its time when it arrives

What other programs publish to a queue has none of these: its id is made from ``message_id`` or made up, and its headers
are those of its AMQP headers that are text, numbers, truth values or nothing.

Pure, and total: ``decode`` takes whatever arrives. By hand, because pika takes twenty times as long.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from struct import Struct
from typing import Any

import msgspec
from ekiden.errors import BrokerRefused
from ekiden.message import DEFAULT_PRIORITY, HIGHEST_PRIORITY, HeaderValue, Message, new_id

CARRIED, HAND_OUTS, LAP = "ekiden", "ekiden-handouts", "ekiden-lap"
_OURS = frozenset((CARRIED, HAND_OUTS, LAP))

_LONGEST_SHORT_STRING = 255
_HEADERS, _DELIVERY_MODE, _PRIORITY, _MESSAGE_ID = 0x2000, 0x1000, 0x0800, 0x0080
_AS_WE_WRITE_THEM = _HEADERS | _DELIVERY_MODE | _PRIORITY | _MESSAGE_ID
_PERSISTENT = 2

_SHORT = Struct(">H")
_LONG = Struct(">I")
_LONG_LONG = Struct(">q")
_CARRIED_KEY = b"%c%bS" % (len(CARRIED), CARRIED.encode())
_HAND_OUTS_KEY = b"%c%bl" % (len(HAND_OUTS), HAND_OUTS.encode())
_LAP_ENTRY = b"%c%bt\1" % (len(LAP), LAP.encode())


class Carried(msgspec.Struct, frozen=True, omit_defaults=True):
    """The JSON in the header ``ekiden``."""

    headers: Mapping[str, Any] = {}
    due: float | None = None
    id: str | None = None


class Arrived(msgspec.Struct, frozen=True):
    """A message as it was delivered.

    ``earlier``: how often it was handed out before, as far as the message and the server's counters tell. ``counted``:
    whether the server counts at all. ``lap``: it is to be delayed for the rest of its time.
    """

    message: Message
    earlier: int
    counted: bool
    lap: bool

    def once_more(self) -> Arrived:
        """The same, handed out once more than this says: the server did not count."""
        return msgspec.structs.replace(self, earlier=self.earlier + 1, counted=True)


_NOTHING_CARRIED = Carried()
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Carried)


def encode(message: Message, *, hand_outs: int = 0, lap: bool = False) -> bytes:
    """The properties of ``message``. Raises BrokerRefused for text that is no text (half of a surrogate pair)."""
    try:
        message_id = message.id.encode()
        fits = len(message_id) <= _LONGEST_SHORT_STRING
        table = b""
        if message.headers or message.due is not None or not fits:
            carried = _encoder.encode(Carried(message.headers, message.due, None if fits else message.id))
            table = b"%b%b%b" % (_CARRIED_KEY, _LONG.pack(len(carried)), carried)
    except UnicodeEncodeError as error:
        raise BrokerRefused(
            f"message {message.id!r} for queue {message.queue!r}: it cannot be encoded: {error}."
        ) from error
    if hand_outs:
        table += _HAND_OUTS_KEY + _LONG_LONG.pack(hand_outs)
    if lap:
        table += _LAP_ENTRY
    if not fits:
        message_id = b""
    return b"%b%b%b%c%c%c%b" % (
        _SHORT.pack(_AS_WE_WRITE_THEM),
        _LONG.pack(len(table)),
        table,
        _PERSISTENT,
        message.priority,
        len(message_id),
        message_id,
    )


def decode(properties: bytes, body: bytes, queue: str, *, priority: int, counters: tuple[str, ...]) -> Arrived:
    """The message that was delivered from ``queue``, out of its band ``priority``.

    ``counters``: the names of the headers in which this server counts earlier hand-outs.
    """
    try:
        message_id, own_priority, table = _read(properties)
    except (struct.error, IndexError, UnicodeDecodeError, KeyError):
        message_id, own_priority, table = "", None, {}
    carried = _carried(table.get(CARRIED))
    if priority == DEFAULT_PRIORITY and own_priority is not None:
        priority = min(own_priority, HIGHEST_PRIORITY)
    headers = carried.headers if table.get(CARRIED) is not None else _foreign(table, counters)
    counts = [count for counter in counters if isinstance(count := table.get(counter), int)]
    hand_outs = table.get(HAND_OUTS, 0)
    return Arrived(
        Message(carried.id or message_id or new_id(), queue, body, headers, priority, carried.due),
        (hand_outs if isinstance(hand_outs, int) else 0) + max(counts, default=0),
        bool(counts),
        LAP in table,
    )


def _carried(text: object) -> Carried:
    if text is None:
        return _NOTHING_CARRIED
    try:
        return _decoder.decode(text)  # type: ignore[arg-type]
    except (msgspec.MsgspecError, TypeError):
        return _NOTHING_CARRIED  # another program's header of the same name


def _foreign(table: dict[str, Any], counters: tuple[str, ...]) -> dict[str, HeaderValue]:
    return {
        name: value.decode() if isinstance(value, bytes) else value
        for name, value in table.items()
        if name not in _OURS and name not in counters and _is_header(value)
    }


def _is_header(value: object) -> bool:
    if isinstance(value, bytes):
        try:
            value.decode()
        except UnicodeDecodeError:
            return False
    return value is not _SKIPPED


# AMQP's own encoding. All properties, in their order, each present if its flag is set.


def _read(properties: bytes) -> tuple[str, int | None, dict[str, Any]]:
    """The message id, the priority and the headers."""
    (flags,) = _SHORT.unpack_from(properties)
    position = 2
    for flag in (0x8000, 0x4000):  # content_type, content_encoding
        if flags & flag:
            position += 1 + properties[position]
    table: dict[str, Any] = {}
    if flags & _HEADERS:
        end = position + 4 + _LONG.unpack_from(properties, position)[0]
        if end > position + 4:
            table = _read_table(properties, position + 4, end)
        position = end
    if flags & _DELIVERY_MODE:
        position += 1
    priority = None
    if flags & _PRIORITY:
        priority = properties[position]
        position += 1
    for flag in (0x0400, 0x0200, 0x0100):  # correlation_id, reply_to, expiration
        if flags & flag:
            position += 1 + properties[position]
    if flags & _MESSAGE_ID:
        return properties[position + 1 : position + 1 + properties[position]].decode(), priority, table
    return "", priority, table


def _read_table(data: bytes, position: int, end: int) -> dict[str, Any]:
    table = {}
    while position < end:
        name_end = position + 1 + data[position]
        name = data[position + 1 : name_end].decode()
        table[name], position = _read_value(data, name_end)
    return table


_SKIPPED = object()
"""Stands for a value that no header of ours can hold: a table, an array, a decimal."""

_FIXED = {
    ord("b"): Struct(">b"),
    ord("B"): Struct(">B"),
    ord("s"): Struct(">h"),
    ord("u"): Struct(">H"),
    ord("U"): Struct(">h"),
    ord("I"): Struct(">i"),
    ord("i"): Struct(">I"),
    ord("l"): Struct(">q"),
    ord("L"): Struct(">q"),
    ord("f"): Struct(">f"),
    ord("d"): Struct(">d"),
    ord("T"): Struct(">Q"),
}
_DECIMAL_BYTES = 5


def _read_value(data: bytes, position: int) -> tuple[Any, int]:
    """The value whose type letter stands at ``position``, and where the next entry begins. Text stays bytes."""
    kind = data[position]
    position += 1
    if kind in b"Sx":
        begin = position + 4
        end = begin + _LONG.unpack_from(data, position)[0]
        return data[begin:end], end
    if (fixed := _FIXED.get(kind)) is not None:
        return fixed.unpack_from(data, position)[0], position + fixed.size
    if kind == 0x74:  # t
        return data[position] != 0, position + 1
    if kind == 0x56:  # V
        return None, position
    if kind in b"AF":
        return _SKIPPED, position + 4 + _LONG.unpack_from(data, position)[0]
    if kind == 0x44:  # D
        return _SKIPPED, position + _DECIMAL_BYTES
    raise KeyError(kind)
