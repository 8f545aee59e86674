"""The result store in Redis: results, the fence, joins and records.

``store_keys`` says what is kept, ``backend_scripts`` how it changes; who waits for results does so in ``waits``.
Every method takes one trip to each server that it concerns: one script is about up to 256 tasks, or in a cluster,
where tasks are on different servers, about one, and all of them travel together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import msgspec
from ekiden.errors import BackendError, BackendRefused, EkidenError
from ekiden.loggers import safe_logger
from ekiden.results import Backend, BeginOutcome, Begun, Joined, Record, Start, StoredResult, refuse_unstorable
from ekiden.states import STARTED
from ekiden.urls import BrokerURL

from ekiden_redis.backend_scripts import BEGIN, FORGET, JOIN, PUT, TIDY, WRITE
from ekiden_redis.client import Call, Client
from ekiden_redis.connection import Part, Reply
from ekiden_redis.full import does_not_hold, may_go_beyond, memory_of, never_fits
from ekiden_redis.store_keys import StoreKeys
from ekiden_redis.stored_results import VERSION_DIGITS, check_step, decoded, encoded, is_final
from ekiden_redis.waits import Waits
from ekiden_redis.warnings import warnings_about

AT_ONCE = 256
"""So many tasks, or records, are the business of one script or command: it holds up the server for a millisecond."""

BYTES_AT_ONCE = 4 * 1024 * 1024
"""A script takes fewer when they are this large together."""

LONGEST_KEPT_SECONDS = 1e12

logger = safe_logger("ekiden_redis")

_RECORD = re.compile(rb"(\d{1,%d}) " % VERSION_DIGITS)
_STORED, _ANOTHER_VERSION = ord("1"), -1
_GO, _SECOND_COPY = Begun(BeginOutcome.GO), Begun(BeginOutcome.SECOND_COPY)

_Item = TypeVar("_Item")


class RedisRefused(BackendError):
    """The server will not do it before an operator has changed something: a password, a right, a version."""


class _Put(msgspec.Struct, frozen=True):
    """A result on its way: its key, for how long it is kept (ms), and what is stored."""

    key: bytes
    kept: Part
    stored: bytes


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
        self._check_open(result.task_id for result in results)
        parts: list[list[_Put]] = []
        size = 0
        for result in results:
            each = _Put(self._keys.result(result.task_id), _milliseconds(result.expires), encoded(result))
            size += len(each.stored)
            if not parts or len(parts[-1]) == self._at_once or size > BYTES_AT_ONCE:
                parts.append([])
                size = len(each.stored)
            parts[-1].append(each)
        replies = self._client.run_all([self._put_call(part) for part in parts]) if parts else []
        flags = [self._flags(part, reply) for part, reply in zip(parts, replies, strict=True)]
        return [flag == _STORED for some in flags for flag in some]

    def _put_call(self, part: Sequence[_Put], *, beyond: bool = False) -> Call:
        arguments: list[Part] = [self._publish, self._keys.channel_end, _flag(beyond)]
        for each in part:
            arguments += (each.kept, each.stored)
        return Call(PUT, [each.key for each in part], arguments)

    def _flags(self, part: Sequence[_Put], reply: Reply | EkidenError) -> bytes:
        """What PUT answered for each of ``part``; from a full server, after what may go in has gone in."""
        flags: bytes
        if not isinstance(reply, EkidenError):
            flags = reply
            return flags
        if not self._client.errors.is_full(reply):
            raise self._refused(reply)
        memory = memory_of(self._client, part[0].key)
        for each in part:
            if never_fits(len(each.stored), memory):
                raise BackendRefused(does_not_hold(self._client.place, len(each.stored), memory)) from reply
        going: list[_Put] = []
        beyond = 0
        for each in part:
            size = len(each.stored)
            if may_go_beyond(size, memory, beside=beyond):
                going.append(each)
                beyond += size
        flags = self._run(self._put_call(going, beyond=True)) if going else b""
        if len(going) < len(part):
            raise reply
        return flags

    def get(self, ids: Sequence[str]) -> list[StoredResult | None]:
        self._check_open(ids)
        result, note = self._keys.result, self._keys.note
        slices = self._slices(ids)
        calls = [_command(b"MGET", *map(result, some), *map(note, some)) for some in slices]
        found: list[StoredResult | None] = []
        for some, reply in zip(slices, self._run_all(calls), strict=True):
            found += map(_told, some, reply[: len(some)], reply[len(some) :])
            if len(ids) == 1 and found == [None] and reply[0] is not None:
                raise BackendError(f"What is stored for task {ids[0]} cannot be read: it was not stored by ekiden.")
        return found

    def wait(self, ids: Sequence[str], timeout: float) -> list[StoredResult]:
        self._check_open(ids)
        if timeout > 0 and ids:
            return self._waits.wait(ids, timeout)
        slices = self._slices(ids)
        replies = self._run_all([_command(b"MGET", *map(self._keys.result, some)) for some in slices])
        found = [
            decoded(task_id, stored)
            for some, reply in zip(slices, replies, strict=True)
            for task_id, stored in zip(some, reply, strict=True)
            if stored is not None and is_final(stored)
        ]
        return [result for result in found if result is not None]

    def wake(self) -> None:
        self._waits.wake()

    def forget(self, ids: Sequence[str], *, deadline: float | None = None) -> None:
        self._check_open(ids)
        result, note = self._keys.result, self._keys.note
        calls = [_command(b"UNLINK", *map(result, some), *map(note, some)) for some in self._slices(ids)]
        self._run_all(calls, by=deadline)

    def begin(self, starts: Sequence[Start]) -> list[Begun]:
        self._check_open(text for start in starts for text in (start.task_id, start.message_id))
        answers = self._begin(starts)
        unreadable = {number: answer for number, answer in enumerate(answers) if isinstance(answer, bytes)}
        if not unreadable:
            return [answer for answer in answers if isinstance(answer, Begun)]
        # They would stand in the way of the tasks' results.
        self._run_all(
            [
                Call(FORGET, [self._keys.result(starts[number].task_id)], [stored])
                for number, stored in unreadable.items()
            ]
        )
        for number, answer in zip(unreadable, self._begin([starts[number] for number in unreadable]), strict=True):
            answers[number] = answer
        return [answer if isinstance(answer, Begun) else _GO for answer in answers]

    def _begin(self, starts: Sequence[Start]) -> list[Begun | bytes]:
        """The answers; where what is stored as a task's result cannot be read, that."""
        calls = []
        for some in self._slices(starts):
            keys: list[bytes] = []
            arguments: list[Part] = []
            for start in some:
                check_step(start.task_id, start.step)
                keys += (self._keys.result(start.task_id), self._keys.note(start.task_id))
                arguments += (str(start.step), start.message_id, _milliseconds(start.expires))
            calls.append(Call(BEGIN, keys, arguments))
        answers = [answer for reply in self._run_all(calls) for answer in reply]
        return [_begun(start, answer) for start, answer in zip(starts, answers, strict=True)]

    def join(self, join_id: str, member: str, outcome: bytes, *, size: int, expires: float | None) -> Joined:
        self._check_open((join_id, member))
        key, kept = self._keys.join(join_id), _milliseconds(expires)
        arrived, outcomes = self._run_beyond(
            lambda beyond: Call(JOIN, [key], [member, outcome, str(size), kept, beyond]), len(outcome)
        )
        members = (name.decode("utf-8", "backslashreplace") for name in outcomes[::2])
        return Joined(arrived, arrived >= size, dict(zip(members, outcomes[1::2], strict=True)))

    def read(self, keys: Sequence[str]) -> list[Record | None]:
        self._check_open(keys)
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
        self._check_open((key,))
        keys = [self._keys.record(key), self._keys.record_keys, self._keys.record_ends]
        arguments: list[Part] = [
            key,
            "" if expected_version is None else str(expected_version),
            "delete" if value is None else "write",
            _milliseconds(expires),
            value or b"",
        ]
        version = self._run_beyond(lambda beyond: Call(WRITE, keys, [*arguments, beyond]), len(value or b""))
        return None if version == _ANOTHER_VERSION else int(version)

    def scan(self, prefix: str) -> list[Record]:
        self._check_open((prefix,))
        first, behind = _range(prefix)
        found: list[Record] = []
        is_untidy = False
        while True:
            command = _command(b"ZRANGEBYLEX", self._keys.record_keys, first, behind, b"LIMIT", b"0", b"%d" % AT_ONCE)
            (members,) = self._run_all([command])
            keys = (member.decode("utf-8", "replace") for member in members)
            records = self.read([key for key in keys if "\0" not in key])
            found += [record for record in records if record is not None]
            is_untidy = is_untidy or None in records
            if len(members) < AT_ONCE:
                break
            first = b"(" + members[-1]
        if is_untidy:
            self._run_all([Call(TIDY, (self._keys.record_keys, self._keys.record_ends), ())])
        return found

    def warnings(self) -> list[str]:
        self._check_open(())
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
        answers = self._client.run_all(calls, by=by) if calls else []
        for answer in answers:
            if isinstance(answer, EkidenError):
                raise self._refused(answer)
        return answers

    def _run(self, call: Call) -> Reply:
        (answer,) = self._run_all([call])
        return answer

    def _run_beyond(self, call: Callable[[str], Call], size: int) -> Reply:
        """Run a call that stores a value of so many bytes; where the server is full, once more if that may go in."""
        normal = call(_flag(False))
        (answer,) = self._client.run_all([normal])
        if not isinstance(answer, EkidenError):
            return answer
        if not self._client.errors.is_full(answer):
            raise self._refused(answer)
        memory = memory_of(self._client, normal.keys[0])
        if never_fits(size, memory):
            raise BackendRefused(does_not_hold(self._client.place, size, memory)) from answer
        if not may_go_beyond(size, memory):
            raise answer
        return self._run(call(_flag(True)))

    def _refused(self, error: EkidenError) -> EkidenError:
        """``error``, as BackendRefused where it is about a value that is too large for this server."""
        if not self._client.errors.is_too_large(error):
            return error
        refusal = BackendRefused(str(error))
        refusal.__cause__ = error
        return refusal

    def _check_open(self, texts: Iterable[str]) -> None:
        """Raise what is to be raised for a closed backend, and for ``texts`` (ids, keys) that cannot be stored."""
        if self._closed:
            raise BackendError(f"The result backend {self._url} was closed here; open it again.")
        refuse_unstorable(texts)


