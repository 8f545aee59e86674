"""Messages as documents: their ids, which say in which order they are delivered, and what is in them.

    QUEUE:r:RANK:AGE:ID        a message that was ready when it was published
    QUEUE:d:DUE:RANK:ID        one that was not due then
    ~QUEUE:ID                  a note where the message of this id is: {"at": its document}
    ~~SLOT                     what the consumer of this name may hold in this database: {"held": [document, ...],
                               "at": when that was written}

QUEUE and ID are written in the characters that ids have, all others as ``=xx``; RANK is 0 for the most urgent; AGE are
microseconds and DUE milliseconds by the server's clock, with leading zeros. ``_all_docs`` compares ids byte by byte, so
each queue is two ranges, in the order of delivery. A message stays in its range until it is settled:

    message     the message itself: ``packed``
    attempts    how often it was handed out, less how often it was given back
    until       milliseconds by the server's clock: not delivered before
    token       fresh with each hand-out; "" when nobody holds it
    owner       which consumer holds it
    given_back  fresh each time it was given back
    note        the revision of its note
"""

from __future__ import annotations

import base64
import math
import re
from hashlib import blake2b
from typing import Any

import msgspec
from ekiden.errors import BrokerRefused
from ekiden.message import HIGHEST_PRIORITY, Message, unsendable

FORMAT = 1

Document = dict[str, Any]

_LONGEST_NAME = 200
_UNSAFE = re.compile(r"[^A-Za-z0-9.-]")
_REVISION = re.compile(r"\d+-[0-9a-f]+")
MESSAGE_ID = re.compile(r"[A-Za-z0-9.=-]+:(?:r:\d:\d{16}|d:\d{15}:\d):[A-Za-z0-9.=-]+")
"""How the documents of messages are called."""
_LATEST_DUE = 10**15 - 1
_MOST_ATTEMPTS = 1_000_000
_ESCAPED = re.compile(r"(?:=[0-9a-f]{2})+")
_UNREADABLE = {"content-type": "application/x-ekiden-unreadable"}
"""No worker takes it for a call: it goes to the dead letters."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[str, str, int, float | None, dict[str, Any] | None, bytes]).decode


class Packed(msgspec.Struct, frozen=True, gc=False):
    """A message as it is stored. ``due`` are milliseconds; None is now."""

    queue: str
    id: str
    rank: int
    due: int | None
    content: str


class Rows(msgspec.Struct, frozen=True):
    """The ids of one kind of documents of one queue: from ``start`` on, all below ``end``."""

    start: str
    end: str


SLOTS = Rows("~~", "~~~")
"""Those of all consumers."""


def encoded_name(name: str) -> str:
    """``name`` in the characters of ids; a long one is cut, and told from others by a hash."""
    encoded = _UNSAFE.sub(lambda found: "".join(f"={byte:02x}" for byte in found[0].encode()), name)
    if len(encoded) <= _LONGEST_NAME:
        return encoded
    digest = blake2b(name.encode(), digest_size=16).hexdigest()
    return f"{encoded[: _LONGEST_NAME - 40]}=={digest}"


def ready_rows(queue: str) -> Rows:
    """Where the messages are that were ready when they were published."""
    encoded = encoded_name(queue)
    return Rows(f"{encoded}:r:", f"{encoded}:r;")


def delayed_rows(queue: str) -> Rows:
    """Where those are that were not due then."""
    encoded = encoded_name(queue)
    return Rows(f"{encoded}:d:", f"{encoded}:d;")


def after(document_id: str) -> str:
    """Where the ids behind ``document_id`` begin."""
    return document_id + " "  # less than every character in an id


def ready_id(message: Packed, age: int) -> str:
    """The document of a message that is ready."""
    return f"{encoded_name(message.queue)}:r:{message.rank}:{age:016d}:{encoded_name(message.id)}"


def delayed_id(message: Packed, due: int) -> str:
    """The document of a message that is not due yet."""
    return f"{encoded_name(message.queue)}:d:{due:015d}:{message.rank}:{encoded_name(message.id)}"


def note_id(message: Packed) -> str:
    """The document that says where the message is."""
    return f"~{encoded_name(message.queue)}:{encoded_name(message.id)}"


def note_of(document_id: str) -> str:
    """The same, by the message's document."""
    queue, *_, message_id = document_id.split(":")
    return f"~{queue}:{message_id}"


def place_in(note: Document) -> str:
    """Where a note says that its message is; "" for what is no note of ours."""
    place = note.get("at")
    return place if isinstance(place, str) and MESSAGE_ID.fullmatch(place) else ""


def slot_id(owner: str) -> str:
    """The document that says what a consumer may hold."""
    return f"~~{owner}"


def owner_in(slot: str) -> str:
    """The owner of a slot, by its id."""
    return slot.removeprefix("~~")


