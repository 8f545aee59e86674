"""Logging for ekiden's own processes. As a library ekiden configures nothing: it only logs under ``ekiden``."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import msgspec

from ekiden import hooks
from ekiden.safe_text import indented_below, printable_json, storable

_TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(process)d %(name)s: %(message)s"


def configure_logging(level: str, log_format: str) -> None:
    """Add a handler to the root logger, unless it has one: ``log_format`` is ``text`` or ``json``.

    A receiver of ``setup_logging`` does it instead.
    """
    told = {"loglevel": getattr(logging, level.upper()), "logfile": None, "format": log_format, "colorize": False}
    if hooks.setup_logging.receivers:
        hooks.setup_logging.send(None, **told)
        return
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter() if log_format == "json" else TextFormatter(_TEXT_FORMAT))
    handler.addFilter(add_task)
    root.addHandler(handler)
    root.setLevel(level.upper())
    hooks.after_setup_logger.send(None, logger=root, **told)
    hooks.after_setup_task_logger.send(None, logger=get_task_logger("ekiden.task"), **told)


def get_task_logger(name: str) -> logging.Logger:
    """``logging.getLogger(name)``: a record of any logger that is written in a body carries the task's id and name."""
    return logging.getLogger(name)


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
