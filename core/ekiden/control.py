"""Asks and tells: what an app says to its workers besides sending them tasks.

A revocation is a record in the backend, looked up when a worker claims the task; the broadcast only makes workers look
at once, for tasks that are running.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from ekiden.errors import ConfigurationError, MisuseError
from ekiden.results import Backend
from ekiden.transport import Transport

CONTROL_TOPIC = "ekiden.control"
REVOKED_PREFIX = "revoked/"
ANY_REVOKED = "revoked"
"""The record that is there while any task's revocation may be."""

REVOCATION_KEPT_SECONDS = 7 * 86400.0


class Revocation(msgspec.Struct, frozen=True):
    """What is stored of a revoked task: when (seconds since the epoch), and whether it is to end if it runs."""

    at: float
    terminate: bool = False


class ControlMessage(msgspec.Struct, frozen=True):
    """What is broadcast to workers: look up these revocations now."""

    revoked: tuple[str, ...] = ()


_revocation_decoder = msgspec.json.Decoder(Revocation)
_message_decoder = msgspec.json.Decoder(ControlMessage)


def revoke(
    transport: Transport, backend: Backend, task_ids: str | Iterable[str], *, terminate: bool, now: float
) -> None:
    """Have tasks not run when a worker claims them; with ``terminate``, end those that are running.

    Kept for seven days. Raises ConfigurationError on a backend that stores nothing.
    """
    if not backend.stores:
        raise ConfigurationError("revoking needs a backend that stores; this one only passes results on.")
    ids: tuple[Any, ...] = (task_ids,) if isinstance(task_ids, str) else tuple(task_ids)
    if not all(isinstance(each, str) and each for each in ids):
        raise MisuseError(f"revoke() takes task ids, not {ids!r}.")
    record = msgspec.json.encode(Revocation(now, terminate))
    backend.write(ANY_REVOKED, b"", expires=REVOCATION_KEPT_SECONDS)  # first: it makes workers look
    for task_id in ids:
        backend.write(REVOKED_PREFIX + task_id, record, expires=REVOCATION_KEPT_SECONDS)
    if terminate:
        transport.broadcast(CONTROL_TOPIC, [msgspec.json.encode(ControlMessage(revoked=ids))])


def revocations(backend: Backend, task_ids: Sequence[str]) -> dict[str, Revocation]:
    """Which of these tasks are revoked. One look at one record tells that none is, where nothing was revoked lately."""
    if backend.read([ANY_REVOKED]) == [None]:
        return {}
    records = backend.read([REVOKED_PREFIX + each for each in task_ids])
    return {
        task_id: _revocation_decoder.decode(record.value)
        for task_id, record in zip(task_ids, records, strict=True)
        if record is not None
    }


def read_control_message(payload: bytes) -> ControlMessage | None:
    """What a broadcast tells, or None for one that this version does not understand."""
    try:
        return _message_decoder.decode(payload)
    except msgspec.DecodeError:
        return None
