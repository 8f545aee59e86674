"""Text from outside, made fit for what it goes into: a record, a line of a log, a terminal.

    storable            for records and messages: a plain ``str`` that UTF-8 carries
    text_of, repr_of    ``str()`` and ``repr()`` of anything: raises nothing, and is storable
    traceback_text      the same of an exception's traceback
    cut, cut_middle     no more bytes than that, written as JSON
    printable           for a terminal: nothing in it moves the cursor, changes colours, hides or turns text round
    one_line            for a line of a log: printable, and not too long
    block               for several lines below such a line: none of them looks like a line of its own

What a task raised or returned, what a message or its headers say, names, ids, and what a server answered are all from
outside. Every line of ours in a log passes through ``ekiden.loggers``, every print of the command through
``ekiden.cli.output``, and every record of a failure through ``ekiden.failures.failure_record``; those call this module.
"""

from __future__ import annotations

import traceback
import unicodedata
from types import TracebackType

import msgspec

LONGEST_LINE = 2000
"""Characters of one value in a line of a log."""

LONGEST_BLOCK = 20_000
"""Characters of a traceback below a line of a log."""

_JSON_BYTES_OF_A_CHARACTER = 12
_INDENT = "    "
_JOINERS = "\u200c\u200d"
"""Scripts and emoji need them inside of words, and they move nothing."""

_to_json = msgspec.json.Encoder().encode


class Block(str):
    """Several lines that ``block`` has made fit to stand below a line of a log."""

    __slots__ = ()


def storable(text: str) -> str:
    """``text`` as a plain ``str`` that UTF-8 carries; a lone surrogate, which it cannot, becomes ``\\udce9``."""
    text = _plain(text)
    if text.isascii():
        return text
    return text.encode("utf-8", "backslashreplace").decode()


def is_storable(text: str) -> bool:
    """Whether UTF-8 carries ``text``, a plain ``str``: it holds no lone surrogate."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(text: str) -> str:
    # A subclass of a user's may do anything when it is asked for its text, or for its length.
    return text if type(text) is str else str.__str__(text)


def text_of(value: object) -> str:
    """``str(value)``, storable. Where that fails, what failed."""
    try:
        return storable(str(value))
    except BaseException as failure:  # noqa: BLE001 - a user's __str__ may do anything
        return f"(its text cannot be shown: {repr_of(failure)})"


def repr_of(value: object) -> str:
    """``repr(value)``, storable. Where that fails, of what type it is."""
    try:
        return storable(repr(value))
    except BaseException:  # noqa: BLE001 - a user's __repr__ may do anything
        return f"a {_name_of(type(value))} whose repr failed"


def traceback_text(error: BaseException, frames: TracebackType | None = None) -> str:
    """The traceback of ``error``, storable; ``frames``: where it begins, if not where the error was caught.

    Where that cannot be told, what failed: a user's exception may answer anything when it is asked for its causes.
    """
    try:
        return storable("".join(traceback.format_exception(type(error), error, frames or error.__traceback__)))
    except BaseException as failure:  # noqa: BLE001 - as above
        return f"(its traceback cannot be shown: {repr_of(failure)})"


def _name_of(kind: type) -> str:
    return storable(type.__dict__["__name__"].__get__(kind))  # past a metaclass that has a __name__ of its own


def json_bytes(text: str) -> int:
    """How many bytes ``text``, which is storable, has in JSON, its quotes included."""
    return len(_to_json(text))


def cut(text: str, most: int) -> str:
    """The beginning of ``text``, with at most ``most`` bytes in JSON; the end says how much is missing."""
    if len(text) * _JSON_BYTES_OF_A_CHARACTER <= most or json_bytes(text) <= most:
        return text
    kept = text
    while kept:
        kept = _shorter(kept, most, json_bytes(kept))
        found = f"{kept}... ({len(text) - len(kept)} more characters)"
        if json_bytes(found) <= most:
            return found
    return ""


def cut_middle(text: str, most: int) -> str:
    """The beginning and the end of ``text``, with at most ``most`` bytes in JSON: a traceback says most at both."""
    if len(text) * _JSON_BYTES_OF_A_CHARACTER <= most or json_bytes(text) <= most:
        return text
    kept = len(text)
    while kept > 1:
        size = json_bytes(text[: kept // 2]) + json_bytes(text[-(kept // 2) :])
        kept = min(kept - 1, kept * most // (size + 1), len(text))
        found = (
            f"{text[: kept // 2]}\n... ({len(text) - kept} characters left out) ...\n{text[len(text) - kept // 2 :]}"
        )
        if json_bytes(found) <= most:
            return found
    return ""


def _shorter(text: str, most: int, size: int) -> str:
    return text[: min(len(text) - 1, len(text) * most // (size + 1))]


def printable(text: str) -> str:
    """``text`` with everything escaped that is not shown as what it is: control characters, line ends, bidi marks."""
    text = storable(text)
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs":
        return character
    return repr(character)[1:-1]


def printable_lines(text: str) -> str:
    """The same for a text of several lines: its line feeds stay."""
    return "\n".join(map(printable, text.expandtabs(4).split("\n")))


def printable_json(body: bytes) -> str:
    """JSON whose strings are printable, and mean the same."""
    text = body.decode()
    return text if text.isprintable() else "".join(map(_shown_in_json, text))


def _shown_in_json(character: str) -> str:
    if character == "\n" or _shown(character) == character:
        return character
    encoded = character.encode("utf-16-be")
    return "".join(f"\\u{encoded[start : start + 2].hex()}" for start in range(0, len(encoded), 2))


def one_line(text: str) -> str:
    """``text`` for a line of a log: printable, and of at most ``LONGEST_LINE`` characters."""
    text = _plain(text)
    if len(text) > LONGEST_LINE:
        text = f"{text[:LONGEST_LINE]}... ({len(text) - LONGEST_LINE} more characters)"
    return printable(text)


def block(text: str) -> Block:
    """``text`` to stand below a line of a log: printable, each line indented, of about ``LONGEST_BLOCK`` characters."""
    if isinstance(text, Block):
        return text
    text = _plain(text)
    half = LONGEST_BLOCK // 2
    if len(text) > LONGEST_BLOCK:
        text = f"{text[:half]}\n... ({len(text) - 2 * half} characters left out) ...\n{text[-half:]}"
    return Block(indented(text))


def indented(text: str) -> str:
    """``text`` printable, each of its lines indented; those that are already stay as they are."""
    lines = map(printable, text.rstrip("\n").expandtabs(4).split("\n"))
    return "\n".join(line if line.startswith(_INDENT) else f"{_INDENT}{line}" for line in lines)


def indented_below(text: str) -> str:
    """The same, except that the first line begins where it is put."""
    first, newline, more = text.partition("\n")
    return f"{printable(first)}{newline}{indented(more)}" if newline else printable(first)
