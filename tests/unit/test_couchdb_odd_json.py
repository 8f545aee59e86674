"""One odd document in an answer of CouchDB hides no other."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from ekiden_couchdb.odd_json import MOST_NESTED, readable
from hypothesis import given
from hypothesis import strategies as st

DEEP = "[" * 5000 + '"]}{["' + "]" * 5000

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("odd", "instead"),
    [
        (DEEP, None),
        ("1e400", None),
        ("-1.5E+999", None),
        (r'"caf\udce9"', "caf\ufffd"),
        (r'"\ud83d\ude00 \\udce9 \ud83d"', "\U0001f600 \\udce9 \ufffd"),
    ],
    ids=["deep", "large", "small", "surrogate", "pair"],
)
def test_what_cannot_be_read_becomes_null_and_its_neighbours_stay(odd: str, instead: object) -> None:
    text = f'{{"rows": [{{"id": "a", "doc": {{"odd": {odd}, "n": 1}}}}, {{"id": "b\\"]}}"}}], "n": 1e3}}'.encode()
    with pytest.raises((msgspec.DecodeError, RecursionError)):
        msgspec.json.decode(text)

    assert msgspec.json.decode(readable(text)) == {
        "rows": [{"id": "a", "doc": {"odd": _within(instead, odd), "n": 1}}, {"id": 'b"]}'}],
        "n": 1e3,
    }


def _within(instead: object, odd: str) -> object:
    """What is nested too deep is cut where it is too deep, and not before."""
    if odd is not DEEP:
        return instead
    found: object = None
    for _ in range(MOST_NESTED - 4):  # there are four around it
        found = [found]
    return found


@given(VALUES)
@pytest.mark.slow
def test_what_can_be_read_stays_as_it_is(value: Any) -> None:
    text = json.dumps(value).encode()

    assert readable(text) == text or msgspec.json.decode(readable(text)) == msgspec.json.decode(text)


@pytest.mark.parametrize("text", [b"", b"<html>", b'{"a": "', b"[[[", b"]]]", b'"\\'])
def test_what_is_no_json_stays_none(text: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(readable(text))