def _command(name: bytes, key: bytes, *rest: Part) -> Call:
    return Call(None, (key,), (name, key, *rest))


def _slices(items: Sequence[_Item], most: int) -> list[Sequence[_Item]]:
    return [items[start : start + most] for start in range(0, len(items), most)]


def _milliseconds(seconds: float | None) -> Part:
    if seconds is None:
        return b""
    return b"%d" % (max(1, int(seconds * 1000)) if seconds < LONGEST_KEPT_SECONDS else LONGEST_KEPT_SECONDS * 1000)


def _flag(is_so: bool) -> str:
    return "1" if is_so else ""


def _told(task_id: str, stored: bytes | None, note: bytes | None) -> StoredResult | None:
    if stored is not None and (result := decoded(task_id, stored)) is not None:
        return result
    if note is not None:
        step = note.partition(b" ")[0]
        if step.isdigit():
            return StoredResult(task_id, STARTED, int(step), b"")
        logger.error("the note that task %s has begun cannot be read and counts as none", task_id)
    return None


def _begun(start: Start, answer: bytes) -> Begun | bytes:
    if answer == b"GO":
        return _GO
    if answer == b"SECOND":
        return _SECOND_COPY
    result = decoded(start.task_id, answer)
    return answer if result is None else Begun(BeginOutcome.ENDED, result)


def _record(key: str, stored: bytes) -> Record | None:
    found = _RECORD.match(stored)
    if found is None:
        logger.error("the record %s cannot be read and counts as none", key)
        return None
    return Record(key, stored[found.end() :], int(found[1]))


def _range(prefix: str) -> tuple[bytes, bytes]:
    """Where in a sorted set the members lie that begin with ``prefix``. No byte of a text is 255."""
    first = prefix.encode()
    return (b"[" + first, b"(" + first + b"\xff") if first else (b"-", b"+")
