"""Replies: results as messages, to the one who sent the call.

A caller whose backend stores nothing puts the name of its reply queue into the header ``ekiden-reply-to`` of a call's
message. Further tries and what is linked carry it on. Whoever has something to tell of such a task publishes it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from ekiden.codec import UNREADABLE
from ekiden.errors import MessageError, NewerFormat
from ekiden.message import MAX_QUEUE_NAME_LENGTH, REPLY_PREFIX, RESERVED_HEADER_PREFIX, Message
from ekiden.results import StoredResult
from ekiden.signature import FORMAT_VERSION, Step, follow_up_id

REPLY_TO_HEADER = f"{RESERVED_HEADER_PREFIX}reply-to"


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is told of one task: a StoredResult. ``expires``: for how many seconds it is to be kept."""

    id: str
    state: str
    step: int
    outcome: msgspec.Raw
    expires: float | None = None


class Reply(msgspec.Struct, frozen=True, tag_field="v", tag=FORMAT_VERSION):
    """What a reply's body holds. What is known at the same time for one caller comes together."""

    results: list[Told]


class Wanted(msgspec.Struct, frozen=True, tag_field="v", tag=FORMAT_VERSION):
    """What a call's body says of whose results will come: its own, and those of what follows."""

    id: str
    ignore_result: bool | None = None
    on_success: tuple[Step, ...] = ()
    on_error: tuple[Step, ...] = ()


_encode = msgspec.json.Encoder().encode
_reply_decoder = msgspec.json.Decoder(Reply)
_wanted_decoder = msgspec.json.Decoder(Wanted)


class _Version(msgspec.Struct):
    v: int


def reply_queue(headers: Mapping[str, Any]) -> str | None:
    """Where replies are to go, as a message's headers say; None where nobody waits for any.

    Only a ``reply.*`` queue counts: a message must not make a worker publish anywhere else.
    """
    name = headers.get(REPLY_TO_HEADER)
    if not isinstance(name, str) or not name.startswith(REPLY_PREFIX):
        return None
    return name if len(name) <= MAX_QUEUE_NAME_LENGTH and name.isprintable() else None


def reply_message(results: Iterable[StoredResult], queue: str, message_id: str) -> Message:
    """The message that tells ``results`` to whoever waits at ``queue``."""
    told = [Told(each.task_id, each.state, each.step, msgspec.Raw(each.body), each.expires) for each in results]
    return Message(message_id, queue, _encode(Reply(told)))


def read_reply(body: bytes) -> list[StoredResult]:
    """The results that a reply tells. Raises MessageError for what is none, NewerFormat for one of a later version."""
    try:
        reply = _reply_decoder.decode(body)
    except UNREADABLE as error:
        raise _unreadable(body, error) from error
    return [StoredResult(each.id, each.state, each.step, bytes(each.outcome), each.expires) for each in reply.results]


def _unreadable(body: bytes, error: Exception) -> MessageError:
    try:
        version = msgspec.json.decode(body, type=_Version).v
    except UNREADABLE:
        return MessageError(f"it is no reply: {error}")
    if version > FORMAT_VERSION:
        return NewerFormat(f"its format is {version}, and this process understands up to {FORMAT_VERSION}")
    return MessageError(f"it is no reply of format {version}: {error}")


def wanted_results(body: bytes, *, ignored_by_default: bool) -> list[str]:
    """The ids of the tasks whose results a call will bring: its own, and those of all that may follow it."""
    call = _wanted_decoder.decode(body)
    ignored = ignored_by_default if call.ignore_result is None else call.ignore_result
    wanted = [] if ignored else [call.id]
    if call.on_success or call.on_error:
        _collect(call.id, call.on_success, "success", wanted)
        _collect(call.id, call.on_error, "error", wanted)
    return wanted


def _collect(task_id: str, steps: tuple[Step, ...], why: str, wanted: list[str]) -> None:
    for index, step in enumerate(steps):
        following = follow_up_id(step, task_id, f"{why} {index}")
        if not step.ignore_result:
            wanted.append(following)
        _collect(following, step.on_success, "success", wanted)
        _collect(following, step.on_error, "error", wanted)
