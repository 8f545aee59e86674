"""How a result is stored: twelve digits that say how far its task has come, then the rest in MessagePack.

The digits are its *order*, the step times ten plus ``states.rank``. Scripts compare the orders of two results and
need to understand nothing else: see ``follows``.
"""

from __future__ import annotations

import msgspec
from ekiden.errors import BackendRefused
from ekiden.loggers import safe_logger
from ekiden.results import StoredResult
from ekiden.states import FINAL_RANK, rank

ORDER_BASE, ORDER_DIGITS = 10, 12
VERSION_DIGITS = 15
"""Of a record's version, at most: it stands before the value."""

_LARGEST_STEP = 10 ** (ORDER_DIGITS - 1) - 1

logger = safe_logger("ekiden_redis")

_FINAL_DIGIT = str(FINAL_RANK).encode()


class _Rest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """All but the task's id, which the key holds. A newer ekiden may put more behind, with a default."""

    state: str
    step: int
    body: bytes
    expires: float | None


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Rest).decode


def order(state: str, step: int) -> int:
    """How far a task in this state of this try has come."""
    return step * ORDER_BASE + rank(state)


def follows(old: int, new: int) -> bool:
    """``states.may_follow`` for two orders, as the scripts have it: nothing follows a final result, a final one
    follows everything else, and otherwise the order may not fall."""
    return old % ORDER_BASE != FINAL_RANK and (new % ORDER_BASE == FINAL_RANK or new >= old)


def check_step(task_id: str, step: int) -> None:
    """Raise BackendRefused for a step that cannot be written."""
    if not 0 <= step <= _LARGEST_STEP:
        raise BackendRefused(f"Task {task_id} has no step {step}: steps are 0 to {_LARGEST_STEP}.")


def encoded(result: StoredResult) -> bytes:
    """What is stored for ``result``. Raises BackendRefused for what cannot be."""
    state, step = result.state, result.step
    check_step(result.task_id, step)
    try:
        rest = _encode(_Rest(state, step, result.body, result.expires))
    except (msgspec.MsgspecError, UnicodeEncodeError, OverflowError) as error:
        raise BackendRefused(f"A result of task {result.task_id} cannot be written: {error}.") from error
    return b"%012d%b" % (step * ORDER_BASE + rank(state), rest)


def decoded(task_id: str, stored: bytes) -> StoredResult | None:
    """The result of a task out of what is stored; None for what cannot be read, which is said in the log."""
    try:
        rest = _decode(memoryview(stored)[ORDER_DIGITS:])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        logger.error("what is stored as the result of task %s cannot be read and counts as none: %s", task_id, error)
        return None
    return StoredResult(task_id, rest.state, rest.step, rest.body, rest.expires)


def is_final(stored: bytes) -> bool:
    """Whether nothing more will happen to the task of this result."""
    return stored[ORDER_DIGITS - 1 : ORDER_DIGITS] == _FINAL_DIGIT
