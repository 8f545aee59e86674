"""What goes through the pipe between a worker and a body process: a four-byte length and JSON."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from ekiden.message import Message, PublishOutcome
from ekiden.outcomes import Outcome
from ekiden.results import StoredResult

if TYPE_CHECKING:
    pass
_LENGTH = struct.Struct("!I")


class Begin(msgspec.Struct, frozen=True, tag=True):
    """The first frame: which app to import, and from where."""

    target: str
    search_path: list[str]
    log_level: int


class Run(msgspec.Struct, frozen=True, tag=True):
    """Execute the call that this message carries; ``soft_time_limit`` in seconds."""

    message: Message
    attempt: int
    hostname: str
    soft_time_limit: float | None


class Done(msgspec.Struct, frozen=True, tag=True):
    """How it ended."""

    outcome: Outcome


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The app is imported: bodies can run."""


class Unusable(msgspec.Struct, frozen=True, tag=True):
    """The app could not be imported there."""

    reason: str


class AskPublish(msgspec.Struct, frozen=True, tag=True):
    """``Transport.publish``; ``seconds`` are left until the deadline, where there is one."""

    messages: list[Message]
    seconds: float | None = None


class AskBroadcast(msgspec.Struct, frozen=True, tag=True):
    """``Transport.broadcast``."""

    topic: str
    payloads: list[bytes]


class AskDepth(msgspec.Struct, frozen=True, tag=True):
    """``Transport.depth``."""

    queue: str


class AskPut(msgspec.Struct, frozen=True, tag=True):
    """``Backend.put``."""

    results: list[StoredResult]


class AskGet(msgspec.Struct, frozen=True, tag=True):
    """``Backend.get``."""

    ids: list[str]


class AskExpect(msgspec.Struct, frozen=True, tag=True):
    """``Backend.expect``."""

    ids: list[str]


class AskWait(msgspec.Struct, frozen=True, tag=True):
    """``Backend.wait``."""

    ids: list[str]
    timeout: float


class AskForget(msgspec.Struct, frozen=True, tag=True):
    """``Backend.forget``."""

    ids: list[str]


class AskRead(msgspec.Struct, frozen=True, tag=True):
    """``Backend.read``."""

    keys: list[str]


class AskWrite(msgspec.Struct, frozen=True, tag=True):
    """``Backend.write``."""

    key: str
    value: bytes | None
    expected_version: int | None
    expires: float | None


class AskScan(msgspec.Struct, frozen=True, tag=True):
    """``Backend.scan``."""

    prefix: str


Ask = (
    AskPublish
    | AskBroadcast
    | AskDepth
    | AskExpect
    | AskPut
    | AskGet
    | AskWait
    | AskForget
    | AskRead
    | AskWrite
    | AskScan
)


class Answer(msgspec.Struct, frozen=True, tag=True):
    """What was asked for, encoded; or the kind and text of the error."""

    value: msgspec.Raw = msgspec.Raw(b"null")
    error_kind: str | None = None
    error: str = ""


class PublishedAnswer(msgspec.Struct, frozen=True):
    """A ``Published`` whose error has become text."""

    outcome: PublishOutcome
    error: str | None = None


ToBody = Begin | Run | Answer
FromBody = Done | Ready | Unusable | Ask

to_json = msgspec.json.Encoder().encode
TO_BODY = msgspec.json.Decoder(ToBody)
FROM_BODY = msgspec.json.Decoder(FromBody)


def write_frame(stream: BinaryIO, frame: ToBody | FromBody) -> None:
    """Write one frame. Raises OSError (BrokenPipeError) when nobody reads any more."""
    body = to_json(frame)
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame's body, or None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length)
    return body if len(body) == length else None
