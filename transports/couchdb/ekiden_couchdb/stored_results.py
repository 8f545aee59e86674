"""What is stored of a task, as a document; what may follow it, and what the fence says to who wants to begin.

    state, step, body, expires    the result, as it was put; nothing of it while the task has only begun
    result_ends                   when the result expires, in milliseconds
    begun                         {"step", "message", "ends"}: the fence's note of the try that began last
    ends                          when all of that has expired

Both are in one document, so that the fence decides about both at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from ekiden.errors import BackendError
from ekiden.results import BeginOutcome, Begun, Start, StoredResult
from ekiden.states import RETRY, STARTED, is_final

from ekiden_couchdb.store import Store
from ekiden_couchdb.store_documents import Document, end_of, has_ended, packed, unpacked

_GO, _SECOND_COPY = Begun(BeginOutcome.GO), Begun(BeginOutcome.SECOND_COPY)


class Note(msgspec.Struct, frozen=True):
    """Try ``step`` has begun out of a message."""

    step: int
    message: str
    ends: int | None = None


class Task(msgspec.Struct, frozen=True):
    """What is known of a task now: all that has not expired. ``result_ends`` are milliseconds."""

    task_id: str
    result: StoredResult | None = None
    result_ends: int | None = None
    note: Note | None = None

    def told(self) -> StoredResult | None:
        """What ``get`` tells of it."""
        if self.result is not None:
            return self.result
        return None if self.note is None else StoredResult(self.task_id, STARTED, self.note.step, b"")

    def with_result(self, result: StoredResult, now: float) -> Task:
        """The same, with another result."""
        return msgspec.structs.replace(self, result=result, result_ends=end_of(result.expires, now))

    def with_note(self, start: Start, now: float) -> Task:
        """The same, once this try has begun."""
        note = Note(start.step, start.message_id, end_of(start.expires, now))
        return msgspec.structs.replace(self, note=note)

    def answer(self, start: Start) -> Begun:
        """The fence: may this try begin?"""
        result, note = self.result, self.note
        if max(0 if result is None else result.step, 0 if note is None else note.step) > start.step:
            return _SECOND_COPY
        if result is not None and (is_final(result.state) or (result.state == RETRY and result.step == start.step)):
            return Begun(BeginOutcome.ENDED, result)
        if note is not None and note.step == start.step and note.message != start.message_id:
            return _SECOND_COPY
        return _GO

    def document(self) -> Document:
        """How it is stored."""
        document: Document = {}
        ends: list[int | None] = []
        if self.result is not None:
            document |= {"state": self.result.state, "step": self.result.step, "expires": self.result.expires}
            document |= {"result_ends": self.result_ends, **packed(self.result.body)}
            ends.append(self.result_ends)
        if self.note is not None:
            document["begun"] = msgspec.to_builtins(self.note)
            ends.append(self.note.ends)
        known = [end for end in ends if end is not None]
        if known and len(known) == len(ends):
            document["ends"] = max(known)
        return document


def known_task(store: Store, document: Document | None, task_id: str, now: float) -> Task:
    """What is known of a task by its document. One that is none of ours is set aside: nothing is known by it."""
    if document is None:
        return Task(task_id)
    try:
        return task_in(document, task_id, now)
    except BackendError as error:
        store.set_aside(document, error)
        return Task(task_id)


def task_in(document: Mapping[str, Any], task_id: str, now: float) -> Task:
    """What is known of a task by its document. Raises BackendError for a document that is none of ours."""
    try:
        note = msgspec.convert(document["begun"], Note) if "begun" in document else None
        stored = msgspec.convert(document, _Stored) if "state" in document else None
    except (KeyError, msgspec.ValidationError) as error:
        raise BackendError(f"What is stored for task {task_id} was not stored by ekiden: {error}.") from error
    result, result_ends = None, None
    if stored is not None and not has_ended(stored.result_ends, now):
        result = StoredResult(task_id, stored.state, stored.step, unpacked(document), stored.expires)
        result_ends = stored.result_ends
    if note is not None and has_ended(note.ends, now):
        note = None
    return Task(task_id, result, result_ends, note)


class _Stored(msgspec.Struct, frozen=True):
    """The fields of a result in its document, but for its body."""

    state: str
    step: int
    expires: float | None = None
    result_ends: int | None = None
