"""Logging for ekiden's own processes. As a library ekiden configures nothing: it only logs under ``ekiden``."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

import msgspec

from ekiden import hooks
from ekiden.safe_text import indented_below, printable_json, storable

_TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(process)d %(name)s: %(message)s"


def configure_logging(level: str, log_format: str) -> None:
    """Add a handler to the root logger, unless it has one: ``log_format`` is ``text`` or ``json``.

    A receiver of ``setup_logging`` does it instead.
    """
    with logging_of_program(level, log_format):
        return


@contextlib.contextmanager
def logging_of_program(level: str | int, log_format: str) -> Iterator[None]:
    """Import the program inside: how it configures logging holds, and what it leaves open is as for our processes.

    Records that find no handler meanwhile are written as they will be. Afterwards the root logger gets our handler,
    unless it has one, or a receiver of ``setup_logging`` sees to it.
    """
    root = logging.getLogger()
    number = logging.getLevelNamesMapping()[level.upper()] if isinstance(level, str) else level
    handler, before = _OwnHandler(log_format), logging.lastResort
    if not root.handlers:
        root.setLevel(number)
        logging.lastResort = handler
    try:
        yield
    finally:
        logging.lastResort = before
        _configure(root, handler, number)


def _configure(root: logging.Logger, handler: _OwnHandler, level: int) -> None:
    told = {"loglevel": level, "logfile": None, "format": handler.log_format, "colorize": False}
    if hooks.setup_logging.receivers:
        hooks.setup_logging.send(None, **told)
    elif not root.handlers:
        root.addHandler(handler)
        hooks.after_setup_logger.send(None, logger=root, **told)
        hooks.after_setup_task_logger.send(None, logger=get_task_logger("ekiden.task"), **told)


def format_of(root: logging.Logger) -> str:
    """The format of our handler, for processes that are to write like this one; ``text`` where it has none."""
    return next((handler.log_format for handler in root.handlers if isinstance(handler, _OwnHandler)), "text")


class _OwnHandler(logging.StreamHandler[TextIO]):
    """Writes to standard error what no handler of the program's has written to the terminal already."""

    def __init__(self, log_format: str) -> None:
        super().__init__()
        self.log_format = log_format
        self.setFormatter(JSONFormatter() if log_format == "json" else TextFormatter(_TEXT_FORMAT))
        self.addFilter(add_task)

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, unless that was done below."""
        if not _is_written(record):
            super().emit(record)


def _is_written(record: logging.LogRecord) -> bool:
    """Whether a handler of the record's logger, or of one above it, writes it to standard output or error."""
    terminal = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None:
        for handler in logger.handlers:
            if (
                isinstance(handler, logging.StreamHandler)
                and not isinstance(handler, _OwnHandler)
                and any(handler.stream is each for each in terminal)
                and record.levelno >= handler.level
            ):
                return True
        logger = logger.parent if logger.propagate else None
    return False


def get_task_logger(name: str) -> logging.Logger:
    """``logging.getLogger(name)``: a record of any logger that is written in a body carries the task's id and name."""
    return logging.getLogger(name)


get_logger = get_task_logger


def add_task(record: logging.LogRecord) -> bool:
    """Give a record ``task_id`` and ``task_name``: of the task in whose body it was logged, or empty."""
    request = sys.modules.get("ekiden.request")  # a supervisor logs, too, and runs no bodies
    execution = None if request is None else request.running.get()
    record.task_id = "" if execution is None else execution.request.id
    record.task_name = "" if execution is None else execution.request.task
    return True


class TextFormatter(logging.Formatter):
    """One record after the other: what follows a record's first line is indented, and nothing moves the cursor.

    So it is with records of the program and its libraries, too: no text from outside looks like a record of its own.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as one or more lines."""
        return indented_below(super().format(record))


class JSONFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, process, and the task it was logged in."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as a line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": storable(record.getMessage()),
            "process": record.process,
        }
        if getattr(record, "task_id", ""):
            line["task_id"] = storable(record.__dict__["task_id"])
            line["task_name"] = storable(record.__dict__["task_name"])
        if record.exc_info:
            line["exception"] = storable(self.formatException(record.exc_info))
        return printable_json(msgspec.json.encode(line))


def __getattr__(name: str) -> object:
    from ekiden.celery_names import missing_name  # only for a name that is not here

    raise missing_name(__name__, name)
