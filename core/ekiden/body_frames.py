"""What goes through the pipe between a worker and a body process: four known bytes, a four-byte length, and JSON.

A body may write to any descriptor of its process. By the known bytes that is noticed at once, instead of being taken
for a length and waited for.
"""

from __future__ import annotations

import functools
import struct
from typing import Protocol

import msgspec

from ekiden.codec import UNREADABLE
from ekiden.message import Message, PublishOutcome
from ekiden.outcomes import Outcome
from ekiden.results import StoredResult
from ekiden.safe_text import text_of

_HEAD = struct.Struct("!4sI")
_BEGINS_WITH = b"ekdn"
_LONGEST_FRAME_BYTES = 1024 * 1024 * 1024
_SHOWN_BYTES = 40


class Stream(Protocol):
    """What frames are read from and written to."""

    def read(self, size: int, /) -> bytes:
        """So many bytes; fewer at the end."""
        ...

    def write(self, data: bytes, /) -> object:
        """Write all of it."""
        ...

    def flush(self) -> None:
        """Hold nothing back."""
        ...

    def close(self) -> None:
        """Read and write no more."""
        ...


class NoFrame(Exception):
    """What came through the pipe is not what the other end writes, or something cannot be sent through it."""


class UnreadableFrame(NoFrame):
    """A frame came whole and cannot be read; the next one can."""


class Begin(msgspec.Struct, frozen=True, tag=True):
    """The first frame: which app to import, and from where."""

    target: str
    search_path: list[str]
    log_level: int
    log_format: str


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
    """``Backend.expect``; ``seconds`` as above."""

    ids: list[str]
    seconds: float | None = None


class AskWait(msgspec.Struct, frozen=True, tag=True):
    """``Backend.wait``."""

    ids: list[str]
    timeout: float


class AskForget(msgspec.Struct, frozen=True, tag=True):
    """``Backend.forget``; ``seconds`` as above."""

    ids: list[str]
    seconds: float | None = None


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
    """A ``Published`` whose error has become its kind and its text."""

    outcome: PublishOutcome
    error_kind: str | None = None
    error: str = ""


ToBody = Begin | Run | Answer
FromBody = Done | Ready | Unusable | Ask

to_json = msgspec.json.Encoder().encode


# Made when first needed: that takes 2 ms, and most worker processes have no body process.
@functools.cache
def _to_body() -> msgspec.json.Decoder[ToBody]:
    return msgspec.json.Decoder(ToBody)


@functools.cache
def _from_body() -> msgspec.json.Decoder[FromBody]:
    return msgspec.json.Decoder(FromBody)


def write_frame(stream: Stream, frame: ToBody | FromBody) -> None:
    """Write one frame. Raises OSError (BrokenPipeError) when nobody reads any more.

    Raises NoFrame, and writes nothing, for what JSON cannot carry or what is larger than a gigabyte.
    """
    try:
        body = to_json(frame)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise NoFrame(f"it cannot be sent through the pipe of a body process: {text_of(error)}") from error
    if len(body) > _LONGEST_FRAME_BYTES:
        raise NoFrame(f"it is too large for the pipe of a body process: {len(body)} bytes")
    stream.write(_HEAD.pack(_BEGINS_WITH, len(body)) + body)
    stream.flush()


def read_from_body(stream: Stream) -> FromBody | None:
    """The next frame of a body process, or None at the end of the stream. Raises NoFrame."""
    body = _read_body(stream)
    try:
        return None if body is None else _from_body().decode(body)
    except UNREADABLE as error:
        raise UnreadableFrame(f"its body process sent what cannot be read: {error}") from error


def read_to_body(stream: Stream) -> ToBody | None:
    """The next frame of the worker, or None at the end of the stream. Raises NoFrame."""
    body = _read_body(stream)
    try:
        return None if body is None else _to_body().decode(body)
    except UNREADABLE as error:
        raise UnreadableFrame(f"its body process cannot read what the worker sent: {error}") from error


def _read_body(stream: Stream) -> bytes | None:
    head = stream.read(_HEAD.size)
    if not head.startswith(_BEGINS_WITH[: len(head)]):
        raise NoFrame(f"something else wrote to the pipe of its body process: {head[:_SHOWN_BYTES]!r}")
    if len(head) < _HEAD.size:
        return None
    _, length = _HEAD.unpack(head)
    if length > _LONGEST_FRAME_BYTES:
        raise NoFrame(f"something else wrote to the pipe of its body process: a frame of {length} bytes")
    body = stream.read(length)
    return body if len(body) == length else None
