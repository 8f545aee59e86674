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
What somebody else has written counts as not there, and is replaced: a result whose u, o, k, s or b, or a note whose v,
n or m, is of another type.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from bson import Binary
from ekiden.errors import BackendRefused
from ekiden.loggers import safe_logger
from ekiden.results import BeginOutcome, Begun, Start, StoredResult
from ekiden.states import FINAL_RANK, RETRY, STARTED, rank
from pymongo import UpdateOne

from ekiden_mongodb.expiring import FOREVER, NOW, WHOLE, Document, Expression, date, end, is_whole, until

FINAL = 10**15
"""The order of a final result is not below."""

READ = {"o": 1, "s": 1, "k": 1, "b": 1, "u": 1, "n": 1, "m": 1, "v": 1}

Item = TypeVar("Item", StoredResult, Start)

logger = safe_logger("ekiden_mongodb")

_LARGEST_STEP = 10**13
_BYTES_AT_ONCE = 16 * 1024 * 1024
"""Results that are larger together are several requests, each with a deadline of its own."""

_GO, _SECOND_COPY = Begun(BeginOutcome.GO), Begun(BeginOutcome.SECOND_COPY)


def _is(field: str, *types: str) -> Expression:
    return {"$in": [{"$type": f"${field}"}, list(types)]}


_COUNTS: Expression = {
    "$and": [
        {"$gt": ["$u", NOW]},
        *(_is(field, *WHOLE) for field in ("u", "o", "k")),
        _is("s", "string"),
        _is("b", "binData"),
    ]
}
_IS_NOTED: Expression = {
    "$and": [{"$gt": ["$v", NOW]}, *(_is(field, *WHOLE) for field in ("v", "n")), _is("m", "string")]
}


def _end(field: str) -> Expression:
    """When what is stored, or the note, ends; nothing where that is no number."""
    return {"$cond": [_is(field, *WHOLE), f"${field}", 0]}


def _latest(one: Expression | int, other: Expression) -> Expression:
    """The later of two ends as a date."""
    return {"$toDate": {"$min": [FOREVER, {"$max": [one, other]}]}}


def order(state: str, step: int) -> int:
    """How far a task in this state of this try has come. Raises BackendRefused for a step that cannot be stored."""
    if not 0 <= step <= _LARGEST_STEP:
        raise BackendRefused(f"A task has no step {step}: steps are 0 to {_LARGEST_STEP}.")
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
            "x": _latest(ends, _end("v")),
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
            "x": _latest(ends, _end("u")),
        },
    )


def _update(task_id: str, condition: Expression, fields: Document) -> UpdateOne:
    changed = {"$mergeObjects": ["$$ROOT", fields]}
    return UpdateOne({"_id": task_id}, [{"$replaceWith": {"$cond": [condition, changed, "$$ROOT"]}}], upsert=True)


def begun(start: Start, document: Document | None, now: int) -> Begun:
    """The answer to ``start``, out of what is stored after it was to be noted, at ``now`` in milliseconds."""
    if document is None:
        return _GO  # it was forgotten, or has expired, since it was noted
    stored, noted_step = _stored(document, now), _noted_step(document, now)
    if (stored is not None and stored.step > start.step) or noted_step > start.step:
        return _SECOND_COPY
    if stored is not None and (document["o"] >= FINAL or document["o"] == order(RETRY, start.step)):
        return Begun(BeginOutcome.ENDED, stored)
    if noted_step == start.step and document["m"] != start.message_id:
        return _SECOND_COPY
    return _GO


def told(document: Document, now: int) -> StoredResult | None:
    """What ``get`` says of a task at ``now`` in milliseconds; None too where that cannot be read."""
    stored, noted_step = _stored(document, now), _noted_step(document, now)
    if stored is not None:
        return stored
    if noted_step >= 0:
        return StoredResult(document["_id"], STARTED, noted_step, b"")
    if not _is_over(document.get("u"), now) or not _is_over(document.get("v"), now):
        logger.error("what is stored for task %s cannot be read and counts as nothing", document["_id"])
    return None


def is_readable(document: Document, now: int) -> bool:
    """Whether ``told`` says what there is."""
    return told(document, now) is not None or (_is_over(document.get("u"), now) and _is_over(document.get("v"), now))


def _stored(document: Document, now: int) -> StoredResult | None:
    """The result, if there is one that counts, as ``_COUNTS`` has it."""
    ends, state, step, body = document.get("u"), document.get("s"), document.get("k"), document.get("b")
    if not is_whole(ends) or ends <= now or not is_whole(step) or not is_whole(document.get("o")):
        return None
    if not isinstance(state, str) or not isinstance(body, bytes):
        return None
    return StoredResult(document["_id"], state, int(step), bytes(body))


def _noted_step(document: Document, now: int) -> int:
    """The step that has begun, by a note that counts, as ``_IS_NOTED`` has it; -1 where there is none."""
    ends, step = document.get("v"), document.get("n")
    if not is_whole(ends) or ends <= now or not is_whole(step) or not isinstance(document.get("m"), str):
        return -1
    return int(step)


def _is_over(ends: Any, now: int) -> bool:
    return ends is None or (is_whole(ends) and ends <= now)


def parts(items: Sequence[Item], most: int) -> Iterator[list[tuple[int, Item]]]:
    """``items`` with their places, in parts of at most ``most`` and of different tasks; of each task in their order.

    Each part, unless it is one result, has at most some megabytes.
    """
    rounds: list[list[tuple[int, Item]]] = []
    seen: dict[str, int] = {}
    for place, item in enumerate(items):
        number = seen[item.task_id] = seen.get(item.task_id, -1) + 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append((place, item))
    for each in rounds:
        part: list[tuple[int, Item]] = []
        size = 0
        for place, item in each:
            item_size = _size_of(item)
            if part and (len(part) == most or size + item_size > _BYTES_AT_ONCE):
                yield part
                part, size = [], 0
            part.append((place, item))
            size += item_size
        yield part


def _size_of(item: StoredResult | Start) -> int:
    return len(item.body) if isinstance(item, StoredResult) else 0
