"""The result store in memory: the backend's contract, method by method, over a Store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

from ekiden.errors import BackendError, BackendRefused
from ekiden.memory.options import MemoryOptions
from ekiden.memory.shared import in_this_process, name_in
from ekiden.memory.store import Store, Wait
from ekiden.results import Backend, Begun, Joined, Record, Start, StoredResult, refuse_unstorable
from ekiden.states import is_final
from ekiden.urls import BrokerURL


class MemoryBackend(Backend):
    """A result store in this process."""

    def __init__(self, url: BrokerURL) -> None:
        self._largest = url.options_as(MemoryOptions).max_value_bytes
        self._name = name_in(url)
        self._store = in_this_process.named(self._name).store
        self._waits: set[Wait] = set()
        self._closed = False

    def put(self, results: Sequence[StoredResult]) -> list[bool]:
        store = self._opened(result.task_id for result in results)
        for result in results:
            if len(result.body) > self._largest:
                self._refuse(result.body)
        with store.lock:
            answers = [store.put(result) for result in results]
            store.call({result.task_id for result in results if is_final(result.state)})
            return answers

    def get(self, ids: Sequence[str]) -> list[StoredResult | None]:
        store = self._opened(ids)
        with store.lock:
            return [store.get(task_id) for task_id in ids]

    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        store = self._opened(ids)
        wait = Wait(set(ids))
        try:
            with store.lock:
                final = store.final(ids)
                if final or timeout <= 0:
                    return final
                store.waits.add(wait)
                self._waits.add(wait)
            if not self._closed:
                wait.called.wait(timeout)
        finally:
            store.waits.discard(wait)
            self._waits.discard(wait)
        with store.lock:
            return store.final(ids)

    def wake(self) -> None:
        for wait in list(self._waits):
            wait.end()

    def forget(self, ids: Sequence[str], *, deadline: float | None = None) -> None:
        store = self._opened(ids)
        with store.lock:
            for task_id in ids:
                store.results.discard(task_id)
                store.starts.discard(task_id)

    def begin(self, starts: Sequence[Start]) -> list[Begun]:
        store = self._opened(start.task_id for start in starts)
        with store.lock:
            return [store.begin(start) for start in starts]

    def join(self, join_id: str, member: str, outcome: bytes, *, size: int, expires: float | None) -> Joined:
        store = self._opened((join_id, member))
        if len(outcome) > self._largest:
            self._refuse(outcome)
        with store.lock:
            arrived = store.joins.get(join_id) or {}
            arrived.setdefault(member, outcome)
            store.joins.set(join_id, arrived, expires=expires)
            complete = len(arrived) >= size
            return Joined(len(arrived), complete, dict(arrived) if complete else {})

    def read(self, keys: Sequence[str]) -> list[Record | None]:
        store = self._opened(keys)
        with store.lock:
            return [store.records.get(key) for key in keys]

    def write(
        self, key: str, value: bytes | None, *, expected_version: int | None = None, expires: float | None = None
    ) -> int | None:
        store = self._opened((key,))
        if value is not None and len(value) > self._largest:
            self._refuse(value)
        with store.lock:
            record = store.records.get(key)
            version = record.version if record is not None else 0
            if expected_version is not None and expected_version != version:
                return None
            if value is None:
                store.records.discard(key)
                return 0
            store.records.set(key, Record(key, value, version + 1), expires=expires)
            return version + 1

    def scan(self, prefix: str) -> list[Record]:
        store = self._opened((prefix,))
        with store.lock:
            found = (store.records.get(key) for key in sorted(store.records.keys()) if key.startswith(prefix))
            return [record for record in found if record is not None]

    def close(self) -> None:
        self._closed = True
        self.wake()

    def forget_connections(self) -> None:
        self._store = in_this_process.named(self._name).store
        self._waits = set()

    def _opened(self, texts: Iterable[str]) -> Store:
        if self._closed:
            raise BackendError(f"The result backend memory://{self._name} was closed here; open it again.")
        for text in texts:
            if not text.isascii() or "\0" in text:
                refuse_unstorable((text,))
        return self._store

    def _refuse(self, value: bytes) -> NoReturn:
        raise BackendRefused(
            f"memory://{self._name} takes no value of {len(value)} bytes; its option max_value_bytes allows "
            f"{self._largest}."
        )
