"""Logging of ekiden's own processes: a line per event with its task, and nobody's handlers replaced."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ekiden import Ekiden
from ekiden.logs import JSONFormatter, add_task, configure_logging


@contextmanager
def root_without_handlers() -> Iterator[logging.Logger]:
    """The root logger without the handlers that pytest has put there."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def record(message: str = "it is %s", *args: object, error: BaseException | None = None) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("ekiden.worker", logging.WARNING, __file__, 1, message, args, info)


def test_a_handler_is_added_only_where_there_is_none() -> None:
    with root_without_handlers() as root:
        configure_logging("warning", "text")
        (first,) = root.handlers
        configure_logging("debug", "json")

        assert root.handlers == [first]
        assert root.level == logging.WARNING


def test_a_line_of_json_holds_all_that_is_known() -> None:
    try:
        raise KeyError("x")
    except KeyError as error:
        told = record("it is %s", "so", error=error)
    add_task(told)

    line = json.loads(JSONFormatter().format(told))

    assert (line["level"], line["logger"], line["message"]) == ("WARNING", "ekiden.worker", "it is so")
    assert line["time"].endswith("Z")
    assert "KeyError: 'x'" in line["exception"]
    assert "task_id" not in line


def test_what_a_body_logs_carries_its_task(ekiden_app: Ekiden) -> None:
    lines: list[dict[str, str]] = []

    @ekiden_app.task(name="shop.add")
    def add() -> str:
        told = record("from inside")
        add_task(told)
        lines.append(json.loads(JSONFormatter().format(told)))
        return add.request.id

    task_id = add.apply().get()

    assert [(line["task_id"], line["task_name"]) for line in lines] == [(task_id, "shop.add")]


def test_a_line_of_json_is_one_line() -> None:
    told = record("first\nsecond")

    assert "\n" not in JSONFormatter().format(told)


def test_a_library_configures_nothing() -> None:
    with root_without_handlers() as root:
        with Ekiden("quiet", broker="memory://quiet") as app, app.worker():
            app.send_task("x")

        assert root.handlers == []
