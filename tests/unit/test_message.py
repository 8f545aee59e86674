"""The values that travel, their ids, and what no broker carries."""

import time

import msgspec
import pytest
from ekiden.message import (
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    MAX_QUEUE_NAME_LENGTH,
    Message,
    derived_id,
    new_id,
    unsendable,
)


def test_new_ids_are_unique_and_sort_by_age() -> None:
    first = new_id()
    many = {new_id() for _ in range(10_000)}
    give_up = time.monotonic() + 1
    while (last := new_id())[:12] <= max(many)[:12] and time.monotonic() < give_up:
        pass

    assert len(many) == 10_000
    assert first[:12] <= min(many)[:12]
    assert last > max(many)


def test_an_id_is_32_hexadecimal_digits_and_begins_with_its_time() -> None:
    before = time.time_ns() // 1_000_000

    made = new_id()

    assert len(made) == 32
    assert before <= int(made[:12], 16) <= time.time_ns() // 1_000_000
    int(made, 16)


def test_the_same_step_of_the_same_message_has_the_same_id() -> None:
    old = new_id()

    assert derived_id(old, "dead") == derived_id(old, "dead")
    assert derived_id(old, "dead") != derived_id(old, "retry 1")
    assert derived_id(old, "dead") != derived_id(new_id(), "dead")


def test_no_chain_of_steps_meets_itself() -> None:
    seen = [new_id()]
    for number in range(1000):
        seen.append(derived_id(seen[-1], "dead" if number % 2 else "redrive"))

    assert len(set(seen)) == len(seen)


def test_a_derived_id_keeps_the_age_of_the_first() -> None:
    old = new_id()

    derived = derived_id(derived_id(old, "a"), "b")

    assert derived[:12] == old[:12]
    assert len(derived) == 32


@pytest.mark.parametrize("old", ["", "short", "größe-größe-größe", "not-alphanumeric-at-all"])
def test_an_id_of_the_users_own_gets_derived_ids_too(old: str) -> None:
    derived = derived_id(old, "dead")

    assert len(derived) == 32
    int(derived, 16)


def test_a_step_cannot_be_confused_with_a_part_of_the_id() -> None:
    assert derived_id("a", "b\nc") == derived_id("a", "b\nc")
    assert derived_id("a", "bc") != derived_id("ab", "c")


@pytest.mark.parametrize(
    "message",
    [
        Message("id", "queue", b""),
        Message("id", "q" * MAX_QUEUE_NAME_LENGTH, b""),
        Message("id", "größe 世界/%", b"", {"text": "x", "int": 1, "float": 0.5, "bool": True, "none": None}),
        Message("id", "queue", b"", {}, LOWEST_PRIORITY),
        Message("id", "queue", b"", {}, HIGHEST_PRIORITY, 0.0),
    ],
)
def test_an_ordinary_message_is_sendable(message: Message) -> None:
    assert unsendable(message) is None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Message("id", "", b""), "1 to 200 characters, this one 0"),
        (Message("id", "q" * 201, b""), "this one 201"),
        (Message("id", "line\nbreak", b""), "printable"),
        (Message("id", "half a \ud800 character", b""), "printable"),
        (Message("", "queue", b""), "id is empty"),
        (Message("a\0b", "queue", b""), "zero byte"),
        (Message("id", "queue", "text"), "str, not bytes"),  # type: ignore[arg-type]
        (Message("id", "queue", bytearray(b"x")), "bytearray, not bytes"),  # type: ignore[arg-type]
        (Message("id", "queue", b"", {}, 10), "0 to 9, this one is 10"),
        (Message("id", "queue", b"", {}, -1), "this one is -1"),
        (Message("id", "queue", b"", {"fine": 1, "list": [1]}), "header 'list' is list"),  # type: ignore[dict-item]
        (Message("id", "queue", b"", {"bytes": b"x"}), "header 'bytes' is bytes"),  # type: ignore[dict-item]
    ],
)
def test_what_no_broker_carries_is_named(message: Message, reason: str) -> None:
    assert reason in (unsendable(message) or "")


def test_a_message_cannot_be_changed() -> None:
    message = Message("id", "queue", b"")

    with pytest.raises(AttributeError):
        message.body = b"other"  # type: ignore[misc]
    assert msgspec.structs.replace(message, body=b"other").body == b"other"
