"""Asks and tells: what an app says to its workers besides sending them tasks.

A revocation is a record in the backend, looked up when a worker claims the task; the broadcast only makes workers look
at once, for tasks that are running. Where no backend stores (``rpc://``) the broadcast is all there is: each worker
process that hears it remembers what is revoked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from ekiden.codec import UNREADABLE
from ekiden.errors import BackendRefused, MisuseError
from ekiden.loggers import safe_logger
from ekiden.results import Backend, each_apart
from ekiden.transport import Transport

logger = safe_logger(__name__)

CONTROL_TOPIC = "ekiden.control"
REVOKED_PREFIX = "revoked/"
ANY_REVOKED = "revoked"
"""The record that is there while any task's revocation may be."""

REVOCATION_KEPT_SECONDS = 7 * 86400.0
MOST_REVOCATIONS_HEARD = 50_000
_AT_ONCE = 500


class Revocation(msgspec.Struct, frozen=True):
    """What is stored of a revoked task: when (seconds since the epoch), and whether it is to end if it runs."""

    at: float
    terminate: bool = False


class NameClaim(msgspec.Struct, frozen=True):
    """A worker process starts under a name that somebody chose.

    ``instance`` tells its supervisor from every other; ``at`` is when it first asked (seconds since the epoch).
    """

    name: str
    instance: str
    at: float

    def precedes(self, other: NameClaim) -> bool:
        """Whether this claim wins where both are new. Every worker decides the same way."""
        return (self.at, self.instance) < (other.at, other.instance)


class ControlMessage(msgspec.Struct, frozen=True):
    """What is broadcast to workers: look up these revocations now; a name is claimed, or taken already.

    With ``heard`` there is no record to look up: that one holds for all of them.
    """

    revoked: tuple[str, ...] = ()
    heard: Revocation | None = None
    claimed: NameClaim | None = None
    taken: NameClaim | None = None


_revocation_decoder = msgspec.json.Decoder(Revocation)
_message_decoder = msgspec.json.Decoder(ControlMessage)


def revoke(
    transport: Transport, backend: Backend, task_ids: str | Iterable[str], *, terminate: bool, now: float
) -> None:
    """Have tasks not run when a worker claims them; with ``terminate``, end those that are running.

    Kept for seven days: in the backend, or, by a backend that stores nothing, in the workers that run now.
    """
    ids: tuple[Any, ...] = (task_ids,) if isinstance(task_ids, str) else tuple(task_ids)
    if not all(isinstance(each, str) and each for each in ids):
        raise MisuseError(f"revoke() takes task ids, not {ids!r}.")
    if not backend.stores:
        heard = Revocation(now, terminate)
        batches = (ids[start : start + _AT_ONCE] for start in range(0, len(ids), _AT_ONCE))
        transport.broadcast(CONTROL_TOPIC, [msgspec.json.encode(ControlMessage(each, heard)) for each in batches])
        return
    record = msgspec.json.encode(Revocation(now, terminate))
    backend.write(ANY_REVOKED, b"", expires=REVOCATION_KEPT_SECONDS)  # first: it makes workers look
    for task_id in ids:
        backend.write(REVOKED_PREFIX + task_id, record, expires=REVOCATION_KEPT_SECONDS)
    if terminate:
        transport.broadcast(CONTROL_TOPIC, [msgspec.json.encode(ControlMessage(revoked=ids))])


def revocations(backend: Backend, task_ids: Sequence[str]) -> dict[str, Revocation]:
    """Which of these tasks are revoked. One look at one record tells that none is, where nothing was revoked lately.

    A record that cannot be read revokes nothing; nor does one under an id that the store could not hold.
    """
    if backend.read([ANY_REVOKED]) == [None]:
        return {}
    records = each_apart(backend.read, [REVOKED_PREFIX + each for each in task_ids])
    found = {}
    for task_id, record in zip(task_ids, records, strict=True):
        if record is None or isinstance(record, BackendRefused):
            continue
        try:
            found[task_id] = _revocation_decoder.decode(record.value)
        except UNREADABLE as error:
            logger.warning("the record %s is no revocation, and is passed over: %s", record.key, error)
    return found


class HeardRevocations:
    """What this worker process heard of, where no record tells. The oldest go first; ``_mutex`` guards ``by_id``."""

    def __init__(self) -> None:
        self.by_id: dict[str, Revocation] = {}
        self._mutex = threading.Lock()

    def add(self, task_ids: Iterable[str], revocation: Revocation) -> None:
        """Remember that these are revoked."""
        with self._mutex:
            for task_id in task_ids:
                self.by_id.pop(task_id, None)
                self.by_id[task_id] = revocation
            while len(self.by_id) > MOST_REVOCATIONS_HEARD:
                del self.by_id[next(iter(self.by_id))]

    def of(self, task_ids: Iterable[str], now: float) -> dict[str, Revocation]:
        """Which of these are revoked; ``now``: seconds since the epoch."""
        with self._mutex:
            found = {each: self.by_id[each] for each in task_ids if each in self.by_id}
        return {each: one for each, one in found.items() if now - one.at < REVOCATION_KEPT_SECONDS}


def read_control_message(payload: bytes) -> ControlMessage | None:
    """What a broadcast tells, or None for one that this version does not understand."""
    try:
        return _message_decoder.decode(payload)
    except UNREADABLE as error:
        logger.info("a broadcast to workers cannot be understood, and is passed over: %s", error)
        return None
