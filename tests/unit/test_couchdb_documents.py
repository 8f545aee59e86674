"""Messages as CouchDB documents: their ids and their order."""

from __future__ import annotations

import re

import pytest
from ekiden.errors import BrokerRefused
from ekiden.message import Message, new_id
from ekiden_couchdb.documents import (
    Packed,
    Rows,
    after,
    delayed_id,
    delayed_rows,
    due_of,
    encoded_name,
    note_id,
    note_of,
    order_of,
    packed,
    ready_id,
    ready_rows,
    slot_id,
    unpacked,
)
from hypothesis import given
from hypothesis import strategies as st

NAMES = st.text(min_size=1, max_size=200).filter(str.isprintable)
LIMIT = 1_000_000


def a_packed(queue: str = "queue", *, priority: int = 4, due: float | None = None, id: str = "x") -> Packed:  # noqa: A002
    """A message as it is stored."""
    value = packed(Message(id, queue, b"body", {}, priority, due), max_message_bytes=LIMIT)
    assert isinstance(value, Packed)
    return value


def is_in(rows: Rows, document_id: str) -> bool:
    """Whether the server finds the document there, which compares byte by byte."""
    return rows.start.encode() <= document_id.encode() < rows.end.encode()


@given(NAMES)
def test_a_name_has_safe_characters_only(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9.=-]{1,200}", encoded_name(name))


@given(NAMES, NAMES)
def test_different_names_stay_different(one: str, other: str) -> None:
    assert (encoded_name(one) == encoded_name(other)) == (one == other)


@given(NAMES, NAMES, st.integers(0, 9), st.integers(0, 10**15))
def test_a_message_is_in_its_queues_range_and_in_no_other(queue: str, other: str, priority: int, age: int) -> None:
    message = a_packed(queue, priority=priority)
    ids = {ready_rows: ready_id(message, age), delayed_rows: delayed_id(message, age)}

    for rows, document_id in ids.items():
        assert is_in(rows(queue), document_id)
        assert other == queue or not is_in(rows(other), document_id)
    assert not is_in(ready_rows(queue), ids[delayed_rows])
    assert not is_in(delayed_rows(queue), ids[ready_rows])
    assert not is_in(ready_rows(queue), note_id(message))


def test_notes_and_slots_come_behind_all_messages() -> None:
    message = a_packed("zzz", id="zzz")

    assert ready_id(message, 10**16 - 1) < "~" < note_id(message)
    assert ready_id(message, 10**16 - 1) < "~" < slot_id("00")


def test_ready_messages_are_in_the_order_of_priority_and_age() -> None:
    urgent, early, late, low = (
        ready_id(a_packed(priority=9), 5),
        ready_id(a_packed(), 3),
        ready_id(a_packed(), 10),
        ready_id(a_packed(priority=0), 1),
    )

    assert sorted([low, late, early, urgent]) == [urgent, early, late, low]
    assert sorted([low, late, early, urgent], key=order_of) == [urgent, early, late, low]


def test_delayed_messages_are_in_the_order_of_due_times() -> None:
    ids = [delayed_id(a_packed(priority=priority), due) for due, priority in [(5, 0), (70, 9), (600, 4)]]

    assert sorted(ids) == ids
    assert list(map(due_of, ids)) == [5, 70, 600]
    assert due_of(ready_id(a_packed(), 7)) == 0


def test_a_note_is_found_by_its_message() -> None:
    message = a_packed("größe: 1", id=new_id())

    assert note_of(ready_id(message, 1)) == note_of(delayed_id(message, 1)) == note_id(message)


def test_what_follows_an_id_begins_right_behind_it() -> None:
    ids = sorted(ready_id(a_packed(id=name), 1) for name in ("a", "a-", "a.", "a0", "aa", "é"))

    for number, document_id in enumerate(ids):
        assert [other for other in ids if other >= after(document_id)] == ids[number + 1 :]


@given(
    st.binary(max_size=300),
    st.dictionaries(
        st.text(),
        st.text() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans(),
    ),
    st.none() | st.floats(0, 3e10),
)
def test_a_message_comes_out_as_it_went_in(
    body: bytes, headers: dict[str, str | int | float | bool], due: float | None
) -> None:
    message = Message(new_id(), "queue", body, headers, 4, due)

    stored = packed(message, max_message_bytes=LIMIT)

    assert isinstance(stored, Packed)
    assert unpacked(stored.content) == message


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (Message("x", "q", b"x" * 11), "max_message_bytes is 10"),
        (Message("x", "q", b"", {"n": 2**64}), "more than 64 bits"),
        (Message("x", "q", b"", {}, 4, float("inf")), "cannot be due at inf"),
        (Message("x", "q", b"", {"half": "\ud800"}), "lone surrogate"),
    ],
)
def test_what_cannot_be_stored_is_said(message: Message, words: str) -> None:
    reason = packed(message, max_message_bytes=10)

    assert isinstance(reason, BrokerRefused)
    assert words in str(reason)


@pytest.mark.parametrize(("content", "words"), [("!", "base64"), ("", "truncated"), ("AAAA", "array")])
def test_what_is_no_message_is_not_taken_for_one(content: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        unpacked(content)
