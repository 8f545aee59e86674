"""The abstract Backend: where results, and the small records that need storing, are kept.

A backend stores bytes under task ids and keys and knows nothing of tasks. Every method takes a batch and answers
for each. The conformance kit (``ekiden.testing.conformance``) checks what the docstrings promise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

if TYPE_CHECKING:
    from ekiden.urls import BrokerURL


class StoredResult(msgspec.Struct, frozen=True):
    """What a backend keeps of a task: its state, which try (``step``: 0 for the first) it is of, and encoded bytes.

    ``expires`` is how many seconds from the moment of storing it is kept; None is for ever.
    """

    task_id: str
    state: str
    step: int
    body: bytes
    expires: float | None = None


class Start(msgspec.Struct, frozen=True):
    """A worker is about to run try ``step`` of a task, out of the message ``message_id``. ``expires`` as above."""

    task_id: str
    step: int
    message_id: str
    expires: float | None = None


class BeginOutcome(Enum):
    """What a worker that asked to begin is to do.

    GO: run it. SECOND_COPY: another message of this same try, or a later try, has begun: settle and publish nothing.
    ENDED: this try's outcome is stored already: publish what follows from it again, settle, do not run.
    """

    GO = "go"
    SECOND_COPY = "second copy"
    ENDED = "ended"


class Begun(msgspec.Struct, frozen=True):
    """The answer for one start; ``result`` is what is stored when it ENDED, and None otherwise."""

    outcome: BeginOutcome
    result: StoredResult | None = None


class Joined(msgspec.Struct, frozen=True):
    """The answer to a member's arrival. ``complete`` is told to everyone who asks from then on.

    ``outcomes``: what each member brought, by member, once complete; empty before.
    """

    arrived: int
    complete: bool
    outcomes: dict[str, bytes] = {}


class Record(msgspec.Struct, frozen=True):
    """A small stored value. ``version`` is 1 when it was first written and rises with each write."""

    key: str
    value: bytes
    version: int


class Backend(ABC):
    """One result store, opened once per app and process.

    Made with the parsed URL. Every method may be called by any thread. Each raises BackendError when the store
    cannot be reached or is full, within its deadline; then none, some or all of the batch may have been done, and
    every method may safely be called again with the same arguments.
    """

    stores: bool = True
    """False for a backend that only passes results on (``rpc``): then ``begin``, ``join`` and records are refused."""

    @abstractmethod
    def __init__(self, url: BrokerURL) -> None: ...

    @abstractmethod
    def put(self, results: Sequence[StoredResult]) -> list[bool]:
        """Store each, unless its task's stored state may not be followed by it (``states.may_follow``): then False.

        Wakes whoever waits for these tasks. Within one batch they are stored in order.
        """

    @abstractmethod
    def get(self, ids: Sequence[str]) -> list[StoredResult | None]:
        """What is stored for each task id, in their order; None for what is not there or has expired.

        A task that has begun but stored nothing yet is told as STARTED with an empty body.
        """

    @abstractmethod
    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        """Block until at least one of ``ids`` is final, and return every final one; none after ``timeout`` seconds.

        Any number of threads may wait at once. May return early with none (``wake``, ``close``).
        """

    @abstractmethod
    def wake(self) -> None:
        """Make every ``wait`` in progress in this process return now with what is final."""

    @abstractmethod
    def forget(self, ids: Sequence[str]) -> None:
        """Delete what is stored for each; unknown ids are passed over."""

    @abstractmethod
    def begin(self, starts: Sequence[Start]) -> list[Begun]:
        """The fence: say of each whether it may run, and note that it has begun when it may.

        Nothing noted for this task, or an earlier step: noted, GO. A later step noted or stored: SECOND_COPY. This
        step: ENDED when a RETRY or final state is stored for it; else SECOND_COPY when it was begun out of another
        message; else GO (the same message, handed out again). A final state stored at any earlier step is ENDED too.
        """

    @abstractmethod
    def join(self, join_id: str, member: str, outcome: bytes, *, size: int, expires: float | None) -> Joined:
        """Note that ``member`` of the ``size`` members of ``join_id`` arrived, and with what; once, however often called."""

    @abstractmethod
    def read(self, keys: Sequence[str]) -> list[Record | None]:
        """The record under each key, in their order; None for what is not there or has expired."""

    @abstractmethod
    def write(
        self, key: str, value: bytes | None, *, expected_version: int | None = None, expires: float | None = None
    ) -> int | None:
        """Write (or with None delete) a record, and return its new version (0 when deleted).

        With ``expected_version``, only if that is its version now (0: it must not exist); else nothing is changed
        and None is returned. ``expires``: seconds from now until it vanishes; None is never.
        """

    @abstractmethod
    def scan(self, prefix: str) -> list[Record]:
        """Every record whose key begins with ``prefix``, sorted by key."""

    @abstractmethod
    def close(self) -> None:
        """Close every connection and wake whoever waits. May be called again."""

    @abstractmethod
    def forget_connections(self) -> None:
        """In a forked child: drop every connection and lock without touching the parent's sockets or files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
