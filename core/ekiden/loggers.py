"""Loggers whose lines nobody can forge: every logger of ours is made here.

Names, ids, errors and header values in a line are from outside. Whatever handler shows the record, whoever configured
it: a value in it has no control characters and ends no line, and what stands below it is indented.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ekiden.safe_text import Block, block, one_line, repr_of, text_of, traceback_text


def safe_logger(name: str) -> logging.Logger:
    """The logger of that name, whose records are made safe before any handler sees them."""
    logger = logging.getLogger(name)
    logger.addFilter(_make_safe)
    return logger


class _Shown:
    """A value that a record shows; its text is made when a handler asks for it."""

    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value

    def __str__(self) -> str:
        return one_line(text_of(self.value))

    def __repr__(self) -> str:
        return one_line(repr_of(self.value))


def _make_safe(record: logging.LogRecord) -> bool:
    if isinstance(record.args, Mapping):
        record.args = {name: _safe(value) for name, value in record.args.items()}
    elif record.args:
        record.args = tuple(map(_safe, record.args))
    elif not isinstance(record.msg, Block):
        record.msg = one_line(text_of(record.msg))
    if record.exc_info and record.exc_info[1] is not None and not record.exc_text:
        # Where this is set, every formatter shows it instead of formatting the exception itself.
        record.exc_text = block(traceback_text(record.exc_info[1]))
    return True


def _safe(value: object) -> object:
    if value is None or isinstance(value, int | float | Block | _Shown):
        return value
    return one_line(value) if isinstance(value, str) else _Shown(value)
