"""JSON that a server may send and msgspec does not read: made readable, with ``null`` where something was.

One document that somebody has put into a database could otherwise hide all others that come in the same answer: one
that is nested a thousand times, holds a number beyond what a float is, or half of a surrogate pair. What is left of it
is no document of ours, and is set aside by whoever reads it.
"""

from __future__ import annotations

import json
import math
import re

MOST_NESTED = 100
"""Nothing that ekiden or CouchDB writes is nested so often."""

_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?', re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_OPENING, _CLOSING = (b"[", b"{"), (b"]", b"}")
_NULL = b"null"


def readable(content: bytes) -> bytes:
    """``content`` with what no reader can hold replaced. What is no JSON stays none."""
    pieces: list[bytes] = []
    done = 0
    depth = 0
    too_deep_since = 0
    for token in _TOKEN.finditer(content):
        text = token[0]
        if text in _OPENING:
            depth += 1
            if depth == MOST_NESTED + 1:
                too_deep_since = token.start()
        elif text in _CLOSING:
            depth -= 1
            if depth == MOST_NESTED:
                pieces += [content[done:too_deep_since], _NULL]
                done = token.end()
        elif depth <= MOST_NESTED and (instead := _instead_of(text)) is not None:
            pieces += [content[done : token.start()], instead]
            done = token.end()
    return b"".join([*pieces, content[done:]])


def _instead_of(token: bytes) -> bytes | None:
    """What to write for a text or number that cannot be held; None for one that can."""
    if not token.startswith(b'"'):
        is_float = any(mark in token for mark in b".eE")
        return _NULL if is_float and math.isinf(float(token)) else None
    if not _SURROGATE.search(token):
        return None
    text: str = json.loads(token, strict=False)
    # What is a pair stays one: surrogatepass joins it, and only halves are replaced.
    return json.dumps(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")).encode()
