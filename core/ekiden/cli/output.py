"""What commands share: the app that an argument names, and tables and JSON as output."""

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


def print_json(value: object) -> None:
    """Print ``value`` as JSON, indented."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print rows below each other, with the keys of the first as headings."""
    if not rows:
        return
    headings = list(rows[0])
    cells = [[_shown(row[heading]) for heading in headings] for row in rows]
    widths = [max(len(line[column]) for line in [headings, *cells]) for column in range(len(headings))]
    right = [all(isinstance(row[heading], int | float) for row in rows) for heading in headings]
    for number, line in enumerate([headings, *cells]):
        padded = [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ]
        text = "  ".join(padded).rstrip()
        click.echo(click.style(text, bold=True) if number == 0 else text)


def print_fields(fields: Mapping[str, object]) -> None:
    """Print what is known of one thing, a line each; what is not known is left out."""
    known = {name: value for name, value in fields.items() if value is not None}
    width = max((len(name) for name in known), default=0)
    for name, value in known.items():
        first, *more = _shown(value).splitlines() or [""]
        click.echo(f"{click.style(name.replace('_', ' ').ljust(width), bold=True)}  {first}")
        for line in more:
            click.echo(f"{'':{width}}  {line}")


def when(seconds: float | None) -> str | None:
    """A time (seconds since the epoch) as text, in UTC."""
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


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
            return str(value)
        case _:
            return msgspec.json.encode(value).decode()
