"""The result store in Redis: results, the fence, joins and records.

``store_keys`` says what is kept, ``backend_scripts`` how it changes; who waits for results does so in ``waits``.
Every method takes one trip to each server that it concerns: one script is about up to 256 tasks, or in a cluster,
where tasks are on different servers, about one, and all of them travel together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from ekiden.errors import BackendError, EkidenError
from ekiden.results import Backend, BeginOutcome, Begun, Joined, Record, Start, StoredResult
from ekiden.states import STARTED
from ekiden.urls import BrokerURL

from ekiden_redis.backend_scripts import BEGIN, JOIN, PUT, TIDY, WRITE
from ekiden_redis.client import Call, Client
from ekiden_redis.connection import Part, Reply
from ekiden_redis.store_keys import StoreKeys
from ekiden_redis.stored_results import decoded, encoded, is_final
from ekiden_redis.waits import Waits
from ekiden_redis.warnings import warnings_about

AT_ONCE = 256
"""So many tasks, or records, are the business of one script or command: it holds up the server for a millisecond."""

BYTES_AT_ONCE = 4 * 1024 * 1024
"""A script takes fewer when they are this large together."""

LONGEST_KEPT_SECONDS = 1e12

_STORED, _ANOTHER_VERSION = ord("1"), -1
_GO, _SECOND_COPY = Begun(BeginOutcome.GO), Begun(BeginOutcome.SECOND_COPY)

_Item = TypeVar("_Item")


class RedisRefused(BackendError):
    """The server will not do it, however often it is asked: a password, a right, a version."""


class RedisBackend(Backend):
    """Results at one Redis server, the master of a Sentinel service, or a cluster."""

    def __init__(self, url: BrokerURL) -> None:
        self._url = str(url)
        self._client = Client(url, unavailable=BackendError, refused=RedisRefused)
        self._keys = StoreKeys(self._client.options.prefix, self._client.place.database)
        self._publish = b"SPUBLISH" if self._client.is_cluster else b"PUBLISH"
        self._at_once = 1 if self._client.is_cluster else AT_ONCE
        self._waits = Waits(self._client, self._keys)
        self._closed = False

    def put(self, results: Sequence[StoredResult]) -> list[bool]:
        calls: list[Call] = []
        keys: list[bytes] = []
        arguments: list[Part] = []
        size = 0
        for result in results:
            stored = encoded(result)
            size += len(stored)
            if not calls or len(keys) == self._at_once or size > BYTES_AT_ONCE:
                keys, size = [], len(stored)
                arguments = [self._publish, self._keys.channel_end]
                calls.append(Call(PUT, keys, arguments))
            keys.append(self._keys.result(result.task_id))
            arguments += (_milliseconds(result.expires), stored)
        return [flag == _STORED for flags in self._run_all(calls) for flag in flags]

    def get(self, ids: Sequence[str]) -> list[StoredResult | None]:
        result, note = self._keys.result, self._keys.note
        slices = self._slices(ids)
        calls = [_command(b"MGET", *map(result, some), *map(note, some)) for some in slices]
        found: list[StoredResult | None] = []
        for some, reply in zip(slices, self._run_all(calls), strict=True):
            found += map(_told, some, reply[: len(some)], reply[len(some) :])
        return found

    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        self._check_open()
        if timeout > 0 and ids:
            return self._waits.wait(ids, timeout)
        slices = self._slices(ids)
        replies = self._run_all([_command(b"MGET", *map(self._keys.result, some)) for some in slices])
        return [
            decoded(task_id, stored)
            for some, reply in zip(slices, replies, strict=True)
            for task_id, stored in zip(some, reply, strict=True)
            if stored is not None and is_final(stored)
        ]

    def wake(self) -> None:
        self._waits.wake()

    def forget(self, ids: Sequence[str], *, deadline: float | None = None) -> None:
        result, note = self._keys.result, self._keys.note
        calls = [_command(b"UNLINK", *map(result, some), *map(note, some)) for some in self._slices(ids)]
        self._run_all(calls, by=deadline)

    def begin(self, starts: Sequence[Start]) -> list[Begun]:
        calls = []
        for some in self._slices(starts):
            keys: list[bytes] = []
            arguments: list[Part] = []
            for start in some:
                keys += (self._keys.result(start.task_id), self._keys.note(start.task_id))
                arguments += (start.step, start.message_id, _milliseconds(start.expires))
            calls.append(Call(BEGIN, keys, arguments))
        answers = [answer for reply in self._run_all(calls) for answer in reply]
        return [_begun(start, answer) for start, answer in zip(starts, answers, strict=True)]

    def join(self, join_id: str, member: str, outcome: bytes, *, size: int, expires: float | None) -> Joined:
        (reply,) = self._run_all(
            [Call(JOIN, [self._keys.join(join_id)], [member, outcome, size, _milliseconds(expires)])]
        )
        arrived, outcomes = reply
        members = map(bytes.decode, outcomes[::2])
        return Joined(arrived, arrived >= size, dict(zip(members, outcomes[1::2], strict=True)))

    def read(self, keys: Sequence[str]) -> list[Record | None]:
        slices = _slices(keys, AT_ONCE)
        replies = self._run_all([_command(b"MGET", *map(self._keys.record, some)) for some in slices])
        return [
            None if stored is None else _record(key, stored)
            for some, reply in zip(slices, replies, strict=True)
            for key, stored in zip(some, reply, strict=True)
        ]

    def write(
        self, key: str, value: bytes | None, *, expected_version: int | None = None, expires: float | None = None
    ) -> int | None:
        call = Call(
            WRITE,
            [self._keys.record(key), self._keys.record_keys, self._keys.record_ends],
            [
                key,
                "" if expected_version is None else expected_version,
                "delete" if value is None else "write",
                _milliseconds(expires),
                value or b"",
            ],
        )
        (version,) = self._run_all([call])
        return None if version == _ANOTHER_VERSION else int(version)

    def scan(self, prefix: str) -> list[Record]:
        first, behind = _range(prefix)
        found: list[Record] = []
        is_untidy = False
        while True:
            command = _command(b"ZRANGEBYLEX", self._keys.record_keys, first, behind, b"LIMIT", 0, AT_ONCE)
            (members,) = self._run_all([command])
            records = self.read([member.decode() for member in members])
            found += [record for record in records if record is not None]
            is_untidy = is_untidy or None in records
            if len(members) < AT_ONCE:
                break
            first = b"(" + members[-1]
        if is_untidy:
            self._run_all([Call(TIDY, (self._keys.record_keys, self._keys.record_ends), ())])
        return found

    def warnings(self) -> list[str]:
        self._check_open()
        return warnings_about(self._client, "results and notes of what has begun")

    def close(self) -> None:
        self._closed = True
        self._waits.close()
        self._client.close()

    def forget_connections(self) -> None:
        self._waits.abandon()
        self._client.forget()
        self._waits = Waits(self._client, self._keys)

    def _slices(self, items: Sequence[_Item]) -> list[Sequence[_Item]]:
        """``items`` in parts that one script or command may be about."""
        return _slices(items, self._at_once)

    def _run_all(self, calls: Sequence[Call], *, by: float | None = None) -> list[Reply]:
        """Every reply, after one trip to each server. Raises the first error, if there was one."""
        self._check_open()
        answers = self._client.run_all(calls, by=by) if calls else []
        for answer in answers:
            if isinstance(answer, EkidenError):
                raise answer
        return answers

    def _check_open(self) -> None:
        if self._closed:
            raise BackendError(f"The result backend {self._url} was closed here; open it again.")


def _command(name: bytes, key: bytes, *rest: Part) -> Call:
    return Call(None, (key,), (name, key, *rest))


def _slices(items: Sequence[_Item], most: int) -> list[Sequence[_Item]]:
    return [items[start : start + most] for start in range(0, len(items), most)]


def _milliseconds(seconds: float | None) -> Part:
    return b"" if seconds is None else max(1, int(min(seconds, LONGEST_KEPT_SECONDS) * 1000))


def _told(task_id: str, stored: bytes | None, note: bytes | None) -> StoredResult | None:
    if stored is not None:
        return decoded(task_id, stored)
    if note is not None:
        return StoredResult(task_id, STARTED, int(note.partition(b" ")[0]), b"")
    return None


def _begun(start: Start, answer: bytes) -> Begun:
    if answer == b"GO":
        return _GO
    if answer == b"SECOND":
        return _SECOND_COPY
    return Begun(BeginOutcome.ENDED, decoded(start.task_id, answer))


def _record(key: str, stored: bytes) -> Record:
    version, _, value = stored.partition(b" ")
    return Record(key, value, int(version))


def _range(prefix: str) -> tuple[bytes, bytes]:
    """Where in a sorted set the members lie that begin with ``prefix``. No byte of a text is 255."""
    first = prefix.encode()
    return (b"[" + first, b"(" + first + b"\xff") if first else (b"-", b"+")
