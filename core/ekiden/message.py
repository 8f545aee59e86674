"""The values that travel between ekiden and a broker: all that a transport ever sees.

    Message   what is published        Delivery  one hand-out of it        Ending   how that hand-out ends
    Published, Settled   the broker's answers      Seen, Depth   what looking at a queue tells

All are immutable; ``headers`` is a mapping that nobody changes after the message was made.
They are msgspec structs rather than dataclasses because making one costs a tenth (0.1 instead of 0.8 microseconds),
and a worker makes several for each task. Those of which there is one a task are out of the garbage collector's sight
(``gc=False``): they are part of no cycle.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from enum import Enum
from typing import Any

import msgspec

from ekiden.digests import blake2b
from ekiden.safe_text import is_storable
from ekiden.times import LATEST_TIME, shown

HeaderValue = str | int | float | bool | None
"""What a header may hold: text, integers of 64 bits at most, finite numbers, truth values, nothing."""

LOWEST_PRIORITY, DEFAULT_PRIORITY, HIGHEST_PRIORITY = 0, 4, 9
MAX_QUEUE_NAME_LENGTH = 200
LONGEST_TASK_ID, LONGEST_TASK_NAME = 200, 500
DEAD_SUFFIX = ".dead"
REPLY_PREFIX = "reply."

RESERVED_HEADER_PREFIX = "ekiden-"
"""Headers that ekiden sets itself begin with this; a user's may not."""

_ID_TIME_DIGITS = 12
_LONGEST_REASON = 1000
_HEADER_TYPES = frozenset({str, int, float, bool, type(None)})
_NUMBER_TYPES = frozenset({int, float})
_SMALLEST_INTEGER, _LARGEST_INTEGER = -(2**63), 2**63 - 1


class Message(msgspec.Struct, frozen=True, gc=False):
    """What is published: opaque bytes for one queue.

    ``id`` is made by the client and unique per queue while the queue holds it. ``priority`` is 0 to 9, 9 most urgent.
    ``due`` is the broker's wall-clock time (seconds since the epoch, before the year 3000) before which it is not
    delivered; None is now.
    """

    id: str
    queue: str
    body: bytes
    headers: Mapping[str, HeaderValue] = {}
    priority: int = DEFAULT_PRIORITY
    due: float | None = None


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """One hand-out of a message to one consumer.

    ``tag`` means something to that consumer only and is new with every hand-out. ``attempt`` counts the hand-outs
    of this message that were not given back by ``release``: 1, 2, ...
    """

    message: Message
    tag: Any
    attempt: int


class Ending(msgspec.Struct, frozen=True, gc=False):
    """How a delivery ends: ``publish`` is stored first (in the same act where the broker can), then it is forgotten."""

    delivery: Delivery
    publish: tuple[Message, ...] = ()


class PublishOutcome(Enum):
    """What became of one published message."""

    STORED = "stored"
    DUPLICATE = "duplicate"
    FAILED = "failed"


class Published(msgspec.Struct, frozen=True):
    """The broker's answer for one published message; ``error`` says why it FAILED, and is None otherwise."""

    outcome: PublishOutcome
    error: Exception | None = None


class SettleOutcome(Enum):
    """What became of one ending (or one extension) of a delivery.

    SETTLED: done. LOST: the delivery is not this consumer's any more. FAILED: its messages could not be stored, or
    the broker could not be asked; the delivery is still held as far as is known.
    """

    SETTLED = "settled"
    LOST = "lost"
    FAILED = "failed"


class Settled(msgspec.Struct, frozen=True):
    """The answer for one ending; ``error`` says why it FAILED, and is None otherwise."""

    outcome: SettleOutcome
    error: Exception | None = None


STORED = Published(PublishOutcome.STORED)
DUPLICATE = Published(PublishOutcome.DUPLICATE)
SETTLED = Settled(SettleOutcome.SETTLED)
LOST = Settled(SettleOutcome.LOST)


class Condition(Enum):
    """Where a message in a queue is: READY to be received, DELAYED until it is due, LEASED to a consumer."""

    READY = "ready"
    DELAYED = "delayed"
    LEASED = "leased"


class Seen(msgspec.Struct, frozen=True):
    """One message as ``browse`` found it. ``cursor`` continues after it; ``attempt`` counts its hand-outs so far."""

    message: Message
    condition: Condition
    attempt: int
    cursor: str


class Depth(msgspec.Struct, frozen=True):
    """How many messages a queue holds; None where the broker cannot count them."""

    ready: int | None
    delayed: int | None
    leased: int | None


def new_id() -> str:
    """A fresh id of 32 hexadecimal digits whose first 12 are the time in milliseconds, so that ids sort by age."""
    return f"{time.time_ns() // 1_000_000:012x}{os.urandom(10).hex()}"


