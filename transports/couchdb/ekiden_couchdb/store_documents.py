"""What the result store keeps, and under which ids.

    {prefix}-results / t:TASK            what is stored of a task, and which try of it has begun: ``stored_results``
    {prefix}-records / r:KEY             a record: ``records``
    {prefix}-records / j:JOIN            who has arrived: ``joins``
    {prefix}-records / m:JOIN:MEMBER     what he brought

``ends`` is when a document may be deleted, in milliseconds by the server's clock; what never expires has none. Who
reads passes over what has ended, so ``tidying`` has time.

TASK, KEY and the others are written in the characters that ids have everywhere, all others as ``=xx``. So ids that
begin alike stand together, and ``~`` is behind all of them. Bytes are kept in base64, many of them as an attachment,
because the size of a document is limited and that of its attachments is not.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

from ekiden.errors import BackendError

Document = dict[str, Any]

LARGE_BYTES = 3 * 1024 * 1024
"""A body of so many bytes becomes an attachment."""

LAST = "~"

_LATEST = 2.0**53
"""Milliseconds; no server need keep a larger whole number as it is. What ends later is kept for ever."""

_UNSAFE = re.compile(r"[^A-Za-z0-9.-]")
_ATTACHMENT = "body"


def escaped(name: str) -> str:
    """``name`` in the characters of ids."""
    return _UNSAFE.sub(lambda found: "".join(f"={byte:02x}" for byte in found[0].encode()), name)


def task_document(task_id: str) -> str:
    """The document of a task."""
    return f"t:{escaped(task_id)}"


def record_document(key: str) -> str:
    """The document of a record; of a prefix of keys, what the ids of all of them begin with."""
    return f"r:{escaped(key)}"


def join_document(join_id: str) -> str:
    """The document that says who has arrived."""
    return f"j:{escaped(join_id)}"


def members_of(join_document_id: str) -> str:
    """What the ids of all members' documents begin with."""
    return f"m:{join_document_id.removeprefix('j:')}:"


def member_document(join_id: str, member: str) -> str:
    """The document of what a member brought."""
    return f"{members_of(join_document(join_id))}{escaped(member)}"


def packed(body: bytes) -> Document:
    """The fields that hold ``body``."""
    data = base64.b64encode(body).decode()
    if len(body) < LARGE_BYTES:
        return {"body": data}
    return {"_attachments": {_ATTACHMENT: {"content_type": "application/octet-stream", "data": data}}}


def unpacked(document: Mapping[str, Any]) -> bytes:
    """The body out of such fields. Raises BackendError for a document that is none of ours."""
    try:
        data = document["body"] if "body" in document else document["_attachments"][_ATTACHMENT]["data"]
        return base64.b64decode(data, validate=True)
    except (KeyError, TypeError, ValueError) as error:
        raise BackendError(f"The document {document.get('_id')!r} was not stored by ekiden: it has no body.") from error


def end_of(expires: float | None, now: float) -> int | None:
    """When what is stored now, to be kept for ``expires`` seconds, ends, in milliseconds; None is never."""
    if expires is None:
        return None
    end = (now + expires) * 1000
    return int(end) if end < _LATEST else None


def has_ended(end: int | None, now: float) -> bool:
    """Whether the moment ``end`` has come."""
    return end is not None and end <= now * 1000
