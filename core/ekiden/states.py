"""The states of a task, and the order in which they may follow each other.

A task's state only moves forward. ``rank`` orders the states within one try; a later try (``step``) outranks an
earlier one; nothing outranks a final state. Names are Celery's.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """Where a task is, as far as its results tell. PENDING also means "never heard of"."""

    PENDING = "PENDING"
    STARTED = "STARTED"
    PROGRESS = "PROGRESS"
    RETRY = "RETRY"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    REVOKED = "REVOKED"
    EXPIRED = "EXPIRED"


READY_STATES = frozenset({State.SUCCESS, State.FAILURE, State.REVOKED, State.EXPIRED})
UNREADY_STATES = frozenset(State) - READY_STATES
EXCEPTION_STATES = frozenset({State.RETRY, State.FAILURE, State.REVOKED, State.EXPIRED})
PROPAGATE_STATES = frozenset({State.FAILURE, State.REVOKED, State.EXPIRED})

FINAL_RANK = 9
_RANK = {State.PENDING.value: 0, State.STARTED.value: 1, State.RETRY.value: 3} | {
    s.value: FINAL_RANK for s in READY_STATES
}
_WORKING_RANK = 2


def rank(state: str) -> int:
    """How far along ``state`` is within one try: 0 (pending) to ``FINAL_RANK``.

    A state of the user's own (``update_state("COMPILING")``) ranks with PROGRESS: after STARTED, before RETRY.
    """
    return _RANK.get(state, _WORKING_RANK)


def is_final(state: str) -> bool:
    """Whether nothing more will happen to a task in this state."""
    return state in READY_STATES


def may_follow(old_state: str, old_step: int, new_state: str, new_step: int) -> bool:
    """Whether a stored (state, step) may be replaced by a new one: forwards, or the same again, never back."""
    old_rank = rank(old_state)
    if old_rank == FINAL_RANK:
        return False
    new_rank = rank(new_state)
    if new_rank == FINAL_RANK:
        return True
    return (new_step, new_rank) >= (old_step, old_rank)


PENDING, STARTED, PROGRESS, RETRY = State.PENDING, State.STARTED, State.PROGRESS, State.RETRY
SUCCESS, FAILURE, REVOKED, EXPIRED = State.SUCCESS, State.FAILURE, State.REVOKED, State.EXPIRED


def __getattr__(name: str) -> object:
    from ekiden.celery_names import missing_name  # only for a name that is not here

    raise missing_name(__name__, name)