def derived_id(old: str, step: str) -> str:
    """The id of the message that ``step`` makes out of message ``old``: always the same for the same two.

    A step repeated after a crash therefore collides with itself in the broker instead of doubling, while every
    further step (a second redrive, a fourth retry) starts from another id and gets another one.
    """
    digest = blake2b(f"{old}\n{step}".encode(), digest_size=10).hexdigest()
    prefix = old[:_ID_TIME_DIGITS]
    return (prefix if len(prefix) == _ID_TIME_DIGITS and prefix.isalnum() and prefix.isascii() else "0" * 12) + digest


def unreadable(queue: str, message_id: str, stored: bytes, reason: str, *, attempt: int = 0) -> Message | None:
    """The dead letter for what a transport has found among the messages of ``queue`` and cannot read as one.

    Its body is what was ``stored``, as far as that is bytes; the headers say why it is there, as those of every dead
    letter do. The transport publishes it and forgets what it found, in one act where it can. What lay among the dead
    letters stays among them; None for a reply queue, where nobody would look for it.
    """
    if queue.startswith(REPLY_PREFIX):
        return None
    headers: dict[str, HeaderValue] = {
        f"{RESERVED_HEADER_PREFIX}dead-queue": queue.removesuffix(DEAD_SUFFIX),
        f"{RESERVED_HEADER_PREFIX}dead-reason": "MessageError",
        f"{RESERVED_HEADER_PREFIX}dead-error": reason[:_LONGEST_REASON],
        f"{RESERVED_HEADER_PREFIX}dead-attempts": min(attempt, 2**53),
        f"{RESERVED_HEADER_PREFIX}dead-at": time.time(),
    }
    dead = queue if queue.endswith(DEAD_SUFFIX) else queue + DEAD_SUFFIX
    return Message(derived_id(message_id, "unreadable"), dead, stored, headers)


def unsendable(message: Message) -> str | None:
    """Why no broker carries ``message``, in words that follow "message ...: "; None when every one should.

    Transports ask it of each message first, so that all of them refuse the same ones (FAILED with BrokerRefused).
    """
    if type(message.queue) is not str or type(message.id) is not str:
        return f"its queue's name and its id are text, not {shown(message.queue)} and {shown(message.id)}"
    if not 0 < len(message.queue) <= MAX_QUEUE_NAME_LENGTH:
        return f"a queue's name has 1 to {MAX_QUEUE_NAME_LENGTH} characters, this one {len(message.queue)}"
    if not message.queue.isprintable():
        return "a queue's name has printable characters only"
    if not message.id or "\0" in message.id or not (message.id.isascii() or is_storable(message.id)):
        return "its id is empty, or holds a zero byte or a lone surrogate"
    if type(message.body) is not bytes:
        return f"its body is {type(message.body).__name__}, not bytes"
    priority = message.priority
    if not (type(priority) is int and LOWEST_PRIORITY <= priority <= HIGHEST_PRIORITY) and not is_priority(priority):
        return f"priorities are {LOWEST_PRIORITY} to {HIGHEST_PRIORITY}, this one is {shown(message.priority)}"
    if message.due is not None and not (type(message.due) in _NUMBER_TYPES and 0 <= message.due <= LATEST_TIME):
        return f"it cannot be due at {shown(message.due)}; that is seconds since the epoch, before the year 3000"
    return wrong_header(message.headers) if message.headers else None


def is_priority(value: object) -> bool:
    """Whether ``value`` is a whole number from 0 to 9."""
    return isinstance(value, int) and not isinstance(value, bool) and LOWEST_PRIORITY <= value <= HIGHEST_PRIORITY


def wrong_header(headers: Mapping[str, Any]) -> str | None:
    """What is wrong with one of ``headers``, in words that follow "message ...: "; None when nothing is."""
    kinds = set(map(type, headers.values()))
    if not kinds <= _HEADER_TYPES:
        wrong = next(name for name, value in headers.items() if type(value) not in _HEADER_TYPES)
        return f"its header {wrong!r} is {type(headers[wrong]).__name__}, not str, int, float, bool or None"
    for name, value in headers.items():
        if type(name) is not str or not is_storable(name):
            return f"the name of its header {shown(name)} is no text, or holds a lone surrogate"
        if type(value) is str and not is_storable(value):
            return f"its header {name!r} holds a lone surrogate, which cannot be encoded"
        if type(value) is int and not _SMALLEST_INTEGER <= value <= _LARGEST_INTEGER:
            return f"its header {name!r} is an integer of more than 64 bits"
        if type(value) is float and not math.isfinite(value):
            return f"its header {name!r} is {value}; numbers are finite"
    return None
