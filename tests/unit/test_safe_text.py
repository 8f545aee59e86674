"""Text from outside, made fit for records, logs and terminals."""

import io
import json
import logging
from collections.abc import Callable

import msgspec
import pytest
from ekiden.loggers import safe_logger
from ekiden.safe_text import (
    LONGEST_BLOCK,
    LONGEST_LINE,
    Block,
    block,
    cut,
    cut_middle,
    json_bytes,
    one_line,
    printable,
    printable_json,
    repr_of,
    storable,
    text_of,
)
from hypothesis import given
from hypothesis import strategies as st

from tests.apps import hostile

ANYTHING = st.text(st.characters(codec=None, exclude_categories=()))


@given(ANYTHING)
def test_what_is_storable_is_carried_by_utf_8(text: str) -> None:
    made = storable(text)

    assert type(made) is str
    assert made.encode().decode() == made
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert made == text


@given(ANYTHING)
def test_what_is_printable_moves_nothing_on_a_terminal(text: str) -> None:
    made = printable(text)

    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in made)
    assert not set("\u2028\u2029\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u200e\u200f\ufeff") & set(made)
    assert made.encode().decode() == made


@given(ANYTHING.map(storable))
def test_printable_json_means_the_same(text: str) -> None:
    made = printable_json(msgspec.json.encode({text: [text]}))

    assert json.loads(made) == {text: [text]}
    assert "\x9b" not in made
    assert "\u202e" not in made


def test_text_that_is_shown_as_it_is_stays_as_it_is() -> None:
    for text in ("größe 世界 \u3000 \U0001f468\u200d\U0001f469\u200d\U0001f467", "a b", ""):
        assert printable(text) == storable(text) == text


@pytest.mark.parametrize("shorten", [cut, cut_middle])
@pytest.mark.parametrize("text", ["x" * 9000, "\0" * 9000, "ü" * 9000, "\U0001f600" * 900, "\0" * 900 + "x" * 9000])
@pytest.mark.parametrize("most", [0, 1, 10, 50, 100, 1000, 5000])
def test_what_is_cut_has_no_more_bytes_in_json(shorten: Callable[[str, int], str], text: str, most: int) -> None:
    made = shorten(text, most)

    assert made == "" or json_bytes(made) <= most
    if 100 <= most < json_bytes(text):
        assert made[:3] == text[:3]
        assert "characters" in made
    assert shorten(text, 100_000) == text


def test_text_of_what_has_none_says_so() -> None:
    assert text_of(hostile.ShyError()).startswith("(its text cannot be shown")
    assert text_of(hostile.NumberError()).startswith("(its text cannot be shown")
    assert repr_of(hostile.Shy()) == "a Shy whose repr failed"
    assert repr_of(hostile.NamelessError()) == "a NamelessError whose repr failed" or repr_of(hostile.NamelessError())
    assert type(text_of(hostile.Text("x"))) is str
    assert storable(hostile.Text("x")) == "x"


def test_a_line_is_one_line_of_bounded_length() -> None:
    assert one_line("a\nb\r\x1b[31m\u202e") == "a\\nb\\r\\x1b[31m\\u202e"
    assert len(one_line("x" * 10_000_000)) < LONGEST_LINE + 50


def test_a_block_is_indented_and_of_bounded_length() -> None:
    assert block("Traceback\n  File\x1b\n") == "    Traceback\n      File\\x1b"
    assert len(block("line\n" * 1_000_000)) < 4 * LONGEST_BLOCK
    assert isinstance(block("x"), Block)


FORGED = "x\n2026-01-01 00:00:00,000 INFO ekiden.worker: all is well\x1b[2J"


@pytest.fixture
def lines() -> Callable[[], list[str]]:
    """What a handler that anybody configured writes of a logger of ours, as lines."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("ekiden.tests")
    logger.addHandler(handler)
    logger.propagate = False

    def written() -> list[str]:
        logger.removeHandler(handler)
        return stream.getvalue().splitlines()

    return written


def test_nobody_forges_a_line_of_a_log(lines: Callable[[], list[str]]) -> None:
    logger = safe_logger("ekiden.tests")
    logger.setLevel(logging.INFO)

    logger.warning("%s and %r and %d", FORGED, FORGED, 5)
    logger.warning("%(name)s", {"name": FORGED})
    logger.warning(FORGED)
    logger.warning("%s", ValueError(FORGED))
    logger.warning("%s", hostile.ShyError())
    logger.warning("%s", hostile.SURROGATE)
    logger.warning("failed\n%s", block(FORGED))
    try:
        raise ValueError(FORGED)
    except ValueError:
        logger.exception("failed")
    logger.error("failed", exc_info=hostile.ShyError())

    written = lines()
    assert len([line for line in written if not line.startswith("    ")]) == 9
    assert not [line for line in written if line.startswith("2026-01-01")]
    assert "\x1b" not in "".join(written)


def test_a_logger_is_made_safe_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        logger = safe_logger("ekiden.tests.again")

    logger.warning("a\\b %s", "c\nd")

    assert caplog.messages == ["a\\b c\\nd"]
    assert len(logger.filters) == 1
