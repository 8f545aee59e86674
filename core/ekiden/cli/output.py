"""What commands share: the app that an argument names, and everything that they print.

Names, ids, errors and header values are from outside: nothing but this module writes to the terminal, and it makes all
of it printable first.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

from ekiden.app import Ekiden, load_app
from ekiden.errors import ConfigurationError
from ekiden.plugins import check_shared
from ekiden.safe_text import printable, printable_json, printable_lines, storable, text_of
from ekiden.task import Task

json_option = click.option("as_json", "--json", is_flag=True, help="Print JSON.")


def open_app(target: str) -> Ekiden:
    """The app, whose broker other processes see too. Raises ConfigurationError in one sentence."""
    app = load_app(target)
    check_shared(app.broker_url(), app.backend_url())
    return app


def task_named(app: Ekiden, name: str) -> Task[..., Any]:
    """The task of that name, or the only one whose function has it. Raises ConfigurationError naming what there is."""
    task = app.find_task(name)
    ending = [each for each in app.tasks.values() if each.name.endswith(f".{name}")]
    if task is None and len(ending) == 1:
        task = ending[0]
    if task is not None:
        return task
    spelt = {spelling: full for full in app.tasks for spelling in (full, full.rpartition(".")[2])}
    close = difflib.get_close_matches(name, list(spelt), n=1)
    known = ", ".join(sorted(app.tasks)) or "none"
    meant = f"did you mean {spelt[close[0]]}? " if close else ""
    raise ConfigurationError(f"the app has no task {name!r}; {meant}its tasks: {known}.")


class Styled(str):
    """A piece of what ``say`` prints that has a look: bold, dim, or a colour."""

    def __new__(cls, text: str, *, bold: bool = False, dim: bool = False, fg: str | None = None) -> Styled:
        """``text``, made printable, in that look."""
        look: dict[str, Any] = {"bold": bold or None, "dim": dim or None, "fg": fg}
        return super().__new__(cls, click.style(printable(text), **look))


def say(*pieces: str) -> None:
    """Print ``pieces`` behind each other as one line."""
    click.echo("".join(each if isinstance(each, Styled) else printable(each) for each in pieces))


def say_lines(text: str, *, to_stderr: bool = False) -> None:
    """Print a text of several lines. What in it is from outside must not begin a line: see ``indented_below``."""
    click.echo(printable_lines(text), err=to_stderr)


def confirm(question: str) -> None:
    """Ask, and abort unless the answer is yes."""
    click.confirm(printable(question), abort=True)


def print_json(value: object) -> None:
    """Print ``value`` as JSON, indented."""
    click.echo(printable_json(msgspec.json.format(json_of(value), indent=2)))


def json_of(value: object) -> bytes:
    """``value`` as JSON; what has none, such as a header that another program set, as text."""
    try:
        return _encoder.encode(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        return _encoder.encode(_carried(value, _DEEPEST))


def _carried(value: object, deeper: int) -> object:
    match value:
        case None | bool() | float():
            return value
        case str():
            return storable(value)
        case Mapping() if deeper:
            return {text_of(name): _carried(each, deeper - 1) for name, each in value.items()}
        case list() | tuple() if deeper:
            return [_carried(each, deeper - 1) for each in value]
        case _:
            return text_of(value)


_DEEPEST = 50
_encoder = msgspec.json.Encoder(enc_hook=text_of)


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows below each other, with the keys of the first as headings."""
    if not rows:
        return
    headings = list(rows[0])
    cells = [[printable(_shown(row[heading])) for heading in headings] for row in rows]
    widths = [max(len(line[column]) for line in [headings, *cells]) for column in range(len(headings))]
    right = [all(isinstance(row[heading], int | float) for row in rows) for heading in headings]
    for number, line in enumerate([headings, *cells]):
        padded = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ]
        text = "  ".join(padded).rstrip()
        say(Styled(text, bold=True) if number == 0 else text)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print what is known of one thing, a line each; what is not known is left out."""
    known = {name: value for name, value in fields.items() if value is not None}
    width = max((len(name) for name in known), default=0)
    for name, value in known.items():
        first, *more = printable_lines(_shown(value)).rstrip("\n").split("\n")
        say(Styled(name.replace("_", " ").ljust(width), bold=True), f"  {first}")
        for line in more:
            say(f"{'':{width}}  {line}")


def when(seconds: object) -> str | None:
    """A time (seconds since the epoch) as text, in UTC; what is none, as it is."""
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return text_of(seconds)


def plural(number: int, noun: str) -> str:
    """``1 message``, ``2 messages``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _shown(value: object) -> str:
    match value:
        case None:
            return "?"
        case bool():
            return "yes" if value else "no"
        case str() | int() | float():
            return text_of(value)
        case _:
            return json_of(value).decode()
