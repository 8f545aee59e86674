"""``ekiden call``, ``ekiden result`` and ``ekiden revoke``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click
import msgspec

from ekiden.cli.celery_words import REFUSED_BY_CALL, accepted_options, refused_options
from ekiden.cli.output import json_option, open_app, print_fields, print_json, say, say_lines, task_named
from ekiden.cli.target import AppCommand, app_argument, task_argument
from ekiden.codec import encode_value
from ekiden.results import AsyncResult
from ekiden.safe_text import indented, printable, printable_json, text_of
from ekiden.states import State


def _json(kind: type, name: str, example: str) -> Callable[[click.Context, click.Parameter, str], Any]:
    """Reads an option's value as JSON of one kind."""

    def read(_ctx: click.Context, _param: click.Parameter, value: str) -> Any:
        try:
            return msgspec.json.decode(value, type=kind)
        except msgspec.DecodeError as error:
            raise click.BadParameter(f"{value!r} is not a JSON {name}, such as {example}: {error}.") from error

    return read


_array = _json(list, "array", """'[1, "two"]'""")
_object = _json(dict, "object", """'{"name": 1}'""")


@click.command(cls=AppCommand)
@app_argument
@task_argument
@click.option("-a", "--args", callback=_array, default="[]", help="Positional arguments, a JSON array.")
@click.option("-k", "--kwargs", callback=_object, default="{}", help="Keyword arguments, a JSON object.")
@click.option("--queue", help="Send it there instead of where the app would.")
@click.option("--priority", type=int, help="0 to 9; 9 is most urgent.")
@click.option("--countdown", type=float, metavar="SECONDS", help="Start it after so long, not before.")
@click.option("--expires", type=float, metavar="SECONDS", help="Do not start it after so long.")
@click.option("--task-id", help="An id of your own.")
@click.option("--wait", type=float, metavar="SECONDS", help="Wait for the result, and print it as JSON.")
@refused_options(REFUSED_BY_CALL)
@click.option("--serializer", type=click.Choice(["json"]), expose_value=False, hidden=True)
def call(
    *,
    target: str,
    task: str,
    args: list[Any],
    kwargs: dict[str, Any],
    queue: str | None,
    priority: int | None,
    countdown: float | None,
    expires: float | None,
    task_id: str | None,
    wait: float | None,
) -> None:
    """Send a call of TASK, and print its id; or with --wait its result.

    \b
    ekiden call shop:app add --args '[1, 2]'
    ekiden call shop:app send_mail --kwargs '{"to": "ann@example.org"}' --countdown 60
    ekiden call shop:app add --args '[1, 2]' --wait 10

    TASK is its full name (shop.add), or the name of its function where that is enough. With --wait the exit status is
    1 if the task fails or takes longer.
    """
    with open_app(target) as app:
        sent = task_named(app, task).apply_async(
            args,
            kwargs,
            queue=queue,
            priority=priority,
            countdown=countdown,
            expires=expires,
            task_id=task_id,
            ignore_result=None if wait is None else False,
        )
        if wait is None:
            say(sent.id)
            return
        value = sent.get(wait, propagate=False)
        if sent.state == State.SUCCESS:
            say_lines(printable_json(encode_value(value)))
            return
        say_lines(f"Error: {_failure(sent)}", to_stderr=True)
        sys.exit(1)


def _failure(ended: AsyncResult[Any]) -> str:
    error = ended.result
    told = f": {type(error).__name__}: {text_of(error)}" if isinstance(error, BaseException) else ""
    where = f"\n\n{indented(ended.traceback)}" if ended.traceback else ""
    return f"{printable(f'{ended.name}[{ended.id}] ended as {ended.state}{told}')}{where}"


@click.command(cls=AppCommand)
@app_argument
@click.argument("task_id", metavar="ID")
@click.option("--wait", type=float, metavar="SECONDS", help="Wait until it has ended.")
@json_option
@accepted_options(("-t", "--task"))
@accepted_options(("--traceback",), are_flags=True)
def result(target: str, task_id: str, wait: float | None, as_json: bool) -> None:
    """What became of a task: its state, and its value or what went wrong.

    \b
    ekiden result shop:app 0190d0c3f6ab4b1f... --wait 10

    PENDING is a task that waits, or that nobody has heard of.
    """
    with open_app(target) as app:
        found = app.AsyncResult(task_id)
        if wait is not None:
            found.get(wait, propagate=False)
        fields = result_fields(found)
    if as_json:
        print_json(fields)
    else:
        print_fields(fields)


def result_fields(found: AsyncResult[Any]) -> dict[str, object]:
    """Everything that is stored of a task."""
    value = found.result
    failed = isinstance(value, BaseException)
    return {
        "id": found.id,
        "state": found.state,
        "task": found.name,
        "value": None if failed or found.state == State.PENDING else msgspec.Raw(encode_value(value)),
        "error": f"{type(value).__name__}: {text_of(value)}" if failed else None,
        "traceback": found.traceback,
        "retries": found.retries,
        "queue": found.queue,
        "worker": found.worker,
        "runtime_seconds": found.runtime,
        "done": None if found.date_done is None else found.date_done.isoformat(timespec="milliseconds"),
        "children": [child.id for child in found.children] or None,
    }


@click.command(cls=AppCommand)
@app_argument
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
@click.option("--terminate", is_flag=True, help="End it if it is running.")
def revoke(target: str, task_ids: tuple[str, ...], terminate: bool) -> None:
    """Have tasks not run.

    \b
    ekiden revoke shop:app 0190d0c3f6ab4b1f...

    A task that is running already goes on, unless --terminate ends it. The result of a revoked task says REVOKED once
    a worker has come to its message. Where no backend stores results, only workers that run now hear of it.
    """
    with open_app(target) as app:
        app.revoke(task_ids, terminate=terminate)
        told = "" if app.stores_results() else " The workers that run now were told; nothing is stored of it."
    say(f"Revoked {', '.join(task_ids)}.{told}")
