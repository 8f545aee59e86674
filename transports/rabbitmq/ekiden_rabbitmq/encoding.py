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

Headers travel in one frame, with all other properties, and the server closes the connection of a client that sends a
larger one. ``too_large`` refuses before that, and leaves room for what ekiden adds when it buries a message.

Pure, and total: ``decode`` takes whatever arrives, and what it returns can be published again, and buried: counts and
times are bounded, headers are of ekiden's types, and take no more than can be sent. By hand, because pika takes twenty
times as long.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from struct import Struct
from typing import Any

import msgspec
from ekiden.errors import BrokerRefused
from ekiden.message import (
    DEFAULT_PRIORITY,
    HIGHEST_PRIORITY,
    RESERVED_HEADER_PREFIX,
    HeaderValue,
    Message,
    derived_id,
    new_id,
)

CARRIED, HAND_OUTS, LAP = "ekiden", "ekiden-handouts", "ekiden-lap"
_OURS = frozenset((CARRIED, HAND_OUTS, LAP))

MOST_HAND_OUTS = 1_000_000_000
LATEST_DUE = 253_402_300_799.0
"""The last second of the year 9999."""

LARGEST_HEADERS_BYTES = 112 * 1024
"""What a message's headers take at most, as JSON, beside those that ekiden sets: these get the rest of the frame."""

LONGEST_ID_TOLD = 100
LARGEST_ID_BYTES = 4096
"""What an id takes at most, as JSON."""

FRAME_BYTES = 128 * 1024
"""The largest frame, as servers and clients agree on it by default."""

OVERHEAD_BYTES = 20
"""Of a frame of properties: its own eight bytes, and what stands before the properties."""

_ROOM_OF_A_COPY_BYTES = 1024
"""What a copy has, beside the headers and the id: its time, its count, its priority."""

_SMALL_BYTES = LARGEST_HEADERS_BYTES // 8
"""What takes no more than this is not too large when it is written anew: a byte becomes six (``\\u0001``) at most."""

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

    headers: Mapping[str, HeaderValue] = {}
    due: float | None = None
    id: str | None = None


class Arrived(msgspec.Struct, frozen=True):
    """A message as it was delivered.

    ``earlier``: how often it was handed out before, as far as the message and the server's counters tell. ``counted``:
    whether the server counts at all. ``lap``: it is to be delayed for the rest of its time. ``nameless``: it came
    without an id, and will have another one when it comes again.
    """

    message: Message
    earlier: int
    counted: bool
    lap: bool
    nameless: bool = False

    def once_more(self) -> Arrived:
        """The same, handed out once more than this says: the server did not count."""
        return msgspec.structs.replace(self, earlier=self.earlier + 1, counted=True)


_NOTHING_CARRIED = Carried()
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Carried)
_any_decoder = msgspec.json.Decoder()


