"""What one result store in memory keeps. Every method expects the store's lock held."""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections.abc import Iterable
from typing import Generic, TypeVar

from ekiden.memory.wakeup import Wakeup
from ekiden.results import BeginOutcome, Begun, Record, Start, StoredResult
from ekiden.states import RETRY, STARTED, is_final, may_follow

Value = TypeVar("Value")


class Wait:
    """Somebody waits for one of ``ids`` to be final."""

    __slots__ = ("called", "ids")

    def __init__(self, ids: set[str]) -> None:
        self.ids = ids
        self.called = Wakeup()

    def end(self) -> None:
        self.called.ring()


class Store:
    """What one ``memory://NAME`` keeps of tasks. ``lock`` guards all of it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.results: Expiring[StoredResult] = Expiring()
        self.starts: Expiring[Start] = Expiring()
        self.joins: Expiring[dict[str, bytes]] = Expiring()
        self.records: Expiring[Record] = Expiring()
        self.waits: set[Wait] = set()

    def put(self, result: StoredResult) -> bool:
        old = self.results.get(result.task_id)
        if old is not None and not may_follow(old.state, old.step, result.state, result.step):
            return False
        self.results.set(result.task_id, result, expires=result.expires)
        return True

    def get(self, task_id: str) -> StoredResult | None:
        stored = self.results.get(task_id)
        if stored is not None:
            return stored
        begun = self.starts.get(task_id)
        return StoredResult(task_id, STARTED, begun.step, b"", begun.expires) if begun is not None else None

    def final(self, ids: Iterable[str]) -> list[StoredResult]:
        found = (self.results.get(task_id) for task_id in ids)
        return [result for result in found if result is not None and is_final(result.state)]

    def call(self, final_ids: set[str]) -> None:
        for wait in list(self.waits):
            if not wait.ids.isdisjoint(final_ids):
                wait.end()

    def begin(self, start: Start) -> Begun:
        stored = self.results.get(start.task_id)
        begun = self.starts.get(start.task_id)
        if (stored is not None and stored.step > start.step) or (begun is not None and begun.step > start.step):
            return Begun(BeginOutcome.SECOND_COPY)
        if stored is not None and (is_final(stored.state) or (stored.state == RETRY and stored.step == start.step)):
            return Begun(BeginOutcome.ENDED, stored)
        if begun is not None and begun.step == start.step and begun.message_id != start.message_id:
            return Begun(BeginOutcome.SECOND_COPY)
        self.starts.set(start.task_id, start, expires=start.expires)
        return Begun(BeginOutcome.GO)


class Expiring(Generic[Value]):
    """A mapping whose entries vanish when their time (on the monotonic clock) has come."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[Value, float]] = {}
        self._ends: list[tuple[float, str]] = []

    def get(self, key: str) -> Value | None:
        entry = self._entries.get(key)
        return entry[0] if entry is not None and entry[1] > time.monotonic() else None

    def set(self, key: str, value: Value, *, expires: float | None) -> None:
        now = time.monotonic()
        while self._ends and self._ends[0][0] <= now:
            _, ended = heapq.heappop(self._ends)
            if ended in self._entries and self._entries[ended][1] <= now:
                del self._entries[ended]
        end = math.inf if expires is None else now + expires
        self._entries[key] = (value, end)
        if expires is not None:
            heapq.heappush(self._ends, (end, key))

    def discard(self, key: str) -> None:
        self._entries.pop(key, None)

    def keys(self) -> Iterable[str]:
        return self._entries.keys()
