"""How a result is stored: twelve digits that say how far its task has come, then the rest in MessagePack.

The digits are its *order*, the step times ten plus ``states.rank``. Scripts compare the orders of two results and
need to understand nothing else: see ``follows``.
"""

from __future__ import annotations

import msgspec
from ekiden.errors import BackendError
from ekiden.results import StoredResult
from ekiden.states import FINAL_RANK, rank

ORDER_BASE, ORDER_DIGITS = 10, 12

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


def encoded(result: StoredResult) -> bytes:
    """What is stored for ``result``."""
    state, step = result.state, result.step
    rest = _encode(_Rest(state, step, result.body, result.expires))
    return b"%012d%b" % (step * ORDER_BASE + rank(state), rest)


def decoded(task_id: str, stored: bytes) -> StoredResult:
    """The result of a task out of what is stored. Raises BackendError for what is none."""
    try:
        rest = _decode(memoryview(stored)[ORDER_DIGITS:])
    except msgspec.DecodeError as error:
        raise BackendError(f"What is stored for task {task_id} was not stored by ekiden: {error}.") from error
    return StoredResult(task_id, rest.state, rest.step, rest.body, rest.expires)


def is_final(stored: bytes) -> bool:
    """Whether nothing more will happen to the task of this result."""
    return stored[ORDER_DIGITS - 1 : ORDER_DIGITS] == _FINAL_DIGIT