def encode(message: Message, *, hand_outs: int = 0, lap: bool = False) -> bytes:
    """The properties of ``message``. Raises BrokerRefused for what they cannot hold, such as half a surrogate pair."""
    try:
        message_id = message.id.encode()
        fits = len(message_id) <= _LONGEST_SHORT_STRING
        table = b""
        if not fits and len(_encoder.encode(message.id)) > LARGEST_ID_BYTES:
            raise ValueError(f"its id takes {len(message_id)} bytes, and may take {LARGEST_ID_BYTES}")
        if message.headers or message.due is not None or not fits:
            carried = _encoder.encode(Carried(message.headers, message.due, None if fits else message.id))
            table = b"%b%b%b" % (_CARRIED_KEY, _LONG.pack(len(carried)), carried)
        if hand_outs:
            table += _HAND_OUTS_KEY + _LONG_LONG.pack(min(hand_outs, MOST_HAND_OUTS))
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
    except (AttributeError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise BrokerRefused(f"{in_words(message)}: it cannot be encoded: {error}.") from error


def in_words(message: Message) -> str:
    """How sentences about ``message`` begin; its id may be of any length, and hold anything."""
    named = str(message.id)
    if len(named) > LONGEST_ID_TOLD or not named.isprintable():
        named = ascii(named[:LONGEST_ID_TOLD])
    return f"message {named} for queue {message.queue!r}"


def always_carried(frame_max: int) -> int:
    """How many bytes of properties a frame of ``frame_max`` carries whatever they are, and those of a dead letter."""
    return (frame_max - OVERHEAD_BYTES) // 2


def too_large(message: Message, properties: bytes, frame_max: int, *, is_copy: bool = False) -> str | None:
    """Why a frame of ``frame_max`` bytes cannot carry the ``properties`` of ``message``, or those of its dead letter.

    In words that follow "message ...: "; None when they can. ``is_copy``: nothing is added to it any more.
    """
    if len(properties) <= always_carried(frame_max):
        return None
    room = frame_max - OVERHEAD_BYTES
    most = min(LARGEST_HEADERS_BYTES, room - room // 8)
    own = {name: value for name, value in message.headers.items() if not name.startswith(RESERVED_HEADER_PREFIX)}
    size = _size(own)
    if size > most:
        return f"its headers take {size} bytes, and may take {most} together: what is large belongs into the body"
    if len(properties) > room - (0 if is_copy else min(2 * _ROOM_OF_A_COPY_BYTES, room // 16)):
        return f"its headers and its id take {len(properties)} bytes, and a frame has {room} for all of them"
    return None


def decode(properties: bytes, body: bytes, queue: str, *, priority: int, counters: tuple[str, ...]) -> Arrived:
    """The message that was delivered from ``queue``, out of its band ``priority``.

    ``counters``: the names of the headers in which this server counts earlier hand-outs.
    """
    message_id, own_priority, table = _read(properties)
    text = table.get(CARRIED)
    carried = _carried(text)
    headers = carried.headers if text is not None else _foreign(table, counters)
    message_id = carried.id or message_id
    if "\0" in message_id:
        message_id = message_id.replace("\0", "")
    if len(properties) > _SMALL_BYTES:
        message_id, headers = _bounded(message_id, headers)
    if priority == DEFAULT_PRIORITY and own_priority is not None:
        priority = min(own_priority, HIGHEST_PRIORITY)
    due = None if carried.due is None else min(max(carried.due, 0.0), LATEST_DUE)
    counts = [count for counter in counters if type(count := table.get(counter)) is int]
    hand_outs = table.get(HAND_OUTS)
    earlier = max(hand_outs, 0) if type(hand_outs) is int else 0
    earlier = min(earlier + max(0, *counts), MOST_HAND_OUTS) if counts else min(earlier, MOST_HAND_OUTS)
    return Arrived(
        Message(message_id or new_id(), queue, body, headers, priority, due),
        earlier,
        bool(counts),
        LAP in table,
        not message_id,
    )


def _carried(text: object) -> Carried:
    if text is None:
        return _NOTHING_CARRIED
    try:
        return _decoder.decode(text)  # type: ignore[arg-type]
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        return _carried_by_another(text)


def _carried_by_another(text: object) -> Carried:
    """What can be used of another program's header of the same name."""
    try:
        found = _any_decoder.decode(text)  # type: ignore[arg-type]
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError):
        return _NOTHING_CARRIED
    if not isinstance(found, dict):
        return _NOTHING_CARRIED
    headers, due, message_id = found.get("headers"), found.get("due"), found.get("id")
    return Carried(
        {name: value for name, value in headers.items() if _is_header(value)} if isinstance(headers, dict) else {},
        float(due) if isinstance(due, int | float) and abs(due) <= LATEST_DUE else None,
        message_id if isinstance(message_id, str) else None,
    )


def _foreign(table: dict[str, Any], counters: tuple[str, ...]) -> dict[str, HeaderValue]:
    return {
        name: value for name, value in table.items() if name not in _OURS and name not in counters and _is_header(value)
    }


def _is_header(value: object) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    if type(value) is int:
        return -(2**63) <= value < 2**63  # a timestamp of AMQP has no sign
    return value is None or type(value) in {str, bool}


def _bounded(message_id: str, headers: Mapping[str, HeaderValue]) -> tuple[str, Mapping[str, HeaderValue]]:
    """The same where it can be sent again; else a shorter id, and of the headers the small ones, as many as fit."""
    if len(_encoder.encode(message_id)) > LARGEST_ID_BYTES:
        message_id = derived_id(message_id, "shortened")
    own = _fitting(headers, LARGEST_HEADERS_BYTES, reserved=False)
    room = FRAME_BYTES - OVERHEAD_BYTES - _ROOM_OF_A_COPY_BYTES - LARGEST_ID_BYTES - _size(own)
    kept = own | _fitting(headers, room, reserved=True)
    return message_id, {name: value for name, value in headers.items() if name in kept}


def _fitting(headers: Mapping[str, HeaderValue], most: int, *, reserved: bool) -> dict[str, HeaderValue]:
    """Of ekiden's headers, or of the others, those that take ``most`` bytes together: all, or the small ones."""
    found = {name: value for name, value in headers.items() if name.startswith(RESERVED_HEADER_PREFIX) is reserved}
    if _size(found) <= most:
        return found
    kept: dict[str, HeaderValue] = {}
    for name in sorted(found, key=lambda name: _size({name: found[name]})):
        most -= _size({name: found[name]})
        if most < 0:
            break
        kept[name] = found[name]
    return kept


def _size(headers: Mapping[str, HeaderValue]) -> int:
    return len(_encoder.encode(headers))


# AMQP's own encoding. All properties, in their order, each present if its flag is set.


def _read(properties: bytes) -> tuple[str, int | None, dict[str, Any]]:
    """The message id, the priority and the headers; of what cannot be read, what stands before it."""
    message_id, priority = "", None
    table: dict[str, Any] = {}
    try:
        (flags,) = _SHORT.unpack_from(properties)
        position = 2
        for flag in (0x8000, 0x4000):  # content_type, content_encoding
            if flags & flag:
                position += 1 + properties[position]
        if flags & _HEADERS:
            end = position + 4 + _LONG.unpack_from(properties, position)[0]
            _read_table(table, properties, position + 4, end)
            position = end
        if flags & _DELIVERY_MODE:
            position += 1
        if flags & _PRIORITY:
            priority = properties[position]
            position += 1
        for flag in (0x0400, 0x0200, 0x0100):  # correlation_id, reply_to, expiration
            if flags & flag:
                position += 1 + properties[position]
        if flags & _MESSAGE_ID:
            message_id = properties[position + 1 : position + 1 + properties[position]].decode(errors="replace")
    except (struct.error, IndexError):
        pass  # another program's: it is delivered as far as it can be understood
    return message_id, priority, table


def _read_table(table: dict[str, Any], data: bytes, position: int, end: int) -> None:
    """Add the entries of a table to ``table``, up to one of an unknown type: where that ends nobody knows."""
    try:
        while position < end:
            name_end = position + 1 + data[position]
            name = data[position + 1 : name_end].decode(errors="replace")
            value, position = _read_value(data, name_end)
            table[name] = _as_text(value) if type(value) is bytes and name != CARRIED else value
    except (struct.error, IndexError, KeyError):
        return


def _as_text(value: bytes) -> Any:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return _SKIPPED


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
