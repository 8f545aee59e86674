"""A message is the same when it comes back from its document, or it is refused."""

from __future__ import annotations

import math

import bson
import pytest
from ekiden.errors import BrokerRefused
from ekiden.message import HeaderValue, Message
from ekiden_mongodb.client import LARGEST_DOCUMENT
from ekiden_mongodb.documents import Document, date, date_not_before, document_of, message_of
from hypothesis import given
from hypothesis import strategies as st

NO_LIMIT = LARGEST_DOCUMENT

texts = st.text(st.characters(exclude_categories=["Cs"]))
names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=200)
header_values = st.one_of(
    texts, st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none()
)


def stored(message: Message, *, max_message_bytes: int = NO_LIMIT) -> Document:
    document = document_of(message, max_message_bytes=max_message_bytes)
    assert not isinstance(document, BrokerRefused), document
    return document


@given(
    message_id=texts.filter(lambda text: text and "\0" not in text),
    queue=names,
    body=st.binary(),
    headers=st.dictionaries(texts, header_values),
    priority=st.integers(0, 9),
    due=st.none() | st.floats(0, 3e10),
)
def test_a_message_comes_back_as_it_was(
    *, message_id: str, queue: str, body: bytes, headers: dict[str, HeaderValue], priority: int, due: float | None
) -> None:
    message = Message(message_id, queue, body, headers, priority, due)

    back = message_of(bson.decode(bson.encode(stored(message))))

    assert back == message
    assert {name: type(value) for name, value in back.headers.items()} == {
        name: type(value) for name, value in headers.items()
    }


def test_an_id_is_one_of_its_queue() -> None:
    here, there = stored(Message("id", "a", b"")), stored(Message("id", "b", b""))

    assert here["_id"] != there["_id"]


def test_the_most_urgent_comes_first() -> None:
    assert [stored(Message("id", "q", b"", priority=priority))["p"] for priority in (9, 4, 0)] == [0, 5, 9]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (Message("id", "q", b"x" * 11), "max_message_bytes is 10"),
        (Message("id", "q", b"", {"x": math.nan}), "header 'x' is nan"),
        (Message("id", "q", b"", {"x": -math.inf}), "header 'x' is -inf"),
        (Message("id", "q", b"", {"x": "\ud800"}), "lone surrogate"),
        (Message("\ud800", "q", b""), "lone surrogate"),
        (Message("id", "q", b"", due=math.inf), "due at "),
        (Message("id", "q", b"", {"x": "x" * LARGEST_DOCUMENT}), "above 16 MiB"),
        (Message("id", "a\nb", b""), "printable"),
    ],
)
def test_what_cannot_be_stored_is_refused(message: Message, words: str) -> None:
    refused = document_of(message, max_message_bytes=10)

    assert isinstance(refused, BrokerRefused)
    assert words in str(refused)


@pytest.mark.parametrize("length", range(LARGEST_DOCUMENT - 2000, LARGEST_DOCUMENT + 1, 100))
def test_what_is_stored_is_never_larger_than_mongodb_takes(length: int) -> None:
    message = Message("i" * 32, "q" * 200, b"x" * length, {"kind": "large"}, due=1e9)

    document = document_of(message, max_message_bytes=NO_LIMIT)

    if not isinstance(document, BrokerRefused):
        # What is added when it is published: two dates, a number, later a token, and the date when it vanishes.
        added = {"v": date(0.0), "w": date(0.0), "x": date(0.0), "o": 2**62, "t": "t" * 100}
        assert len(bson.encode(document | added)) <= LARGEST_DOCUMENT


@given(st.floats(0, 2e11))
@pytest.mark.slow
def test_dates_are_never_after_what_they_round_down_and_never_before_what_they_round_up(seconds: float) -> None:
    assert int(date(seconds)) <= seconds * 1000 <= int(date_not_before(seconds))
    assert int(date_not_before(seconds)) - int(date(seconds)) <= 1


@pytest.mark.parametrize("seconds", [-1e300, -1.0, 1e15, 1e300])
def test_far_away_dates_are_dates(seconds: float) -> None:
    for made in (date(seconds), date_not_before(seconds)):
        assert 1970 <= made.as_datetime().year <= 9999
