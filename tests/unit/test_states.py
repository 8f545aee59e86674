"""Which state may follow which: the whole table, and the laws behind it."""

import itertools

import pytest
from ekiden.states import (
    EXCEPTION_STATES,
    FINAL_RANK,
    PROPAGATE_STATES,
    READY_STATES,
    UNREADY_STATES,
    State,
    is_final,
    may_follow,
    rank,
)

OWN = "COMPILING"
NAMES = [*(state.value for state in State), OWN]
PLACES = list(itertools.product(NAMES, [0, 1, 2]))

# What may replace the state in the left column within the same try.
WITHIN_ONE_TRY = {
    "PENDING": {"PENDING", "STARTED", "PROGRESS", OWN, "RETRY", "SUCCESS", "FAILURE", "REVOKED", "EXPIRED"},
    "STARTED": {"STARTED", "PROGRESS", OWN, "RETRY", "SUCCESS", "FAILURE", "REVOKED", "EXPIRED"},
    "PROGRESS": {"PROGRESS", OWN, "RETRY", "SUCCESS", "FAILURE", "REVOKED", "EXPIRED"},
    OWN: {"PROGRESS", OWN, "RETRY", "SUCCESS", "FAILURE", "REVOKED", "EXPIRED"},
    "RETRY": {"RETRY", "SUCCESS", "FAILURE", "REVOKED", "EXPIRED"},
    "SUCCESS": set(),
    "FAILURE": set(),
    "REVOKED": set(),
    "EXPIRED": set(),
}


@pytest.mark.parametrize("old", NAMES)
@pytest.mark.parametrize("new", NAMES)
def test_within_one_try(old: str, new: str) -> None:
    assert may_follow(old, 1, new, 1) == (new in WITHIN_ONE_TRY[old])


def test_between_tries() -> None:
    for (old_state, old_step), (new_state, new_step) in itertools.product(PLACES, PLACES):
        if is_final(old_state):
            expected = False
        elif is_final(new_state) or new_step > old_step:
            expected = True
        elif new_step < old_step:
            expected = False
        else:
            expected = new_state in WITHIN_ONE_TRY[old_state]

        assert may_follow(old_state, old_step, new_state, new_step) == expected, (
            old_state,
            old_step,
            new_state,
            new_step,
        )


def test_nothing_ever_goes_round_in_a_circle() -> None:
    for old, new in itertools.product(PLACES, PLACES):
        if may_follow(*old, *new) and may_follow(*new, *old):
            assert old[1] == new[1]
            assert rank(old[0]) == rank(new[0])


def test_final_states_are_the_ready_ones() -> None:
    assert {state for state in State if is_final(state)} == READY_STATES
    assert {state for state in State if rank(state) == FINAL_RANK} == READY_STATES
    assert set(State) == READY_STATES | UNREADY_STATES
    assert not READY_STATES & UNREADY_STATES
    assert PROPAGATE_STATES < EXCEPTION_STATES
    assert not is_final(OWN)


def test_states_are_their_names() -> None:
    assert all(state == state.value == str(state) for state in State)
