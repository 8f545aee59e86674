"""How the result of a task is kept, and the fence's note beside it, in one document for each task.

    <prefix>.results
    _id  the task's id
    o    how far the stored result has come: the step times ten plus ``states.rank``, or FINAL and more
    s    its state          k    its step           b    its body
    u    until when it counts, in milliseconds
    w    which call stored it
    n    the step that has begun, by the fence's note       m    out of which message
    v    until when the note counts, in milliseconds
    x    the later of u and v as a date, for the TTL index

What is not there is smaller than every number, which the expressions below make use of. A change is the insertion of a
new document, or else one update by a pipeline in which the server decides by its own clock: what may not change stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from bson import Binary
from ekiden.errors import BackendError
from ekiden.results import BeginOutcome, Begun, Start, StoredResult
from ekiden.states import FINAL_RANK, RETRY, STARTED, rank
from pymongo import UpdateOne

from ekiden_mongodb.expiring import NOW, Document, Expression, date, end, until

FINAL = 10**15
"""The order of a final result is not below."""

READ = {"o": 1, "s": 1, "k": 1, "b": 1, "u": 1, "n": 1, "m": 1, "v": 1}

Item = TypeVar("Item", StoredResult, Start)

_GO, _SECOND_COPY = Begun(BeginOutcome.GO), Begun(BeginOutcome.SECOND_COPY)
_COUNTS: Expression = {"$gt": ["$u", NOW]}
_IS_NOTED: Expression = {"$gt": ["$v", NOW]}


def order(state: str, step: int) -> int:
    """How far a task in this state of this try has come."""
    of_state = rank(state)
    return FINAL + step if of_state == FINAL_RANK else step * 10 + of_state


def follows(old: int, new: int) -> bool:
    """``states.may_follow`` for two orders, as the pipeline has it: not above the highest that may be replaced."""
    return old <= _replaceable(new)


def _replaceable(new: int) -> int:
    """The highest order that a result of the order ``new`` may replace: any but a final one, or its own."""
    return FINAL - 1 if new >= FINAL else new


def new_document(result: StoredResult, writer: Binary, now: int) -> Document:
    """What is stored of a task of which nothing is stored yet."""
    ends = end(result.expires, now)
    return {
        "_id": result.task_id,
        "o": order(result.state, result.step),
        "s": result.state,
        "k": result.step,
        "b": Binary(result.body),
        "u": ends,
        "w": writer,
        "x": date(ends),
    }


def put_update(result: StoredResult, writer: Binary) -> UpdateOne:
    """Stores ``result`` for the call ``writer``, if it may follow what is stored."""
    new, ends = order(result.state, result.step), until(result.expires)
    may_follow = {"$or": [{"$not": [_COUNTS]}, {"$lte": ["$o", _replaceable(new)]}]}
    return _update(
        result.task_id,
        may_follow,
        {
            "o": new,
            "s": {"$literal": result.state},
            "k": result.step,
            "b": Binary(result.body),
            "u": ends,
            "w": writer,
            "x": {"$toDate": {"$max": [ends, "$v"]}},
        },
    )


def begin_update(start: Start) -> UpdateOne:
    """Notes ``start``, if it may go. ``begun`` says afterwards what became of it, by the same rule."""
    step, ends = start.step, until(start.expires)
    has_ended = {"$or": [{"$gt": ["$k", step]}, {"$gte": ["$o", FINAL]}, {"$eq": ["$o", order(RETRY, step)]}]}
    is_anothers = {"$and": [{"$eq": ["$n", step]}, {"$ne": ["$m", {"$literal": start.message_id}]}]}
    may_go = {
        "$and": [
            {"$not": [{"$and": [_COUNTS, has_ended]}]},
            {"$not": [{"$and": [_IS_NOTED, {"$or": [{"$gt": ["$n", step]}, is_anothers]}]}]},
        ]
    }
    return _update(
        start.task_id,
        may_go,
        {
            "n": step,
            "m": {"$literal": start.message_id},
            "v": ends,
            "x": {"$toDate": {"$max": [ends, "$u"]}},
        },
    )


def _update(task_id: str, condition: Expression, fields: Document) -> UpdateOne:
    changed = {"$mergeObjects": ["$$ROOT", fields]}
    return UpdateOne({"_id": task_id}, [{"$replaceWith": {"$cond": [condition, changed, "$$ROOT"]}}], upsert=True)


def begun(start: Start, document: Document | None, now: int) -> Begun:
    """The answer to ``start``, out of what is stored after it was to be noted, at ``now`` in milliseconds."""
    if document is None:
        return _GO  # it was forgotten, or has expired, since it was noted
    stored_step = document["k"] if document.get("u", 0) > now else -1
    noted_step = document["n"] if document.get("v", 0) > now else -1
    if stored_step > start.step or noted_step > start.step:
        return _SECOND_COPY
    if stored_step >= 0 and (document["o"] >= FINAL or document["o"] == order(RETRY, start.step)):
        return Begun(BeginOutcome.ENDED, _stored(start.task_id, document))
    if noted_step == start.step and document["m"] != start.message_id:
        return _SECOND_COPY
    return _GO


def told(document: Document, now: int) -> StoredResult | None:
    """What ``get`` says of a task at ``now`` in milliseconds."""
    if document.get("u", 0) > now:
        return _stored(document["_id"], document)
    if document.get("v", 0) > now:
        return StoredResult(document["_id"], STARTED, document["n"], b"")
    return None


def _stored(task_id: str, document: Document) -> StoredResult:
    try:
        return StoredResult(task_id, str(document["s"]), int(document["k"]), bytes(document["b"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BackendError(f"What is stored for task {task_id} was not stored by ekiden.") from error


def parts(items: Sequence[Item], most: int) -> Iterator[list[tuple[int, Item]]]:
    """``items`` with their places, in parts of at most ``most`` and of different tasks; of each task in their order."""
    rounds: list[list[tuple[int, Item]]] = []
    seen: dict[str, int] = {}
    for place, item in enumerate(items):
        number = seen[item.task_id] = seen.get(item.task_id, -1) + 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append((place, item))
    for each in rounds:
        for start in range(0, len(each), most):
            yield each[start : start + most]
