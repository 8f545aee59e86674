"""What can become of a delivery, as plain data, because a body may run in another process."""

from __future__ import annotations

from typing import Any

import msgspec

from ekiden.codec import FailureRecord
from ekiden.message import HeaderValue
from ekiden.times import Moment, Seconds

NULL = msgspec.Raw(b"null")


class Succeeded(msgspec.Struct, frozen=True, tag=True, gc=False):
    """The body returned; ``value`` is what, as JSON."""

    value: msgspec.Raw = NULL
    children: tuple[str, ...] = ()
    runtime: float | None = None


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The body raised, was ended, or its result could not be stored; there is no further try."""

    failure: FailureRecord
    children: tuple[str, ...] = ()
    runtime: float | None = None


class NextTry(msgspec.Struct, frozen=True):
    """What the next try is sent with, where the body says so; None is as this one. ``expires``: since the epoch."""

    queue: str | None = None
    priority: int | None = None
    expires: float | None = None
    headers: dict[str, HeaderValue] | None = None
    ignore_result: bool | None = None
    time_limit: float | None = None
    soft_time_limit: float | None = None


class Retried(msgspec.Struct, frozen=True, tag=True):
    """There is to be one more try at ``due`` (seconds since the epoch), with other arguments if some are given."""

    due: Moment
    failure: FailureRecord | None = None
    args: list[Any] | None = None
    kwargs: dict[str, Any] | None = None
    options: NextTry | None = None
    children: tuple[str, ...] = ()
    runtime: float | None = None


class Ignored(msgspec.Struct, frozen=True, tag=True):
    """The body raised ``Ignore``."""


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The body raised ``Reject``. ``requeue``: to be handed out again; the attempt counts."""

    reason: str
    requeue: bool


class Expired(msgspec.Struct, frozen=True, tag=True):
    """Its ``expires`` passed before it was started."""


class Revoked(msgspec.Struct, frozen=True, tag=True):
    """It was revoked; ``terminated`` while it was running."""

    terminated: bool = False


class Unprocessable(msgspec.Struct, frozen=True, tag=True):
    """No worker of ours can run this message: garbage, an unknown task, wrong arguments, handed out too often."""

    failure: FailureRecord


class Postponed(msgspec.Struct, frozen=True, tag=True):
    """Not now: another worker may know better, or its turn comes later. It counts as no attempt.

    ``keep_attempt``: its body had been given to a process that died, not by our hand. That attempt counts.
    """

    delay: Seconds
    reason: str
    keep_attempt: bool = False


class SecondCopy(msgspec.Struct, frozen=True, tag=True):
    """The fence said that this step has begun out of another message."""


class AlreadyEnded(msgspec.Struct, frozen=True, tag=True):
    """The fence said that this step's outcome is stored: ``state`` and its body."""

    state: str
    body: bytes


Outcome = (
    Succeeded
    | Failed
    | Retried
    | Ignored
    | Rejected
    | Expired
    | Revoked
    | Unprocessable
    | Postponed
    | SecondCopy
    | AlreadyEnded
)