def owner_of(name: str) -> str:
    """What a consumer of this name writes into what it holds."""
    return blake2b(name.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()


def due_of(document_id: str) -> int:
    """Milliseconds by the server's clock before which the message was not to be delivered; 0 for a ready one."""
    _, kind, due, *_ = document_id.split(":")
    return int(due) if kind == "d" else 0


def age_of(document_id: str) -> int:
    """The age of a message that was ready when it was published; 0 for another."""
    _, kind, _, age, _ = document_id.split(":")
    return int(age) if kind == "r" else 0


def order_of(document_id: str) -> tuple[int, int]:
    """What messages of one queue are sorted by: the rank, then since when it is ready."""
    _, kind, first, second, _ = document_id.split(":")
    return (int(second), int(first) * 1000) if kind == "d" else (int(first), int(second))


def packed(message: Message, *, max_message_bytes: int) -> Packed | BrokerRefused:
    """What is stored of ``message``, or why it cannot be."""
    reason = unsendable(message)
    if reason is None and len(message.body) > max_message_bytes:
        reason = f"its body has {len(message.body)} bytes and max_message_bytes is {max_message_bytes}"
    if reason is None:
        due = message.due
        try:
            value = (message.id, message.queue, message.priority, due, message.headers or None, message.body)
            return Packed(
                message.queue,
                message.id,
                HIGHEST_PRIORITY - message.priority,
                None if due is None else min(max(0, int(due * 1000)), _LATEST_DUE),
                base64.b64encode(_encode(value)).decode(),
            )
        except (msgspec.MsgspecError, OverflowError, UnicodeEncodeError, ValueError) as error:
            # A header of more than 64 bits, half a character, a due time that is infinite.
            reason = f"its id, its due time or a header cannot be written: {error}"
    return BrokerRefused(f"message {message.id!r} for queue {message.queue!r}: {reason}.")


def unpacked(content: str) -> Message:
    """The message that ``packed`` made it of. Raises ValueError for anything else."""
    try:
        message_id, queue, priority, due, headers, body = _decode(base64.b64decode(content, validate=True))
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    message = Message(message_id, queue, body, headers or {}, priority, due)
    if (reason := unsendable(message)) is not None:
        raise ValueError(reason)
    return message


def message_in(document: Document, queue: str) -> tuple[Message, str | None]:
    """The message of a document in ``queue``, and why it cannot be read, if so: then it is marked as being none."""
    content = document.get("message")
    why = "it is no text"
    if isinstance(content, str):
        try:
            return unpacked(content), None
        except ValueError as error:
            why = str(error)
    stored = content if isinstance(content, str) else msgspec.json.encode(content).decode()
    message_id = _decoded_name(document["_id"].rpartition(":")[2])
    return Message(message_id, queue, stored.encode(errors="replace"), _UNREADABLE), why


def size_of(document: Document | None) -> int:
    """About how large the document is."""
    content = None if document is None else document.get("message")
    return len(content) if isinstance(content, str) else len(msgspec.json.encode(content))


def queue_in(document_id: str) -> str:
    """The queue of a message by the id of its document: as it was, or, if it was long, what is left of it."""
    return _decoded_name(document_id.partition(":")[0])


def _decoded_name(written: str) -> str:
    """What ``encoded_name`` has written so; of a long name, what it has kept."""
    decoded = _ESCAPED.sub(lambda found: bytes.fromhex(found[0].replace("=", "")).decode(errors="replace"), written)
    return decoded.replace("\0", "") or written


def new_document(document_id: str, message: Packed, note: str) -> Document:
    """The document of a message that nobody has received yet."""
    return {
        "_id": document_id,
        "format": FORMAT,
        "message": message.content,
        "attempts": 0,
        "until": 0,
        "token": "",
        "owner": "",
        "note": note,
    }


def why_foreign(document: Document) -> str | None:
    """Why this is no message of ours, or of a later format; None for one, however damaged it is."""
    if not MESSAGE_ID.fullmatch(str(document.get("_id"))):
        return "its id is none of a message"
    written = document.get("format")
    return None if type(written) is int and written == FORMAT else f"its format is {written!r}, not {FORMAT}"


def note_revision(document: Document) -> str:
    """The revision of the message's note; "" where the document does not say it."""
    rev = document.get("note")
    return rev if isinstance(rev, str) and _REVISION.fullmatch(rev) else ""


def attempts_of(document: Document) -> int:
    """How often the message was handed out; what cannot be is as much as that is nearest to."""
    attempts = document.get("attempts")
    return min(max(0, attempts), _MOST_ATTEMPTS) if type(attempts) is int else 0


def until_of(document: Document) -> int:
    """Milliseconds by the server's clock before which it is not delivered; a moment that we cannot write is none."""
    end = document.get("until")
    return end if type(end) is int and 0 <= end <= _LATEST_DUE else 0


def token_of(document: Document) -> str:
    """The token of who holds it; "" where nobody does."""
    token = document.get("token")
    return token if isinstance(token, str) else ""


def is_ready_at(document: Document) -> int:
    """Milliseconds by the server's clock from which on the message may be delivered."""
    return max(due_of(document["_id"]), until_of(document))


def until(now: float, seconds: float) -> int:
    """The moment so many seconds after ``now`` (seconds as well), in milliseconds; at most the latest one there is."""
    moment = (now + max(0.0, seconds)) * 1000
    return math.ceil(moment) if moment < _LATEST_DUE else _LATEST_DUE  # also where it is no number


def generation(rev: str) -> int:
    """How many revisions there were up to this one."""
    number = rev.partition("-")[0]
    return int(number) if number.isdecimal() else 0
